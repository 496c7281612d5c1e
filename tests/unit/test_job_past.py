"""What a node tells of a job's past, from files of root's and of the job's."""

from __future__ import annotations

import json
import os

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import job_past, job_state, launch, systemd


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
    return job_past.look("train", str(job / folder), pattern, str(root))


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
    assert found[0]["digest"] == "" and len({entry["digest"] for entry in found}) == 4
    assert job_past.digest(str(folder), "step-0.pt") == job_past.digest(str(folder), "step-1.pt") != ""
    (folder / "link.pt").symlink_to("/etc/shadow")
    assert job_past.digest(str(folder), "link.pt") == ""


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
