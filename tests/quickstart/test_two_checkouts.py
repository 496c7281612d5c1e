# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two checkouts on one machine, whose labs have the same bridge and addresses; and what killed runs leave. In this order."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import typing as t
from pathlib import Path

import pytest
from clone import BRIDGE, SUBNET, Clone
from systemd_host import nspawn
from test_quickstart import leftovers, wait

OUTSIDER = "strangerQ"
TABLE = f"onprem_lab_{BRIDGE}"


@pytest.fixture(scope="module")
def second(clone: Clone, tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Clone]:
    """Return another checkout, with the Python environment of the first."""
    clone.run("make", "setup")
    made = Clone(tmp_path_factory.mktemp("second"))
    made.make()
    (made.folder / ".venv").symlink_to(clone.folder / ".venv")
    yield made
    if made.folder.exists():
        made.run("make", "clean", check=False)


def nodes(clone: Clone) -> Path:
    """Return the folder of the lab's nodes."""
    return clone.folder / "inventories" / "lab" / ".state" / "nodes"


def running(clone: Clone) -> list[str]:
    """Return the nodes of a clone that run."""
    return sorted({machine.node for machine in nspawn.machines() if machine.nodes == str(nodes(clone))})


def groups(clone: Clone) -> list[Path]:
    """Return the cgroups of a clone's lab."""
    return [path for path in Path("/sys/fs/cgroup").glob(f"*/{nspawn.GROUPS}/{nspawn.digest(str(nodes(clone)))}*") if path.is_dir()]


def namespaces() -> str:
    """Return the network namespaces."""
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def kill_family(pid: int) -> None:
    """SIGKILL to a process and all that descend from it: Ansible's workers and modules are sessions of their own."""
    family, parents = {pid}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for member in family:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_the_lab_of_a_second_checkout_is_refused_and_named_the_first(clone: Clone, second: Clone):
    clone.lab_variables(f"lab_outsiders: [{{name: {OUTSIDER}, address: {SUBNET}.200/24}}]\n")
    clone.run("make", "lab")
    before = subprocess.run(["ip", "-brief", "address", "show", "dev", BRIDGE], capture_output=True, text=True, check=True).stdout
    done = second.run("make", "lab", check=False)
    said = " ".join(done.stdout.split())
    assert done.returncode != 0
    assert f"the bridge {BRIDGE} is in use by another lab on this machine, {clone.folder}/inventories/lab, whose nodes run (lab1, lab2)" in said
    assert "make clean" in said and "lab_bridge, lab_subnet and ansible_host" in said
    assert not nodes(second).parent.exists()
    assert before == subprocess.run(["ip", "-brief", "address", "show", "dev", BRIDGE], capture_output=True, text=True, check=True).stdout
    assert [clone.shell(name, "hostname") for name in ("lab1", "lab2")] == ["lab1", "lab2"]


def test_another_bridge_alone_is_refused_for_the_subnet(clone: Clone, second: Clone):
    done = second.play("playbooks/lab.yml", "-e", "lab_bridge=onpremQ9", check=False)
    assert done.returncode != 0
    assert f"the network {SUBNET}.0/24, on the bridge {BRIDGE}, is in use by another lab" in " ".join(done.stdout.split())


def test_clean_of_the_second_checkout_leaves_the_first_alone(clone: Clone, second: Clone):
    second.run("make", "clean")
    assert [clone.shell(name, "hostname") for name in ("lab1", "lab2")] == ["lab1", "lab2"]
    assert TABLE in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert OUTSIDER in namespaces()


def test_clean_removes_what_a_killed_run_and_a_changed_inventory_have_left(clone: Clone):
    pids = {machine.pid for machine in nspawn.machines() if machine.nodes == str(nodes(clone))}
    lab = clone.folder / "inventories" / "lab"
    environment = {**os.environ, "PATH": f"{clone.folder}/.venv/bin:{os.environ['PATH']}"}
    environment.pop("ANSIBLE_CONFIG", None)
    words = [f"{clone.folder}/.venv/bin/ansible-playbook", "playbooks/lab.yml", "-i", "inventories/lab", "-e", "lab_memory=2G"]
    run = subprocess.Popen(words, cwd=clone.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # The first node is ended, to be booted anew with the limit of memory.
        wait(lambda: not pids <= {machine.pid for machine in nspawn.machines()} or run.poll() is not None, 120, "the end of a node")
        assert run.poll() is None
    finally:
        kill_family(run.pid)
        run.wait(30)
    hosts = lab / "hosts.yml"
    text = hosts.read_text()
    begin = text.index("    lab2:")
    hosts.write_text(text[:begin] + "".join(text[begin:].splitlines(keepends=True)[2:]))
    assert "lab2" not in hosts.read_text()
    variables = lab / "group_vars" / "all.yml"
    kept = variables.read_text()
    variables.write_text(kept.replace(BRIDGE, "onpremQ8").replace(SUBNET, "198.18.17").partition("lab_outsiders")[0])
    clone.run("make", "clean")
    assert leftovers(clone) == [] and running(clone) == [] and groups(clone) == []
    assert OUTSIDER not in namespaces()
    assert not nodes(clone).parent.exists()
    variables.write_text(kept.partition("lab_outsiders")[0])
    hosts.write_text(text)


def test_a_lab_whose_checkout_was_deleted_is_taken_over_and_nodes_leave_with_the_inventory(clone: Clone, second: Clone):
    second.run("make", "lab")
    shutil.rmtree(second.folder, ignore_errors=True)
    assert running(second) == ["lab1", "lab2"]
    done = clone.play("playbooks/lab.yml", "-e", "lab_take_over=false")
    assert f"node lab1 of the lab of {second.folder}/inventories/lab" in " ".join(done.stdout.split())
    assert running(second) == [] and [clone.shell(name, "hostname") for name in ("lab1", "lab2")] == ["lab1", "lab2"]

    hosts = clone.folder / "inventories" / "lab" / "hosts.yml"
    text = hosts.read_text()
    hosts.write_text(text[: text.index("    lab2:")])
    done = clone.play("playbooks/lab.yml")
    assert "Removed: node lab2 which the inventory no longer has" in " ".join(done.stdout.split())
    assert running(clone) == ["lab1"]
    hosts.write_text(text)
    clone.run("make", "clean")
    assert leftovers(clone) == []
