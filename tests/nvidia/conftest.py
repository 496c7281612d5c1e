"""Booted nodes of both distributions, a signed repository on their bridge, and Ansible that works on all nodes at once."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import typing as t
from pathlib import Path

import apt_repository
import pytest
from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = Path(__file__).parent / "inventory"
STATE = INVENTORY / ".state"
BRIDGE = "198.18.65.1"
NAMES = ("nv12", "nv13")
ANSIBLE = Path(sys.executable).parent
JSON_OUTPUT = {"ANSIBLE_LOAD_CALLBACK_PLUGINS": "1", "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}
Answer = t.Dict[str, t.Any]

# Plans are made with the builders of the unit tests.
sys.path.append(str(ROOT / "tests" / "unit"))
_AnsibleCollectionFinder(paths=[str(ROOT / ".collections")])._install()


def ansible(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's commands in the checkout."""
    return subprocess.run(
        [str(ANSIBLE / words[0]), *words[1:]],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )


class Nodes:
    """All nodes: each does the same at the same time, and each is asked for itself."""

    def run(self, command: str, check: bool = True) -> dict[str, str]:
        """Run a command as root on every node and return what each prints."""

        def one(name: str) -> tuple[str, str]:
            words = ["ssh", "-F", str(STATE / "ssh_config"), "-o", "BatchMode=yes", name, f"sudo sh -c {shlex.quote(command)}"]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
            assert not check or done.returncode == 0, f"{name}: {command}: {done.stdout}{done.stderr}"
            return name, done.stdout

        with concurrent.futures.ThreadPoolExecutor(len(NAMES)) as pool:
            return dict(pool.map(one, NAMES))

    def module_words(self, settings: Answer, check: bool = False, **options: t.Any) -> list[str]:
        """Return the command that runs the module on every node."""
        asked = json.dumps({"settings": settings, **options})
        words = ["ansible", "train", "-i", str(INVENTORY), "-m", "onprem.torch.nvidia_packages", "-a", asked]
        return [*words, "--check", "--diff"] if check else words

    def bring(self, settings: Answer, check: bool = False, **options: t.Any) -> list[Answer]:
        """Run the module on every node and return the answers."""
        done = ansible(*self.module_words(settings, check, **options), **JSON_OUTPUT)
        try:
            answers: dict[str, Answer] = json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"]
        except (ValueError, LookupError) as error:
            raise AssertionError(f"no answer: {done.stdout[-2000:]}{done.stderr[-2000:]}") from error
        assert set(answers) == set(NAMES)
        for answer in answers.values():
            assert "module_stderr" not in answer, answer["module_stderr"]
        return list(answers.values())

    def versions(self) -> list[dict[str, str]]:
        """Return the completely installed packages of NVIDIA's with their versions, for each node."""
        texts = self.run("dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'")
        found = []
        for text in texts.values():
            rows = [line.split() for line in text.splitlines() if len(line.split()) == 3]
            mine = {name: version for name, version, state in rows if state == "installed"}
            found.append({name: version for name, version in mine.items() if "nvidia" in name or name.startswith(("libcuda", "libnccl", "cuda-"))})
        return found

    def held(self) -> list[set[str]]:
        """Return the packages on hold, for each node."""
        return [set(text.split()) for text in self.run("apt-mark showhold").values()]

    def files(self) -> str:
        """Return the names of the files that describe repositories, keys and pins."""
        return "".join(self.run("ls /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/preferences.d 2>&1 || true").values())

    def clean(self) -> None:
        """Remove every trace of an earlier test, whatever it was interrupted in."""
        self.run(
            "systemctl stop stranger 2>/dev/null; apt-get clean; rm -f /run/slow-build /run/broken-build /etc/asks-for-reboot; "
            "pkill -9 -x dpkg; pkill -9 -x apt-get; dpkg --configure -a --force-confold >/dev/null 2>&1; "
            "apt-mark showhold | xargs -r apt-mark unhold >/dev/null; "
            "dpkg-query -W -f '${Package}\\n' | grep -E 'nvidia|^libcuda|^libnccl|^cuda-|^linux-headers-' | xargs -r dpkg --purge --force-all >/dev/null 2>&1; "
            "rm -rf /etc/apt/sources.list.d/*stranger* /etc/apt/preferences.d/nvidia-driver-pin /usr/share/keyrings/stranger* /etc/nvidia-stand-in.conf* "
            "/etc/apt/preferences.d/*onprem-torch-* /etc/apt/sources.list.d/onprem-torch-* /etc/apt/keyrings/onprem-torch-* "
            "/etc/modprobe.d/onprem* /etc/systemd/system/*onprem-torch-* /etc/systemd/system/*/onprem-torch-* /etc/nccl.conf "
            "/etc/security/limits.d/onprem* /etc/systemd/logind.conf.d/onprem* "
            "/var/lib/apt/lists/198.18.65* /var/lib/onprem.torch /run/reboot-required*; systemctl daemon-reload"
        )
        assert self.versions() == [{}, {}], "the nodes are clean"


@pytest.fixture(scope="session")
def lab() -> t.Iterator[Nodes]:
    """Boot the nodes, over whatever an interrupted run has left; remove them in the end."""
    ansible("ansible-playbook", "playbooks/lab.yml", "-i", str(INVENTORY), "-e", "lab_state=absent")
    done = ansible("ansible-playbook", "playbooks/lab.yml", "-i", str(INVENTORY))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    yield Nodes()
    if not os.environ.get("KEEP_LAB"):
        done = ansible("ansible-playbook", "playbooks/lab.yml", "-i", str(INVENTORY), "-e", "lab_state=absent")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture
def nodes(lab: Nodes) -> Nodes:
    """Return the nodes without anything of NVIDIA's."""
    lab.clean()
    return lab


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[tuple[apt_repository.Key, ...]]:
    """Return the repository's key and a stranger's."""
    made = tuple(apt_repository.Key(tmp_path_factory.mktemp("gpg") / name) for name in ("own", "strange"))
    yield made
    for key in made:
        key.close()


class Source(t.NamedTuple):
    """The repository as the nodes see it."""

    repository: apt_repository.Repository
    settings: dict[str, str]


def served(repository: apt_repository.Repository) -> t.Iterator[Source]:
    """Serve a repository on the bridge."""
    server, port = apt_repository.serve(repository.folder, BRIDGE)
    url = f"http://{BRIDGE}:{port}/"
    yield Source(repository, {"url": url, "key_url": f"{url}key.pub", "key_fingerprint": repository.key.fingerprint})
    server.shutdown()
    server.server_close()


@pytest.fixture
def source(lab: Nodes, keys: tuple[apt_repository.Key, ...], tmp_path: Path) -> t.Iterator[Source]:
    """Serve an empty repository like NVIDIA's."""
    yield from served(apt_repository.Repository(tmp_path / "repo", keys[0]))


@pytest.fixture
def distribution(lab: Nodes, keys: tuple[apt_repository.Key, ...], tmp_path: Path) -> t.Iterator[Source]:
    """Serve an empty repository that says of itself that it is the distribution's own."""
    yield from served(apt_repository.Repository(tmp_path / "distribution", keys[1], origin="Debian"))
