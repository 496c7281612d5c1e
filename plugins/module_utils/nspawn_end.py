# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a node of a lab is ended and removed, whatever a killed run has left of it."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import nspawn

HIERARCHIES = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
SECONDS_TO_END = 15.0
SECONDS_TO_BE_REAPED = 3.0
IN_GROUP = re.compile(rf"^0::\S*/{nspawn.GROUPS}/[^/\s]+/([^/\s]+)", re.MULTILINE)
# Runs a command, whose failure is no error, and returns what it prints.
Run = t.Callable[..., str]


def quietly(module: t.Any) -> Run:
    """Return what runs a command that may fail, or that this machine may not have, for a module."""

    def run(*words: str) -> str:
        return str(module.run_command(list(words))[1]) if module.get_bin_path(words[0]) else ""

    return run


def names(root: str) -> list[str]:
    """Return the names that the machine of a node has, or would have."""
    folder = os.path.dirname(nspawn.located(root))
    running = {found.name for found in nspawn.machines() if found.root == nspawn.located(root)}
    return sorted(running | {nspawn.machine_name(os.path.basename(folder), os.path.dirname(folder))})


def members(machines: t.Container[str]) -> list[int]:
    """Return the processes in the cgroups of machines: a node outlives an nspawn that was killed, and its first process no folder."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cgroup"):
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                inside = IN_GROUP.search(stream.read())
        except OSError:
            continue
        if inside and inside[1] in machines:
            found.append(int(path.split("/")[2]))
    return found


def kill(pids: t.Iterable[int]) -> None:
    """SIGKILL to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def groups(root: str, machines: t.Iterable[str]) -> list[str]:
    """Return the cgroups of a node that exist. systemd keeps those of its own units."""
    lab = nspawn.digest(os.path.dirname(os.path.dirname(nspawn.located(root))))
    places = [os.path.join(path, nspawn.GROUPS, lab, name) for path in HIERARCHIES for name in machines]
    return [place for place in places if os.path.isdir(place)]


def empty(group: str) -> None:
    """Kill whatever lives in a cgroup and remove it once it is empty; a process that is still ending keeps it."""
    with contextlib.suppress(OSError):
        with open(os.path.join(group, "cgroup.kill"), "w", encoding="ascii") as stream:
            stream.write("1")
    remove_group(group)


def remove_group(group: str, seconds: float = 0.0) -> None:
    """Remove a cgroup with those below it, as far as they are empty, or will be within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        for path, _folders, _files in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if not os.path.isdir(group) or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def end(root: str, run: Run) -> None:
    """End a node at once, and what a killed nspawn left of it.

    Args:
        root: folder of its root file system.
        run: runs a command.

    Raises:
        TimeoutError: its processes do not end.
    """
    machines = names(root)
    deadline = time.monotonic() + SECONDS_TO_END
    while True:
        running = nspawn.processes(root) + members(machines)
        kill(running)
        left = groups(root, machines)
        for group in left:
            empty(group)
        if not running and not left:
            break
        if time.monotonic() > deadline:
            raise TimeoutError("its processes do not end")
        time.sleep(0.05)
    for machine in machines:
        if nspawn.unified_systemd():
            # Until systemd has forgotten the unit, whose name the next boot needs.
            run("systemctl", "kill", "--signal=KILL", nspawn.unit_name(machine))
            run("systemctl", "stop", nspawn.unit_name(machine))
        run("ip", "link", "delete", f"vb-{machine}")


def unmount(folder: str, run: Run) -> None:
    """Unmount what is mounted on a folder or below it, however often.

    Raises:
        TimeoutError: something stays mounted.
    """
    deadline = time.monotonic() + SECONDS_TO_END
    while points := mounts(folder):
        for point in points:
            run("umount", "--lazy", point)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{points[0]} stays mounted")


def mounts(folder: str) -> list[str]:
    """Return what is mounted on a folder or below it, the deepest first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as stream:
        return nspawn.mounts_below(nspawn.located(folder), stream.read())


def there(folder: str) -> bool:
    """Return whether anything of a node is there."""
    root = os.path.join(folder, "root")
    machines = names(root)
    return bool(nspawn.processes(root) or members(machines) or groups(root, machines) or os.path.lexists(folder) or mounts(folder))


def remove(folder: str, run: Run) -> None:
    """Remove a node and everything that it wrote.

    Args:
        folder: its folder.
        run: runs a command.

    Raises:
        TimeoutError: a process does not end, or something stays mounted.
    """
    end(os.path.join(folder, "root"), run)
    unmount(folder, run)
    shutil.rmtree(folder, ignore_errors=True)  # follows no links
    with contextlib.suppress(OSError):
        os.unlink(folder)


def left_nodes(nodes: str) -> list[str]:
    """Return the names of all nodes of a lab of which anything is left: folder, process or mount."""
    real = nspawn.located(nodes)
    found = {machine.node for machine in nspawn.machines() if machine.nodes == real}
    found |= {os.path.relpath(point, real).split(os.sep)[0] for point in mounts(real) if point != real}
    with contextlib.suppress(OSError):
        found |= set(os.listdir(real))
    return sorted(found)


def remove_lab_groups(nodes: str, run: Run) -> None:
    """Remove what held the nodes of a lab together, where none is left."""
    lab = nspawn.digest(nodes)
    for path in (*HIERARCHIES, "/sys/fs/cgroup/memory"):
        remove_group(os.path.join(path, nspawn.GROUPS, lab), SECONDS_TO_BE_REAPED)
        with contextlib.suppress(OSError):  # another lab's are in it
            os.rmdir(os.path.join(path, nspawn.GROUPS))
    if nspawn.unified_systemd():
        run("systemctl", "stop", nspawn.slice_name(lab))
        run("systemctl", "revert", nspawn.slice_name(lab))
