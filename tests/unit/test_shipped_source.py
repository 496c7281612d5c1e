"""Who writes a source can neither have files of whoever sends it sent, nor keep a verb from ending in a sentence."""

from __future__ import annotations

import os
import pathlib
import tarfile
import types

import pytest
import yaml
from ansible_collections.onprem.torch.plugins.action import plan as action
from ansible_collections.onprem.torch.plugins.action import torchrun_unit as unit_action
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from ansible_collections.onprem.torch.plugins.module_utils import source_tree
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, shipped
from builders import host

PLAYBOOKS = pathlib.Path(catalog.ROLES).parent / "playbooks"
MODES = (source_tree.ANYWHERE, source_tree.INSIDE, source_tree.OUTSIDE)


@pytest.fixture
def source(tmp_path):
    """A project, and beside it what its author may not have."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("planted")
    folder = tmp_path / "project"
    (folder / "pkg" / "inner").mkdir(parents=True)
    for name in ("train.py", "pkg/model.py", "pkg/inner/data.txt"):
        (folder / name).write_text(name)
    return folder


def links_out(source):
    """By name, how links may leave a source: link → what it names."""
    secret = source.parent / "secret"
    return {
        "file": {"pkg/weights.txt": secret / "key"},
        "folder": {"pkg/weights": secret},
        "relative": {"pkg/weights.txt": "../../secret/key"},
        "in two steps": {"a.txt": "pkg/b.txt", "pkg/b.txt": secret / "key"},
        "below a link within": {"deep": "pkg/inner", "x.txt": "deep/../../../secret/key"},
        "a neighbour with the same beginning": {"x.txt": "../project-2/key"},
        "above": {"up": source.parent},
        "root": {"up": "/"},
        "process": {"pkg/environ": "/proc/self/environ"},
        "kernel": {"kernel": "/sys/kernel"},
        "device": {"zero": "/dev/zero"},
    }


LINKS_OUT = sorted(links_out(pathlib.Path("/x/y")))
NEVER = ("process", "kernel", "device")


def lay(source, links):
    (source.parent / "project-2").mkdir()
    (source.parent / "project-2" / "key").write_text("planted")
    for name, target in links.items():
        (source / name).symlink_to(target)


def release(source, reads=True, **variables):
    """Return what the plan's action says of a source."""
    module = action.ActionModule.__new__(action.ActionModule)
    module._reads_source = reads
    return module._release(host(torchrun_source=str(source), **variables), "/")


