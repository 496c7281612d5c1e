# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes that inventories are tried on, and the command that a user types."""
from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAB = HERE / "inventory"
BRIDGE = "onpremI0"
ADDRESSES = {"inv1": "198.18.56.11", "inv2": "198.18.56.12", "inv3": "198.18.56.13"}


def _nspawn():
    spec = importlib.util.spec_from_file_location("nspawn", ROOT / "plugins/module_utils/nspawn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nspawn = _nspawn()


def playbook(*words, folder=None):
    """ansible-playbook with these arguments, as it is typed in the checkout; ``folder`` keeps its ssh connections apart."""
    environment = {key: value for key, value in os.environ.items() if key != "ANSIBLE_FORCE_COLOR"}
    # A connection that an earlier run has left open would let a wrong key pass.
    environment.update({"ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder)} if folder else {}, ANSIBLE_NOCOLOR="1")
    command = [sys.executable, "-m", "ansible", "playbook", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=600, check=False)


def sentences(output):
    """The problems that a run has named, in their order."""
    error = output.split("fatal: ")[0]
    found = re.findall(r"^  - (.*)$", error, re.M)
    assert found, output
    return found


def lab(state):
    """Boot or remove the nodes."""
    done = playbook("playbooks/lab.yml", "-i", LAB, "-e", f"lab_state={state}")
    assert done.returncode == 0, done.stdout[-6000:]


def shell(name, command):
    """A command as root on a node, without the network; its output."""
    leader = nspawn.leader(str(LAB / ".state" / "nodes" / name / "root"))
    assert leader, f"{name} is off"
    done = subprocess.run(
        ["nsenter", "--target", str(leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--", "/bin/sh", "-c", command],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"{name}: {command}: {done.stdout}"
    return done.stdout


def files(name):
    """Every file of a node that a play could leave behind, with size and time of change."""
    return shell(name, "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /dev -o -path /tmp -o -path /var/log "
                       "-o -path /var/tmp -o -path '/home/*/.ansible' -o -path /root/.ansible -o -path /var/lib/systemd \\) -prune "
                       "-o \\( -type f -o -type l \\) -printf '%p %s %T@\\n' | sort")
