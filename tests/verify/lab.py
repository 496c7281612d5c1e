# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Booted nodes, what can be done to their network and power, and the verification as a user runs it."""
from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A veth is as fast as the CPU has time, so every port gets a speed of its own that two busy cores can carry.
PORT, SLOW = "200mbit", "16mbit"    # 0.025 and 0.002 GB/s
# A port that has rested sends so much at once: far less than a pair exchanges, or rested pairs would look twice as fast as others.
BURST = "32kb"
# GB/s of bus bandwidth that healthy ports reach easily, and that no all-reduce with a slow one can.
MINIMUM = 0.003
PYTHON_PACKAGES = "/opt/torch/lib/python3.11/site-packages"


def _nspawn():
    spec = importlib.util.spec_from_file_location("nspawn", ROOT / "plugins/module_utils/nspawn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nspawn = _nspawn()


def run(*words, check=True, timeout=900, **options):
    """A command on this host; its output."""
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                          timeout=timeout, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


class Node:
    """One node of the lab."""

    def __init__(self, name, address, bridge, nodes, port=PORT):
        self.name, self.address, self.bridge, self.nodes, self.port = name, address, bridge, nodes, port
        self.machine = nspawn.machine_name(name, str(nodes))

    def shell(self, command, check=True, timeout=60):
        """A command as root inside, without the network."""
        leader = nspawn.leader(str(self.nodes / self.name / "root"))
        if not leader:
            raise RuntimeError(f"{self.name} is off")
        return run("nsenter", "--target", leader, "--mount", "--uts", "--ipc", "--net", "--pid", "--", "/bin/sh", "-c", command,
                   check=check, timeout=timeout)

    def limit(self, rate=SLOW):
        """The speed of the node's port, both ways."""
        self.shell(f"tc qdisc del dev host0 root 2>/dev/null; tc qdisc add dev host0 root tbf rate {rate} burst {BURST} latency 200ms")
        run("tc", "qdisc", "replace", "dev", f"vb-{self.machine}", "root", "tbf", "rate", rate, "burst", BURST, "latency", "200ms")

    def limit_to(self, peer, rate=SLOW):
        """A slow way to one peer only."""
        self.shell("tc qdisc del dev host0 root; tc qdisc add dev host0 root handle 1: htb default 1; "
                   f"tc class replace dev host0 parent 1: classid 1:1 htb rate {self.port} burst {BURST}; "
                   f"tc class replace dev host0 parent 1: classid 1:2 htb rate {rate} burst {BURST}; "
                   f"tc filter replace dev host0 parent 1: protocol ip u32 match ip dst {peer.address}/32 flowid 1:2")

    def drop(self, port):
        """Packets to one port vanish without an answer."""
        self.shell("nft add table inet verifytest; nft 'add chain inet verifytest input { type filter hook input priority -10; }'; "
                   f"nft add rule inet verifytest input tcp dport {port} drop")

    def power_off(self):
        """Pull the plug: nothing inside says goodbye."""
        run("ip", "link", "set", f"vb-{self.machine}", "down", check=False)     # no TCP reset gets out
        run("ansible", "localhost", "-m", "onprem.torch.nspawn_node", "-a",
            f"name={self.name} state=powered_off state_dir={self.nodes} bridge={self.bridge}", cwd=ROOT)

    def heal(self):
        """Undo everything that a test, or a killed one before it, did to this node; its port has its usual speed again."""
        self.shell("nft delete table inet verifytest 2>/dev/null; "
                   f"umount {PYTHON_PACKAGES}/torch 2>/dev/null; "
                   f"for f in {PYTHON_PACKAGES}/torch-*/METADATA.kept; do [ -e $f ] && mv $f ${{f%.kept}}; done; "
                   "systemctl stop torchrun-other.service nccl-verify.service 2>/dev/null; "
                   "rm -f /etc/systemd/system/torchrun-other.service; systemctl daemon-reload; true")
        self.limit(self.port)

    def left(self):
        """What a verification has left behind."""
        return self.shell("ls -d /run/nccl-verify 2>/dev/null; systemctl is-active nccl-verify.service | grep -v inactive; "
                          "pgrep -af '[n]ccl_verify|[t]orch.distributed.run'; true").strip()


class Lab:
    """All nodes of an inventory."""

    def __init__(self, inventory=HERE / "inventory", port=PORT):
        self.inventory = inventory
        listed = json.loads(run("ansible-inventory", "-i", inventory, "--list", cwd=ROOT))
        hosts = listed["train"]["hosts"]
        variables = listed["_meta"]["hostvars"]
        bridge = variables[hosts[0]]["lab_bridge"]
        self.nodes = [Node(name, variables[name]["ansible_host"], bridge, inventory / ".state" / "nodes", port)
                      for name in hosts]

    def playbook(self, name, *options, check=True):
        path = name if "/" in name else f"playbooks/{name}.yml"
        return run("ansible-playbook", path, "-i", self.inventory, *options, cwd=ROOT, check=check,
                   env={**os.environ, "NO_COLOR": "1"})

    def power_on(self):
        """Boot the nodes that are off."""
        self.playbook("tests/verify/boot.yml")
        for node in self.nodes:
            run("ip", "link", "set", f"vb-{node.machine}", "up")

    def close(self):
        self.playbook("lab", "-e", "lab_state=absent")

    def heal(self):
        for node in self.nodes:
            node.heal()


class Verification:
    """One run of playbooks/verify.yml."""

    def __init__(self, lab, *options, store=None, minimum=MINIMUM):
        with tempfile.TemporaryDirectory() as folder:
            self.store = pathlib.Path(store or folder)
            words = ["-e", f"nccl_verify_state_dir={self.store}", *options]
            if minimum:
                words += ["-e", f"nccl_verify_minimum_gbytes_per_second={minimum}"]
            began = time.monotonic()
            self.text = lab.playbook("verify", *words, check=False)
            self.seconds = time.monotonic() - began
            latest = self.store / "latest.json"
            self.report = json.loads(latest.read_text()) if latest.exists() else {}
            self.page = latest.with_suffix(".html").read_text() if latest.exists() else ""

    @property
    def culprits(self):
        return sorted((entry["kind"], entry["host"], entry["peer"]) for entry in self.report.get("culprits", []))

    @property
    def recap(self):
        return self.text.partition("PLAY RECAP")[2]

    def screen(self):
        """The lines that the verification itself printed."""
        lines = self.text.partition("VERIFIED: ")[2].splitlines()
        return lines[: lines.index("")] if "" in lines else lines
