"""Booted nodes, a signed repository on their bridge, and the module run on them by Ansible."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import typing as t
from pathlib import Path

import apt_repository
import pytest

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = Path(__file__).parent / "inventory"
BRIDGE = "198.18.65.1"
NODES = {"nv12": "198.18.65.12", "nv13": "198.18.65.13"}
ANSIBLE = Path(sys.executable).parent


def ansible(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's commands in the checkout."""
    return subprocess.run([str(ANSIBLE / words[0]), *words[1:]], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False)


class Node:
    """A booted node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = NODES[name]

    def ssh_words(self, command: str) -> list[str]:
        """Return the words that run a command as root on the node."""
        state = INVENTORY / ".state"
        options = ["-o", "ConnectTimeout=10", "-o", f"UserKnownHostsFile={state / 'known_hosts'}", "-o", "BatchMode=yes", "-i", str(state / "id_ed25519")]
        return ["ssh", *options, f"ops@{self.address}", f"sudo sh -c {shlex.quote(command)}"]

    def run(self, command: str, check: bool = True) -> str:
        """Run a command as root on the node and return what it prints."""
        done = subprocess.run(self.ssh_words(command), capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def module_words(self, settings: dict[str, t.Any], check: bool = False) -> list[str]:
        """Return the command that runs the module on the node."""
        words = ["ansible", self.name, "-i", str(INVENTORY), "-m", "onprem.torch.nvidia_packages", "-a", json.dumps({"settings": settings})]
        return [*words, "--check", "--diff"] if check else words

    def bring(self, settings: dict[str, t.Any], check: bool = False) -> dict[str, t.Any]:
        """Run the module on the node and return its answer."""
        done = ansible(*self.module_words(settings, check), ANSIBLE_LOAD_CALLBACK_PLUGINS="1", ANSIBLE_STDOUT_CALLBACK="ansible.posix.json")
        try:
            answer: dict[str, t.Any] = json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"][self.name]
        except (ValueError, LookupError) as error:
            raise AssertionError(f"no answer: {done.stdout[-2000:]}{done.stderr[-2000:]}") from error
        assert "module_stderr" not in answer, answer["module_stderr"]
        return answer

    def versions(self) -> dict[str, str]:
        """Return the completely installed packages of NVIDIA's with their versions."""
        text = self.run("dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'")
        rows = [line.split() for line in text.splitlines() if len(line.split()) == 3]
        return {name: version for name, version, state in rows if state == "installed" and ("nvidia" in name or name.startswith(("libcuda", "libnccl", "cuda-")))}

    def held(self) -> set[str]:
        """Return the packages on hold."""
        return set(self.run("apt-mark showhold").split())

    def clean(self) -> None:
        """Remove every trace of an earlier test."""
        self.run(
            "rm -f /run/slow-build; dpkg --configure -a; apt-mark showhold | xargs -r apt-mark unhold; "
            "dpkg-query -W -f '${Package}\\n' | grep -E 'nvidia|^libcuda|^libnccl|^cuda-' | xargs -r dpkg --purge --force-all; "
            "rm -f /etc/apt/preferences.d/onprem-torch-* /etc/apt/sources.list.d/onprem-torch-* /etc/apt/keyrings/onprem-torch-* /etc/modprobe.d/onprem*; "
            "rm -rf /var/lib/apt/lists/198.18.65* /var/lib/onprem.torch /run/reboot-required*; rm -f /etc/systemd/system/onprem-torch-*; systemctl daemon-reload"
        )


@pytest.fixture(scope="session")
def lab() -> t.Iterator[None]:
    """Boot the nodes; remove them in the end."""
    done = ansible("ansible-playbook", "playbooks/lab.yml", "-i", str(INVENTORY))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    yield
    if not os.environ.get("KEEP_LAB"):
        ansible("ansible-playbook", "playbooks/lab.yml", "-i", str(INVENTORY), "-e", "lab_state=absent")


@pytest.fixture(params=sorted(NODES))
def node(request: pytest.FixtureRequest, lab: None) -> t.Iterator[Node]:
    """Return a node without anything of NVIDIA's."""
    found = Node(request.param)
    found.clean()
    yield found


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[tuple[apt_repository.Key, apt_repository.Key]]:
    """Return the repository's key and a stranger's."""
    made = tuple(apt_repository.Key(tmp_path_factory.mktemp("gpg") / name) for name in ("own", "strange"))
    yield made
    for key in made:
        key.close()


class Source(t.NamedTuple):
    """The repository as the nodes see it."""

    repository: apt_repository.Repository
    settings: dict[str, str]


@pytest.fixture
def source(lab: None, keys: tuple[apt_repository.Key, apt_repository.Key], tmp_path: Path) -> t.Iterator[Source]:
    """Serve an empty repository on the bridge."""
    repository = apt_repository.Repository(tmp_path / "repo", keys[0])
    server, port = apt_repository.serve(repository.folder, BRIDGE)
    url = f"http://{BRIDGE}:{port}/"
    yield Source(repository, {"url": url, "key_url": f"{url}key.pub", "key_fingerprint": keys[0].fingerprint})
    server.shutdown()
