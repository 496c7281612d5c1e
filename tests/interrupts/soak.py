# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""train.yml killed at random moments: counts, prints a line each, exits 1 if a run after one did not converge.

usage: tests/interrupts/soak.py [TIMES] [SEED]     (as root; INTERRUPTS_KEEP=1 leaves the nodes running)
"""
from __future__ import annotations

import os
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from cut import FOREVER, Cut


def main(times: int, seed: int) -> int:
    chance = random.Random(seed)
    print(f"{times} interrupted runs, seed {seed}", flush=True)
    cut = Cut()
    cut.lab("absent")
    cut.lab("present")
    cut.target(FOREVER)
    lost = []
    began = time.monotonic()
    cut.converged()
    # A run from nothing takes longest; those that follow are killed somewhere in that time, or are over before.
    long = time.monotonic() - began
    short = 12.0
    try:
        for number in range(times):
            # A new release is a switch; another folder for torch is an installation as well.
            install = chance.random() < 0.3
            cut.round += 1
            if install:
                for node in cut.nodes:
                    node.shell(f"rm -rf /opt/old; [ ! -d {cut.root} ] || true")
                cut.root = f"/opt/onprem.torch-{number}"
            moment = chance.uniform(0.5, long if install else short)
            victim = chance.choice(["ansible-playbook", "ansible-playbook with its forks", "the modules"])
            process = cut.start()
            time.sleep(moment)
            over = process.poll() is not None
            line = f"{number + 1:3} {'installation' if install else 'switch':12} {victim} killed after {moment:4.1f} s" + (" (was over)" if over else "")
            try:
                if over:
                    process.communicate()
                elif victim == "ansible-playbook":
                    cut.kill_main(process)
                elif victim == "ansible-playbook with its forks":
                    cut.kill_play(process)
                else:
                    cut.kill_modules(process)
                cut.check()
                cut.converged()
                for node in cut.nodes:  # room for the next
                    node.shell(f"find /opt -mindepth 1 -maxdepth 1 ! -path {cut.root} -exec rm -rf {{}} +")
                print(f"{line}: converged", flush=True)
            except AssertionError as error:
                lost.append(number + 1)
                print(f"{line}: NOT CONVERGED: {error}", flush=True)
                cut.converged()
        steps = cut.finish()
        print(f"finished: step {steps}, every step done once on every node")
    finally:
        if not os.environ.get("INTERRUPTS_KEEP"):
            cut.lab("absent")
    print(f"{times - len(lost)} of {times} converged on the next run")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)))
