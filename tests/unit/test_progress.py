"""A look at rank 0, parsed."""

from __future__ import annotations

import base64
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


def base64_of(text):
    return base64.b64encode(text.encode("utf-8", "surrogateescape")).decode()


def entry(message, cursor="s=1;i=2", moment=1_700_000_000_000_000):
    return json.dumps({"__CURSOR": cursor, "__REALTIME_TIMESTAMP": str(moment), "MESSAGE": message})


def output(show="ActiveState=active\nResult=success", state='{"state": "running"}', checkpoint="", *lines):
    return f"\n{journal.MARK}\n".join([show, base64_of(state), base64_of(checkpoint), "\n".join(map(entry, lines))])


def test_parts_are_found():
    look = journal.parse("n1", output(*output.__defaults__[:2], "/data/a.pt\n", "one", "two"))
    assert (look.active, look.result, look.state, look.odd) == ("active", "success", {"state": "running"}, "")
    assert ([line.text for line in look.lines], look.cursor, look.checkpoint) == (["one", "two"], "s=1;i=2", "/data/a.pt")


def test_carriage_returns_of_a_terminal_do_no_harm():
    look = journal.parse("n1", output(*output.__defaults__, "one").replace("\n", "\r\n"))
    assert (look.active, look.state, [line.text for line in look.lines]) == ("active", {"state": "running"}, ["one"])


def test_the_command_is_shell_that_runs():
    job = {**JOB, "unit": "torchrun-it's.service"}
    for cursor in ("", "s=abc;i=1"):
        assert subprocess.run(["sh", "-n", "-c", progress.command(job, cursor)], check=False).returncode == 0


def test_no_pager_gets_between_a_node_with_a_terminal_and_us():
    words = f"{progress.command(JOB, '')}; {progress.command(JOB, 's=abc')}; {journal.command('torchrun-train.service', '/s', '')}"
    programs = re.findall(r"\b(?:systemctl|journalctl)\b[^;)]*", words)
    assert len(programs) == 10 and all("--no-pager" in program for program in programs), programs


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
    assert progress.outcome(journal.Look(active, "", {"state": state} if state else {})) == outcome


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
    assert progress.cause_sentence(JOB, journal.Look("failed", "exit-code", state)) == sentence


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
    assert progress.last_step([line, ""], DEFAULT_PATTERN) == (line if step else "")


def test_the_last_step_counts_and_without_a_pattern_nothing_is_one():
    assert progress.last_step(["epoch 3", "epoch 4", "saved"], DEFAULT_PATTERN) == "epoch 4"
    assert progress.last_step(["epoch 3"], "") == ""


def test_what_keeps_the_other_nodes_is_told():
    cut_off = {"state": "waiting", "text": "waiting for rank 0's supervisor at 198.18.0.11:29501 (it drops)", "node": {"connected": False}}
    blocked = {"state": "running", "text": "running", "node": {"connected": True, "blocked": ["198.18.0.13 drops TCP"]}}
    fine = {"state": "waiting", "text": "waiting for n5", "node": {"connected": True, "blocked": []}}
    texts = {"n2": json.dumps(cut_off), "n3": json.dumps(blocked), "n4": json.dumps(fine), "n6": "", "n7": "[]"}
    states = {**{host: base64_of(text) for host, text in texts.items()}, "n5": None, "n8": "cat: no such file", "n9": "-"}
    found = progress.obstacles(states)
    assert found[:2] == ["n2: waiting for rank 0's supervisor at 198.18.0.11:29501 (it drops)", "n3: 198.18.0.13 drops TCP"]
    assert [sentence[:2] for sentence in found[2:]] == ["n7", "n8", "n9"]
    assert all("not what a supervisor writes" in sentence for sentence in found[2:])
