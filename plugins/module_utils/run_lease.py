# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which run may change this node: one run of a verb at a time holds the nodes of its cluster.

The lease is a file below /run that says who holds the node. It is taken when the node is looked at, before anything is
planned; every module of the run that works for long renews it; it is given back before the job is followed. A module
whose run has lost it, or has given it back, changes nothing any more, however late it gets to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, invoker, node_lock

NAME = "run.json"
# Who reads or writes the lease is done within milliseconds.
PATIENCE = 20.0
SECONDS_BETWEEN_RENEWALS = 20.0
# A run of another control node that has given no sign of life anywhere for so long is dead, in seconds: a reboot, or wheels
# that the control node downloads, take less.
STALE = 1200.0
TEXTS = ("id", "who", "verb", "job", "control", "boot")
NUMBERS = ("pid", "start", "since", "renewed")
LONGEST = 200


class Lost(node_lock.Busy):
    """The run does not hold this node any more, so nothing may be done for it."""


def boot() -> str:
    """Return what tells this start of the node from others; a container's kernel is that of its host."""
    first = invoker.stat(1)
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as stream:
        return f"{stream.read().strip()}/{first[2] if first else 0}"


def uptime() -> float:
    """Return seconds of this kernel that no correction of the clock changes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(folder: str = node_lock.FOLDER) -> dict[str, t.Any]:
    """Return the lease of this node; empty where nobody has it, or where what lies there is none."""
    try:
        handle = os.open(os.path.join(folder, NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, encoding="utf-8") as stream:
            found = json.loads(stream.read(1 << 16))
    except (OSError, ValueError, RecursionError):
        return {}
    return shaped(found)


def shaped(found: t.Any) -> dict[str, t.Any]:
    """Return a lease whose every part is what it should be, and can be shown; empty for anything else."""
    if not isinstance(found, dict):
        return {}
    lease: dict[str, t.Any] = {}
    for key in TEXTS:
        value = found.get(key, "")
        lease[key] = "".join(letter for letter in value[:LONGEST] if letter.isprintable()) if isinstance(value, str) else ""
    for key in NUMBERS:
        lease[key] = number(found.get(key, 0))
    return lease if lease["id"] else {}


def number(value: t.Any) -> float:
    """Return a number with which one can go on; 0 for anything else."""
    return value if isinstance(value, (int, float)) and abs(value) < 1e15 else 0


def answered(found: t.Any) -> dict[str, t.Any]:
    """Return what a node tells of its lease (see ``told``), whose every part is what it should be; empty for anything else.

    Whoever is root on one node must not shape what happens on the control node. ``problem`` is why it could not tell.
    """
    if not isinstance(found, dict) or not found:
        return {}
    if isinstance(found.get("problem"), str) and found["problem"]:
        return {"problem": hostile_input.printable(" ".join(found["problem"].split()))}
    lease = shaped(found.get("lease"))
    return {"taken": bool(lease) and found.get("taken") is True, "lease": lease, "silent": max(number(found.get("silent")), 0)}


def may_take(present: t.Mapping[str, t.Any], wanted: str, over: t.Collection[str]) -> bool:
    """Return whether a run may have the node.

    Args:
        present: the lease of now; empty for none.
        wanted: id of the run that asks.
        over: ids of runs that are dead, or that it is told to take over from.
    """
    return not present or present["id"] == wanted or present["id"] in over


def take(run: t.Mapping[str, t.Any], over: t.Collection[str] = (), folder: str = node_lock.FOLDER) -> dict[str, t.Any]:
    """Take or renew the lease; return it as it is afterwards, which is another run's where that one has it.

    Raises:
        node_lock.Busy: the lease cannot be had at all.
    """
    with node_lock.held("run", PATIENCE, folder):
        present = read(folder)
        if not may_take(present, run["id"], over):
            return present
        lease = shaped({**run, "boot": boot(), "renewed": uptime()})
        _write(lease, folder)
        return lease


def give_back(identity: str, folder: str = node_lock.FOLDER) -> bool:
    """Give the lease back; return whether the run had it. Raises node_lock.Busy."""
    with node_lock.held("run", PATIENCE, folder):
        if read(folder).get("id") != identity:
            return False
        os.unlink(os.path.join(folder, NAME))
        return True


def _write(lease: t.Mapping[str, t.Any], folder: str) -> None:
    """Replace the lease in one step; the folder is root's alone (see node_lock)."""
    handle, path = tempfile.mkstemp(prefix=".run-", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(lease, stream)
    os.replace(path, os.path.join(folder, NAME))


def require(run: t.Mapping[str, t.Any], folder: str = node_lock.FOLDER) -> None:
    """Renew the lease of the run that a module works for; one without a lease (``{}``) needs none.

    Where the node has been restarted since the lease was taken, its file is gone and is made again.

    Raises:
        Lost: the run has given it back, or another one has taken it over.
        node_lock.Busy: the lease cannot be renewed at all.
    """
    if not run:
        return
    present = read(folder)
    if not present and run["boot"] == boot():
        raise Lost("this run has given the node back, or was taken for dead")
    if present and present["id"] == run["id"] and 0 <= uptime() - present["renewed"] < SECONDS_BETWEEN_RENEWALS / 2:
        return  # whoever asks often does not write often
    if not present or present["id"] == run["id"]:
        present = take(run, folder=folder)
    if present["id"] != run["id"]:
        raise Lost(f"{described(present)} has taken the node over from this run")


@contextlib.contextmanager
def at_work(run: t.Mapping[str, t.Any], folder: str = node_lock.FOLDER) -> t.Iterator[None]:
    """Renew the lease as long as the block runs and somebody waits for the module. Raises what ``require`` raises, at the beginning only."""
    if not run:
        yield
        return
    require(run, folder)
    done = threading.Event()

    # Made once: one that is made after whoever asked has gone knows nothing of it.
    with invoker.Invoker() as asker:

        def renew() -> None:
            while not done.wait(SECONDS_BETWEEN_RENEWALS) and not asker.gone():
                with contextlib.suppress(node_lock.Busy, OSError):
                    require(run, folder)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def described(lease: t.Mapping[str, t.Any]) -> str:
    """Return who holds it, for people: user, control node, verb, job and since when."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease["since"]))
    job = f" of the job {lease['job']}" if lease["job"] else ""
    return f"{lease['who']} ({lease['verb']}{job}, process {lease['pid']:.0f}, since {since})"


def alive(lease: t.Mapping[str, t.Any], silent: float, control: str) -> bool:
    """Return whether the run that holds it goes on, as far as can be known from a control node.

    Args:
        lease: its lease.
        silent: seconds since its last sign of life on any node.
        control: the control node that asks. Its own processes are looked at; of another one's nothing else is known, and
            of a hidden one not even whether it is the run or got its id later.
    """
    if lease["control"] == control:
        known = invoker.stat(int(lease["pid"]))
        if known or not invoker.hidden(int(lease["pid"])):
            return bool(known) and known[2] == lease["start"]
    return silent < STALE


def told(run: t.Mapping[str, t.Any], over: t.Collection[str] = (), folder: str = node_lock.FOLDER) -> dict[str, t.Any]:
    """Take the lease where a run is given, and tell how things are.

    Returns:
        ``taken``: whether the run has it; ``lease``: whose ever it is, empty for nobody's; ``silent``: seconds since its
        last sign of life.

    Raises:
        node_lock.Busy: the lease cannot be had at all.
    """
    lease = take(run, over, folder) if run else read(folder)
    silent = max(uptime() - lease["renewed"], 0.0) if lease else 0.0
    return {"taken": bool(run) and lease["id"] == run["id"], "lease": lease, "silent": silent}


@dataclass
class Standing:
    """What keeps a run from having all its nodes: leases of other runs, by the run's id.

    Attributes:
        others: they go on, so one waits for them.
        interrupted: they go on and are taken over, since whoever asks wants that.
        dead: they have ended without giving the node back.
    """

    others: dict[str, dict[str, t.Any]] = field(default_factory=dict)
    interrupted: dict[str, dict[str, t.Any]] = field(default_factory=dict)
    dead: dict[str, dict[str, t.Any]] = field(default_factory=dict)

    @property
    def free(self) -> bool:
        """Whether nothing keeps the run from going on."""
        return not (self.others or self.interrupted or self.dead)

    @property
    def over(self) -> list[str]:
        """Ids of the runs that are taken over; none as long as there is one to wait for, since one has all nodes or none."""
        return [] if self.others else [*self.interrupted, *self.dead]


def silence(answers: t.Mapping[str, t.Mapping[str, t.Any]], identity: str) -> float:
    """Return the seconds since the last sign of life that a run gave on any node; infinite for one that is on none."""
    return min((answer["silent"] for answer in answers.values() if (answer.get("lease") or {}).get("id") == identity), default=float("inf"))


def standing(answers: t.Mapping[str, t.Mapping[str, t.Any]], me: t.Mapping[str, t.Any], take_over: bool) -> Standing:
    """Return what keeps a run from having all its nodes.

    Whoever stops a job means it, at three in the morning too: whatever is being done with that job is interrupted, and what is
    done for other jobs goes on beside the stop.

    Args:
        answers: what ``told`` tells of each node.
        me: the run that asks.
        take_over: whether it takes over whoever is there.
    """
    found = Standing()
    leases = {answer["lease"]["id"]: answer["lease"] for answer in answers.values() if answer.get("lease") and not answer.get("taken")}
    for identity, lease in leases.items():
        if not alive(lease, silence(answers, identity), me["control"]):
            found.dead[identity] = lease
        elif take_over or (me["verb"] == "stop" and lease["job"] == me["job"]):
            found.interrupted[identity] = lease
        elif me["verb"] != "stop":
            found.others[identity] = lease
    return found
