# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Causes, progress, local checks and the command line of the supervisor."""
from __future__ import annotations

import errno
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from supervisor_support import PATH, load

supervisor = load()

# As torch 2.13 prints it: lab2's local rank 0 fell over its peer, local rank 1 was killed.
TWO_FAILURES = """\
[rank2]: Traceback (most recent call last):
[rank2]: RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [198.18.32.11]:41234
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_08:00:01
  host      : lab2
  rank      : 3 (local_rank: 1)
  exitcode  : -9 (pid: 812)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 812
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_08:00:01
  host      : lab2
  rank      : 2 (local_rank: 0)
  exitcode  : 1 (pid: 811)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================""".splitlines()


def report(text):
    return {"message": {"message": text, "extraInfo": {"py_callstack": "", "timestamp": "1"}}}


def test_a_killed_worker_comes_before_an_echo():
    cause = supervisor.cause_from(1, None, TWO_FAILURES)
    assert (cause["reason"], cause["signal"], cause["rank"], cause["local_rank"]) == ("signal", "SIGKILL", 3, 1)
    assert cause["own"] and not cause["echo"]
    assert supervisor.describe(dict(cause, host="lab2")) == "lab2: rank 3 (local rank 1): killed by SIGKILL".replace(
        "lab2: rank", "lab2, rank")


def test_an_exception_comes_before_workers_torchrun_killed():
    tail = [line.replace("Connection closed by peer", "mat1 and mat2 shapes cannot be multiplied") for line in TWO_FAILURES]
    cause = supervisor.cause_from(1, None, tail)
    assert (cause["rank"], cause["exit_code"], cause["echo"]) == (2, 1, False)
    assert "mat1 and mat2" in cause["error"]


def test_worker_that_failed_before_torchrun_was_told_to_end():
    tail = [line for line in TWO_FAILURES if "rank2" not in line]
    cause = supervisor.cause_from(-15, report("ValueError: bad"), tail)
    assert supervisor.describe(dict(cause, host="lab2")) == "lab2, rank 2 (local rank 0): exit code 1: ValueError: bad"


def test_error_json_is_believed_first():
    cause = supervisor.cause_from(1, report("OSError: [Errno 28] No space left on device"), [])
    assert (cause["reason"], cause["error"], cause["own"]) == ("error", "OSError: [Errno 28] No space left on device", True)


def test_our_own_sigterm_is_no_cause():
    cause = supervisor.cause_from(1, report("SignalException: Process 5 got signal: 15"), [])
    assert not cause["own"] and cause["error"] is None


@pytest.mark.parametrize("text", [
    "RuntimeError: Connection reset by peer", "torch.distributed.DistBackendError: NCCL error: remote process exited",
    "RuntimeError: [c10d] Timed out after 61 seconds waiting for clients", "RuntimeError: Broken pipe"])
def test_echoes(text):
    assert supervisor.cause_from(1, report(text), [])["echo"]


@pytest.mark.parametrize("text", ["ValueError: bad", "torch.OutOfMemoryError: CUDA out of memory", "KeyError: 'x'"])
def test_no_echoes(text):
    assert not supervisor.cause_from(1, report(text), [])["echo"]


@pytest.mark.parametrize("broken", [{}, {"message": None}, {"message": []}, {"message": {"message": {"a": 1}}}])
def test_unexpected_error_json(broken):
    assert supervisor.cause_from(1, broken, [])["exit_code"] == 1


def test_last_words_without_error_json():
    tail = ["[rank 1] [rank1]: Traceback (most recent call last):", "[rank 1] [rank1]:   File \"train.py\", line 3",
            "[rank 0] [rank0]: RuntimeError: Connection closed by peer", "[rank 1] [rank1]: ValueError: bad sample",
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"]
    cause = supervisor.cause_from(1, None, tail)
    assert cause["error"] == "ValueError: bad sample" and not cause["echo"]


def test_killed_torchrun():
    cause = supervisor.cause_from(-9, None, [])
    assert supervisor.describe(dict(cause, host="lab1")) == "lab1: killed by SIGKILL: torchrun itself was killed"


def test_watch_counts_only_what_is_new(tmp_path):
    watch = supervisor.Watch(str(tmp_path), "step-*")
    (tmp_path / "step-1").write_text("")
    watch.look()
    assert watch.count == 0, "what lay there before is no progress"
    (tmp_path / "step-2").write_text("")
    (tmp_path / "other").write_text("")
    watch.look()
    watch.look()
    assert watch.count == 1 and watch.newest["path"].endswith("step-2")
    os.utime(tmp_path / "step-2", (2e9, 2e9))
    watch.look()
    assert watch.count == 1, "a checkpoint written again is no progress: the job may be going in a circle"
    (tmp_path / "step-1").unlink()
    (tmp_path / "step-2").unlink()
    watch.look()
    (tmp_path / "step-2").write_text("")
    watch.look()
    assert watch.count == 1


def test_watch_of_a_single_file(tmp_path):
    watch = supervisor.Watch(str(tmp_path), "last.pt")
    watch.look()
    (tmp_path / "last.pt").write_text("")
    watch.look()
    os.utime(tmp_path / "last.pt", (2e9, 2e9))
    watch.look()
    assert watch.count == 2


def loop_of_links(folder):
    """Folders that link to each other: who follows them walks for ever."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    for name in "cdefgh":
        (folder / "a" / name).symlink_to("../b")
        (folder / "b" / name).symlink_to("../a")


def deep_folders(folder):
    """More levels than Python's stack has, and than a path has room for."""
    place = os.open(folder, os.O_RDONLY)
    for _level in range(1500):
        os.mkdir("d", dir_fd=place)
        inner = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)


