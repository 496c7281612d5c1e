"""A source packed on one machine and unpacked on another is the same source."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import source_tree
from hypothesis import given
from hypothesis import strategies as st

NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}(\.py|\.txt)?", fullmatch=True)
TREES = st.dictionaries(
    st.lists(NAME, min_size=1, max_size=3).map(lambda parts: os.path.join(*[f"d{part}" for part in parts[:-1]], f"f{parts[-1]}")),
    st.tuples(st.binary(max_size=200), st.booleans()),
    min_size=1,
    max_size=8,
)


def write(root, tree):
    for name, (content, executable) in tree.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(content)
        os.chmod(path, 0o755 if executable else 0o644)


@given(TREES)
def test_round_trip(tree):
    with tempfile.TemporaryDirectory() as root:
        first, second, archive = (os.path.join(root, name) for name in ("first", "second", "archive.tar.gz"))
        write(first, tree)
        os.mkdir(second)
        members = source_tree.files(first)
        assert sorted(members) == sorted(tree)
        source_tree.pack(members, archive)
        source_tree.unpack(archive, second)
        copied = source_tree.files(second)
        assert source_tree.tree_hash(copied) == source_tree.tree_hash(members)
        for name, (content, executable) in tree.items():
            with open(copied[name], "rb") as stream:
                assert stream.read() == content
            assert source_tree.executable(os.stat(copied[name])) == executable


@given(TREES, st.data())
def test_any_change_changes_the_hash(tree, data):
    changed = dict(tree)
    name = data.draw(st.sampled_from(sorted(tree)))
    content, executable = tree[name]
    how = data.draw(st.sampled_from(["content", "bit", "name", "gone"]))
    if how == "content":
        changed[name] = (content + b"x", executable)
    elif how == "bit":
        changed[name] = (content, not executable)
    else:
        del changed[name]
        if how == "name":
            changed[f"{name}x"] = (content, executable)
    with tempfile.TemporaryDirectory() as root:
        hashes = []
        for number, each in enumerate((tree, changed)):
            folder = os.path.join(root, str(number))
            os.mkdir(folder)
            write(folder, each)
            hashes.append(source_tree.tree_hash(source_tree.files(folder)))
        assert hashes[0] != hashes[1]


def test_what_no_run_needs_stays_behind(tmp_path):
    for name in ("train.py", ".git/config", "__pycache__/x.pyc", "venv/bin/python", "pkg/__pycache__/y.pyc", "pkg/m.py", "lost+found/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert sorted(source_tree.files(str(tmp_path))) == ["pkg/m.py", "train.py"]


def test_one_file_is_a_source(tmp_path):
    path = tmp_path / "train_ddp.py"
    path.write_text("x")
    assert source_tree.files(str(path)) == {"train_ddp.py": str(path)}


def test_a_missing_source_is_said_so(tmp_path):
    with pytest.raises(source_tree.SourceError, match="does not exist"):
        source_tree.files(str(tmp_path / "nosuch"))


def test_what_is_neither_a_file_nor_a_folder_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(source_tree.SourceError, match="pipe is neither a file nor a folder"):
        source_tree.files(str(tmp_path / "pipe"))


@pytest.mark.parametrize("hidden", ["", "pkg", "pkg/inner", "pkg/inner/m.py"])
def test_a_part_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, hidden):
    (tmp_path / "pkg" / "inner").mkdir(parents=True)
    (tmp_path / "pkg" / "inner" / "m.py").write_text("x")
    shut, scandir, access = str(tmp_path / hidden).rstrip("/"), os.scandir, os.access

    def refusing(path):
        if path == shut:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: path != shut and access(path, mode))
    with pytest.raises(source_tree.SourceError) as error:
        source_tree.files(str(tmp_path))
    assert str(error.value) == f"{shut} cannot be read (Permission denied)"


def test_links_are_followed_and_broken_ones_left_out(tmp_path):
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b.py").symlink_to("a.py")
    (tmp_path / "c.py").symlink_to("nosuch")
    assert sorted(source_tree.files(str(tmp_path))) == ["a.py", "b.py"]


def test_a_link_to_its_own_parent_does_not_walk_forever(tmp_path):
    (tmp_path / "train.py").write_text("x")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "up").symlink_to("..")
    assert sorted(source_tree.files(str(tmp_path))) == ["train.py"]


def evil(path, name, kind=tarfile.REGTYPE, target=""):
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.type = kind
        entry.linkname = target
        entry.size = 1 if kind == tarfile.REGTYPE else 0
        tar.addfile(entry, io.BytesIO(b"x"))


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "..", "."])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    archive, folder = tmp_path / "evil.tar.gz", tmp_path / "folder"
    folder.mkdir()
    evil(archive, name)
    with pytest.raises(source_tree.SourceError, match="no file below its folder"):
        source_tree.unpack(str(archive), str(folder))
    assert os.listdir(folder) == []
    assert sorted(os.listdir(tmp_path)) == ["evil.tar.gz", "folder"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_files_are_unpacked(tmp_path, kind):
    archive, folder = tmp_path / "evil.tar.gz", tmp_path / "folder"
    folder.mkdir()
    evil(archive, "link", kind, "/etc/passwd")
    with pytest.raises(source_tree.SourceError, match="no file below its folder"):
        source_tree.unpack(str(archive), str(folder))
    assert os.listdir(folder) == []
