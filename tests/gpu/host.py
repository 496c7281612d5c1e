# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The machine with GPUs: what its driver says, and the inventory of the nodes that share it."""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests" / "bench")]
from machines import Place

BUILD = ROOT / "build" / "gpu"
HOSTS = BUILD / "hosts.yml"
BRIDGE, SUBNET, PREFIX = "onpremG0", "198.18.72", "gpu"


def query(fields):
    """A row for each GPU with these fields of nvidia-smi; none without a driver."""
    if not shutil.which("nvidia-smi") or os.environ.get("GPU") == "0":
        return []
    text = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True, check=True,
                          timeout=60).stdout
    return [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.strip()]


def memory_used():
    """MiB in use of each GPU, by the driver's word."""
    return [int(row[0]) for row in query("memory.used")]


def holders():
    """Processes that have memory of a GPU, by the driver's word."""
    if not shutil.which("nvidia-smi") or os.environ.get("GPU") == "0":
        return []
    text = subprocess.run(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"], stdout=subprocess.PIPE, text=True,
                          check=True, timeout=60).stdout
    return [line.strip() for line in text.splitlines() if line.strip()]


def freed(before, seconds=20):
    """Seconds until no process has memory of a GPU and as much is free as before; None where that does not come."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if not holders() and all(now <= then + 1 for now, then in zip(memory_used(), before)):
            return time.monotonic() - start
        time.sleep(0.2)
    return None


def share(nodes, gpus):
    """Write the inventory of so many nodes; returns where they are."""
    BUILD.mkdir(parents=True, exist_ok=True)
    hosts = "".join(f"    {PREFIX}{number + 1}:\n      ansible_host: {SUBNET}.{number + 11}\n" for number in range(nodes))
    HOSTS.write_text(f"---\ntrain:\n  hosts:\n{hosts}")
    variables = BUILD / "group_vars"
    if not variables.is_symlink():
        variables.symlink_to("../../inventories/gpu_host/group_vars")
    return Place(HOSTS, PREFIX, BRIDGE, SUBNET, nodes, max(gpus // nodes, 1))
