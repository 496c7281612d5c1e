# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Causes, progress, local checks and the command line of the supervisor."""
from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

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