@pytest.mark.parametrize("how", LINKS_OUT)
def test_links_that_leave_the_source_are_refused(source, tmp_path, how):
    links = links_out(source)[how]
    lay(source, links)
    with pytest.raises(source_tree.LinkError) as error:
        shipped.members(str(source), False)
    name = str(error.value).partition(" leads to ")[0].rpartition("project/")[2]
    assert name in links and f" leads to {os.path.realpath(source / name)}, " in str(error.value)
    (problem,) = release(source).problems
    assert problem.variable == shipped.SOURCE and "remove the link or put a copy in its place" in problem.cure
    assert (f"set {shipped.LINKS}: true" in problem.cure) == (how not in NEVER)
    with pytest.raises(source_tree.LinkError):
        shipped.pack(str(source), False, "", str(tmp_path / "a.tar.gz"))
    assert not os.path.exists(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("how", LINKS_OUT)
def test_links_that_leave_the_source_can_be_allowed_but_never_to_processes_and_devices(source, tmp_path, how):
    lay(source, links_out(source)[how])
    if how in NEVER:
        with pytest.raises(source_tree.LinkError, match="never sent"):
            shipped.members(str(source), True)
        return
    found = release(source, torchrun_source_links=True)
    assert not found.problems and found.hash
    shipped.pack(str(source), True, found.hash, str(tmp_path / "a.tar.gz"))
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        sent = [tar.extractfile(entry).read() for entry in tar if entry.isfile()]
    assert (b"planted" in sent) == (how not in ("above", "root"))  # those lead to a folder that holds the link


@pytest.mark.parametrize("target", ["secret/key", "secret/nosuch"])
def test_a_script_that_is_a_link_stays_in_its_folder(source, target):
    (source / "link.py").symlink_to(source.parent / target)
    problems = release(source / "link.py").problems
    assert len(problems) == 1 and ("outside the source" in problems[0].text or "does not exist" in problems[0].text)
    (source / "fine.py").symlink_to("pkg/model.py")
    assert not release(source / "fine.py").problems and release(source / "fine.py").script == "fine.py"


def test_links_within_the_source_are_followed_as_on_a_node(source):
    (source / "weights.txt").symlink_to("pkg/inner/data.txt")
    (source / "lib").symlink_to(source / "pkg")
    (source / "pkg" / "up").symlink_to("..")
    (source / "nowhere").symlink_to("/nosuch/at/all")
    os.mkfifo(source / "pipe")
    (source.parent / "current").symlink_to("project")
    hashes = set()
    for path in (source, source.parent / "current"):
        for mode in MODES:
            members = source_tree.files(str(path), links=mode)
            assert sorted(members) == [
                "lib/inner/data.txt", "lib/model.py", "pkg/inner/data.txt", "pkg/model.py", "train.py", "weights.txt",
            ]
            hashes.add(source_tree.tree_hash(members, source_tree.opened if mode == source_tree.ANYWHERE else source_tree.opened_straight))
    assert len(hashes) == 1


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "nothing"])
@pytest.mark.parametrize("name", ["pkg/inner/data.txt", "pkg/inner", "pkg"])
def test_what_is_swapped_between_look_and_read_is_noticed(source, tmp_path, name, what):
    members = shipped.members(str(source), False)
    moved = tmp_path / "moved"
    os.rename(source / name, moved)
    if what == "link":
        (source / name).symlink_to(moved)  # with the very same content
    elif what == "pipe":
        os.mkfifo(source / name)
    elif what == "folder":
        (source / name).mkdir()
    for work in (source_tree.tree_hash, lambda members, opener: source_tree.pack(members, str(tmp_path / "a"), opener)):
        with pytest.raises(source_tree.SourceError, match="changed while the source was read"):
            work(members, source_tree.opened_straight)


def test_what_changes_between_plan_and_packing_is_not_sent(source, tmp_path):
    seen = release(source).hash
    shipped.pack(str(source), False, seen, str(tmp_path / "a.tar.gz"))
    (source / "train.py").write_text("other")
    with pytest.raises(source_tree.SourceError, match="changed since the plan was made"):
        shipped.pack(str(source), False, seen, str(tmp_path / "a.tar.gz"))


def test_the_action_sends_nothing_of_a_source_that_it_may_not_send(source, monkeypatch):
    """A link that has come after the plan is met where the source is packed."""
    module = unit_action.ActionModule.__new__(unit_action.ActionModule)
    seen = release(source).hash
    (source / "key").symlink_to("../secret/key")
    module._task = types.SimpleNamespace(args={"state": "present", "source_path": str(source), "source_hash": seen})
    monkeypatch.setattr(unit_action.runs, "carried", lambda _variables: {})
    monkeypatch.setattr(module, "_links", lambda _variables: allowed, raising=False)
    monkeypatch.setattr(module, "_execute_module", lambda *_words, **_named: {"needs_archive": True})
    for allowed, reason in ((False, "outside the source"), (True, "changed since the plan was made")):
        answer = module._provide({})  # which has no connection to send anything by
        assert answer["failed"] and reason in answer["msg"]


def test_a_file_that_grows_ends(source, tmp_path):
    """As a log does: what was there at first counts."""
    def growing(path):
        stream = source_tree.opened_straight(path)
        read = stream.read

        class Growing:
            def __enter__(self):
                return self

            def __exit__(self, *_error):
                stream.close()

            def fileno(self):
                return stream.fileno()

            def read(self, size):
                with open(path, "ab") as other:
                    other.write(b"x" * 10)
                return read(size)

        return Growing()

    expected = release(source).hash
    assert source_tree.tree_hash(shipped.members(str(source), False), growing) == expected


def doubled(source):
    """Two links in each of 31 folders lead to the next one: 2^31 paths."""
    for number in range(31):
        (source / f"d{number}").mkdir()
        for name in "ab":
            (source / f"d{number}" / name).symlink_to(source / f"d{number + 1}")
    (source / "d31").mkdir()


