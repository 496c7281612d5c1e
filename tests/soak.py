# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random faults on four booted nodes for some minutes: counts, prints a table, exits 1 if one was not recovered.

usage: tests/soak.py MINUTES [SEED]     (as root; FAULTS_KEEP=1 leaves the nodes running)
"""
from __future__ import annotations

import collections
import os
import pathlib
import random
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "faults"))
import faults
from job import FOREVER, Job
from machines import Hall


faults.AWAY, faults.PARTITION = 60, 30


def main(minutes: float, seed: int) -> int:
    chance = random.Random(seed)
    print(f"random faults for {minutes:g} minutes, seed {seed}", flush=True)
    hall = Hall()
    hall.power_on()
    job = Job(hall)
    job.deploy()
    results, lost = [], []
    deadline = time.monotonic() + 60 * minutes
    try:
        while time.monotonic() < deadline:
            fault, number = faults.pick(chance)
            time.sleep(chance.uniform(1, 6))
            print(f"{len(results) + len(lost) + 1:4} {fault.__name__} on fault{number + 1}: ", end="", flush=True)
            try:
                row = faults.recovered(job, fault, number)
            except (AssertionError, RuntimeError) as error:
                lost.append((fault.__name__, number))
                print(f"NOT RECOVERED: {error}", flush=True)
                job.hall.power_on()
                job.target(FOREVER)
                if set(job.units()) != {"active"}:
                    job.start_again()
                job.trains(0, 180)
            else:
                results.append(row)
                print(f"trains again after {row['to_step']:.1f} s ({row['start_from_return']:.1f} s + torch's own "
                      f"{row['torch']:.1f} s since recovery was possible)", flush=True)
        steps = job.finish()
        print(f"finished: step {steps}, every step done once on every node")
    finally:
        if not os.environ.get("FAULTS_KEEP"):
            hall.close()
    rows = collections.defaultdict(list)
    for row in results:
        rows[row["fault"]].append(row)
    print(f"\n{'fault':20} {'times':>5} {'median s':>9} {'worst s':>8}   from the moment recovery is possible to the new generation")
    for name, found in sorted(rows.items()):
        times = [row["start_from_return"] for row in found]
        print(f"{name:20} {len(found):5} {statistics.median(times):9.1f} {max(times):8.1f}")
    if results:
        print(f"{'all':20} {len(results):5} {statistics.median(row['start_from_return'] for row in results):9.1f} "
              f"{max(row['start_from_return'] for row in results):8.1f}")
    print(f"{len(results)} of {len(results) + len(lost)} recovered")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)))
