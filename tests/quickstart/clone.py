# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""A newcomer's clone: the files of this checkout in a folder of their own, with a lab that no other lab notices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRIDGE, SUBNET = "onpremQ0", "198.18.16"
UNIT = "torchrun-train.service"
NODES = ("lab1", "lab2")


class Clone:
    """A copy of what git would commit, in which commands are typed as the README says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Copy the files and give the lab a bridge and a subnet of its own."""
        words = ["git", "ls-files", "-coz", "--exclude-standard"]
        names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True).stdout.split(b"\0")
        there = b"\0".join(name for name in names if name and os.path.lexists(os.path.join(os.fsencode(ROOT), name)))
        pack = ["tar", "--create", "--null", "--files-from=-"]
        archive = subprocess.run(pack, cwd=ROOT, check=True, capture_output=True, input=there).stdout
        subprocess.run(["tar", "--extract"], cwd=self.folder, check=True, input=archive)
        lab = self.folder / "inventories" / "lab"
        for path, old, new in (
            (lab / "group_vars" / "all.yml", "onprem0", BRIDGE),
            (lab / "group_vars" / "all.yml", "198.18.0", SUBNET),
            (lab / "hosts.yml", "198.18.0", SUBNET),
        ):
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))

    def lab_variables(self, text: str) -> None:
        """Add variables to the inventory of the lab."""
        with (self.folder / "inventories" / "lab" / "group_vars" / "all.yml").open("a") as stream:
            stream.write(text)

    def run(self, *words: str, check: bool = True, seconds: float = 900) -> subprocess.CompletedProcess[str]:
        """Type a command; without a Python environment of somebody else's."""
        environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "VIRTUAL_ENV", "ANSIBLE_CONFIG")}
        environment["NO_COLOR"] = "1"
        path = f"{self.folder}/.venv/bin:{environment['PATH']}" if words[0] != "make" else environment["PATH"]
        environment["PATH"] = path
        done = subprocess.run(
            words, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout[-6000:]}"
        return done

    def play(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Type ansible-playbook with the lab's inventory."""
        return self.run("ansible-playbook", *words, "-i", "inventories/lab", check=check)

    def shell(self, node: str, script: str, check: bool = True) -> str:
        """Run a command on a node as root."""
        config = self.folder / "inventories" / "lab" / ".state" / "ssh_config"
        words = ["ssh", "-F", str(config), "-o", "ConnectTimeout=10", node, "sudo sh -s"]
        done = subprocess.run(words, input=script, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{node}: {script}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def property(self, node: str, name: str) -> str:
        """Return a property of the job's unit."""
        return self.shell(node, f"systemctl show --value --property={name} {UNIT}")
