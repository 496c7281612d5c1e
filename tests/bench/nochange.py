# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""A provision that changes nothing, on 2, 8 and 32 booted nodes, beside a bare script over parallel SSH with the same checks.

On the way: what torch costs a node, and what comes from outside. The nodes and this control node share the machine's cores.
usage: tests/bench/nochange.py [NODES...]    (as root)
"""
from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import statistics
import sys

from measure import PROFILE, ROOT, Cost, cost, verdict

sys.path.insert(0, str(ROOT / "tests" / "verify"))
from lab import Lab

FOLDER, WHEELHOUSE = ROOT / "build" / "bench-nodes", ROOT / "build" / "bench-wheelhouse"
SUBNET = "198.18.64"
COUNTS = (2, 8, 32)
# Seconds of a provision that changes nothing, by nodes; modules on a node; seconds of torch on a node.
WALL, MODULES, INSTALL, THERE = {2: 6.0, 8: 12.0, 32: 45.0}, 10, 8.0, 0.5
RECAP = re.compile(r"^(\S+) +: ok=\d+ +changed=(\d+)", re.MULTILINE)
TORCH = "Provide the environment with torch"
# Ansible runs every module through the interpreter, so a wrapper of it counts them.
COUNTER = "/usr/local/bin/counted-python3"


def inventory(nodes: int) -> pathlib.Path:
    """The quick start's lab with any number of nodes, a network of its own and a wheelhouse that starts empty."""
    (FOLDER / "group_vars").mkdir(parents=True, exist_ok=True)
    (FOLDER / "group_vars" / "all.yml").write_text(f"---\nlab_bridge: onpremN0\nlab_subnet: {SUBNET}.0/24\n")
    shutil.copy(ROOT / "inventories/lab/group_vars/train.yml", FOLDER / "group_vars" / "train.yml")
    hosts = "".join(f"    bench{number + 1}:\n      ansible_host: {SUBNET}.{number + 11}\n" for number in range(nodes))
    settings = f"    torchrun_source: {ROOT}/examples\n    pytorch_wheelhouse: {WHEELHOUSE}\n"
    (FOLDER / "hosts.yml").write_text(f"---\ntrain:\n  vars:\n{settings}  hosts:\n{hosts}")
    return FOLDER


def play(name: str, *options: str, profile: bool = False) -> Cost:
    return cost("ansible-playbook", f"playbooks/{name}.yml", "-i", FOLDER, *options, **(PROFILE if profile else {}))


def changes(done: Cost) -> int:
    return sum(int(changed) for _host, changed in RECAP.findall(done.output))


def seconds_of(done: Cost, task: str) -> float:
    return sum(seconds for name, seconds in done.tasks if name.endswith(task))


def modules(lab: Lab) -> float:
    """Modules that a provision without changes runs on a node."""
    for node in lab.nodes:
        node.shell(f"printf '#!/bin/sh\\necho >>/run/modules\\nexec /usr/bin/python3 \"$@\"\\n' >{COUNTER} && chmod +x {COUNTER} && "
                   "rm -f /run/modules && touch /run/modules && chmod 666 /run/modules")
    done = play("provision", "-e", f"ansible_python_interpreter={COUNTER}")
    if changes(done):
        raise RuntimeError(f"something changed:\n{done.output[-3000:]}")
    counted = [len(node.shell("cat /run/modules; rm /run/modules").splitlines()) for node in lab.nodes]
    return max(counted)


def bare(lab: Lab) -> Cost:
    addresses = [f"{SUBNET}.{number + 11}" for number in range(len(lab.nodes))]
    return cost(sys.executable, ROOT / "tests/bench/bare.py", ROOT / "tests/bench/checks.sh", FOLDER / ".state" / "id_ed25519", "ops", *addresses)


def wheels() -> int:
    """Bytes in the wheelhouse: what came for it, from an index or from a file of this machine."""
    return sum(path.stat().st_size for path in WHEELHOUSE.rglob("*.whl"))


