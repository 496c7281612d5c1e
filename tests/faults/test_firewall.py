# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""While a job trains, an outsider on the same network reaches none of its ports, and the training does not mind the scan.
A firewall that keeps the nodes from each other is named while the job starts, and the job starts once it is gone."""
from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
import time

import pytest
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


# What drops on rank 0's node and, for connections that either side may begin, on the other's. {0}: the one it drops from.
CUT = "table ip cut {{ chain input {{ type filter hook input priority -20; ip saddr {0} tcp flags & (syn | ack) == syn tcp dport {1} drop;\n}}\n}}"


@pytest.mark.parametrize(
    ("ports", "sentence"),
    [
        ("29501", r"fault2: waiting for rank 0's supervisor at 198\.18\.32\.11:29501 \(198\.18\.32\.11 drops TCP from 198\.18\.32\.12 to port 29501: "),
        pytest.param(
            "32768-60999",
            r"(198\.18\.32\.11 drops TCP from 198\.18\.32\.12|198\.18\.32\.12 drops TCP from 198\.18\.32\.11) to port \d{5}, look at its firewall",
            marks=pytest.mark.matrix,
        ),
    ],
    ids=["supervisor", "ephemeral"],
)
def test_a_firewall_that_keeps_the_job_from_starting_is_named(training, tmp_path, ports, sentence):
    job, (one, other, *_rest) = training, training.machines
    job.playbook("playbooks/stop.yml")
    for machine, peer in ((one, other), (other, one)):
        machine.shell(f"nft -f - <<'END'\n{CUT.format(peer.address, ports)}\nEND")
    words = ["ansible-playbook", "playbooks/start.yml", "-i", str(job.hall.place.inventory)]
    began = time.monotonic()
    try:
        with open(tmp_path / "output", "w+", encoding="utf-8") as output:
            # Ansible leaves it to Python when lines reach a file or a pipe.
            start = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "PYTHONUNBUFFERED": "1"})
            try:
                while not re.search(sentence, (tmp_path / "output").read_text()):
                    assert time.monotonic() - began < 100 and start.poll() is None, (tmp_path / "output").read_text()
                    time.sleep(0.5)
                print(f"named after {time.monotonic() - began:.0f} s")
            finally:
                for machine in (one, other):
                    machine.shell("nft delete table ip cut")
            assert start.wait(120) == 0, (tmp_path / "output").read_text()
    finally:
        start.kill()
    job.trains(0)
