# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What torchrun's own restarts make of one killed worker, beside the supervisors in the same lab.

usage: tests/bench/recovery.py [TRIES] [SECONDS]    (as root)
"""
from __future__ import annotations

import os
import random
import sys
import time

from plain import C10D, STATIC, Plain, open_job


def one(job, rendezvous, seconds):
    """Seconds from the kill to the next training, None where it does not come."""
    plain = Plain(job, rendezvous, restarts=3)
    try:
        job.wait(lambda: plain.steps(plain.since), 120, "training by hand")
        machine = random.choice(job.machines)
        pid, moment = machine.pid("worker"), time.time()
        machine.shell(f"kill -KILL {pid}")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(1)
            after = plain.steps(moment + 1)     # a step in the first second may have been under way
            if after:
                return after[0][1] - moment
        return None
    finally:
        plain.stop()


def supervised(job):
    """The same for the supervisors; raises AssertionError where training does not come back."""
    time.sleep(5)
    generation, machine = job.state()["generation"], random.choice(job.machines)
    pid, moment = machine.pid("worker"), time.time()
    machine.shell(f"kill -KILL {pid}")
    return job.trains(generation)[1] - moment


def main(tries: int, seconds: float) -> dict:
    job = open_job()
    result = {}
    try:
        for name, rendezvous in (("static, --max-restarts=3", STATIC), ("c10d, --max-restarts=3", C10D)):
            times = [one(job, rendezvous, seconds) for _try in range(tries)]
            result[name] = times
            good = sorted(value for value in times if value is not None)
            print(f"{name:26} {len(good)} of {tries} train again within {seconds:g} s"
                  + (f", after {', '.join(f'{value:.0f}' for value in good)} s" if good else ""), flush=True)
        job.start_again()
        job.trains(0)
        times = result["supervisors"] = sorted(supervised(job) for _try in range(tries))
        print(f"{'supervisors':26} {len(times)} of {tries} train again, after {', '.join(f'{value:.0f}' for value in times)} s")
    finally:
        if not os.environ.get("FAULTS_KEEP"):
            job.hall.close()
    return {"seconds_to_train_again": result, "tries": tries}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, float(sys.argv[2]) if len(sys.argv) > 2 else 90)
