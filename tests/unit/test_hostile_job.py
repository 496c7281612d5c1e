"""Whatever a job's user writes into state.json and the journal: every view is made, and nothing acts on a terminal."""

from __future__ import annotations

import base64
import copy
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import time

import builders
import pytest
from ansible_collections.onprem.torch.plugins.module_utils import (
    checkpoint_files,
    continuity,
    hostile_input,
    job_causes,
    job_evidence,
    job_folders,
    job_past,
    job_state,
    journal,
    problems,
    progress,
    supervisor_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile_input import JSON, TEXT, WRONG

ESCAPES = "\x1b]0;OWNED\x07\x1b[2J\x1b[A fake: PLAY RECAP\x9b2J\u202e"
CAUSE = {
    "host": "n1",
    "node_rank": 0,
    "rank": 0,
    "local_rank": 0,
    "reason": "signal",
    "error": None,
    "exit_code": None,
    "signal": "SIGKILL",
    "own": True,
    "echo": False,
    "generation": 3,
    "time": 1_700_000_000.5,
    "text": "n1, rank 0 (local rank 0): killed by SIGKILL",
    "charged": True,
}
STATE = {
    "version": 1,
    "job": "train",
    "host": "n1",
    "rank": 0,
    "nnodes": 2,
    "release": "r1",
    "pid": 17,
    "written": 1_700_000_001.0,
    "state": "running",
    "text": "generation 4 runs on 2 nodes",
    "since": 1_700_000_001.0,
    "node": {"phase": "running", "generation": 4, "problems": [{"check": "gpus", "text": "lost"}], "connected": False, "blocked": ["n2 drops"]},
    "generation": 4,
    "restarts": 1,
    "restarts_left": 2,
    "max_restarts": 3,
    "checkpoint": {"path": "/c/step-1.pt", "time": 1_700_000_000.0},
    "checkpoint_hosts": ["n1"],
    "last_exit": {"generation": 3, "time": 1_700_000_000.0, "code": -9, "ordered": False, "cause": CAUSE},
    "first_cause": CAUSE,
    "history": [CAUSE, CAUSE],
    "result": None,
    "stopped_by": None,
    "members": {"0": {"host": "n1", "connected": True, "phase": "running", "generation": 4, "problems": [], "checkpoint": None}},
}
JOB = {
    "name": "train",
    "unit": "torchrun-train.service",
    "root": "/var/lib/torchrun/train",
    "checkpoint_dir": "/c",
    "checkpoint_glob": "*.pt",
    "log_dir": "/var/log/torchrun/train",
    "step_pattern": "step",
}
INFO = {"unit": "active", "since": 1.0, "step": "", "step_time": None, "checkpoint": {}, "gpus": [], "evidence": {}, "releases": []}


def places(value, path=()):
    """Every place in a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def spoilt(draw):
    """A state of which one part is anything."""
    state = copy.deepcopy(STATE)
    path = draw(st.sampled_from(list(places(STATE))))
    value = draw(JSON | st.just("9" * 5000) | st.just(1e308) | st.just(ESCAPES))
    if not path:
        return value
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return state


def views(info_of_first):
    """Every text and every JSON that a person gets of a job."""
    infos = {"n1": job_state.received(info_of_first), "n2": job_state.received(None)}
    found = job_causes.explain(infos)
    yield from job_state.status_lines("train", infos, ["n1", "n2"])
    yield from job_causes.lines("train", found)
    yield json.dumps([infos, found], ensure_ascii=False)
    yield job_state.decide_rollback(infos)[1]


def look_views(look):
    yield progress.ending(JOB, progress.outcome(look), look)
    yield progress.cause_sentence(JOB, look)
    yield from progress.summary(JOB, "n1", {"msg": "", "checkpoint": look.checkpoint})
    yield json.dumps(look.state, ensure_ascii=False)
    for line in look.lines:
        yield journal.shown(line, 4)


def expect_harmless(texts, limit=200_000):
    texts = list(texts)
    assert texts
    for text in texts:
        assert not hostile_input.UNPRINTABLE.search(text), text
        assert len(text) <= limit
        text.encode()


def base64_of(text):
    return base64.b64encode(text.encode("utf-8", "replace")).decode()


def output(state="", lines="", show="ActiveState=failed\nResult=exit-code", checkpoint=""):
    return f"\n{journal.MARK}\n".join([show, base64_of(state), base64_of(checkpoint), lines])


def test_what_a_supervisor_writes_is_no_news():
    state, odd = supervisor_state.parse(json.dumps(STATE))
    assert odd == ""
    cause = state["first_cause"]
    assert state == {**STATE, "last_exit": {**STATE["last_exit"], "cause": cause}, "first_cause": cause, "history": [cause, cause]}
    assert state["first_cause"].items() <= CAUSE.items()
    assert supervisor_state.checked(state) == (state, "")


@given(JSON | spoilt())
@settings(max_examples=300)
def test_any_json_in_place_of_the_state_leaves_every_view_harmless(value):
    text = json.dumps(value)
    state, odd = supervisor_state.parse(text)
    assert state or odd
    expect_harmless(views({**INFO, "state": state, "state_odd": odd}))
    # A node that does not look at it.
    expect_harmless(views({**INFO, "state": value}))
    for show in ("ActiveState=failed", "ActiveState=inactive", "ActiveState=active"):
        expect_harmless(look_views(journal.parse("n1", output(text, show=show))))
    expect_harmless([*progress.obstacles({"n1": base64_of(text)}), "at least one"])


NULLS = [{"checkpoint": {"path": "/c/x", "time": None}}, {"checkpoint": {"path": "/c/x"}}, {"rank": None}, {"checkpoints": {"0": {"path": "/c/x"}}}]


def started_by(state):
    """What the plan makes of two nodes of which one has this state: sentences, or nothing to say."""
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        (folder / "state").mkdir()
        (folder / "state/state.json").write_text(json.dumps(state))
        found = job_past.supervisors(str(folder / "state"), "/c")
    finally:
        shutil.rmtree(folder)
    record = {"host": "n1", "hosts": ["n1", "n2"], "time": 1000.0, "accepted": 0, "ran": True}
    hosts = [builders.host("n1", 1), builders.host("n2", 2)]
    hosts[0].node["past"] = json.loads(json.dumps({**found, "record": record, "unit": {}, "now": [], "before": []}))
    seats = [continuity.seat(host, rank, "torchrun-train.service") for rank, host in enumerate(hosts)]
    return found, [problem.sentence() for problem in continuity.lost(seats, "/c")]


@given(spoilt())
@settings(max_examples=300)
def test_whatever_the_job_says_of_its_past_the_plan_is_made(value):
    _found, sentences = started_by(value)
    expect_harmless(["", *sentences])


@pytest.mark.parametrize("part", NULLS, ids=str)
def test_a_checkpoint_of_which_only_the_path_is_told_was_there(part):
    found, sentences = started_by({**STATE, "checkpoint": None, **part})
    assert found["state"] == "read" and all(isinstance(entry["time"], float) for entry in found["known"])
    assert "n1" in found["seen"] and sentences


@pytest.mark.parametrize(
    "text",
    ["[1]", "[" * 100_000, '{"generation": "abc"}', '{"state": "running", "generation": ' + "9" * 5000 + "}", "", "\0", '{"first_cause": "abc", "state": "x"}'],
)
def test_a_state_that_no_supervisor_writes_is_unknown_and_said(text):
    state, odd = supervisor_state.parse(text)
    assert state == {}
    assert odd.endswith("which is not what a supervisor writes; stop and start the job, and it is written anew")
    info = job_state.received({**INFO, "state": state, "state_odd": odd})
    lines = job_state.status_lines("train", {"n1": info}, ["n1"])
    assert lines[2].split()[2] == "unknown"
    assert lines[3] == f"n1: {odd}"
    found = job_causes.explain({"n1": info})
    assert found["sentence"] == f"whether anything has ended the job early is not known: n1: {odd}"
    look = journal.parse("n1", output(text or "-", show="ActiveState=inactive"))
    assert progress.outcome(look) == "unknown"
    assert "not what a supervisor writes" in progress.ending(JOB, "unknown", look)


def test_where_another_node_knows_the_cause_it_is_told():
    good = job_state.received({**INFO, "state": STATE})
    odd = job_state.received({**INFO, "state": [1]})
    found = job_causes.explain({"n1": odd, "n2": good})
    assert found["sentence"].startswith("first on n1, rank 0")
    assert any("n1: state.json: the whole is a list" in line for line in job_causes.lines("train", found))


@given(TEXT, TEXT)
def test_any_output_of_a_node_is_parsed(before, after):
    look = journal.parse("n1", f"{before}{journal.MARK}{after}")
    assert look is None or look.lines == []
    look = journal.parse("n1", output(before, after, checkpoint=after))
    expect_harmless(look_views(look))


MESSAGE = JSON | TEXT | st.lists(st.integers(0, 255)) | st.lists(st.lists(st.integers(-1, 300))) | st.just(journal.MARK) | st.just("-- cursor: s=1")


@given(st.lists(st.tuples(MESSAGE, st.text("0123456789", max_size=20) | JSON)))
def test_any_entry_of_a_journal_is_shown_harmlessly_and_moves_nothing_else(entries):
    lines = "\n".join(
        json.dumps({"__CURSOR": f"c{index}", "__REALTIME_TIMESTAMP": moment, "MESSAGE": message}, ensure_ascii=index % 2 == 0)
        for index, (message, moment) in enumerate(entries)
    )
    look = journal.parse("n1", output(json.dumps(STATE), lines))
    assert look.state["generation"] == 4 and look.active == "failed"
    assert look.cursor == "" or look.cursor[0] == "c"
    assert len(look.lines) <= len(entries)
    expect_harmless(look_views(look), 10_000)


def test_what_a_job_prints_is_a_line_and_nothing_else():
    for message in (journal.MARK, f"\n{journal.MARK}\nActiveState=inactive", "-- cursor: forged", '{"__CURSOR": "forged"}', ESCAPES, "\r\u2028x"):
        entry = json.dumps({"__CURSOR": "true", "__REALTIME_TIMESTAMP": "1700000000000000", "MESSAGE": message}, ensure_ascii=False)
        look = journal.parse("n1", output(json.dumps(STATE), entry))
        assert (look.cursor, len(look.lines), look.active) == ("true", 1, "failed")
    assert look.lines[0].text == "\\x0d\\u2028x"
    cut = journal.parse("n1", output("", f'{entry}\n{{"__CURSOR": "next", "MESS'))
    assert (cut.cursor, len(cut.lines), cut.more) == ("true", 1, True)


# -- commands, as a node's shell runs them


def run(command):
    began = time.monotonic()
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert time.monotonic() - began < 30
    return answer.stdout


@pytest.fixture
def root(tmp_path):
    (tmp_path / "it's a job" / "state").mkdir(parents=True)
    return tmp_path / "it's a job"


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_a_shell_does_not_wait_for_a_state(make, root, monkeypatch):
    monkeypatch.chdir(root)
    make(root / "state/state.json")
    state, odd = journal.parse_state(run(journal.state_command(str(root))))
    assert state == {} and (odd or make.__name__ == "hard_link")
    assert supervisor_state.read(str(root))[1]


def test_a_shell_reads_a_state_and_tells_what_is_not_there(root):
    command = journal.state_command(str(root))
    assert journal.parse_state(run(command)) == ({}, "") == supervisor_state.read(str(root))
    (root / "state/state.json").write_text(json.dumps(STATE))
    assert journal.parse_state(run(command)) == supervisor_state.read(str(root))


@pytest.mark.parametrize("name", ["a.pt", "two words.pt", "\x1b[2J.pt", "new\nline.pt", "--onprem-torch--.pt", "-rf.pt", "$(touch owned).pt"])
def test_names_of_checkpoints_are_only_names(name, root, monkeypatch):
    monkeypatch.chdir(root)
    (root / name).write_text("x")
    text = journal.command("no-such.service", str(root), "", checkpoints=(str(root), "*.pt"))
    look = journal.parse("n1", run(text))
    expect_harmless([look.checkpoint or "none"])
    assert look.checkpoint == hostile_input.printable(f"{root}/{name}".split("\n", maxsplit=1)[0])
    assert checkpoint_files.newest(str(root), "*.pt")["name"] == hostile_input.printable(name)
    assert not (root / "owned").exists()


@pytest.mark.parametrize("glob", ["*.pt", "step_[0-9]/x.pt", "[!a]*", "?.pt"])
def test_the_shell_finds_what_the_node_finds(glob, root):
    (root / "step_1").mkdir()
    for number, name in enumerate(["a.pt", "bb.pt", "step_1/x.pt", "step_1/y", ".hidden.pt"]):
        (root / name).write_text("")
        os.utime(root / name, (1000 + number, 1000 + number))
    os.utime(root / "step_1", (2000, 2000))
    expected = checkpoint_files.newest(str(root), glob)["path"]
    assert run(journal.newest_command(str(root), glob)).strip() in (expected, "")


def test_a_pattern_is_no_command(root):
    run(f"cd {shlex.quote(str(root))}; {journal.newest_command(str(root), '*; touch owned; $(touch owned) `touch owned` & touch owned #')}")
    assert not list(root.glob("**/owned"))


# -- folders of the job


def test_folders_that_link_to_each_other_end(root):
    for name in "abc":
        (root / name).mkdir()
        for other in "abc":
            (root / name / f"to-{other}").symlink_to(root / other)
    (root / "a" / "x.pt").write_text("")
    began = time.monotonic()
    assert checkpoint_files.newest(str(root), "**/*.pt")["path"] == str(root / "a/x.pt")
    assert [entry["name"] for entry in job_past.newest(str(root), "**/*.pt")] == ["a/x.pt"]
    assert time.monotonic() - began < 20


def test_folders_without_end_hide_no_checkpoint(root):
    (root / "x.pt").write_text("")
    here = os.getcwd()
    try:
        os.chdir(root)
        for _level in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    assert [entry["name"] for entry in job_past.newest(str(root), "**/*.pt")] == ["x.pt"]
    subprocess.run(["rm", "-rf", str(root / "d")], check=True)


@pytest.mark.parametrize("pattern", ["**", "**/*", "*", "a/**/x", "**/**/x", "./a/x", "a//x", "[ab]/x", ".*", "**/.h", "a/*/*"])
def test_find_agrees_with_glob(pattern, root):
    import glob

    for name in ("a/x", "a/b/x", "a/b/c/x", "b/x", ".h", "a/.h", ".d/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    expected = {os.path.normpath(path) for path in glob.glob(os.path.join(glob.escape(str(root)), pattern), recursive=True)}
    found = [str(root / entry.path) for entry in hostile_input.find(str(root), pattern)]
    assert set(found) == expected - {str(root)}


def test_what_is_no_whole_answer_is_said(root):
    for number in range(300):
        (root / f"{number}").write_text("")
    assert len(hostile_input.find(str(root), "*", whole=True)) == 301
    assert hostile_input.find(str(root / "none"), "*", whole=True) == []
    for limits, text in (({"most": 100}, "holds more than 100 names"), ({"seconds": -1}, "takes longer than")):
        with pytest.raises(hostile_input.Odd, match=text):
            hostile_input.find(str(root), "*", whole=True, **limits)
    with pytest.raises(hostile_input.Odd, match="not a directory"):
        hostile_input.find(str(root / "1"), "*", whole=True)


NAMES = ["a.pt", "b/a.pt", "b/c/a.pt", ".a.pt", "b/.a.pt", "a.pt.tmp", "link/x.pt", "set-aside-1/a.pt", "set-aside-1/b/a.pt"]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sampled_from(["*", "*.pt", "**/*.pt", "*/*.pt", "*/*/*.pt", ".*", "link/*", "set-aside-*/*"]))
def test_all_who_look_for_checkpoints_find_the_same(names, pattern):
    with tempfile.TemporaryDirectory() as place:
        folder, outside = pathlib.Path(place, "ckpt"), pathlib.Path(place, "outside")
        outside.mkdir()
        folder.mkdir()
        (folder / "link").symlink_to(outside)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
        for number, path in enumerate(sorted(folder.rglob("*"))):
            os.utime(path, (1000 + number, 1000 + number), follow_symlinks=False)
        moved = job_folders.checkpoints(str(folder), pattern)
        told = [entry["name"] for entry in job_past.newest(str(folder), pattern)]
        shown = checkpoint_files.newest(str(folder), pattern)
        assert set(told) <= set(moved) and told[:1] == ([os.path.relpath(shown["path"], folder)] if shown else [])
        assert set(told) == {name for name in moved if not name.endswith(".tmp")} or len(told) == job_past.RECENT
        assert not [name for name in moved if name.startswith("set-aside-") or name.startswith("link/")]
        seen_by_shell = run(journal.newest_command(str(folder), pattern)).strip()
        # The shell follows links to folders, and knows no "**".
        if "link/x.pt" not in names and not pattern.startswith((".", "**")):
            assert seen_by_shell == (shown.get("path") or "")


def test_find_ends(root):
    for number in range(300):
        (root / f"{number}").write_text("")
    assert len(hostile_input.find(str(root), "*", most=100)) == 100
    assert hostile_input.find(str(root), "*", seconds=-1) == []
    assert hostile_input.find(str(root / "none"), "*") == []


def test_a_time_that_no_calendar_has_is_none(root):
    (root / "a.pt").write_text("")
    os.utime(root / "a.pt", (-1000, -1000))
    assert checkpoint_files.newest(str(root), "*.pt")["time"] == 0


def test_reports_of_errors_are_the_jobs_own_and_few(root):
    run_folder = root / "none_x" / "attempt_0"
    for rank in ("0", "1", "2", "3", "9" * 30):
        (run_folder / rank).mkdir(parents=True)
    report = json.dumps({"message": {"message": ESCAPES + "\nbad" * 10_000, "extraInfo": 7}})
    (run_folder / "0/error.json").write_text(report)
    (run_folder / "1/error.json").symlink_to("/dev/zero")
    os.mkfifo(run_folder / "2/error.json")
    (run_folder / "3/error.json").write_text('{"message":' * 100_000)
    (run_folder / ("9" * 30) / "error.json").write_text(report)
    (root / "none_y").symlink_to("/")
    found = job_evidence.error_files(str(root))
    assert sorted(str(entry["local_rank"]) for entry in found) == ["0", "None"]
    expect_harmless(json.dumps(entry, ensure_ascii=False) for entry in found)


@given(JSON)
@settings(max_examples=50)
def test_any_report_of_an_error_is_read_or_left_out(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("logs")
    (folder / "run").mkdir()
    (folder / "run/error.json").write_text(json.dumps({"message": value}))
    for entry in job_evidence.error_files(str(folder)):
        expect_harmless([entry["text"]], 500)


@pytest.mark.parametrize("text", ["[1]", "7", '{"release": ["r"]}', "[" * 100_000, '{"release": "other"}'])
def test_a_marker_that_is_odd_marks_nothing(text, root):
    (root / "state/done").write_text(text)
    assert not job_folders.finished(str(root), "r")
    (root / "state/done").write_text('{"release": "r"}')
    assert job_folders.finished(str(root), "r")


def test_a_report_of_problems_is_harmless():
    expect_harmless(problems.report([problems.Problem("n1", "", ESCAPES, ESCAPES)]).split("\n"))


def test_a_process_whose_name_has_commas_still_holds_its_gpu():
    (found,) = job_evidence.gpu_processes("GPU-1, 77, /tmp/a, 1, 5 MiB, b, 1024 MiB\n", lambda _pid: "")
    assert (found["pid"], found["used_mib"]) == (77, 1024)


def test_many_slow_reports_of_a_job_hold_nobody_up(tmp_path, monkeypatch):
    """Each takes long to parse: whatever was read until the time is up is told."""
    monkeypatch.setattr(job_evidence, "REPORT_SECONDS", 0.5)
    slow = "[" + ",".join(['"\\ud800"'] * 20_000) + "]"
    for number in range(150):
        folder = tmp_path / "run" / "attempt_0" / str(number)
        folder.mkdir(parents=True)
        (folder / "error.json").write_text(slow)
    whole = tmp_path / "run" / "attempt_0" / "150"
    whole.mkdir()
    (whole / "error.json").write_text('{"message": "ValueError: bad"}')
    began = time.thread_time()
    assert [report["text"] for report in job_evidence.error_files(str(tmp_path))] == ["ValueError: bad"]
    assert time.thread_time() - began < 30
