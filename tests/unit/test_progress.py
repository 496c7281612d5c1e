"""A look at rank 0, parsed."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import journal, progress

JOB = {
    "name": "train",
    "unit": "torchrun-train.service",
    "root": "/var/lib/torchrun/train",
    "checkpoint_dir": "/data/check points",
    "checkpoint_glob": "*.pt",
    "log_dir": "/var/log/torchrun/train",
}
DEFAULT_PATTERN = r"(?i)\b(step|epoch|iteration)s?\b\W{0,3}\d"


def output(show="ActiveState=active\nResult=success", state="{}", checkpoint="", journal=""):
    return f"\n{progress.MARK}\n".join([show, state, checkpoint, journal])


def test_parts_are_found():
    look = progress.parse(
        output(state=json.dumps({"state": "running"}), checkpoint="/data/a.pt", journal="one\ntwo\n-- cursor: s=1;i=2")
    )
    assert look == progress.Look("active", "success", {"state": "running"}, ["one", "two"], "s=1;i=2", "/data/a.pt")


def test_carriage_returns_of_a_terminal_do_no_harm():
    look = progress.parse(output(journal="one\n-- cursor: c").replace("\n", "\r\n"))
    assert (look.active, look.lines, look.cursor) == ("active", ["one"], "c")


def test_a_state_that_is_being_written_is_no_state():
    assert progress.parse(output(state='{"state": "runn')).state == {}


def test_the_command_is_shell_that_runs():
    job = {**JOB, "unit": "torchrun-it's.service"}
    for cursor in ("", "s=abc;i=1"):
        assert subprocess.run(["sh", "-n", "-c", progress.command(job, cursor)], check=False).returncode == 0


def test_no_pager_gets_between_a_node_with_a_terminal_and_us():
    words = f"{progress.command(JOB, '')}; {progress.command(JOB, 's=abc')}; {journal.command('torchrun-train.service', '/s', '', '')}"
    programs = re.findall(r"\b(?:systemctl|journalctl)\b[^;)]*", words)
    assert len(programs) == 6 and all("--no-pager" in program for program in programs), programs


@pytest.mark.parametrize(
    ("active", "state", "outcome"),
    [
        ("active", "running", "running"),
        ("activating", "", "running"),
        ("deactivating", "done", "running"),
        ("failed", "running", "failed"),
        ("inactive", "failed", "failed"),
        ("inactive", "done", "finished"),
        ("inactive", "stopped", "stopped"),
        ("inactive", "", "stopped"),
    ],
)
def test_outcomes(active, state, outcome):
    assert progress.outcome(progress.Look(active, "", {"state": state} if state else {})) == outcome


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (
            {"first_cause": {"text": "n1, rank 0 (local rank 0): exit code 1: RuntimeError:\n  bad shape"}},
            "the job train failed first on n1, rank 0 (local rank 0): exit code 1: RuntimeError: bad shape",
        ),
        ({"first_cause": None, "text": "waiting for n2"}, "the job train failed: waiting for n2"),
        ({}, "the job train failed: its unit ended with exit-code"),
    ],
)
def test_causes(state, sentence):
    assert progress.cause_sentence(JOB, progress.Look("failed", "exit-code", state)) == sentence


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("[rank 0] epoch 3 loss 0.1", True),
        ("Epoch: 12/20", True),
        ("step=100", True),
        ("iterations 5", True),
        ("loading the dataset in 3 steps", False),
        ("stepper 5", False),
        ("", False),
    ],
)
def test_the_default_pattern_finds_steps(line, step):
    assert progress.is_step(line, DEFAULT_PATTERN) == step


def test_without_a_pattern_nothing_is_a_step():
    assert not progress.is_step("epoch 3", "")


def test_what_keeps_the_other_nodes_is_told():
    cut_off = {"state": "waiting", "text": "waiting for rank 0's supervisor at 198.18.0.11:29501 (it drops)", "node": {"connected": False}}
    blocked = {"state": "running", "text": "running", "node": {"connected": True, "blocked": ["198.18.0.13 drops TCP"]}}
    fine = {"state": "waiting", "text": "waiting for n5", "node": {"connected": True, "blocked": []}}
    states = {"n2": json.dumps(cut_off), "n3": json.dumps(blocked), "n4": json.dumps(fine), "n5": None, "n6": "cat: no such file", "n7": "[]"}
    assert progress.obstacles(states) == ["n2: waiting for rank 0's supervisor at 198.18.0.11:29501 (it drops)", "n3: 198.18.0.13 drops TCP"]
    assert subprocess.run(["sh", "-n", "-c", progress.state_command(JOB)], check=False).returncode == 0
