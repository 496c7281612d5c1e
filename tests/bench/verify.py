# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""How often the verification names a slow node, or a slow link, that lies at a random place, and whether it accuses others.

usage: tests/bench/verify.py [PLACEMENTS] [NODES] [SEED]    (as root; 20 placements each on 8 nodes; 0 measures healthy nodes once)
"""
from __future__ import annotations

import pathlib
import random
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "verify"))
from lab import MINIMUM, Lab, Verification

# What two cores carry at once, in Mbit/s; the ports of up to eight nodes have their usual speed.
TOGETHER = 1600


def inventory(count):
    """The tests' inventory with any number of nodes."""
    folder = ROOT / "build" / "bench-verify"
    (folder / "group_vars").mkdir(parents=True, exist_ok=True)
    for name in ("all.yml", "train.yml"):
        text = (ROOT / "tests/verify/inventory/group_vars" / name).read_text()
        (folder / "group_vars" / name).write_text(text.replace("../../../examples", f"{ROOT}/examples"))
    hosts = "".join(f"    verify{number + 1}:\n      ansible_host: 198.18.40.{number + 11}\n" for number in range(count))
    (folder / "hosts.yml").write_text(f"---\ntrain:\n  hosts:\n{hosts}")
    return folder


def spent(found):
    seconds = found.report.get("seconds", {})
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value)
    tournament = found.report.get("tournament", {})
    return f"{found.seconds:.1f} s ({parts}), {tournament.get('rounds')} rounds, {tournament.get('confirmed')} pairs again"


def judge(found, wanted):
    """Whether exactly what was planted was named, and whether anything else was."""
    named = {(kind, frozenset({host, peer} - {None})) for kind, host, peer in found.culprits if host}
    return wanted in named, bool(named - {wanted})


def placements(lab, count, dice, share):
    """Plant a fault at a random place, verify, heal; print and count."""
    result = {}
    names = [node.name for node in lab.nodes]
    for kind in ("node", "link"):
        hits, false, times = 0, 0, []
        for turn in range(count):
            one, other = dice.sample(lab.nodes, 2)
            rate = f"{dice.choice((20, 40, 80)) * share:.0f}mbit"
            if kind == "node":
                one.limit(rate)
                wanted = ("node", frozenset({one.name}))
            else:
                one.limit_to(other, rate)
                other.limit_to(one, rate)
                wanted = ("link", frozenset({one.name, other.name}))
            try:
                found = Verification(lab, "-e", "nccl_verify_pairwise=always", minimum=MINIMUM * share)
            finally:
                one.heal()
                other.heal()
            hit, accused = judge(found, wanted)
            hits, false, times = hits + hit, false + accused, [*times, found.seconds]
            print(f"{kind} {turn + 1:2}: {' - '.join(sorted(wanted[1], key=names.index))} at {rate}: {'named' if hit else 'MISSED'}"
                  f"{', OTHERS ACCUSED: ' + str(found.culprits) if accused else ''}; {spent(found)}", flush=True)
        if count:
            result[f"slow {kind}"] = {"placements": count, "named": hits, "others_accused": false, "median_seconds": statistics.median(times)}
            print(f"slow {kind}: {hits} of {count} named, {false} of {count} with a false accusation, "
                  f"{statistics.median(times):.1f} s in the median", flush=True)
    return result


def main(count: int, nodes: int, seed: int) -> dict:
    """Healthy nodes first, then faults at random places."""
    result = {"nodes": nodes, "seed": seed}
    share = min(1.0, TOGETHER / nodes / 200)
    lab = Lab(inventory(nodes), port=f"{200 * share:.0f}mbit")
    try:
        lab.power_on()
        lab.heal()
        lab.playbook("provision")
        for pairwise in ("never", "always"):
            found = Verification(lab, "-e", f"nccl_verify_pairwise={pairwise}", minimum=MINIMUM * share)
            print(f"healthy, pairs {pairwise}: {found.report.get('verdict')}, culprits {found.culprits}; {spent(found)}", flush=True)
            for failure in found.report.get("failures", []):
                print(f"    {failure}", flush=True)
            result[f"healthy, pairs {pairwise}"] = {"verdict": found.report.get("verdict"), "wall_seconds": found.seconds,
                                                    "seconds": found.report.get("seconds")}
        result.update(placements(lab, count, random.Random(seed), share))
    finally:
        lab.close()
    return result


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    main(*(numbers + [20, 8, 1][len(numbers):]))
