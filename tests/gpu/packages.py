# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA's packages on the nodes, which have this machine's distribution: real apt, a signed repository of empty packages.

Decisions are those for bare nodes with eight H100: what the machine's own driver is does not count.
"""
from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import re
import shutil
import sys

from host import BUILD, ROOT, SUBNET
from machines import run

sys.path.append(str(ROOT / "tests" / "nvidia"))
import apt_repository

STACK = ROOT / "tests" / "nvidia" / "stack.py"
LINE, TOOLKIT, NCCL = "13.0", "13.0.2-1", "2.28.9-1+cuda13.0"
OLD, NEW = "580.105.08", "580.159.03"
SHOWN = r"nvidia|libcuda1|libnccl|cuda-toolkit-\d+-\d+$"
# Only the new repository is asked: the machine may have no network.
ONLY = "-o Dir::Etc::SourceList=/etc/apt/sources.list.d/onprem-torch-nvidia.sources -o Dir::Etc::SourceParts=/dev/null"


def distribution() -> str:
    """Name and version of this machine's distribution, as the lab writes them."""
    fields = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', pathlib.Path("/etc/os-release").read_text(), re.M))
    return f"{fields['ID']}-{fields['VERSION_ID']}"


class Packages:
    """The roles over plans, and what the nodes have of packages after them."""

    def __init__(self, step, settings):
        self.step = step
        self.settings = settings
        self.shown = {}

    def plan(self, **variables):
        """The plan for bare nodes of this machine's distribution."""
        asked = {**self.settings, "cuda_version": LINE, "cuda_toolkit": True, "nccl_library": True,
                 # The manifest's differs by distribution, and what is offered here does not.
                 "nvidia_driver_version": OLD, **variables}
        hosts = {machine.name: {**asked, "lab_distribution": distribution()} for machine in self.step.hall.machines}
        text = run(sys.executable, str(STACK), json.dumps(hosts), env={**os.environ, "PYTHONPATH": str(BUILD / "site")})
        return json.loads(text.strip().splitlines()[-1])

    def roles(self, log, **variables):
        """Run the roles; returns how many tasks have changed something."""
        path = BUILD / "plan.json"
        path.write_text(json.dumps({"cluster_plan": self.plan(**variables)}))
        text = self.step.playbook("tests/nvidia/roles.yml", "-e", f"@{path}", log=f"packages-{log}")
        return sum(int(count) for count in re.findall(r"changed=(\d+)", text))

    def refusal(self, log, **variables):
        """What the roles say when they refuse, on one line."""
        try:
            self.roles(log, **variables)
        except RuntimeError as error:
            return " ".join(str(error).split())
        raise AssertionError(f"the roles were expected to refuse {variables}")

    def versions(self):
        """Installed packages of NVIDIA's with their versions, for each node."""
        found = []
        for machine in self.step.hall.machines:
            rows = [line.split() for line in machine.shell("dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'").splitlines()]
            found.append({row[0]: row[1] for row in rows if row[2:] == ["installed"] and re.search(SHOWN, row[0])})
        return found


def driver(plan, version):
    """The packages of a driver as the plan wants them, empty, and a library that comes along."""
    wanted = next(iter(plan["nodes"].values()))["nvidia"]["driver"]["settings"]["packages"]
    names = [entry["name"] for entry in wanted if entry["version"]]
    number = re.sub(r"\D.*", "", version)
    own = f"{version}-0ubuntu1"
    library = f"libnvidia-compute-{number}"
    return [apt_repository.Package(library, own), *(apt_repository.Package(name, own, f"{library} (= {own})") for name in names)]


@contextlib.contextmanager
def served():
    """An empty signed repository on the bridge, and the variables that name it."""
    folder = BUILD / "packages"
    shutil.rmtree(folder, ignore_errors=True)
    key = apt_repository.Key(folder / "gpg")
    repository = apt_repository.Repository(folder / "repository", key)
    server, port = apt_repository.serve(repository.folder, f"{SUBNET}.1")
    url = f"http://{SUBNET}.1:{port}/"
    try:
        yield repository, {"cuda_repository_url": url, "cuda_repository_key_url": f"{url}key.pub",
                           "cuda_repository_key_fingerprint": key.fingerprint}
    finally:
        server.shutdown()
        server.server_close()
        key.close()


def respected(mine):
    """Some images hold their NCCL: that is respected and named, until it is released as the sentence says."""
    # grep finds nothing where nothing is held.
    held = mine.step.hall.machines[0].shell("apt-mark showhold | grep -x 'libnccl.*' || true").split()
    if not held:
        return []
    refusal = mine.refusal("held")
    cure = f"apt-mark unhold {' '.join(held)}"
    assert f"{held[0]} is held at" in refusal and cure in refusal, refusal[-2000:]
    for machine in mine.step.hall.machines:
        machine.shell(cure)
    return [f"the image's hold of {' and '.join(held)} was respected and named"]


def installed(step):
    """Install, again, newer versions on offer, one variable up and down, a key that is not the expected one."""
    with served() as (repository, settings):
        mine = Packages(step, settings)
        plan = mine.plan()
        offered = [*apt_repository.headers(platform.release()), *apt_repository.toolkit(LINE, TOOLKIT), *apt_repository.nccl(NCCL),
                   *driver(plan, OLD), *driver(plan, NEW)]
        repository.offer(offered)
        before = mine.versions()
        rows = []

        def row(what, changed):
            now = mine.versions()[0]
            shown = ("libnccl2", *sorted(package.name for package in driver(plan, OLD))[:2])
            rows.append({"what": what, "changed": changed, **{name: now[name] for name in shown}})

        lines = respected(mine)
        row("install", mine.roles("install"))
        first = mine.versions()
        for node in first:
            for package in driver(plan, OLD):
                assert node[package.name] == package.version, f"{package.name} is {node.get(package.name)}, {package.version} was expected"
            assert node["libnccl2"] == node["libnccl-dev"] == NCCL and node["cuda-toolkit-13-0"] == TOOLKIT, node
        again = mine.roles("again")
        assert again == 0, f"the second run has changed {again} things"
        newer = [*apt_repository.nccl("2.30.1-1+cuda13.0"), *apt_repository.toolkit(LINE, "13.0.9-1")]
        repository.offer([*offered, *newer])
        for machine in step.hall.machines:
            machine.shell(f"apt-get {ONLY} update && DEBIAN_FRONTEND=noninteractive apt-get {ONLY} --yes full-upgrade", timeout=300)
        assert mine.versions() == first, "pins and holds keep what is installed"
        row("full-upgrade with newer ones on offer", 0)
        row(f"nvidia_driver_version: {NEW}", mine.roles("up", nvidia_driver_version=NEW))
        up = mine.versions()
        assert all(node[package.name] == package.version for node in up for package in driver(plan, NEW)), up
        row(f"nvidia_driver_version: {OLD}", mine.roles("down", nvidia_driver_version=OLD))
        assert mine.versions() == first
        refusal = mine.refusal("key", nvidia_driver_version=NEW, cuda_repository_key_fingerprint="0" * 40)
        assert "is refused" in refusal and "0" * 40 in refusal, refusal[-2000:]
        assert mine.versions() == first
        return {"rows": rows, "before": before, "after": first,
                "lines": [*lines, f"{distribution()}: a second run changes nothing; a key that is not the expected one is refused"]}