def remove_deep(folder):
    subprocess.run(["rm", "-rf", str(folder)], check=True)      # pytest's own removal is recursive


@pytest.mark.parametrize("pattern", ["**/*.pt", "**", "**/**/*.pt"])
@pytest.mark.parametrize("odd", [loop_of_links, deep_folders])
def test_watch_ends_whatever_folders_there_are(tmp_path, odd, pattern):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    odd(folder)
    watch = supervisor.Watch(str(folder), pattern)

    def looks():
        watch.look()
        (folder / "x").mkdir()
        (folder / "x" / "1.pt").write_text("")
        watch.look()

    thread = threading.Thread(target=looks, daemon=True)
    thread.start()
    thread.join(120)
    try:
        assert not thread.is_alive(), "it looks for ever"
        assert watch.count == 1 and watch.newest
    finally:
        remove_deep(folder)


@pytest.mark.parametrize("pattern, name", [("**/last.pt", "last.pt"), ("**/last.pt", "run/last.pt"), ("*", "last.pt"), ("*/last.pt", "run/last.pt")])
def test_what_was_set_aside_is_no_checkpoint(tmp_path, pattern, name):
    """After a restart of the job the only file is again the only one, and each rewrite of it counts."""
    for path in (tmp_path / "set-aside-20261130T120000Z" / name, tmp_path / name):
        path.parent.mkdir(parents=True, exist_ok=True)
    watch = supervisor.Watch(str(tmp_path), pattern)
    (tmp_path / "set-aside-20261130T120000Z" / name).write_text("")
    watch.look()
    assert watch.newest is None
    for moment in range(3):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (2e9 + moment, 2e9 + moment))
        os.utime((tmp_path / name).parent, (2e9 + moment, 2e9 + moment))
        watch.look()
    assert watch.count == 3 and watch.newest["path"] == str(tmp_path / name)


