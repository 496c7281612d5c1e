"""What a node tells of a job's past, from files of root's and of the job's."""

from __future__ import annotations

import json
import os
import time

import builders
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import continuity, hostile_input, job_folders, job_past, job_state, launch, looks, systemd


@pytest.fixture
def node(tmp_path):
    """A root file system with a unit that keeps its state and checkpoints in a job's folder."""
    job = tmp_path / "job with space%"
    for name in ("state", "old", "new"):
        (job / name).mkdir(parents=True)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    (tmp_path / "etc/torchrun").mkdir()
    words = ["/usr/bin/python3", "supervisor.py", "--job", "train", "--host", "n1", "--node-rank", 1, "--nnodes", 2]
    words += ["--state-dir", job / "state", "--checkpoint-dir", job / "old", "--checkpoint-glob", "*.pt"]
    text = f"[Service]\nExecStart={systemd.command(words)} --secret-file ${{CREDENTIALS_DIRECTORY}}/secret -- \\\n    python --nnodes=2\n"
    (units / "torchrun-train.service").write_text(text)
    return tmp_path, job


def look(node, folder="old", pattern="*.pt"):
    root, job = node
    return job_past.look("train", str(job / folder), pattern, None, str(root))


def test_the_unit_tells_place_and_folder_where_there_is_no_record(node):
    _root, job = node
    (job / "old" / "step-1.pt").write_text("one")
    found = look(node, "new")
    assert {key: found["unit"][key] for key in ("host", "rank", "nnodes")} == {"host": "n1", "rank": 1, "nnodes": 2}
    assert (found["folder"], found["pattern"], [entry["name"] for entry in found["before"]]) == (str(job / "old"), "*.pt", ["step-1.pt"])
    assert found["now"] == [] and look(node)["folder"] == ""


def test_the_record_is_older_wisdom_than_the_unit(node):
    root, job = node
    record = {"host": "n1", "hosts": ["n1"], "checkpoint_dir": str(job / "new"), "checkpoint_glob": "*.pt", "time": 1.0, "accepted": 0, "ran": True}
    (root / "etc/torchrun/train.past.json").write_text(json.dumps(record))
    assert look(node, "new")["record"] == record and look(node, "new")["folder"] == ""
    assert look(node, "old")["folder"] == str(job / "new")


def test_states_of_supervisors_are_read_as_hostile_input(node):
    _root, job = node
    state = job / "state" / "state.json"
    assert look(node)["state"] == "missing"
    newest = {"path": str(job / "old/a/step-3.pt"), "time": 3.0}
    good = {
        "state": "done", "host": "n1", "rank": 1, "release": "r", "result": "done", "checkpoint": None, "checkpoint_hosts": ["n0"],
        "checkpoints": {"0": {**newest, "host": "n0"}}, "members": {"0": {"host": "n0", "checkpoint": newest}, "1": {"host": None, "checkpoint": None}},
    }  # fmt: skip
    state.write_text(json.dumps(good))
    found = look(node)
    assert (found["state"], found["seen"], found["done"]) == ("read", ["n0"], "r")
    assert found["known"] == [{"host": "n0", "rank": 0, "name": "a/step-3.pt", "time": 3.0}] * 2
    for odd in ("[1]", "[" * 100_000, '{"checkpoints": {"0": {"path": [], "time": "x"}}}', '{"members": {"0": []}}', '{"checkpoint_hosts": "n0"}'):
        state.write_text(odd)
        assert look(node)["state"] == "odd" and look(node)["known"] == []
    state.unlink()
    os.mkfifo(state)
    assert look(node)["state"] == "odd"
    state.unlink()
    state.symlink_to("/dev/zero")
    assert look(node)["state"] == "odd"


def test_checkpoints_are_told_newest_first_with_what_tells_them_apart(node):
    _root, job = node
    folder = job / "old"
    for number, text in enumerate(["same", "same", "other", "x" * 300_000, "y" + "x" * 299_999]):
        path = folder / f"step-{number}.pt"
        path.write_text(text)
        os.utime(path, (1000 + number, 1000 + number))
    (folder / "set-aside-1").mkdir()
    (folder / "set-aside-1" / "step-9.pt").write_text("old")
    os.mkfifo(folder / "pipe.pt")
    os.utime(folder / "pipe.pt", (1500, 1500))
    found = job_past.newest(str(folder), "**/*.pt")
    assert [entry["name"] for entry in found] == ["pipe.pt", "step-4.pt", "step-3.pt", "step-2.pt"]
    assert [entry["name"] for entry in job_past.newest(str(folder), "**/*.pt", 1001.0)][4:] == ["step-0.pt"], "the newest from before the start"
    assert found[0]["digest"] == "" and len({entry["digest"] for entry in found}) == 4
    assert job_past.digest(str(folder), "step-0.pt") == job_past.digest(str(folder), "step-1.pt") != ""
    (folder / "link.pt").symlink_to("/etc/shadow")
    assert job_past.digest(str(folder), "link.pt") == ""


def never(*_arguments):
    time.sleep(600)


def breaks(*_arguments):
    raise KeyError("time")


def refuses(*_arguments):
    raise PermissionError(13, "Permission denied")


def is_not_whole(*_arguments):
    raise hostile_input.Odd("/c holds more than 5 names")


