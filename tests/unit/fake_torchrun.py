# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for torchrun where many starts are needed: an agent, a worker in a session of its own, a grandchild.

Behaves as torchrun does where the supervisor can tell: exit code 1 for every failure and for SIGTERM, a report of the
failed worker on stderr, error.json, and orphans when the agent is killed.

usage: fake_torchrun.py FOLDER NODE_RANK STEPS [--master-port=N]; a file FOLDER/fail with the node's rank makes its
worker fail at once.
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

REPORT = """
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : lab
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: {pid})
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================"""


def worker(folder, rank, steps):
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    mine = folder / f"checkpoints-{rank}"
    mine.mkdir(exist_ok=True)
    step = max([int(path.name.split("-")[1]) for path in mine.iterdir()] or [0])
    helper = subprocess.Popen(["sleep", "1000"], start_new_session=True)     # a DataLoader's child, say
    (folder / f"worker-{rank}").write_text(str(os.getpid()))
    (folder / f"agent-{rank}").write_text(str(os.getppid()))
    while step < steps:
        fail = folder / "fail"
        if fail.exists() and fail.read_text() == str(rank):
            raise ValueError("bad sample")
        time.sleep(0.1)
        step += 1
        if step % 5 == 0 or stopping:
            (mine / f"step-{step}").write_text("x")
            print(f"rank {rank} step {step}", flush=True)
        if stopping:
            sys.exit(0)
    assert helper.poll() is None


def agent(arguments):
    process = subprocess.Popen([sys.executable, __file__, "--worker", *arguments[:3]], start_new_session=True)
    stopping = []

    def stop(_number, _frame):
        stopping.append(1)
        process.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    code = process.wait()
    if stopping:
        sys.exit(1)
    if code:
        if code > 0:
            with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
                json.dump({"message": {"message": "ValueError: bad sample", "extraInfo": {"timestamp": "0"}}}, file)
        print(REPORT.format(rank=arguments[1], code=code, pid=process.pid), file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        agent(sys.argv[1:])
