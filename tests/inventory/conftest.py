# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Booted nodes, some of their trouble, and inventories in a folder of their own."""
from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
import yaml

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import machines

BASE = {
    "ansible_user": "ops",
    "ansible_become": True,
    "ansible_ssh_private_key_file": str(machines.LAB / ".state" / "id_ed25519"),
    "ansible_ssh_common_args": f"-o UserKnownHostsFile={machines.LAB}/.state/known_hosts -o ConnectTimeout=5",
    "torchrun_source": str(machines.ROOT / "examples"),
    "torchrun_script": "train_ddp.py",
    "pytorch_version": "2.13.0",
}


@pytest.fixture(scope="session")
def nodes():
    """Three booted nodes, unchanged at the end; INVENTORY_KEEP=1 leaves them running."""
    machines.lab("present")
    # A user who may log in and has no sudo.
    machines.shell("inv2", "id plain >/dev/null 2>&1 || { useradd --create-home plain; cp -a /home/ops/.ssh /home/plain/; chown -R plain: /home/plain; }")
    before = {name: machines.files(name) for name in machines.ADDRESSES}
    yield machines
    try:
        after = {name: machines.files(name) for name in machines.ADDRESSES}
        for name in before:
            changed = set(after[name].splitlines()) ^ set(before[name].splitlines())
            assert not changed, f"{name} was changed: {sorted(changed)[:10]}"
    finally:
        if not os.environ.get("INVENTORY_KEEP"):
            machines.lab("absent")


class Inventory:
    """An inventory of a user's, in files."""

    def __init__(self, folder):
        self.folder = folder
        # Sockets of ssh need a short path.
        self.sockets = tempfile.mkdtemp(prefix="inv-")
        (folder / "group_vars").mkdir()

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def group(self, hosts, name="train", **variables):
        """Write the group's hosts (name → variables; known names get their address) and variables."""
        hosts = {host: {"ansible_host": machines.ADDRESSES.get(host, host), **values} for host, values in hosts.items()}
        self.write("hosts.yml", yaml.safe_dump({name: {"hosts": hosts}}, sort_keys=False))
        self.write(f"group_vars/{name}.yml", yaml.safe_dump({**BASE, **variables}, sort_keys=False))

    def encrypted(self, text):
        """A value that is encrypted with a password nobody gives, as it stands in YAML."""
        password = self.write("password", "secret\n")
        done = subprocess.run([sys.executable, "-m", "ansible", "vault", "encrypt_string", "--vault-password-file", password, text],
                              text=True, stdout=subprocess.PIPE, check=True, cwd=machines.ROOT)
        password.unlink()
        return done.stdout

    def train(self, *options):
        """The README's command with this inventory: its output. It must fail, in words, without changing a node."""
        done = machines.playbook("train.yml", "-i", self.folder, *options, folder=self.sockets)
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stdout and "unexpected" not in done.stdout.lower(), done.stdout
        assert "changed=0" in done.stdout or "PLAY RECAP" not in done.stdout, done.stdout
        for line in done.stdout.partition("PLAY RECAP")[2].splitlines():
            assert "changed=" not in line or "changed=0" in line, done.stdout
        return done.stdout

    def close(self):
        for socket in pathlib.Path(self.sockets).iterdir():
            subprocess.run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "x"], stderr=subprocess.DEVNULL, check=False, timeout=20)
        shutil.rmtree(self.sockets)


@pytest.fixture
def inventory(tmp_path):
    made = Inventory(tmp_path)
    yield made
    made.close()
