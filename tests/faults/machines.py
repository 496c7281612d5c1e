# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's nodes, with a hand on their power and their cable."""
from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the nodes of a lab inventory are: the same numbers as in its files."""

    inventory: pathlib.Path = HERE / "inventory"
    prefix: str = "fault"
    bridge: str = "onpremS0"
    subnet: str = "198.18.32"
    count: int = 4
    workers: int = 1

    @property
    def nodes(self):
        """Folder of the nodes."""
        return (self.inventory if self.inventory.is_dir() else self.inventory.parent) / ".state" / "nodes"


def _nspawn():
    spec = importlib.util.spec_from_file_location("nspawn", ROOT / "plugins/module_utils/nspawn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nspawn = _nspawn()


def run(*words, check=True, **options):
    """A command on this host; its output."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


class Machine:
    """One node of the lab."""

    def __init__(self, number, place):
        self.place = place
        self.name, self.address = f"{place.prefix}{number + 1}", f"{place.subnet}.{number + 11}"
        self.machine = nspawn.machine_name(self.name, str(place.nodes))
        self.directory = str(place.nodes / self.name / "root")

    def leader(self):
        """This host's id of the node's first process, 0 while it is off."""
        return nspawn.leader(self.directory)

    def shell(self, command, check=True, timeout=60):
        """A command as root inside, without the network."""
        leader = self.leader()
        if not leader:
            raise RuntimeError(f"{self.name} is off")
        return run("nsenter", "--target", str(leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--", "/bin/sh", "-c",
                   command, check=check, timeout=timeout)

    def power_off(self):
        """Pull the plug: nothing inside says goodbye. Returns the moment."""
        run("ip", "link", "set", f"vb-{self.machine}", "down", check=False)     # no TCP reset gets out
        moment = time.time()
        run("ansible", "localhost", "-m", "onprem.torch.nspawn_node", "-a",
            f"name={self.name} state=powered_off state_dir={self.place.nodes} bridge={self.place.bridge}", cwd=ROOT)
        return moment

    def reboot(self):
        """systemctl reboot; returns the moment, at once."""
        moment = time.time()
        self.shell("systemctl --no-block reboot", check=False)
        return moment

    def wait_reboot(self, leader, seconds=90):
        """Until another first process than the given one runs."""
        deadline = time.monotonic() + seconds
        while self.leader() in (0, leader):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not come back")
            time.sleep(0.2)

    def started(self):
        """When the node was switched on."""
        return os.stat(f"/proc/{self.leader()}").st_ctime

    def cable(self, plugged):
        """Pull or plug the training cable; the node itself stays up."""
        run("ip", "link", "set", f"vb-{self.machine}", "up" if plugged else "down")

    def pid(self, kind):
        """Id inside the node of its supervisor, torchrun or (first) worker."""
        pattern = {"supervisor": "[t]orchrun_supervisor.py", "torchrun": "^[^ ]*python[0-9.]* -m [t]orch.distributed.run",
                   "worker": "^[^ ]*python[0-9.]* -u .*[t]rain.py"}[kind]
        found = self.shell(f"pgrep -f '{pattern}' || true").split()
        if len(found) != (self.place.workers if kind == "worker" else 1):
            raise RuntimeError(f"{self.name} has {len(found)} processes of kind {kind}: {found}")
        return int(found[0])


class Hall:
    """All machines."""

    def __init__(self, place=Place()):
        self.place = place
        self.machines = [Machine(number, place) for number in range(place.count)]

    def power_on(self):
        """Boot those that are off; the others are left alone."""
        (self.place.nodes.parent / "shared").mkdir(parents=True, exist_ok=True)
        run("ansible-playbook", "playbooks/lab.yml", "-i", str(self.place.inventory), cwd=ROOT)

    def close(self):
        run("ansible-playbook", "playbooks/lab.yml", "-i", str(self.place.inventory), "-e", "lab_state=absent", cwd=ROOT)
