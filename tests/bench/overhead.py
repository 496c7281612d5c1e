# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Training steps a second under unit and supervisor, against torchrun by hand on the same nodes; interleaved pairs.

Steps do nothing but two all_reduces, so that whatever the supervisor costs shows most.
usage: tests/bench/overhead.py [PAIRS] [SECONDS]    (as root)
"""
from __future__ import annotations

import os
import random
import statistics
import sys
import time

from plain import STATIC, Plain, open_job, stop


def rate(steps_since, job, seconds):
    """Steps a second over a while, after the first ones."""
    job.wait(lambda: len(steps_since(0)) > 3, 120, "training")
    start = time.time()
    time.sleep(seconds)
    steps = [item for item in steps_since(start) if item[1] <= start + seconds]
    return (steps[-1][0] - steps[0][0]) / (steps[-1][1] - steps[0][1])


def supervised(job, seconds):
    since = time.time()
    job.start_again()
    try:
        return rate(lambda moment: job.steps(max(since, moment)), job, seconds)
    finally:
        stop(job)


def by_hand(job, seconds):
    plain = Plain(job, STATIC, restarts=0, environment="--setenv=TRAIN_PAUSE=0")
    try:
        return rate(lambda moment: plain.steps(max(plain.since, moment)), job, seconds)
    finally:
        plain.stop()


def interval(values, chance, rounds=10000):
    """95 % interval of the median, by bootstrap."""
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _round in range(rounds))
    return medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]


def main(pairs: int, seconds: float) -> int:
    job = open_job()
    ratios = []
    folder = f"/run/systemd/system/{job.unit}.d"
    try:
        for machine in job.machines:
            machine.shell(f"mkdir -p {folder}; printf '[Service]\\nEnvironment=TRAIN_PAUSE=0\\n' >{folder}/bench.conf; "
                          "systemctl daemon-reload")
        for number in range(pairs):
            order = [supervised, by_hand] if number % 2 else [by_hand, supervised]
            rates = {function: function(job, seconds) for function in order}
            ratios.append(rates[supervised] / rates[by_hand])
            print(f"{number + 1:3} supervised {rates[supervised]:8.1f} steps/s, by hand {rates[by_hand]:8.1f} steps/s, "
                  f"ratio {ratios[-1]:.3f}", flush=True)
        for machine in job.machines:
            machine.shell(f"rm -r {folder}; systemctl daemon-reload")
    finally:
        if not os.environ.get("FAULTS_KEEP"):
            job.hall.close()
    low, high = interval(ratios, random.Random(1))
    print(f"median ratio {statistics.median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f} ({pairs} pairs)")
    return 0 if high >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, float(sys.argv[2]) if len(sys.argv) > 2 else 12))
