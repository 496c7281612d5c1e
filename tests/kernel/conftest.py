"""The machine with a kernel of its own, a signed repository on its bridge, and the playbooks run on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import driver_packages
import machine
import pytest
from driver_packages import apt_repository

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = Path(__file__).parent / "inventory"
ANSIBLE = Path(sys.executable).parent
NEEDED = ("qemu-system-x86", "seabios", "mmdebstrap", "debian-archive-keyring", "e2fsprogs", "iproute2", "nftables", "openssh-client", "gpg", "gpg-agent")
OLD, NEW, BROKEN = "580.105.08-1", "580.159.03-1", "580.159.99-1"


def ansible(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's commands in the checkout."""
    return subprocess.run([str(ANSIBLE / words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


def bridge(state: str) -> None:
    """Let the machine's network be there, or not."""
    subprocess.run(["ip", "link", "delete", machine.TAP], check=False, stderr=subprocess.DEVNULL)
    settings = {"name": machine.BRIDGE, "state": state, "address": f"{machine.GATEWAY}/24"}
    done = ansible("ansible", "localhost", "-m", "onprem.torch.nspawn_bridge", "-a", json.dumps(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    if state == "present":
        subprocess.run(["ip", "tuntap", "add", "dev", machine.TAP, "mode", "tap"], check=True)
        subprocess.run(["ip", "link", "set", machine.TAP, "master", machine.BRIDGE, "up"], check=True)


class Site:
    """The machine and the playbooks that are run on it."""

    def __init__(self, guest: machine.Machine, variables: dict[str, t.Any]) -> None:
        self.guest = guest
        self.variables = variables

    def playbook(self, name: str, **variables: t.Any) -> str:
        """Run a playbook that succeeds and return what it prints."""
        text = self.attempt(name, **variables)
        assert "failed=0" in text and "failed=1" not in text, text[-5000:]
        return text

    def attempt(self, name: str, **variables: t.Any) -> str:
        """Run a playbook and return what it prints, without line breaks within sentences."""
        words = ["ansible-playbook", f"playbooks/{name}.yml", "-i", str(INVENTORY), "-e", json.dumps({**self.variables, **variables})]
        done = ansible(*words, *(["--tags", "nvidia_driver,nccl"] if name == "provision" else []))
        return done.stdout + done.stderr

    def changed(self, text: str) -> int:
        """Return how many tasks have changed something."""
        return sum(int(count) for count in re.findall(r"changed=(\d+)", text))

    def loaded(self, name: str = "nvidia") -> str:
        """Return the version of a module that the kernel runs, empty where it does not run."""
        file = f"/sys/module/{name}/version"
        return self.guest.shell(f"[ ! -e {file} ] || cat {file}").strip()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Site]:
    """Boot the machine, and serve two drivers and one that does not compile."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    words = ["apt-get", "--quiet=2", "--no-install-recommends", "install", *NEEDED]
    if subprocess.run(words, check=False, env=environment, stdout=subprocess.DEVNULL).returncode:
        subprocess.run(["apt-get", "--quiet=2", "update"], check=True)
        subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    guest = machine.Machine(INVENTORY / ".state")
    bridge("present")
    key = apt_repository.Key(tmp_path_factory.mktemp("gpg") / "own")
    repository = apt_repository.Repository(tmp_path_factory.mktemp("served") / "repo", key)
    nccl = apt_repository.nccl("2.28.9-1+cuda13.0")
    driver_packages.offer(repository, (OLD, NEW, BROKEN), broken=(BROKEN,), further=nccl)
    server, port = apt_repository.serve(repository.folder, machine.GATEWAY)
    url = f"http://{machine.GATEWAY}:{port}/"
    guest.start()
    guest.wait()
    yield Site(guest, {"cuda_repository_url": url, "cuda_repository_key_url": f"{url}key.pub", "cuda_repository_key_fingerprint": key.fingerprint})
    if not os.environ.get("KEEP_LAB"):
        guest.stop()
        bridge("absent")
    server.shutdown()
    server.server_close()
    key.close()