def comes(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("error", [RecursionError(), OSError(errno.EIO, "Input/output error"), ValueError("odd"), MemoryError()])
def test_watch_survives_a_look_that_fails(tmp_path, monkeypatch, capfd, error):
    watch = supervisor.Watch(str(tmp_path), "*")
    look, failed = watch.look, []

    def first_fails():
        if not failed:
            failed.append(1)
            raise error
        look()

    monkeypatch.setattr(watch, "look", first_fails)
    watch.start()
    comes(lambda: failed)
    for number in range(3):
        (tmp_path / f"step-{number}").write_text("")
        asked = watch.ask()
        comes(lambda: watch.answered >= asked)
    assert watch.count == 2 and watch.newest["path"].endswith("step-2")
    assert f"cannot look for checkpoints in {tmp_path}: {type(error).__name__}" in capfd.readouterr().out


def alone(folder, *command):
    """A supervisor whose loop does not run, and whose look for checkpoints never ends."""
    (folder / "checkpoints").mkdir()
    options = supervisor.parse(["--job", "j", "--host", "lab1", "--node-rank", "0", "--nnodes", "1", "--state-dir", str(folder / "state"),
                                "--checkpoint-dir", str(folder / "checkpoints"), "--release", "r1", "--", *command])
    os.makedirs(options.state_dir)
    return supervisor.Supervisor(options, supervisor.Limits(), b"")


def test_a_look_that_hangs_keeps_no_end_back(tmp_path):
    """The end is told all the same; what is ordered meanwhile is not taken for its reason."""
    made = alone(tmp_path, "false")
    made.member.phase, made.member.generation = "running", 1
    made.perform(("start", 1), time.monotonic())

    def turned(condition):
        made.reap(time.monotonic())
        return condition()

    comes(lambda: turned(lambda: made.end))
    assert made.wake_at(time.monotonic()) <= made.end.until, "the loop would sleep on"
    made.member.receive({"order": "stop", "generation": 1})
    for action in made.member.step(time.monotonic()):
        made.perform(action, time.monotonic())
    comes(lambda: turned(lambda: made.member.phase == "idle"))
    assert (made.member.exit["code"], made.member.exit["ordered"], made.end) == (1, False, None)


def test_the_end_is_told_with_the_checkpoint_that_was_written_last(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor.Watch, "PERIOD", 3600.0)
    made = alone(tmp_path, "sh", "-c", f"echo > {tmp_path}/checkpoints/step-1")
    made.LAST_LOOK = 3600.0
    made.watch.start()
    comes(lambda: made.watch.seen is not None)
    made.member.phase, made.member.generation = "running", 1
    made.perform(("start", 1), time.monotonic())

    def ended():
        made.reap(time.monotonic())
        return made.member.phase == "idle"

    comes(ended)
    assert made.report()["checkpoint"]["path"].endswith("/step-1") and made.report()["checkpoints"] == 1


class Threads:
    """threading.Thread where there are no more."""

    def __init__(self, **_options):
        pass

    def start(self):
        raise RuntimeError("can't start new thread")


ERRORS = [OSError(errno.EMFILE, "Too many open files"), RecursionError("deep"), ValueError("odd\x1b[2J"), MemoryError()]


@pytest.mark.parametrize("error", [*ERRORS, None])
@pytest.mark.parametrize("kind", ["checked", "stop"])
def test_what_fails_in_the_background_is_an_answer_too(tmp_path, monkeypatch, kind, error):
    """Without one the node would check for ever, and a unit that has to end would not."""
    made = alone(tmp_path, "true")

    def fails(*_arguments):
        raise error

    monkeypatch.setattr(supervisor, "run_checks", fails)
    monkeypatch.setattr(supervisor, "why_ended", fails)
    if error is None:
        monkeypatch.setattr(supervisor.threading, "Thread", Threads)
    if kind == "checked":
        made.member.connected, made.member.checking = True, True
        made.perform(("check",), time.monotonic())
    else:
        made.ask_why()
    comes(lambda: made.events)
    made.event(*made.events.popleft(), time.monotonic())
    if kind == "checked":
        (problem,) = made.member.problems
        assert not made.member.checking
        assert problem["text"].startswith("the local checks cannot be made: ") and "\x1b" not in problem["text"]
        assert (type(error).__name__ if error else "can't start new thread") in problem["text"]
        supervisor.check_report(dict(made.report(), lines=0))
    else:
        assert made.member.leaving and made.member.why == "unknown"


def test_a_port_that_cannot_be_asked_for_is_a_problem(monkeypatch):
    def none_left(*_arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(supervisor.socket, "socket", none_left)
    assert [problem["text"] for problem in supervisor.run_checks([("port", "29500")], None)] == [
        "port 29500 cannot be used: Too many open files"]


def test_checks(tmp_path):
    release = tmp_path / "releases" / "abc"
    release.mkdir(parents=True)
    (tmp_path / "current").symlink_to(release)
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        texts = {problem["check"]: problem["text"] for problem in supervisor.run_checks([
            ("shm", str(1 << 60)), ("disk", f"{tmp_path}:{1 << 60}"), ("release", f"{tmp_path}/current:abd"),
            ("port", str(port)), ("gpus", "64")], None)}
    assert texts["shm"].startswith("/dev/shm has ") and texts["shm"].endswith(" free, 1.05e+06 TiB expected")
    assert str(tmp_path) in texts["disk"]
    assert texts["release"] == f"{tmp_path}/current leads to abc, release abd expected"
    assert texts["port"].startswith(f"port {port} is held by another process")
    assert texts["gpus"].endswith("GPU(s) answer, 64 expected")
    assert supervisor.run_checks([("shm", "1"), ("disk", f"{tmp_path}:1"), ("release", f"{tmp_path}/current:abc"),
                                  ("port", str(port)), ("gpus", "0")], None) == []


def test_missing_folder_is_a_problem_with_its_name():
    (problem,) = supervisor.run_checks([("disk", "/nowhere:1")], None)
    assert problem["text"] == "/nowhere cannot be used: No such file or directory"


def run(*arguments):
    return subprocess.run([sys.executable, str(PATH), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=20, check=False)


@pytest.mark.parametrize("change, text", [
    ({"--node-rank": "2"}, "--node-rank 2 is not within --nnodes 2"),
    ({"--check": "gpus=many"}, "--check gpus=many is not understood"),
    ({"--coordinator": "nowhere"}, "--coordinator ADDRESS:PORT are needed"),
    ({"--secret-file": "/nowhere"}, "lab1: /nowhere: No such file or directory"),
])
def test_wrong_usage_is_one_sentence(tmp_path, change, text):
    options = {"--job": "j", "--host": "lab1", "--node-rank": "0", "--nnodes": "2", "--coordinator": "127.0.0.1:1",
               "--secret-file": "/dev/null", "--state-dir": str(tmp_path), **change}
    done = run(*[word for item in options.items() for word in item], "--", "true")
    assert done.returncode == supervisor.EXIT_USAGE
    assert text in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_command_that_cannot_be_started(tmp_path):
    done = run("--job", "j", "--host", "lab1", "--node-rank", "0", "--nnodes", "1", "--state-dir", str(tmp_path),
               "--max-restarts", "0", "--", "/nowhere/python")
    assert done.returncode == supervisor.EXIT_FAILED
    assert "cannot start /nowhere/python: No such file or directory" in done.stdout
