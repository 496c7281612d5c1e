# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection as a user installs it: what is in its tarball, and that it works from there."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOP = {"CHANGELOG.rst", "FILES.json", "LICENSE", "MANIFEST.json", "README.md"}
TOP |= {"changelogs", "docs", "examples", "inventories", "meta", "playbooks", "plugins", "roles"}
JUNK = ("*/.*", ".*", "*.pyc", "*__pycache__*", "*.tar.gz", "*.retry", "*.log", "*/id_ed25519*", "tests/*", "*.egg-info*")


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the tarball in a checkout that has junk lying about, as real ones have."""
    folder = tmp_path_factory.mktemp("build")
    subprocess.run([BIN / "ansible-galaxy", "collection", "build", "--output-path", folder], cwd=ROOT, check=True, capture_output=True)
    (found,) = folder.glob("onprem-torch-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def installed(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install it into an empty folder; returns the environment of a user who knows nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_COLLECTIONS_PATH": str(folder), "NO_COLOR": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    words = ["ansible-galaxy", "collection", "install", "--no-deps", "--collections-path", folder, tarball]
    subprocess.run(words, check=True, capture_output=True, env=environment, cwd=folder)
    return environment


def test_tarball_holds_the_collection_and_nothing_else(tarball: Path):
    with tarfile.open(tarball) as archive:
        names = [member.name for member in archive.getmembers()]
        size = sum(member.size for member in archive.getmembers())
    assert {name.split("/")[0] for name in names} <= TOP
    junk = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in JUNK)]
    assert junk == []
    for needed in ("README.md", "meta/runtime.yml", "playbooks/train.yml", "roles/torchrun/files/torchrun_supervisor.py"):
        assert needed in names
    assert size < 3_000_000


def test_playbooks_run_from_the_installed_collection(installed: dict[str, str], tmp_path: Path):
    (tmp_path / "train.py").write_text("print('hello')\n")
    nodes = {name: {"ansible_host": "127.0.0.1", "ansible_port": 1} for name in ("n1", "n2")}
    inventory = {"train": {"hosts": nodes, "vars": {"torchrun_source": str(tmp_path / "train.py")}}}
    (tmp_path / "hosts.json").write_text(json.dumps(inventory))
    words = ["ansible-playbook", "onprem.torch.train", "-i", "hosts.json"]
    done = subprocess.run(words, capture_output=True, text=True, env=installed, cwd=tmp_path, check=False)
    # Nobody listens there, and both nodes are named in the plan's own sentences.
    assert done.returncode != 0
    for node in nodes:
        assert re.search(rf"\b{node}\b.*(reached|answer|connect)", done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("playbooks/*.yml")), ids=lambda path: path.stem)
def test_every_verb_is_there(installed: dict[str, str], tmp_path: Path, path: Path):
    (tmp_path / "hosts.yml").write_text("train: {hosts: {n1: {}, n2: {}}}\n")
    words = ["ansible-playbook", f"onprem.torch.{path.stem}", "-i", "hosts.yml", "--syntax-check"]
    subprocess.run(words, check=True, capture_output=True, env=installed, cwd=tmp_path)


def test_every_plugin_is_documented(installed: dict[str, str], tmp_path: Path):
    names = {path.stem for folder in ("modules", "filter") for path in (ROOT / "plugins" / folder).iterdir() if path.suffix in (".py", ".yml")}
    found = set()
    for kind in ("module", "filter"):
        words = ["ansible-doc", "--json", "--type", kind, "--list", "onprem.torch"]
        listing = subprocess.run(words, check=True, capture_output=True, text=True, env=installed, cwd=tmp_path).stdout
        found |= {name.rpartition(".")[2] for name, text in json.loads(listing).items() if text}
    assert names - {"systemd"} <= found