def round_trip(source):
    """Links between two folders, neither of which holds the other."""
    for here, there in ("ab", "ba"):
        (source / here).mkdir()
        (source / here / "on").symlink_to(source / there)


def deep(source):
    folder = source
    for _number in range(source_tree.MOST_DEPTH + 1):
        folder = folder / "d"
        folder.mkdir()


def wide(source):
    for number in range(300):
        (source / f"f{number}").write_text("")


def huge(source):
    with open(source / "huge", "wb") as stream:
        os.truncate(stream.fileno(), source_tree.MOST_BYTES + 1)


def misnamed(source):
    (pathlib.Path(os.fsdecode(bytes(source) + b"/model\xff\x1b[2J.py"))).write_text("")


HOSTILE = {
    doubled: ("more than 200 files and folders", "name a smaller folder"),
    deep: (f"more than {source_tree.MOST_DEPTH} folders deep", "name a smaller folder"),
    wide: ("more than 200 files and folders", "name a smaller folder"),
    huge: ("more than 64 GiB", "name a smaller folder"),
    misnamed: (r"model\udcff\x1b[2J.py is no UTF-8", "rename it"),
}


@pytest.mark.parametrize("make", HOSTILE)
def test_a_hostile_source_ends_in_a_sentence(source, monkeypatch, make):
    monkeypatch.setattr(source_tree, "MOST_ENTRIES", 200)
    make(source)
    text, cure = HOSTILE[make]
    (problem,) = release(source).problems
    assert text in problem.text and cure in problem.cure and problem.variable == shipped.SOURCE
    assert problem.sentence().isprintable()
    if make is not huge:
        with pytest.raises(source_tree.SourceError):
            source_tree.files(str(source))


@pytest.mark.parametrize("mode", MODES)
def test_links_that_lead_round_end(source, mode):
    round_trip(source)
    assert "train.py" in source_tree.files(str(source), links=mode)


@pytest.mark.parametrize("mode", MODES)
def test_doubled_links_end_at_the_real_limit_too(source, mode):
    doubled(source)
    # The kernel follows 40 links of one path, so that it may be the first to give up.
    with pytest.raises(source_tree.SourceError, match="more than|Too many levels"):
        source_tree.files(str(source), links=mode)


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error", "/p/\x1b[2J"),
        OSError("odd"),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
        ValueError("embedded null byte"),
        RecursionError("maximum recursion depth exceeded"),
    ],
)
@pytest.mark.parametrize("place", ["files", "tree_hash"])
def test_whatever_a_source_raises_is_said_in_a_sentence(source, monkeypatch, error, place):
    genuine = getattr(source_tree, place)

    def failing(what, *rest, **named):
        if what == str(source) or (isinstance(what, dict) and "train.py" in what):
            raise error
        return genuine(what, *rest, **named)

    monkeypatch.setattr(source_tree, place, failing)
    (problem,) = release(source).problems
    assert problem.variable == shipped.SOURCE and "cannot be read" in problem.text and problem.sentence().isprintable()


def test_a_path_that_no_file_has_is_said_so():
    (problem,) = release("/srv/a\0b").problems
    assert "cannot be read" in problem.text and problem.sentence().isprintable()


@pytest.mark.parametrize("value", ["/nosuch", "", "remote:/srv/p", "/proc/self/environ"])
def test_a_verb_that_ships_nothing_reads_nothing(monkeypatch, value):
    def read(*_arguments, **_named):
        raise AssertionError("the source was read")

    for name in ("files", "tree_hash", "mode_of"):
        monkeypatch.setattr(source_tree, name, read)
    found = release(value, reads=False)
    assert not found.problems
    job = planning.make("train", [host(torchrun_source=value)], found)[0]["job"]
    assert (job["release"], job["source_hash"]) == ("", "") and job["unit"] == "torchrun-train.service"


def test_the_verbs_that_ship_nothing_say_so():
    def given(name):
        (first, *_others) = yaml.safe_load((PLAYBOOKS / f"{name}.yml").read_text())
        return (first.get("vars") or {}).get("look_reads_source")

    assert {name: given(name) for name in ("stop", "status", "why", "logs")} == dict.fromkeys(("stop", "status", "why", "logs"), False)
    # It stops only what it can start again.
    assert given("restart") is True
    assert {given(name) for name in ("start", "plan", "rollback", "verify")} == {None}
