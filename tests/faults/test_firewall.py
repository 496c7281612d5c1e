# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""While a job trains, an outsider on the same network reaches none of its ports, and the training does not mind the scan."""
from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import time

from machines import ROOT

OUTSIDER = "outsider32"
NETWORK6 = ipaddress.ip_network("fdc6:1815:0:32::/64")
SCAN = ROOT / "extensions/molecule/firewall/tests/scan.py"
# Without a firewall of its own a node keeps the job's ports and the kernel's range to the peers, and nothing else.
KEPT = {29500, 29501, 29600, *range(32768, 61000)}


def listening(machine):
    """Ports that are listened on for others."""
    lines = machine.shell("ss --no-header --listening --tcp --numeric").splitlines()
    sockets = [line.split()[3].rsplit(":", 1) for line in lines]
    return {int(port) for address, port in sockets if not address.startswith(("127.", "[::1]"))}


def test_an_outsider_reaches_no_port_of_a_running_job(training):
    job, (rank0, *others) = training, training.machines
    since = time.time()
    generation = job.state()["generation"]
    assert {29500, 29501} <= listening(rank0)
    assert any(port in KEPT for port in set().union(*map(listening, others))), "gloo listens nowhere, so nothing is proven"
    for machine in (rank0, others[-1]):
        address6 = NETWORK6[int(machine.address.rsplit(".", 1)[1])]
        for address in (machine.address, str(address6)):
            words = ["ip", "netns", "exec", OUTSIDER, sys.executable, str(SCAN), address, "1", "65535"]
            found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=200).stdout)
            assert {*found["open"], *found["closed"]} == set(range(1, 65536)) - KEPT, address
            assert set(found["open"]) == listening(machine) - KEPT
    job.wait(lambda: job.steps(since), 60, "training goes on")
    assert job.state()["generation"] == generation
