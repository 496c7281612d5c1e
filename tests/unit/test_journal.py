"""Merged journals: commands that are shell, output that is read whole or not at all."""

from __future__ import annotations

import base64
import json
import subprocess

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import journal


def entry(moment, message, cursor="c"):
    return json.dumps({"__CURSOR": cursor, "__REALTIME_TIMESTAMP": str(int(moment * 1e6)), "MESSAGE": message})


def output(*entries, active="active", state='{"state": "running"}'):
    parts = [f"ActiveState={active}\nResult=success\n", base64.b64encode(state.encode()).decode(), "", "\n".join(entries) + "\n"]
    return f"\n{journal.MARK}\n".join(parts)


def test_the_command_is_shell_that_runs():
    for cursor, since in (("", ""), ("s=a;i=1", ""), ("", "it's 5 min ago")):
        text = journal.command("torchrun-it's.service", "/a b", cursor, since)
        assert subprocess.run(["sh", "-n", "-c", text], check=False).returncode == 0
        assert ("--after-cursor" in text) == bool(cursor)
        assert ("--since" in text) == bool(since)


def test_lines_of_all_nodes_are_merged_by_time():
    one = journal.parse("n1", output(entry(1.5, "[rank 0] a"), entry(3.5, "supervisor: b", "end")))
    two = journal.parse("n2", output(entry(2.5, "[rank 1] c")))
    lines = journal.merged([one, two])
    assert [(line.host, line.text, line.rank) for line in lines] == [("n1", "[rank 0] a", 0), ("n2", "[rank 1] c", 1), ("n1", "supervisor: b", None)]
    assert one.cursor == "end"
    assert [line.text for line in journal.merged([one, two], rank=1)] == ["[rank 1] c"]
    assert journal.shown(lines[1], 4).endswith(" n2   [rank 1] c")


@pytest.mark.parametrize("text", ["", "ActiveState=active", f"x{journal.MARK}y", f"x{journal.MARK}y{journal.MARK}z"])
def test_half_an_answer_is_none(text):
    assert journal.parse("n1", text) is None


def test_bytes_and_broken_lines_do_no_harm():
    look = journal.parse("n1", output(entry(1, [255, 97]), "{broken", state="{broken"))
    assert [line.text for line in look.lines] == ["\ufffda"]
    assert look.state == {} and "not what a supervisor writes" in look.odd


def test_ranks_of_uneven_nodes():
    nodes = {"b": {"host": "b", "rank": 1, "nproc": 1}, "a": {"host": "a", "rank": 0, "nproc": 2}}
    assert journal.ranks(nodes) == {0: "a", 1: "a", 2: "b"}
