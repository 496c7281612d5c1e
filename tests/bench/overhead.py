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

# Steps a second under the unit, as a part of those by hand.
AIM = 0.99


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


def by_hand(job, seconds, environment):
    plain = Plain(job, STATIC, restarts=0, environment=environment)
    try:
        return rate(lambda moment: plain.steps(max(plain.since, moment)), job, seconds)
    finally:
        plain.stop()


def pairs(job, number, seconds, environment):
    """(steps a second supervised, by hand) of interleaved runs, the first of a pair taking turns."""
    folder = f"/run/systemd/system/{job.unit}.d"
    lines = "\n".join(f"Environment={key}={value}" for key, value in environment.items())
    for machine in job.machines:
        machine.shell(f"mkdir -p {folder}; printf '[Service]\n{lines}\n' >{folder}/bench.conf; systemctl daemon-reload")
    for count in range(number):
        if count % 2:
            under_unit = supervised(job, seconds)
            yield under_unit, by_hand(job, seconds, environment)
        else:
            plain = by_hand(job, seconds, environment)
            yield supervised(job, seconds), plain
    for machine in job.machines:
        machine.shell(f"rm -r {folder}; systemctl daemon-reload")


def interval(values, chance, rounds=10000):
    """95 % interval of the median, by bootstrap."""
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _round in range(rounds))
    return medians[int(rounds * 0.025)], medians[int(rounds * 0.975)]


def main(number: int, seconds: float) -> dict:
    job = open_job()
    ratios, rates = [], []
    try:
        for under_unit, plain in pairs(job, number, seconds, {"TRAIN_PAUSE": "0"}):
            ratios.append(under_unit / plain)
            rates.append([under_unit, plain])
            print(f"{len(ratios):3} supervised {under_unit:8.1f} steps/s, by hand {plain:8.1f} steps/s, ratio {ratios[-1]:.3f}", flush=True)
    finally:
        if not os.environ.get("FAULTS_KEEP"):
            job.hall.close()
    low, high = interval(ratios, random.Random(1))
    print(f"median ratio {statistics.median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f} ({number} pairs)")
    if high < AIM:
        raise AssertionError(f"the interval neither includes nor exceeds {AIM}")
    return {"median_ratio": statistics.median(ratios), "interval": [low, high], "pairs": number, "steps_per_second": rates}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, float(sys.argv[2]) if len(sys.argv) > 2 else 12)
