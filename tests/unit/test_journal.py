"""Merged journals: commands that are shell, output that is read whole or not at all."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import types

import pytest
from ansible_collections.onprem.torch.plugins.action import follow, logs
from ansible_collections.onprem.torch.plugins.module_utils import journal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


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


# -- entries that are too long, as a node's shell shortens them

AWKS = [name for name in ("mawk", "gawk", "original-awk") if shutil.which(name)]
# What looks like the fields that the shell keeps, and what a string's end may be mixed up with.
FORGED = ['"__CURSOR":"forged"', '"__CURSOR" : "forged"', '\\"__CURSOR\\":\\"forged\\"', '"__CURSOR', '","__CURSOR":"forged","x":"', "\\", '"',
          '"__REALTIME_TIMESTAMP":"1"', "\n", "\x00", "é", "\u2028"]
CONTENT = st.lists(st.sampled_from(FORGED) | st.text(max_size=20), max_size=8).map("".join)
VALUE = CONTENT | st.lists(CONTENT, min_size=2, max_size=4) | st.just([[255, 34, 92]]) | st.none()


@st.composite
def entries_of_a_journal(draw):
    """Lines of journalctl, whether each is too long, and the cursors; fields in any order, spaces as old and new ones set them."""
    lines, cursors, times = [], [], []
    for number in range(draw(st.integers(1, 5))):
        message, long = draw(VALUE), draw(st.booleans())
        if long:
            padding = draw(st.sampled_from([journal.MOST_ENTRY, 5 * journal.MOST_ENTRY]))
            message = [*(message if isinstance(message, list) else [message]), *["x" * 4000] * (padding // 4000), draw(CONTENT)]
        fields = {"__CURSOR": f"s=0a;i={number}", "__REALTIME_TIMESTAMP": str(10**15 + number), "_BOOT_ID": "0b", "MESSAGE": message}
        order = draw(st.permutations(sorted(fields)))
        separators = draw(st.sampled_from([(",", ":"), (", ", " : ")]))
        lines.append(json.dumps({name: fields[name] for name in order}, separators=separators, ensure_ascii=draw(st.booleans())))
        cursors.append(fields["__CURSOR"])
        times.append((10**15 + number) / 1e6)
    return lines, cursors, times


@pytest.mark.parametrize("awk", AWKS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(entries_of_a_journal())
def test_a_long_entry_keeps_its_place_whatever_it_holds_and_short_ones_pass(awk, tmp_path_factory, journal_lines):
    lines, cursors, times = journal_lines
    file = tmp_path_factory.mktemp("journal") / "lines"
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    answer = shell(journal.shortened(f"cat {file}").replace(" awk ", f" {awk} "))
    found = answer.removesuffix("\n").split("\n")
    assert len(found) == len(lines)
    for line, shown in zip(lines, found):
        if len(line.encode()) <= journal.MOST_ENTRY:
            assert shown == line
        else:
            assert len(shown) < 1000 and json.loads(shown)["MESSAGE"] is None
    assert [json.loads(line)["__CURSOR"] for line in found] == cursors
    seen, cursor, whole = journal.entries("n1", answer)
    assert (cursor, whole, [line.time for line in seen]) == (cursors[-1], True, times)


def shell(command):
    return subprocess.run(["sh", "-c", command], capture_output=True, encoding="utf-8", check=False, timeout=120).stdout


def test_an_entry_of_a_thousand_fields_hides_nothing_after_it(tmp_path, monkeypatch):
    huge = {"MESSAGE": [[255] * 4070] * 1000, "__CURSOR": "huge", "__REALTIME_TIMESTAMP": "1500000"}
    file = tmp_path / "lines"
    file.write_text("".join(f"{text}\n" for text in (entry(1, "before"), json.dumps(huge), entry(2, "after", "end"))))
    assert file.stat().st_size > 2 * journal.MOST_BYTES
    for name, text in (("journalctl", f'#!/bin/sh\ncat "{file}"\n'), ("systemctl", "#!/bin/sh\necho ActiveState=active\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    look = journal.parse("n1", shell(journal.command("torchrun-train.service", str(tmp_path), "s=1")))
    assert [line.text for line in look.lines] == ["before", journal.message(None), "after"]
    assert (look.cursor, look.more, look.active) == ("end", False, "active")
    assert look.now > 0


@pytest.mark.parametrize(("program", "more"), [("exec sleep 600", True), ("printf {; exec sleep 600", True), ("exit 1", False), ("exit 0", False)])
def test_a_journal_that_was_not_read_to_its_end_has_more(program, more):
    lines, cursor, whole = journal.entries("n1", shell(journal.shortened(f"sh -c {shlex.quote(program)}", 1)))
    assert (lines, cursor, whole) == ([], "", not more)


# -- logs, as its action reads them


class Node:
    """A node whose job prints faster than its journal is read, or whose journal cannot be read to its end."""

    def __init__(self, prints):
        self.prints, self.looks, self.clock = prints, 0, 1000.0

    def output(self, _command):
        self.looks += 1
        assert self.looks < 50, "it goes on reading"
        texts = []
        for _line in range(self.prints):
            self.clock += 0.25
            texts.append(entry(self.clock, f"at {self.clock}", f"c{self.clock}"))
        return f"now=1010\n{output(*texts, journal.CUT)}"


def read(monkeypatch, nodes):
    shown, warned = [], []
    monkeypatch.setattr(logs.connections, "shell", lambda action, host, hostvars: nodes[host])
    monkeypatch.setattr(logs.terminal, "show", shown.append)
    monkeypatch.setattr(logs.terminal, "warn", warned.append)
    reader = logs.Reader(None, {"unit": "torchrun-train.service", "root": "/r"}, list(nodes), {}, "")
    outcome, count = logs.ActionModule._print(None, reader, None, False)
    assert (outcome, count) == ("running", len(shown))
    return shown, warned


def test_without_following_logs_end_with_what_was_there_at_first(monkeypatch):
    nodes = {"n1": Node(8), "n2": Node(3)}
    shown, warned = read(monkeypatch, nodes)
    assert len(shown) == 2 * 43 and warned == []  # from 1000.25 to before 1011
    assert "at 1010.75" in shown[-1]


def test_without_following_logs_say_where_a_journal_could_not_be_read(monkeypatch):
    shown, warned = read(monkeypatch, {"n1": Node(0)})
    assert shown == [] and len(warned) == 1 and "n1" in warned[0]


# -- the action that follows a job


@pytest.mark.parametrize(("texts", "pauses"), [((), 1), (("a line",), 0)])
def test_following_pauses_unless_it_came_further(texts, pauses, monkeypatch):
    """What is left may not be readable: then another look at once would bring the same."""
    unread = journal.parse("n1", output(*(entry(1, text) for text in texts), journal.CUT))
    looks = [unread, journal.parse("n1", output(active="failed"))]
    slept = []
    monkeypatch.setattr(follow.time, "sleep", slept.append)
    monkeypatch.setattr(follow.terminal, "show", lambda lines: None)
    action = types.SimpleNamespace(_look=lambda job, host, cursor: looks.pop(0), others=types.SimpleNamespace(ask=lambda: None))
    job = {"name": "train", "step_pattern": "step", "start_timeout": 600, "log_dir": "/l"}
    assert unread.more
    assert follow.ActionModule._follow(action, job, "n1", "finished", "again")["outcome"] == "failed"
    assert len(slept) == pauses
