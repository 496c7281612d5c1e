"""Looks at file systems that do not answer: every view is made, says what it could not look at, and what runs is left alone."""

from __future__ import annotations

import os
import time

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import (
    checkpoint_files,
    job_causes,
    job_evidence,
    job_folders,
    job_past,
    job_state,
    looks,
    safe_files,
    supervisor_state,
)
from ansible_collections.onprem.torch.plugins.modules import torchrun_info, torchrun_unit

PARAMS = {"root": "/r", "checkpoint_dir": "/c", "checkpoint_glob": "*", "log_dir": "/l", "job": "train"}


def never(*_arguments, **_options):
    time.sleep(600)


@pytest.fixture
def hasty(monkeypatch):
    """Every look is given up after a second."""
    at = looks.Looks.at
    monkeypatch.setattr(looks.Looks, "at", lambda self, path, work, default, _seconds=1.0: at(self, path, work, default, 1.0))


class Module:
    """As much of a module as is asked for."""

    params = PARAMS
    check_mode = False

    def run_command(self, _command):
        return 0, "", ""


@pytest.mark.parametrize(
    ("place", "name", "path"),
    [
        (supervisor_state, "read", "/r"),
        (checkpoint_files, "newest", "/c"),
        (job_folders, "history", "/r"),
        (job_evidence, "error_files", "/l"),
        (job_evidence, "room", "/c"),
        (os, "statvfs", "/c"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_system_that_does_not_answer_ends_no_look_and_is_said(hasty, monkeypatch, place, name, path):
    monkeypatch.setattr(place, name, never)
    look = looks.Looks(None)
    found = {**torchrun_info.jobs_own(PARAMS, look), "evidence": torchrun_info.evidence(Module(), look), "unread": look.failed}
    info = job_state.received({**found, "unit": "active"})
    assert info["release"] == "" and info["checkpoint"] == {} and info["evidence"]["errors"] == []
    views = [job_state.status_lines("train", {"n1": info}, ["n1"]), job_causes.lines("train", job_causes.explain({"n1": info}))]
    for lines in views:
        assert any(f"n1: {path} does not answer within 1 s" in line for line in lines), lines


def test_what_fails_is_said_once_and_in_words(hasty):
    def fail(error):
        raise error

    look = looks.Looks(None)
    assert look.at("/a", lambda: fail(PermissionError(13, "Permission denied")), "x") == "x"
    assert look.at("/b\x1b", lambda: fail(RecursionError("too deep")), 7) == 7
    assert look.at("/c", lambda: [1], None) == [1]
    assert look.failed == ["/a cannot be looked at: permission denied", "/b\\x1b cannot be looked at: RecursionError: too deep"]
    assert look.at("/d", never, 1) == look.at("/d", never, 1) == 1 and len(look.failed) == 3, "nobody waits for it again"
    answers = looks.answers(lambda path: never() if path == "/dead" else len(path), ["/dead", "/live"])
    assert answers == {"/live": 5}


def test_a_folder_for_the_jobs_user_alone_is_looked_at_as_that_user(tmp_path, monkeypatch):
    """As root of a client is nobody on a server with root_squash, another user than the job's may see nothing."""
    who = safe_files.Account("alice", 65123, 65123, ())
    monkeypatch.setattr(safe_files, "account", lambda _name: who)
    assert looks.reader("alice") == who
    if os.geteuid() == 0:
        assert looks.Looks(looks.reader("alice")).at("/", os.geteuid, 0) == 65123
    monkeypatch.setattr(safe_files, "account", lambda _name: safe_files.Account("root", 0, 0, ()))
    assert looks.reader("root") is None


@pytest.mark.parametrize(("accepted", "check_mode"), [(True, False), (True, True), (False, False)])
def test_what_was_accepted_is_remembered_where_the_job_runs_already(tmp_path, monkeypatch, accepted, check_mode):
    remembered = []
    monkeypatch.setattr(job_past, "remember_start", lambda *words, **options: remembered.append((words, options)))
    node = object.__new__(torchrun_unit.Node)
    node.module, node.params, node.changes = Module(), {"job": "train", "hosts": ["n1"], "accept_lost": accepted}, []
    node.module.check_mode = check_mode
    node.unit_path = str(tmp_path / "unit")
    (tmp_path / "unit").write_text("")
    monkeypatch.setattr(node, "wanted", lambda _path: True, raising=False)
    monkeypatch.setattr(node, "active", lambda: True, raising=False)
    node.run("UNIT", "", False)
    assert remembered == ([(("train", "UNIT", ["n1"], True), {"ran": True})] if accepted and not check_mode else [])
    assert node.changes == []
