"""Wheels are downloaded by pip as they were asked for; a wheel with another hash than the lock's is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile

import pytest
from ansible_collections.onprem.torch.plugins.action import pytorch_environment
from ansible_collections.onprem.torch.plugins.plugin_utils import wheelhouse
from hypothesis import given, settings
from hypothesis import strategies as st

PLATFORM = {"architecture": "x86_64", "glibc": "2.36", "python": "3.11.2"}


def wheel(index, name, version):
    """Put an empty wheel into a package index that lies in a folder, and return its hash."""
    folder = index / "simple" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    record = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{record}/RECORD", "")
    links = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    for name in ("PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    place = tmp_path / "index"
    for name, version in (("uv", "1.0"), ("onpremexample", "1.0"), ("onpremexample", "2.0")):
        wheel(place, name, version)
    return place


def wanted(index, *requirements, **changes):
    return wheelhouse.Wanted(requirements, PLATFORM, f"file://{index}/simple", **changes)


def test_the_newest_that_the_constraints_allow_is_downloaded_once(index, tmp_path):
    root = str(tmp_path / "house")
    _folder, wheels = wheelhouse.provide(root, wanted(index, "onpremexample"))
    assert sorted(wheels) == ["onpremexample-2.0-py3-none-any.whl", "uv-1.0-py3-none-any.whl"]
    limited = wanted(index, "onpremexample", constraints=("onpremexample<2",))
    folder, wheels = wheelhouse.provide(root, limited)
    assert "onpremexample-1.0-py3-none-any.whl" in wheels
    (index / "simple/onpremexample/index.html").unlink()
    assert wheelhouse.provide(root, limited) == (folder, wheels), "it is there already"


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 300)), st.integers(1, 200))
def test_batches_hold_every_name_once_and_no_more_than_the_limit(sizes, limit):
    groups = wheelhouse.batches(sizes, limit)
    assert [name for group in groups for name in group] == list(sizes)
    assert all(len(group) == 1 or sum(sizes[name] for name in group) <= limit for group in groups)
    assert all(sizes[first[0]] + sum(sizes[name] for name in group) > limit for group, first in zip(groups, groups[1:]))


def test_a_lock_decides_and_another_hash_is_refused(index, tmp_path):
    digest = hashlib.sha256((index / "simple/onpremexample/onpremexample-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    root = str(tmp_path / "house")
    good = wanted(index, "onpremexample", lock=f"onpremexample==1.0 --hash=sha256:{digest}\n")
    assert "onpremexample-1.0-py3-none-any.whl" in wheelhouse.provide(root, good)[1]
    bad = wanted(index, "onpremexample", lock=f"onpremexample==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(wheelhouse.WheelhouseError, match="onpremexample.* has another hash than pytorch_lock says, so nothing was installed"):
        wheelhouse.provide(root, bad)
    assert not [path for path in (tmp_path / "house").iterdir() if path.is_dir() and path.name == wheelhouse.key(bad)]


def test_an_index_that_cannot_be_reached_is_not_taken_for_a_wrong_version(index, tmp_path):
    lost = wheelhouse.Wanted(("onpremexample==1.0",), PLATFORM, "http://127.0.0.1:9/simple")
    with pytest.raises(wheelhouse.WheelhouseError) as caught:
        wheelhouse.provide(str(tmp_path / "house"), lost)
    refused = "an index of wheels cannot be reached from the control node ([Errno 111] Connection refused), of http://127.0.0.1:9/simple; "
    assert str(caught.value).startswith(refused)
    assert "cluster_mirror" in str(caught.value) and "pytorch_version" not in str(caught.value)


def test_an_index_without_uv_is_named(index, tmp_path):
    shutil.rmtree(index / "simple/uv")
    with pytest.raises(wheelhouse.WheelhouseError, match="simple has no uv, with which the nodes install wheels"):
        wheelhouse.provide(str(tmp_path / "house"), wanted(index, "onpremexample"))


@pytest.mark.parametrize("source", ["wheelhouse", "index"])
def test_nothing_but_the_index_that_is_named_is_asked(source):
    arguments = {"source": source, "requirements": ["torch"], "platform": PLATFORM, "index_url": "https://m/pypi/simple", "extra_index_urls": ["https://m/x"]}
    found = wheelhouse.wanted_of({**arguments, "constraints": ["numpy<2"], "lock": ""})
    assert found.index == "https://m/pypi/simple"
    all_of_it = source == "wheelhouse"
    assert (found.requirements, found.extra, found.constraints) == ((("torch",), ("https://m/x",), ("numpy<2",)) if all_of_it else ((), (), ()))


def test_a_full_disk_is_named():
    # The end of what pip printed on a full file system.
    text = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device: '/a.whl' -> '/b.whl'\n"
    assert wheelhouse.reason(text, wheelhouse.Wanted(("torch",), PLATFORM)).startswith("the control node has no room for the wheels")


def test_what_is_not_there_is_named_with_the_variables_to_correct(index, tmp_path):
    with pytest.raises(wheelhouse.WheelhouseError, match="nothere==9.*correct pytorch_version"):
        wheelhouse.provide(str(tmp_path / "house"), wanted(index, "nothere==9"))


@pytest.mark.parametrize("name", ["a';touch x;'.whl", "$(id).whl", "a b-1.0.whl", "a\n.whl", "a`id`.whl", "ä-1.0-py3-none-any.whl", "x.tar.gz", ".partial"])
@pytest.mark.parametrize("kept", [False, True])
def test_an_index_chooses_no_name_but_a_wheels(index, tmp_path, monkeypatch, name, kept):
    def download(folder, _wanted):
        with open(os.path.join(folder, name), "w"):
            pass

    want = wanted(index, "onpremexample")
    if kept:  # by a version that took any name
        (tmp_path / wheelhouse.key(want)).mkdir()
        download(tmp_path / wheelhouse.key(want), want)
    monkeypatch.setattr(wheelhouse, "download", download)
    with pytest.raises(wheelhouse.WheelhouseError, match="holds .*, but names of wheels were expected.*find out which index") as caught:
        wheelhouse.provide(str(tmp_path), want)
    assert "\n" not in str(caught.value)
    assert (tmp_path / wheelhouse.key(want)).exists() == kept


@pytest.mark.parametrize("name", ["torch-2.13.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1!2.0-1-py2.py3-none-any.whl"])
def test_names_of_wheels_are_taken(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert wheelhouse.wheels_in(str(tmp_path)) == {name: 1}


@settings(max_examples=25)
@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda name: name.strip(".")))
def test_no_name_says_anything_to_the_shell_that_moves_wheels(name):
    with tempfile.TemporaryDirectory() as place:
        source, final = os.path.join(place, "from", name), os.path.join(place, "to", name)
        os.mkdir(os.path.dirname(source))
        os.mkdir(os.path.dirname(final))
        with open(source, "w") as stream:
            stream.write("x")
        subprocess.run(["/bin/sh", "-c", pytorch_environment.moving(source, final)], check=True, cwd=place)
        assert sorted(os.listdir(place)) == ["from", "to"] and os.listdir(os.path.dirname(final)) == [name]