@pytest.mark.parametrize("part", ["newest", "supervisors"])
@pytest.mark.parametrize(
    ("trouble", "text"),
    [(never, "does not answer within 1 s"), (breaks, "KeyError"), (refuses, "permission denied"), (is_not_whole, "/c holds more than 5 names")],
)
def test_what_cannot_be_looked_at_is_said_and_what_is_roots_is_known(node, monkeypatch, part, trouble, text):
    root, job = node
    record = {"host": "n1", "hosts": ["n1", "n2"], "checkpoint_dir": str(job / "new"), "checkpoint_glob": "*.pt", "time": 1.0, "accepted": 0, "ran": True}
    (root / "etc/torchrun/train.past.json").write_text(json.dumps(record))
    monkeypatch.setattr(job_past, part, trouble)
    monkeypatch.setattr(job_past, "SECONDS", 1.0)
    at = looks.Looks.at
    monkeypatch.setattr(looks.Looks, "at", lambda self, path, work, default, seconds=1.0: at(self, path, work, default, seconds))
    found = look(node)
    assert found["record"] == record and found["unit"]["host"] == "n1"
    assert text in found["unread"], found["unread"]
    (host, other) = builders.host("n1", 1), builders.host("n2", 2)
    host.node["past"] = json.loads(json.dumps(found))
    seats = [continuity.seat(one, rank, "torchrun-train.service") for rank, one in enumerate((host, other))]
    (problem,) = continuity.lost(seats, str(job / "old"))
    assert (problem.host, problem.variable) == ("n1", "torchrun_checkpoint_dir") and found["unread"] in problem.text


def test_what_was_set_aside_is_no_checkpoint_that_a_host_had(node):
    _root, job = node
    gone = [job / "old/set-aside-1/step-9.pt", "/elsewhere/set-aside-1/step-9.pt"]
    for path in gone:
        (job / "state" / "state.json").write_text(json.dumps({"state": "x", "host": "n1", "checkpoint": {"path": str(path), "time": 9.0}}))
        assert look(node)["known"] == [] and look(node)["seen"] == []
    (job / "old/set-aside-1").mkdir()
    (job / "old/set-aside-1/step-9.pt").write_text("old")
    assert [entry["name"] for entry in look(node, "old/set-aside-1")["now"]] == ["step-9.pt"], "unless it is the folder"


@pytest.mark.parametrize("unit", ["", "[Service]\n", '[Service]\nExecStart="half', "[Service]\nExecStart=/bin/true\n"])
def test_units_without_a_supervisor_tell_nothing(unit):
    assert launch.supervisor_options(unit) == {}


def test_rollback_to_another_checkpoint_folder_is_refused():
    starts = [
        {"release": "a", "back": False, "kept": True, "checkpoints": ["/old", "*.pt"]},
        {"release": "b", "back": False, "kept": True, "checkpoints": ["/new", "*.pt"]},
    ]
    decision, text, _release = job_state.decide_rollback({"n1": {"releases": starts, "release": "b", "unit": "active"}})
    assert decision == "refuse" and "/old/*.pt where /new/*.pt is now on n1" in text
    starts[0]["checkpoints"] = ["/new", "*.pt"]
    assert job_state.decide_rollback({"n1": {"releases": starts, "release": "b", "unit": "active"}})[0] == "rollback"


TORCHRUN = "python -m torch.distributed.run --nnodes={nodes} --node-rank={rank} --master-addr={first} t.py"
UNIT = f"ExecStart=/usr/bin/python3 supervisor.py --host {{host}} -- {TORCHRUN}\n"


def release(host, rank, nodes, first):
    place = job_folders.place("\n" + UNIT.format(host=host, rank=rank, nodes=nodes, first=first))
    return {"release": "a", "back": False, "kept": True, "place": place}


def rolled(order, then, first="10.0.0.1", unit="10.0.0.1"):
    """The decision for hosts in this order, with an earlier release that had them in another one."""
    later = {"release": "b", "back": False, "kept": True}
    infos = {}
    for host in order:
        rank = then.index(host) if host in then else 7
        now = release(host, rank, len(then), unit)["place"]
        infos[host] = {"releases": [release(host, rank, len(then), first), later], "release": "b", "unit": "active", "place": now}
    return job_state.decide_rollback(infos)


@pytest.mark.parametrize(
    ("order", "then", "text"),
    [
        (["n1", "n2"], ["n1", "n2"], ""),
        (["n2", "n1"], ["n1", "n2"], "node-rank was 1 and is 0 on n2, node-rank was 0 and is 1 on n1"),
        (["n1"], ["n1", "n2"], "nnodes was 2 and is 1 on n1"),
        (["n1", "n3"], ["n1", "n2"], "node-rank was 7 and is 1 on n3"),
    ],
)
def test_rollback_compares_the_units_of_then_with_the_order_of_now(order, then, text):
    decision, sentence, _release = rolled(order, then)
    assert decision == ("refuse" if text else "rollback"), sentence
    assert text in sentence and ("torchrun_node_rank" in sentence) == bool(text)


def test_rollback_with_another_rank_0_or_a_renamed_host_is_refused_before_the_job_is_stopped():
    assert "master-addr was 10.0.0.9 and is 10.0.0.1 on n1" in rolled(["n1", "n2"], ["n1", "n2"], first="10.0.0.9")[1]
    infos = {"new": {"releases": [release("old", 0, 1, "x"), {"release": "b", "back": False, "kept": True}], "release": "b", "unit": "active"}}
    assert "host was old and is new on new" in job_state.decide_rollback(infos)[1]


def test_a_release_that_runs_already_is_compared_too():
    infos = {"n2": {"releases": [release("n2", 1, 2, "x"), {"release": "b", "back": False, "kept": True}], "release": "a", "unit": "active"}}
    assert job_state.decide_rollback(infos)[0] == "refuse", "what is written down of a start must not differ from the units"


def test_rollback_says_why_no_release_is_known():
    assert "/r/releases can be written" in job_state.decide_rollback({"n1": {"releases": [], "unread": ["/r/releases can be written by others than root"]}})[1]