def unchanged(nodes: int, lab: Lab, times: int = 3) -> dict:
    """Medians of runs in turns, so that both sides see the same machine."""
    runs, floors = [], []
    for _turn in range(times):
        runs.append(play("provision", profile=True))
        floors.append(bare(lab))
    if any(map(changes, runs)):
        raise RuntimeError(f"something changed:\n{runs[0].output[-3000:]}")
    row = {"nodes": nodes, "modules_per_node": modules(lab),
           "wall_seconds": statistics.median(run.wall for run in runs), "control_cpu_seconds": statistics.median(run.cpu for run in runs),
           "bare_wall_seconds": statistics.median(run.wall for run in floors), "bare_cpu_seconds": statistics.median(run.cpu for run in floors),
           "torch_seconds": statistics.median(seconds_of(run, TORCH) for run in runs)}
    # The nodes share this machine's cores, so a node's own time is its share.
    row["torch_seconds_per_node"] = row["torch_seconds"] / max(1, nodes / (os.cpu_count() or 1))
    print(f"{nodes:3} nodes, nothing changes: {row['wall_seconds']:5.1f} s ({verdict(row['wall_seconds'], WALL.get(nodes, 1.4 * nodes))}), "
          f"control node's CPU {row['control_cpu_seconds']:.1f} s, {row['modules_per_node']} modules a node "
          f"({verdict(row['modules_per_node'], MODULES)}), torch {row['torch_seconds_per_node']:.2f} s a node "
          f"({verdict(row['torch_seconds_per_node'], THERE)}); "
          f"bare script {row['bare_wall_seconds']:.1f} s, CPU {row['bare_cpu_seconds']:.1f} s", flush=True)
    row["tasks"] = dict(runs[0].tasks[:8])
    print("    longest tasks: " + ", ".join(f"{name.rpartition(' : ')[2]} {seconds:.1f} s" for name, seconds in runs[0].tasks[:5]), flush=True)
    return row


def main(counts: list[int]) -> dict:
    inventory(counts[0])
    rows, outside, single = [], 0, None
    shutil.rmtree(WHEELHOUSE, ignore_errors=True)
    play("lab", "-e", "lab_state=absent")
    try:
        for nodes in counts:
            inventory(nodes)
            play("lab")
            lab = Lab(FOLDER)
            if single is None:
                first = play("provision", "--limit", "bench1", profile=True)
                outside += first.outside
                fetched = wheels()
                # Again without torch, whose wheels are here by now: what a node alone costs.
                lab.nodes[0].shell("rm -rf /opt/onprem.torch")
                again = play("provision", "--limit", "bench1", profile=True)
                single = seconds_of(again, TORCH)
                print(f"torch on one node from the wheelhouse: {single:.1f} s ({verdict(single, INSTALL)})", flush=True)
                lab.nodes[0].shell("rm -rf /opt/onprem.torch/environments")
                install = seconds_of(play("provision", "--limit", "bench1", profile=True), TORCH)
                print(f"    of it: copying the wheels {single - install:.1f} s, installing them {install:.1f} s", flush=True)
            new = play("provision", profile=True)
            outside += new.outside
            print(f"{nodes:3} nodes, the new ones provisioned: {new.wall:.1f} s; from outside so far {outside / 1e6:.1f} MB on the network; "
                  f"wheelhouse {wheels() / 1e6:.0f} MB", flush=True)
            row = unchanged(nodes, lab)
            rows.append({**row, "provision_seconds": new.wall, "outside_bytes": outside, "wheelhouse_bytes": wheels()})
            if wheels() != fetched:
                raise RuntimeError("the wheelhouse grew with the nodes")
    finally:
        play("lab", "-e", "lab_state=absent")
        shutil.rmtree(WHEELHOUSE, ignore_errors=True)
    return {"torch_install_seconds": single, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(main([int(word) for word in sys.argv[1:]] or list(COUNTS))))
