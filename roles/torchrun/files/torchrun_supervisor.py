# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one node's share of a torch.distributed.run job, and bring the whole gang back when one node fails.

The main process of ``torchrun-<job>.service`` on every node. torchrun runs in a sub-cgroup of its own, so that nothing
of it survives; the supervisor stays alive to tell why it ended. Rank 0's supervisor coordinates: a generation (one
torchrun on every node) starts only when all nodes have joined and nothing of the one before is alive anywhere; a
failure on one node ends it on all; then all start again. docs/supervisor.md has the protocol and the reasons.

Layers, top to bottom of this file
    Coordinator, Member     the two state machines: no clock, no socket, no process; every call is given the time
    Session                 the authenticated message stream, bytes in and bytes out
    CgroupTree, Torchrun    the processes of one generation, and why they ended
    Watch, run_checks       progress (new checkpoints) and the local checks before a start
    Supervisor              one selectors loop that ties them together

Exit codes
    0   the job is done, or its stop was requested (systemctl stop, Ctrl-C)
    75  this node leaves for a while: a shutdown, a restart of its unit, a bare SIGTERM. systemd starts it again, unless
        it has itself ended the unit (SuccessExitStatus=75 RestartForceExitStatus=75)
    2   wrong usage or configuration; systemd must not restart it (RestartPreventExitStatus=2 10)
    10  the job failed for good: the restart budget is spent; systemd must not restart it
    1   the supervisor itself failed; systemd restarts it

state.json in --state-dir (replaced in one step at every change; times are seconds since the epoch)
    version         1
    job, host, rank, nnodes, release, pid, written
    state           of the whole job as this node knows it: waiting, running, stopping, done, stopped, failed
    text            the same as one sentence for people, e.g. "waiting for lab3: /dev/shm has 12 MiB free, ..."
    since           when this state, or this generation, began
    node            this node's part: {phase: idle | running | stopping, generation, problems: [{check, text}],
                    connected: whether rank 0's supervisor is heard, blocked: sentences on connections of the job
                    that nobody answers}
    generation      the generation running now, or the last one
    restarts        generations ended early since this supervisor's first start (all reasons)
    restarts_left, max_restarts     the budget: failures without progress that are still forgiven
    checkpoint      newest file that matched the glob on this node: {path, time} or null
    checkpoint_hosts    hosts on which a checkpoint has been seen, whether they are still there or not
    checkpoints     the newest one of the first ranks, as last seen: {rank: {host, path, time}}
    last_exit       of torchrun on this node: {generation, time, code (negative: signal), ordered, cause} or null
    first_cause     why the last generation that ended early did: {host, node_rank, rank, local_rank, reason (exit,
                    signal, error, out of memory, hang, lost, shutdown, restart), error, exit_code, signal, generation, time,
                    text (one sentence), charged (whether it cost budget)} or null
    history         rank 0 only: the last 20 such causes, oldest first
    result          null, done, stopped or failed
    stopped_by      the host where the stop was asked for, or null
    members         rank 0 only: {rank: {host, connected, phase, generation, problems, checkpoint}}
The file ``done`` beside it ({job, release, finished, unacknowledged: [ranks]}) is there once every node's torchrun has
exited 0; a supervisor that finds it with its own release exits 0 at once.
"""
from __future__ import annotations

import argparse
import collections
import errno
import glob
import hmac
import ipaddress
import json
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterable, NamedTuple, Optional

# Lies beside this file in a release.
from hostile_input import LAST_MOMENT, Fields, Flag, ListOf, MapOf, Maybe, Number, Odd, Shape, Text, check, find, load, parse_json, printable

EXIT_OK, EXIT_INTERNAL, EXIT_USAGE, EXIT_FAILED, EXIT_AGAIN = 0, 1, 2, 10, 75
MARKER = "TORCHRUN_SUPERVISOR_ID"   # environment variable that names every process of this supervisor
TAIL_LINES, TAIL_WIDTH = 80, 1000   # what is kept of torchrun's output to tell a cause
HISTORY = 20
# Why a node leaves without a stop of the job: (reason of the cause, what happened to the node).
LEAVING = {
    "shutdown": ("shutdown", "the node was shut down"),
    "restart": ("restart", "its unit was restarted"),
    "signal": ("restart", "its supervisor was sent SIGTERM, though nobody has asked systemd to stop the unit"),
    # At a shutdown the bus may be gone before the units are.
    "unknown": ("shutdown", "the node was shut down, or its systemd does not answer"),
}
CLOCK_AGES = 30.0                   # seconds after which a clock's offset is measured anew, though the network has become slower
FINAL = ("done", "stopped", "failed")
JSON = dict[str, Any]

_output_lock = threading.Lock()


class ProtocolError(Exception):
    """The peer is not one of ours, or not in its right mind: drop the connection."""


def write_all(descriptor: int, data: bytes) -> None:
    """Write bytes as one piece: lines of several threads never mix."""
    with _output_lock:
        while data:
            try:
                data = data[os.write(descriptor, data):]
            except OSError:      # the reader has gone; training matters more than its log
                return


def say(text: str) -> None:
    """One line of the supervisor's own in the journal."""
    write_all(1, f"supervisor: {one_line(text)}\n".encode("utf-8", "replace"))


def one_line(text: str, most: int = 2000) -> str:
    """A text as one line that does nothing to a terminal; lines become spaces."""
    return printable(" ".join(text[:2 * most].split()), most)


def notify(text: str) -> None:
    """Tell systemd (sd_notify protocol) where NOTIFY_SOCKET is set."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto(one_line(text, 1000).encode("utf-8", "replace"), "\0" + path[1:] if path[0] == "@" else path)
    except OSError:
        pass


def write_json(path: str, value: Any) -> None:
    """Replace a JSON file in one step; readers never see half of it. What lies there under the new file's name is no obstacle."""
    temporary = f"{path}.{os.getpid()}.tmp"
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        pass
    # The job can write into this folder too: never into a link or a FIFO.
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.fchmod(file, 0o644)
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(file, data):]
    finally:
        os.close(file)
    os.replace(temporary, path)


def read_known(path: str, shape: Shape) -> JSON:
    """What an earlier supervisor has written, {} where there is nothing. The job can write there too: what is odd is said."""
    value, odd = load(os.path.dirname(path), os.path.basename(path), shape)
    if odd:
        say(f"{odd}: taken as not there")
    return dict(value or {})


# ---------------------------------------------------------------------------------------------------------------------
# The coordinator: decides for all nodes when a generation starts and ends (pure)


class Limits:
    """Times in seconds, shared by both state machines."""

    def __init__(self, max_restarts: int = 3, hang_timeout: float = 0.0, grace: float = 30.0, abort_grace: float = 2.0,
                 heartbeat: float = 1.0, lost_after: float = 5.0, start_timeout: float = 30.0) -> None:
        self.max_restarts, self.hang_timeout = max_restarts, hang_timeout
        self.grace, self.abort_grace = grace, abort_grace
        self.heartbeat, self.lost_after, self.start_timeout = heartbeat, lost_after, start_timeout
        self.report_time = 3.0      # what a torchrun that has failed gets to write its report
        self.recheck = 3.0          # between local checks while one fails
        self.recheck_good = 30.0    # and while none does
        self.linger = 5.0           # how long the last word (stopped, failed) is offered to nodes that do not answer
        self.back_by = 30.0         # the same to one whose unit is restarted: systemd waits 2 s, Python starts, a node is busy
        self.done_linger = 3600.0   # the same for done: a node that never hears it would wait for the others for ever
        # The most that passes between two looks of a loop that runs. With the heartbeat before, less than lost_after.
        self.attention = max(heartbeat, lost_after / 3.0)

    @staticmethod
    def backoff(failures: int) -> float:
        """Wait before the restart after so many failures in a row: 0, 1, 2, 4 ... 30 s."""
        return 0.0 if failures <= 1 else min(30.0, 2.0 ** (failures - 2))


class Attention:
    """A clock that stands still while its own loop does: paused, stopped by a signal, starved by a machine that swaps.

    A loop that did not look cannot tell that somebody was silent, so of the time between two looks no more than
    ``limits.attention`` counts, however long it was. Whoever is judged by this clock is never lost by a gap. Whether
    CLOCK_MONOTONIC runs on while a virtual machine is suspended depends on its hypervisor; both are right here.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits, self.looked = limits, now
        self.missed = 0.0           # in all
        self.gap = 0.0              # the last time missed that a peer may have noticed
        self.woke: Optional[float] = None   # when that was over, by this clock

    def time(self, now: float) -> float:
        """Seconds by this clock; called with the time of CLOCK_MONOTONIC at every look."""
        gap = now - self.looked - self.limits.attention
        self.looked = max(self.looked, now)
        if gap > 0:
            self.missed += gap
            if gap + self.limits.attention > self.limits.lost_after / 2:
                self.gap, self.woke = gap + self.limits.attention, now - self.missed
        return now - self.missed

    def excuse(self, now: float) -> str:
        """Empty, or why peers may have given this node up a moment ago; now is this clock's."""
        if self.woke is None or now - self.woke > self.limits.lost_after:
            return ""
        return f"its supervisor stood still for {self.gap:.0f} s"


class Seat:
    """What the coordinator knows of one node."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.host: Optional[str] = None
        self.connected = False
        self.session = 0            # the connection that speaks for this rank; older ones are not heard
        self.host_of = -1           # the connection on which its host was told
        self.heard = 0.0
        self.report: JSON = {}
        self.finished = 0           # the last generation whose torchrun exited 0 here
        self.acknowledged = False   # has taken the job's result to heart
        self.checkpoints: Optional[int] = None
        self.lines: Optional[int] = None

    @property
    def name(self) -> str:
        return self.host or f"rank {self.rank}"

    @property
    def left(self) -> tuple[str, str]:
        """Why it goes or has gone away for a while, as in LEAVING; ("", "") while it does not."""
        if not self.report.get("leaving"):
            return "", ""
        return LEAVING.get(str(self.report.get("why")), LEAVING["shutdown"])

    @property
    def idle(self) -> bool:
        return self.connected and self.report.get("phase") == "idle"


# What passes between supervisors and lies in their files, to the leaf. Nothing of another kind or size gets any further.
FINITE = Number(-LAST_MOMENT, LAST_MOMENT, whole=False)
MOMENT = Number(0, LAST_MOMENT, whole=False)
COUNT, CODE, NAME, WORD, SENTENCE = Number(), Number(-2**31, 2**32), Text(255), Text(40), Text(2000)
PHASES, STATES = ("idle", "running", "stopping"), ("waiting", "running", "stopping") + FINAL
CHECKPOINT = Maybe(Fields({"path": Text(1024), "time": MOMENT}, ("path", "time")))
# Ranks whose newest checkpoint every node remembers, and the bytes of its path: the view is a message of limited size.
CHECKPOINTS_TOLD, PATH_TOLD = 16, 1000
TOLD = MapOf(Fields({"host": NAME, "path": Text(PATH_TOLD), "time": MOMENT}, ("host", "path", "time")), CHECKPOINTS_TOLD)
CAUSE_FIELDS: dict[str, Shape] = {
    "reason": WORD, "error": Maybe(SENTENCE), "time": Maybe(MOMENT), "exit_code": Maybe(CODE), "signal": Maybe(WORD),
    "rank": Maybe(COUNT), "local_rank": Maybe(COUNT), "own": Flag(), "echo": Flag()}
NO_CAUSE: JSON = {"reason": "", "error": None, "time": None, "exit_code": None, "signal": None, "rank": None, "local_rank": None}
OWN_CAUSE = Fields(CAUSE_FIELDS, ("reason",))
SETTLED = Maybe(Fields({**CAUSE_FIELDS, "host": Maybe(NAME), "node_rank": Maybe(COUNT), "generation": COUNT, "charged": Flag(),
                        "text": SENTENCE}, ("reason", "generation", "text")))
EXIT = Fields({"generation": COUNT, "time": Maybe(MOMENT), "code": CODE, "ordered": Flag(), "cause": Maybe(OWN_CAUSE)},
              ("generation", "code", "ordered", "cause"))
REPORT_FIELDS: dict[str, Shape] = {
    "host": NAME, "nnodes": COUNT, "release": NAME, "phase": Text(choices=PHASES), "generation": COUNT, "exit": Maybe(EXIT),
    "problems": Maybe(ListOf(Fields({"check": WORD, "text": Text(300)}, ("check", "text")), 9)),
    "final": Maybe(Text(choices=FINAL)), "unkillable": ListOf(COUNT, 1), "failing": Flag(), "leaving": Flag(), "stop": Flag(),
    "checkpoints": COUNT, "lines": COUNT, "checkpoint": CHECKPOINT}
REPORT = Fields({**REPORT_FIELDS, "why": WORD, "sent": FINITE}, tuple(REPORT_FIELDS))
NEWS = [key for key in REPORT_FIELDS if key not in ("checkpoints", "lines", "checkpoint")]
MOST_HOSTS, HOSTS_BYTES = 10000, 24576  # names of a file that is read, and the bytes of all that are told
VIEW_FIELDS: dict[str, Shape] = {
    "state": Text(choices=STATES), "text": SENTENCE, "generation": COUNT, "restarts": COUNT, "restarts_left": COUNT,
    "first_cause": SETTLED, "stopped_by": Maybe(NAME), "checkpoint_hosts": ListOf(NAME, MOST_HOSTS),
    "checkpoints": TOLD}
VIEW = Fields(VIEW_FIELDS, tuple(VIEW_FIELDS))
ORDERS = ("wait", "run", "stop") + FINAL
ORDER = Fields({"order": Text(choices=ORDERS), "generation": COUNT, "graceful": Flag(), "hang": Flag(), "echo": FINITE, "now": FINITE,
                "view": VIEW}, ("order", "generation"))
DONE = Fields({"job": NAME, "release": NAME, "unacknowledged": ListOf(COUNT, MOST_HOSTS)}, ("release",))
# A generation that no job reaches is not gone on with: it was written by somebody else.
STATE = Fields({"job": NAME, "release": NAME, "text": SENTENCE, "generation": Number(0, 10**6), "result": Maybe(Text(choices=FINAL)),
                "restarts": COUNT, "restarts_left": COUNT, "first_cause": SETTLED, "history": ListOf(SETTLED, HISTORY),
                "checkpoint_hosts": ListOf(NAME, MOST_HOSTS), "checkpoints": TOLD})


class Anything(Shape):
    """A value of which only what fits is looked at."""

    def clean(self, value: Any, name: str) -> Any:
        return value


ERROR_JSON = Fields({"message": Anything()})
# Reports of workers that are looked at: how many, their size (torch's are a few KiB) and seconds for all.
MOST_REPORTS, REPORT_BYTES, REPORT_TIME = 16, 64 << 10, 1.0
# How far beyond rank 0's own a node's generation may be to be gone on from, as after the loss of rank 0's state.
PLAUSIBLE = 100000
# What an order may take in a frame beside the view.
ORDER_BYTES = 4096


def expected(message: Any, shape: Shape) -> JSON:
    """A peer's message in its shape, texts printable and cut; raises ProtocolError."""
    try:
        found: JSON = check(message, shape)
    except Odd as odd:
        raise ProtocolError(str(odd)) from None
    return found


def check_report(report: Any) -> JSON:
    """What a member says, with every field of its cause; raises ProtocolError."""
    found = expected(report, REPORT)
    if found["exit"] and found["exit"]["cause"]:
        found["exit"]["cause"] = {**NO_CAUSE, **found["exit"]["cause"]}
    return found


def encoded(value: Any) -> bytes:
    """A value as it lies in a frame."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def hosts_within(names: Iterable[str]) -> list[str]:
    """Names in order, each once, as far as there is room for them in a view."""
    kept: list[str] = []
    room = HOSTS_BYTES
    for name in dict.fromkeys(names):
        room -= len(encoded(name)) + 1
        if room >= 0:
            kept.append(name)
    return sorted(kept)


def as_told(checkpoint: JSON, host: str) -> JSON:
    """A rank's newest checkpoint as every node is told of it."""
    path = checkpoint["path"].encode("utf-8", "replace")[:PATH_TOLD].decode("utf-8", "ignore")
    return {"host": host, "path": path, "time": checkpoint["time"]}


class Coordinator:
    """Rank 0's view of the gang. Feed it join, report, leave and tick; ask it for the order of each rank.

    Reports and orders carry the whole state of their sender, so that a lost or repeated one does no harm.
    """

    def __init__(self, nnodes: int, limits: Limits, release: str = "", generation: int = 0,
                 restarts_left: Optional[int] = None, unacknowledged: Optional[Iterable[int]] = None,
                 now: float = 0.0) -> None:
        self.limits, self.release = limits, release
        self.seats = [Seat(rank) for rank in range(nnodes)]
        self.attention = Attention(limits, now)
        self.seats[0].connected = True          # to itself: rank 0 needs no connection, and has none to lose
        self.phase = "waiting"
        self.since = now
        self.generation = generation
        self.restarts = 0
        self.restarts_left = limits.max_restarts if restarts_left is None else restarts_left
        self.failures = 0                       # in a row, without progress
        self.not_before = 0.0                   # backoff
        self.activity = 0.0                     # last progress or output line of this generation
        self.abort: Optional[JSON] = None       # why this generation ends, until that is settled
        self.first_cause: Optional[JSON] = None
        self.history: list[JSON] = []
        self.stopped_by: Optional[str] = None
        self.stopping_since = now
        self.most_hosts = 2 * nnodes + 64
        self.checkpoint_hosts: list[str] = []   # never shrinks: who looks for a lost node's checkpoints asks this
        self.checkpoints_seen: JSON = {}
        self.farewell: Optional[JSON] = None    # the order that stays when rank 0 itself goes away
        if unacknowledged is not None:          # done before; some nodes have not been told
            self.phase = "done"
            for seat in self.seats:
                seat.acknowledged = seat.rank not in unacknowledged

    # -- events

    def join(self, rank: int, session: int, now: float) -> None:
        """An authenticated connection speaks for this rank from now on."""
        now, seat = self.attention.time(now), self.seats[rank]
        if rank and seat.connected:
            self._lose(seat, "its supervisor started anew", now)
        seat.connected, seat.session, seat.heard = True, session, now
        seat.report, seat.checkpoints, seat.lines = {}, None, None
        self._step(now)

    def report(self, rank: int, session: int, report: JSON, now: float) -> None:
        """The state of a node, whatever it is; see Member.report for the keys. Raises ProtocolError where it is none."""
        self.hear(rank, session, check_report(report), now)

    def hear(self, rank: int, session: int, report: JSON, now: float) -> None:
        """A report that check_report has returned, or this node's own."""
        now, seat = self.attention.time(now), self.seats[rank]
        if not seat.connected or session != seat.session:
            return
        if seat.host_of == session and report["host"] != seat.host:
            raise ProtocolError("another host name than before")
        news = any(report[key] != seat.report.get(key) for key in NEWS)
        seat.heard, seat.report, seat.host, seat.host_of = now, report, report["host"], session
        if report.get("final") and report["final"] == self.phase:
            seat.acknowledged = True
        if report["checkpoint"] and rank < CHECKPOINTS_TOLD:
            self.checkpoints_seen[str(rank)] = as_told(report["checkpoint"], report["host"])
        if report["checkpoint"] and seat.host not in self.checkpoint_hosts and self._room_for(report["host"]):
            self.checkpoint_hosts = sorted([*self.checkpoint_hosts, report["host"]])
        last = report.get("exit") or {}
        if last.get("generation") == self.generation and last.get("code") == 0:
            seat.finished = self.generation
        if report.get("stop") and self.phase in ("waiting", "running"):
            self.stopped_by = seat.name
        self._progress(seat, report, now)
        if news:                    # a mere heartbeat moves nothing; with hundreds of nodes that matters
            self._step(now)

    def admits(self, rank: int, host: Any) -> bool:
        """Whether a host may speak for a rank: not while another host does, as after a spare has taken over."""
        seat = self.seats[rank]
        return not seat.connected or seat.host in (None, host)

    def leave(self, rank: int, session: int, why: str, now: float) -> None:
        """The connection of a node is gone."""
        now, seat = self.attention.time(now), self.seats[rank]
        if rank and seat.connected and session == seat.session:
            self._lose(seat, why, now)
            self._step(now)

    def depart(self, now: float) -> bool:
        """Rank 0's own supervisor wants to go for a while; whether it may. Nobody else can tell why this generation ended.

        The others may take their whole grace, which a shutdown does not wait for: so that is settled with what is known.
        After a failure they are quiet in a moment, and know more.
        """
        now = self.attention.time(now)
        if self.abort:
            patience = 0.0 if self.abort["planned"] else self.limits.abort_grace + self.limits.report_time + 3.0
            if now - self.abort["at"] < patience:
                return False
            order = self.order()
            self._settle(now)
            if self.phase == "failed":
                return False            # that is for good, and the others have to hear it
            self.farewell = order       # the grace that they were given
        return True

    def tick(self, now: float) -> None:
        """Time has passed."""
        now = self.attention.time(now)
        for seat in self.seats[1:]:
            if seat.connected and now - seat.heard > self.limits.lost_after:
                self._lose(seat, f"not heard for {self.limits.lost_after:g} s", now)
        self._step(now)

    # -- answers

    def order(self, _rank: int = 0) -> JSON:
        """What a node has to do now."""
        if self.farewell:
            return dict(self.farewell)
        order: JSON = {"order": {"waiting": "wait", "running": "run", "stopping": "stop"}.get(self.phase, self.phase),
                       "generation": self.generation}
        if self.abort:
            order.update(graceful=self.abort["planned"], hang=self.abort["hang"])
        return order

    def finished(self, now: float) -> bool:
        """Whether rank 0 may exit: everyone who can be told has been told."""
        now = self.attention.time(now)
        if self.phase == "done":
            return not self.unacknowledged() or now - self.since > self.limits.done_linger
        if self.phase in FINAL:
            # Whose unit is being restarted is back in a moment, and would wait for a job that is over.
            back = any(not seat.connected and seat.left[0] == "restart" for seat in self.seats[1:])
            told = all(seat.acknowledged or not seat.connected for seat in self.seats[1:])
            return told and not back or now - self.since > (self._back_by() if back else self.limits.linger)
        return False

    def unacknowledged(self) -> list[int]:
        """Ranks that do not know the result yet."""
        return [seat.rank for seat in self.seats[1:] if not seat.acknowledged]

    def wake_at(self, now: float) -> float:
        """When tick has to be called next at the latest."""
        times = [now + 1.0]
        if self.phase == "waiting" and not self.abort and self.not_before:
            times.append(now + max(0.0, self.not_before - self.attention.time(now)))
        return min(times)

    def age(self, moment: float, now: float) -> float:
        """Seconds since a moment that this coordinator has noted."""
        return self.attention.time(now) - moment

    def problems(self) -> list[tuple[str, str]]:
        """What the gang waits for: (host, text), by rank."""
        found = []
        for seat in self.seats:
            report = seat.report
            if not seat.connected:
                found.append((seat.name, "not connected"))
            elif not report:
                found.append((seat.name, "has not reported yet"))
            elif report.get("nnodes") not in (None, len(self.seats)):
                found.append((seat.name, f"was set up for {report['nnodes']} nodes, rank 0 for {len(self.seats)}"))
            elif report.get("release", self.release) != self.release:
                found.append((seat.name, f"has release {report['release'] or 'none'}, rank 0 has {self.release}"))
            elif seat.left[0]:
                found.append((seat.name, f"{seat.left[1]}; it is back in a moment"))
            elif report.get("phase") != "idle":
                held = report.get("unkillable")
                found.append((seat.name, f"process {held[0]} does not die (uninterruptible)" if held
                              else f"generation {report.get('generation')} is still ending"))
            elif report.get("problems") is None:
                found.append((seat.name, "local checks are running"))
            else:
                found += [(seat.name, str(problem.get("text"))) for problem in report["problems"]]
        return found

    def text(self) -> str:
        """The state of the job as a sentence without moving numbers."""
        if self.phase == "waiting":
            waits: dict[str, list[str]] = {}
            for host, text in self.problems():
                waits.setdefault(text, []).append(host)
            if waits:
                parts = [f"{', '.join(hosts[:8])}{' and more' if len(hosts) > 8 else ''}: {text}"
                         for text, hosts in list(waits.items())[:8]]
                return "waiting for " + "; ".join(parts)
            return f"generation {self.generation + 1} is about to start"
        if self.phase == "running":
            return f"generation {self.generation} runs on {len(self.seats)} node(s)"
        if self.phase == "stopping":
            return f"stop requested on {self.stopped_by}: ending cleanly"
        if self.phase == "stopped":
            return f"stopped as requested on {self.stopped_by}"
        if self.phase == "done":
            left = [self.seats[rank].name for rank in self.unacknowledged()]
            return "finished on every node" + (f"; still to be told: {', '.join(left)}" if left else "")
        cause = self.first_cause or {}
        return (f"failed {self.failures} time(s) without progress, the budget of {self.limits.max_restarts} restart(s) "
                f"is spent; the last time first on {cause.get('text')}")

    def view(self) -> JSON:
        """What every node is told about the job. Always fits into a frame: those who get a larger one drop the connection."""
        view: JSON = {
            "state": self.phase, "text": self.text()[:2000], "generation": self.generation, "restarts": self.restarts,
            "restarts_left": self.restarts_left, "first_cause": self.first_cause, "stopped_by": self.stopped_by,
            "checkpoint_hosts": self.checkpoint_hosts, "checkpoints": dict(self.checkpoints_seen)}
        # Where a checkpoint lies is worth more than its name.
        over = len(encoded(view)) - Session.LIMIT + ORDER_BYTES
        while over > 0 and view["checkpoints"]:
            rank, checkpoint = view["checkpoints"].popitem()
            over -= len(encoded({rank: checkpoint})) - 1
        while over > 0 and view["checkpoint_hosts"]:
            *view["checkpoint_hosts"], name = view["checkpoint_hosts"]
            over -= len(encoded(name))
        return view

    # -- inside

    def _back_by(self) -> float:
        """How long a unit that is being restarted is waited for. Where rank 0's own is to end too, systemd does not wait for ever."""
        if not (self.seats[0].report.get("stop") or self.seats[0].left[0]):
            return self.limits.back_by
        return min(self.limits.back_by, max(self.limits.linger, self.stopping_since + self.limits.grace + self.limits.linger - self.since))

    def remember(self, hosts: Iterable[str], checkpoints: JSON) -> None:
        """What an earlier supervisor knew of checkpoints, as far as every node can be told."""
        self.checkpoint_hosts = hosts_within(hosts)
        self.most_hosts = len(self.checkpoint_hosts) + 2 * len(self.seats) + 64
        ranks = [str(rank) for rank in range(CHECKPOINTS_TOLD)]     # under other keys there would be one too many soon
        self.checkpoints_seen = {rank: as_told(checkpoints[rank], checkpoints[rank]["host"]) for rank in ranks if rank in checkpoints}

    def _room_for(self, host: str) -> bool:
        """Whether another host's name is kept: all names travel with every view, so there is an end to them."""
        names = [*self.checkpoint_hosts, host]
        return len(names) <= self.most_hosts and len(hosts_within(names)) == len(names)

    def _enter(self, phase: str, now: float) -> None:
        self.phase, self.since = phase, now
        if phase == "stopping":
            self.stopping_since = now
        for seat in self.seats:
            seat.acknowledged = False

    def _lose(self, seat: Seat, why: str, now: float) -> None:
        seat.connected = False
        planned, error = seat.left
        if self.phase == "running" and seat.finished != self.generation:
            self._abort(now, planned=bool(planned))
        if self.abort and self.abort["generation"] == self.generation:
            excuse = "" if planned else self.attention.excuse(now)
            guilty = self.seats[0] if excuse else seat      # they have left because rank 0 was not heard
            self.abort["losses"].append({
                "host": guilty.name, "node_rank": guilty.rank, "reason": planned or "lost",
                "error": error or excuse or why, "at": seat.heard})

    def _abort(self, now: float, planned: bool = False, hang: bool = False) -> None:
        if self.phase != "running":
            return
        self.abort = {"generation": self.generation, "at": now, "planned": planned, "hang": hang, "losses": []}
        self._enter("waiting", now)

    def _progress(self, seat: Seat, report: JSON, now: float) -> None:
        checkpoints, lines = report.get("checkpoints"), report.get("lines")
        if self.phase == "running" and report.get("generation") == self.generation:
            if checkpoints != seat.checkpoints and seat.checkpoints is not None:
                self.restarts_left, self.failures, self.activity = self.limits.max_restarts, 0, now
            if lines != seat.lines:
                self.activity = now
        seat.checkpoints, seat.lines = checkpoints, lines

    def _step(self, now: float) -> None:
        while self._advance(now):
            pass

    def _advance(self, now: float) -> bool:
        """One transition, if there is one to make."""
        if self.phase in ("waiting", "running") and self.stopped_by:
            self._enter("stopping", now)
            return True
        if self.phase == "stopping":
            if all(seat.idle or not seat.connected for seat in self.seats):
                self._enter("stopped", now)
                return True
        elif self.phase == "running":
            return self._advance_running(now)
        elif self.phase == "waiting" and self.abort:
            if all(seat.idle or not seat.connected for seat in self.seats):
                self._settle(now)
                return True
        elif self.phase == "waiting" and now >= self.not_before and not self.problems():
            claims = [int(seat.report.get("generation") or 0) for seat in self.seats]
            self.generation = max([self.generation] + [claim for claim in claims if claim <= self.generation + PLAUSIBLE]) + 1
            self.activity = now
            self._enter("running", now)
            return True
        return False

    def _advance_running(self, now: float) -> bool:
        if all(seat.finished == self.generation for seat in self.seats):
            self._enter("done", now)
            return True
        late = now - self.since > self.limits.start_timeout
        for seat in self.seats:
            report = seat.report
            mine = report.get("generation") == self.generation
            failed = mine and report.get("phase") == "idle" and seat.finished != self.generation
            if report.get("leaving"):
                self._abort(now, planned=True)
            elif failed or (mine and report.get("failing")) or (late and not mine and seat.finished != self.generation):
                self._abort(now)
        if self.phase == "running" and 0 < self.limits.hang_timeout < now - self.activity:
            self._abort(now, hang=True)
        return self.phase != "running"

    def _settle(self, now: float) -> None:
        """Every node is quiet: find the first cause, charge the budget."""
        assert self.abort
        abort, self.abort = self.abort, None
        cause = self._first_cause(abort)
        charged = cause["reason"] not in ("lost", "shutdown", "restart")
        cause.update(generation=abort["generation"], charged=charged)
        cause["text"] = describe(cause)
        self.first_cause = cause
        self.history = (self.history + [dict(cause, error=cause["error"] and cause["error"][:1000])])[-HISTORY:]
        self.restarts += 1
        if charged:
            self.failures += 1
            if self.restarts_left <= 0:
                self._enter("failed", now)
                return
            self.restarts_left -= 1
            self.not_before = now + self.limits.backoff(self.failures)

    def _first_cause(self, abort: JSON) -> JSON:
        """The earliest event that is not merely the echo of another node's."""
        losses: list[JSON] = sorted(abort["losses"], key=lambda loss: loss["at"])
        failures: list[JSON] = []
        for seat in self.seats:
            last = seat.report.get("exit") or {}
            if last.get("generation") == abort["generation"] and last.get("code") and last.get("cause"):
                if last.get("ordered") and not last["cause"].get("own"):
                    continue        # ended by our own SIGTERM
                failures.append(dict(last["cause"], host=seat.name, node_rank=seat.rank))
        failures.sort(key=lambda cause: (bool(cause.get("echo")), cause.get("time") or 0.0))
        if abort["planned"]:
            gone = next((loss for loss in losses if loss["reason"] != "lost"), None)
            going = next((seat for seat in self.seats if seat.left[0]), None)
            if gone or not going:
                return gone or {"host": None, "node_rank": None, "reason": "shutdown", "error": LEAVING["shutdown"][1]}
            return {"host": going.name, "node_rank": going.rank, "reason": going.left[0], "error": going.left[1]}
        if losses and (not failures or failures[0].get("echo") or losses[0]["at"] < abort["at"]):
            return losses[0]
        if failures:
            return failures[0]
        if abort["hang"]:
            return {"host": None, "node_rank": None, "reason": "hang",
                    "error": f"no output and no new checkpoint for {self.limits.hang_timeout:g} s"}
        late = [seat for seat in self.seats if seat.report.get("generation") != abort["generation"]]
        failing = [seat for seat in self.seats if seat.report.get("failing")]
        error = "a worker failed" if failing else f"torchrun did not start within {self.limits.start_timeout:g} s"
        first = next(iter(failing or late), None)
        return {"host": first.name if first else None, "node_rank": first.rank if first else None, "reason": "exit", "error": error}


# ---------------------------------------------------------------------------------------------------------------------
# The member: what one node does (pure)

Action = tuple[Any, ...]


class Member:
    """One node's part. Feed it events; carry out the actions that step returns:

    ("check",) run the local checks; ("start", generation); ("terminate",) SIGTERM to torchrun; ("spare",) SIGKILL to
    all but torchrun itself, which then writes its report; ("kill",) SIGKILL to all; ("result", name) the job's end has
    reached this node; ("exit", code).
    """

    def __init__(self, host: str, nnodes: int, release: str, limits: Limits, generation: int = 0) -> None:
        self.host, self.nnodes, self.release, self.limits = host, nnodes, release, limits
        self.phase = "idle"
        self.generation = generation            # the last one started here; never started again
        self.exit: Optional[JSON] = None
        self.problems: Optional[list[JSON]] = None
        self.unkillable: list[int] = []
        self.connected = False
        self.order: JSON = {"order": "wait"}
        self.stop_at: Optional[float] = None    # when systemctl stop reached this node
        self.leaving = False                    # this node goes away for a while, and the job does not end
        self.why = ""                           # which of LEAVING
        self.failing = False                    # torchrun has seen a worker fail and is ending
        self.ordered = False                    # this generation was ended by us, so its exit code tells nothing
        self.result: Optional[str] = None
        self.deadline: Optional[float] = None   # of the grace
        self.kill_again = 0.0
        self.checking = False
        self.check_at = 0.0
        self.attention: Optional[Attention] = None

    def _time(self, now: float) -> float:
        """The time by which this member judges."""
        self.attention = self.attention or Attention(self.limits, now)
        return self.attention.time(now)

    # -- events

    def receive(self, order: JSON) -> None:
        self.connected, self.order = True, order

    def disconnect(self) -> None:
        """Rank 0's supervisor is not heard any more. A stop or an end it has ordered stays ordered."""
        self.connected, self.problems = False, None
        if self.order.get("order") not in ("stop",) + FINAL:
            self.order = {"order": "wait"}

    def checked(self, problems: list[JSON], now: float) -> None:
        self.problems, self.checking = problems, False
        self.check_at = self._time(now) + (self.limits.recheck if problems else self.limits.recheck_good)

    def stop(self, now: float, leaving: bool, why: str = "shutdown") -> None:
        """SIGTERM has come: a stop of the job, or (leaving) this node's own affair; why is one of LEAVING.

        A stop wins over a restart that was asked for before.
        """
        if leaving:
            self.leaving, self.why = True, self.why or why
        else:
            if self.stop_at is None:
                self.stop_at = self._time(now)
            self.leaving, self.why = False, ""

    def fail(self) -> None:
        """torchrun reports a failed worker and is ending its others."""
        self.failing = self.failing or self.phase == "running"

    def ended(self, code: int, cause: Optional[JSON], now: float) -> None:
        """torchrun has exited and nothing of it is alive."""
        self.exit = {"generation": self.generation, "time": time_of(cause), "code": code, "ordered": self.ordered,
                     "cause": cause}
        self.phase, self.problems, self.checking, self.check_at = "idle", None, False, self._time(now)
        self.failing, self.deadline, self.unkillable = False, None, []

    # -- answers

    def report(self) -> JSON:
        """Everything the coordinator has to know of this node."""
        return {"host": self.host, "nnodes": self.nnodes, "release": self.release, "phase": self.phase,
                "generation": self.generation, "exit": self.exit, "problems": self.problems, "final": self.result,
                "unkillable": self.unkillable[:1], "failing": self.failing, "leaving": self.leaving,
                "why": self.why, "stop": self.stop_at is not None}

    def wake_at(self, now: float) -> float:
        times = [now + 1.0]
        if self.phase == "stopping" and self.deadline is not None:
            times.append(now + max(0.0, self.deadline - self._time(now)))
        return min(times)

    # -- decisions

    def step(self, now: float) -> list[Action]:
        """What to do now."""
        now = self._time(now)
        if self.phase == "running":
            return self._step_running(now)
        if self.phase == "stopping":
            return self._step_stopping(now)
        return self._step_idle(now)

    def _step_running(self, now: float) -> list[Action]:
        order = self.order.get("order")
        gone = not self.connected
        asked = self.stop_at is not None and (gone or now - self.stop_at > 2.0)
        if self.failing:
            self.phase, self.deadline = "stopping", now + self.limits.abort_grace
            return []
        if self.leaving or asked or order == "stop":
            return self._halt(now + self.limits.grace)
        if gone or order != "run" or self.order.get("generation") != self.generation:
            graceful = bool(self.order.get("graceful")) and not gone
            return self._halt(now + (self.limits.grace if graceful else self.limits.abort_grace))
        return []

    def _halt(self, deadline: float) -> list[Action]:
        self.phase, self.deadline, self.ordered = "stopping", deadline, True
        return [("terminate",)]

    def _step_stopping(self, now: float) -> list[Action]:
        if self.deadline is None or now < self.deadline:
            return []
        if self.failing:
            self.failing, self.deadline = False, now + self.limits.report_time
            return [("spare",)]
        self.deadline = now + 0.5       # until it is empty
        return [("kill",)]

    def _step_idle(self, now: float) -> list[Action]:
        order = self.order.get("order")
        if self.result:
            return [("exit", EXIT_FAILED if self.result == "failed" else EXIT_OK)]
        if order in FINAL:
            self.result = str(order)
            return [("result", self.result)]
        if self.leaving:
            return [("exit", EXIT_AGAIN)]
        alone = not self.connected
        # Rank 0's last word has the checkpoints that the others have written at the stop.
        patience = self.limits.grace + self.limits.linger if order == "stop" else 2.0
        if self.stop_at is not None and (alone or now - self.stop_at > patience) or alone and order == "stop":
            self.result = "stopped"
            return [("result", self.result)]
        # Orders come in order on each connection, so one that differs is a new one. A number that somebody has made up, here
        # or in a file, does not keep a node from going on with the job's own.
        if order == "run" and self.connected and int(self.order["generation"]) != self.generation \
                and self.problems is not None and self.stop_at is None:
            self.phase, self.generation, self.exit = "running", int(self.order["generation"]), None
            self.failing = self.ordered = False
            return [("start", self.generation)]
        if self.connected and not self.checking and order == "wait" and (self.problems is None or now >= self.check_at):
            self.checking = True
            return [("check",)]
        return []


def time_of(cause: Optional[JSON]) -> Optional[float]:
    return cause.get("time") if cause else None


# ---------------------------------------------------------------------------------------------------------------------
# The wire: length-limited JSON frames, authenticated both ways


class Session:
    """One end of an authenticated stream: bytes in, messages out. Opens no socket.

    Frame: 4 bytes length, 32 bytes HMAC-SHA256 (none before both sides have proved the secret), JSON payload.
    Both ends give a nonce, so keys differ with every connection and direction; the MAC covers a running number, so
    that a repeated, swapped or dropped frame ends the connection. At most LIMIT bytes of a frame are ever held.
    """

    HELLO_LIMIT, LIMIT, BACKLOG = 512, 65536, 262144

    def __init__(self, secret: bytes, job: str, rank: Optional[int] = None) -> None:
        self.secret, self.job, self.rank = secret, job, rank
        self.server = rank is None
        self.nonce = os.urandom(16).hex()
        self.peer_nonce = ""
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.open = False
        self.keys = (b"", b"")      # to send with, to receive with
        self.counts = [0, 0]
        if not self.server:
            self._put({"protocol": 1, "job": job, "rank": rank, "nonce": self.nonce})

    def feed(self, data: bytes) -> list[JSON]:
        """Take in received bytes; returns the messages that are complete and genuine."""
        self.incoming += data
        messages: list[JSON] = []
        while True:
            payload = self._frame()
            if payload is None:
                return messages
            try:
                message = parse_json(payload.decode("utf-8", "replace"), 8)
            except Odd as odd:
                raise ProtocolError(f"not a message: {odd}") from None
            if not isinstance(message, dict):
                raise ProtocolError("not a JSON object")
            if self.open:
                messages.append(message)
            else:
                self._handshake(message)

    def send(self, message: JSON) -> None:
        """Queue a message; a peer that reads nothing for long is dropped."""
        if not self.open:
            raise ProtocolError("not open")
        if len(self.outgoing) > self.BACKLOG:
            raise ProtocolError("the peer does not read")
        self._put(message)

    def _put(self, message: JSON) -> None:
        payload = encoded(message)
        mac = self._mac(0, payload) if self.open else b""
        self.outgoing += struct.pack(">I", len(payload)) + mac + payload

    def _mac(self, direction: int, payload: bytes) -> bytes:
        number = self.counts[direction]
        self.counts[direction] += 1
        return hmac.digest(self.keys[direction], struct.pack(">QI", number, len(payload)) + payload, "sha256")

    def _frame(self) -> Optional[bytes]:
        """The next payload, checked; None while it is not complete."""
        head = 36 if self.open else 4
        if len(self.incoming) < 4:
            return None
        (length,) = struct.unpack_from(">I", self.incoming)
        if length > (self.LIMIT if self.open else self.HELLO_LIMIT):
            raise ProtocolError(f"a frame of {length} bytes")
        if len(self.incoming) < head + length:
            return None
        mac, payload = bytes(self.incoming[4:head]), bytes(self.incoming[head:head + length])
        del self.incoming[:head + length]
        if self.open and not hmac.compare_digest(mac, self._mac(1, payload)):
            raise ProtocolError("wrong MAC")
        return payload

    def _derive(self, label: str) -> bytes:
        nonces = (self.peer_nonce, self.nonce) if self.server else (self.nonce, self.peer_nonce)
        return hmac.digest(self.secret, "\0".join([label, self.job, str(self.rank), *nonces]).encode(), "sha256")

    @staticmethod
    def _nonce(message: JSON) -> str:
        nonce = message.get("nonce")
        if not isinstance(nonce, str) or len(nonce) != 32 or not nonce.isascii():
            raise ProtocolError("no nonce")
        return nonce

    def _handshake(self, message: JSON) -> None:
        if self.server and not self.peer_nonce:
            rank = message.get("rank")
            known = isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < 1 << 20
            if not known or message.get("protocol") != 1 or message.get("job") != self.job:
                raise ProtocolError("not a member of this job")
            self.rank, self.peer_nonce = rank, self._nonce(message)
            self._put({"nonce": self.nonce, "proof": self._derive("server").hex()})
            return
        if not self.server:
            self.peer_nonce = self._nonce(message)
        proof = str(message.get("proof")).encode("utf-8", "replace")
        if not hmac.compare_digest(proof, self._derive("client" if self.server else "server").hex().encode()):
            raise ProtocolError("wrong secret")
        if not self.server:
            self._put({"proof": self._derive("client").hex()})
        keys = self._derive("to member"), self._derive("to coordinator")
        self.keys = keys if self.server else keys[::-1]
        self.open = True


# ---------------------------------------------------------------------------------------------------------------------
# The processes of one generation


class CgroupTree:
    """All processes of torchrun in one sub-cgroup: whatever they fork, setsid or orphan, they stay inside."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.path = os.path.join(unit, "torchrun")
        own = os.path.join(unit, "supervisor")
        os.makedirs(own, exist_ok=True)
        with open(os.path.join(own, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(str(os.getpid()))
        os.makedirs(self.path, exist_ok=True)

    @staticmethod
    def unit_path() -> Optional[str]:
        """The delegated cgroup of this unit, or None where there is none."""
        try:
            with open("/proc/self/cgroup", encoding="utf-8") as file:
                own = [line[3:].strip() for line in file if line.startswith("0::")]
            with open("/proc/self/mountinfo", encoding="utf-8") as file:
                mounts = [line.split(" ") for line in file if " - cgroup2 " in line]
        except OSError:
            return None
        for mount in mounts:
            if not own or mount[3] != "/":
                continue
            path = mount[4] + own[0]
            if os.path.basename(path) == "supervisor":
                path = os.path.dirname(path)
            files = [path, os.path.join(path, "cgroup.procs")]
            if path.endswith((".service", ".scope")) and all(os.access(name, os.W_OK) for name in files):
                return path
        return None

    def command(self, command: list[str]) -> list[str]:
        """The command, entering the cgroup before it becomes torchrun."""
        return ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', os.path.join(self.path, "cgroup.procs"), *command]

    def pids(self) -> list[int]:
        """Every process inside, sub-cgroups included."""
        found: list[int] = []
        for folder, _folders, _files in os.walk(self.path):
            try:
                with open(os.path.join(folder, "cgroup.procs"), encoding="ascii") as file:
                    found += [int(line) for line in file]
            except OSError:
                pass
        return found

    def kill(self) -> None:
        """SIGKILL to every process at once (cgroup.kill, Linux 5.14), else one by one."""
        try:
            with open(os.path.join(self.path, "cgroup.kill"), "w", encoding="ascii") as file:
                file.write("1")
        except OSError:
            kill_each(self.pids())

    def oom_kills(self) -> int:
        """How many processes of the unit the kernel has killed for memory, so far."""
        try:
            with open(os.path.join(self.unit, "memory.events"), encoding="ascii") as file:
                return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        except (OSError, ValueError):
            return 0

    def memory_limit(self) -> str:
        """What the unit may use, for a sentence; empty where it has no limit."""
        try:
            with open(os.path.join(self.unit, "memory.max"), encoding="ascii") as file:
                return f", of which the unit may use {int(file.read()) / 2 ** 30:.2f} GiB (torchrun_memory_max)"
        except (OSError, ValueError):
            return ""


class MarkedTree:
    """The same without a delegated cgroup: processes are found by a marker in their environment."""

    def __init__(self, marker: str) -> None:
        self.marker = f"{MARKER}={marker}".encode()

    def command(self, command: list[str]) -> list[str]:
        return command

    def pids(self) -> list[int]:
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    with open(f"/proc/{name}/environ", "rb") as file:
                        if self.marker in file.read().split(b"\0"):
                            found.append(int(name))
                except OSError:
                    pass
        return found

    def kill(self) -> None:
        kill_each(self.pids())

    def oom_kills(self) -> int:
        return 0

    def memory_limit(self) -> str:
        return ""


def kill_each(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


class Pump(threading.Thread):
    """Passes one output stream of torchrun on, line by line, and remembers its end."""

    CLOSING = b"closing signal SIGTERM"     # torchrun's words when a worker has failed and it ends the others

    def __init__(self, source: int, target: int, on_closing: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.source, self.target, self.on_closing = source, target, on_closing
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.lines = 0

    def run(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self.source, 65536)
            except OSError:
                data = b""
            rest += data
            cut = len(rest) if not data or len(rest) > 65536 else rest.rfind(b"\n") + 1
            if cut:
                whole, rest = rest[:cut], rest[cut:]
                self.lines += whole.count(b"\n") or 1
                self.tail.extend(line[:TAIL_WIDTH] for line in whole.decode("utf-8", "replace").splitlines()[-TAIL_LINES:])
                write_all(self.target, whole)
                if self.CLOSING in whole:
                    self.on_closing()
            if not data:
                os.close(self.source)
                return


TCP_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
TCP_COUNTERS = "/proc/self/net/netstat"
BLOCKED_PERIOD = 5.0            # seconds between looks at the kernel's table
BLOCKED_COUNTS = 30.0           # seconds for which a look's finding explains a failure
MOST_BLOCKED = 8                # sentences; more would say nothing new
SYN_SENT, RESENT = "02", 2      # the second repetition goes out three seconds after the first packet


def repeated_requests(counters: str) -> Optional[int]:
    """How many requests to connect this network namespace has sent again so far; None where its kernel does not tell."""
    rows = [line.split() for line in counters.splitlines()]
    for names, values in zip(rows[::2], rows[1::2]):
        if "TCPSynRetrans" in names:
            return int(values[names.index("TCPSynRetrans")])
    return None


def unanswered(table: str, uid: int) -> list[tuple[str, str, int]]:
    """Connections of a user that nobody has answered for seconds, from the kernel's table: (own address, address, port)."""
    found = []
    for line in table.splitlines()[1:]:
        words = line.split()
        if words[3] == SYN_SENT and int(words[7]) == uid and int(words[6], 16) >= RESENT:
            own, (target, port) = kernel_address(words[1])[0], kernel_address(words[2])
            found.append((own, target, port))
    return found


def kernel_address(text: str) -> tuple[str, int]:
    """Address and port as /proc/net/tcp writes them: words of 32 bits in the byte order of this machine."""
    digits, _colon, port = text.partition(":")
    packed = b"".join(struct.pack("=I", int(digits[at:at + 8], 16)) for at in range(0, len(digits), 8))
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)


class Torchrun:
    """One generation's torchrun on this node: start, end, and why it ended."""

    def __init__(self, tree: Any, marker: str, error_dir: str, log_dir: str, on_closing: Callable[[], None]) -> None:
        self.tree, self.marker, self.error_dir, self.log_dir = tree, marker, error_dir, log_dir
        self.on_closing = on_closing
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.pumps: list[Pump] = []
        self.error_file = ""
        self.started = 0.0
        self.oom_before = 0
        self.failed_at: Optional[float] = None      # when it was seen to end its workers, or a start that failed
        self.ended_at: Optional[float] = None       # when we told it to end
        self.stuck: list[str] = []                  # processes found stopped when the job hung
        self.blocked: dict[str, float] = {}         # sentence on connections that nobody answers, when last seen so
        self.repeated: Optional[int] = None         # requests to connect sent again, at the last look
        self.start_error = ""

    def start(self, command: list[str], generation: int) -> None:
        """Start a generation; a command that cannot be started counts as exit code 127."""
        try:
            os.makedirs(self.error_dir, exist_ok=True)
            for path in glob.glob(os.path.join(self.error_dir, "generation-*.json")):
                os.unlink(path)
        except OSError:
            pass            # a full disk costs the error's text, not the job
        self.error_file = os.path.join(self.error_dir, f"generation-{generation}.json")
        environment = dict(os.environ, TORCHELASTIC_ERROR_FILE=self.error_file, TORCHRUN_GENERATION=str(generation))
        environment[MARKER] = self.marker
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)
        self.oom_before, self.started = self.tree.oom_kills(), time.time()
        self.failed_at, self.ended_at, self.stuck, self.start_error = None, None, [], ""
        self.process, self.pumps, self.blocked = None, [], {}
        try:
            self.process = subprocess.Popen(self.tree.command(command), stdin=subprocess.DEVNULL, env=environment,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            self.start_error = f"cannot start {command[0]}: {error.strerror}"
            return
        assert self.process.stdout and self.process.stderr
        for stream, target in ((self.process.stdout, 1), (self.process.stderr, 2)):
            self.pumps.append(Pump(os.dup(stream.fileno()), target, self._closing))
            stream.close()
            self.pumps[-1].start()

    def _closing(self) -> None:
        if self.ended_at is None:
            self.failed_at = self.failed_at or time.time()
            self.on_closing()

    def look_for_blocked(self, address: str) -> None:
        """Note connections from this node's training address that nobody answers: torch itself says so after minutes, if at all.

        The kernel walks through all its buckets for its table, which takes milliseconds on a node with much memory; a
        counter tells whether there is anything to find.
        """
        before = self.repeated
        try:
            with open(TCP_COUNTERS, encoding="ascii") as file:
                self.repeated = repeated_requests(file.read())
        except OSError:
            self.repeated = None        # no counter: look at the table each time
        if self.repeated is not None and self.repeated == before and not self.still_blocked():
            return
        for path in TCP_TABLES:
            try:
                with open(path, encoding="ascii") as file:
                    found = unanswered(file.read(), os.geteuid())
            except OSError:
                continue
            for own, target, port in found:
                text = f"{target} drops TCP from {own} to port {port}, look at its firewall"
                if own != address or (text not in self.blocked and len(self.blocked) == MOST_BLOCKED):
                    continue
                if text not in self.blocked:
                    say(text)
                self.blocked[text] = time.monotonic()

    def still_blocked(self) -> list[str]:
        """Those that have been seen lately: a connection may have come through after all."""
        return [text for text, seen in self.blocked.items() if time.monotonic() - seen < BLOCKED_COUNTS]

    def lines(self) -> int:
        """Output lines seen so far: a change means that something still speaks."""
        return sum(pump.lines for pump in self.pumps)

    def terminate(self, hang: bool) -> None:
        """SIGTERM to torchrun, which passes it on to its workers. After a hang, note first who stands still."""
        if hang:
            for pid in self.tree.pids():
                state, name = process_state(pid)
                if state in ("T", "t"):
                    self.stuck.append(f"process {pid} ({name}) is stopped (state {state})")
        self.ended_at = self.ended_at or time.time()
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to all."""
        self.ended_at = self.ended_at or time.time()
        self.tree.kill()

    def spare(self) -> None:
        """SIGKILL to all but torchrun itself, which then writes its report."""
        kill_each(pid for pid in self.tree.pids() if not self.process or pid != self.process.pid)

    def exit_code(self) -> Optional[int]:
        """torchrun's exit code (negative: signal), None while it runs."""
        return self.process.poll() if self.process else 127

    def left(self) -> list[int]:
        """What is still alive."""
        return [pid for pid in self.tree.pids() if process_state(pid)[0] not in ("Z", "X", "")]

    def close(self) -> None:
        """All is dead: take in the last output."""
        for pump in self.pumps:
            pump.join(1.0)

    def cause(self) -> JSON:
        """Why torchrun ended, from error.json, its own report, the kernel and the last lines."""
        code = self.exit_code() or 0
        tail = list(self.pumps[1].tail) if self.pumps else []
        path, report = self._error_report()
        if self.ended_at and (mtime(path) or 0.0) > self.ended_at:
            report = None               # written because we have ended it
        cause = cause_from(0 if self.ended_at and code < 0 else code, report, tail)
        cause["time"] = max(0.0, min(stamp for stamp in (time.time(), self.failed_at, mtime(path)) if stamp))
        if self.start_error:
            cause.update(error=self.start_error, own=True)
        oom = self.tree.oom_kills() - self.oom_before
        if oom > 0:
            text = f"the kernel killed {oom} process(es) of the job for memory{self.tree.memory_limit()}"
            cause.update(reason="out of memory", own=True, echo=False,
                         error=f"{text}; {cause['error']}" if cause["error"] else text)
        xids = gpu_faults(self.started)
        if xids:
            cause.update(own=True, echo=False, error="; ".join(xids[:3] + ([cause["error"]] if cause["error"] else [])))
        if self.stuck:
            cause.update(reason="hang", own=True, error="; ".join(self.stuck[:4]))
        blocked = self.still_blocked()[:1]
        # A connection that a peer has closed had come about: another node's end is the cause, and no firewall.
        explains = not cause["error"] or (UNREACHED.search(cause["error"]) and not CLOSED.search(cause["error"]))
        if blocked and explains:
            cause.update(own=True, echo=False, error="; ".join(blocked + ([cause["error"]] if cause["error"] else [])))
        cause["own"] = bool(cause["own"] or self.failed_at)
        cause["error"] = one_line(cause["error"]) if cause["error"] else None
        return cause

    def _error_report(self) -> tuple[str, Optional[JSON]]:
        """torchrun's copy of the first error.json; where it came to no copy, the earliest of its workers'."""
        paths = [self.error_file]
        if self.log_dir:
            runs = [run.path for run in find(self.log_dir, "*", seconds=0.5) if run.folder and run.modified >= self.started]
            found = [entry for run in runs[:2] for entry in find(self.log_dir, f"{glob.escape(run)}/**/error.json", seconds=0.5)]
            paths += [os.path.join(self.log_dir, entry.path) for entry in sorted(found, key=lambda entry: entry.modified)]
        # The job may have written many, and the loop waits: what is found in a moment has to do.
        deadline, first_odd, reason = time.monotonic() + REPORT_TIME, "", None
        for path in paths[:MOST_REPORTS]:
            reason, odd = load(os.path.dirname(path), os.path.basename(path), ERROR_JSON, REPORT_BYTES)
            first_odd = first_odd or odd
            if reason or time.monotonic() > deadline:
                break
        if first_odd:
            say(first_odd)
        return (path, reason) if reason else ("", None)


def mtime(path: str) -> Optional[float]:
    """When a file was last written, None where there is none."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


# The driver's whole form: the kernel begins lines with names of processes, of 15 characters that any user may choose.
XID = re.compile(r"NVRM: Xid \((?:PCI:)?[0-9a-f]{4,8}:[0-9a-f]{2}[^)]{0,40}\): \d+", re.ASCII | re.IGNORECASE)


def gpu_faults(since: float) -> list[str]:
    """XID lines of the NVIDIA driver in the kernel's log since a moment, where this user may read it."""
    found = []
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    boot = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    try:
        while True:
            record = os.read(log, 8192).decode("utf-8", "replace")
            head, _separator, text = record.partition(";")
            if XID.match(text) and boot + int(head.split(",")[2]) / 1e6 >= since:
                found.append(text.splitlines()[0][:300])
    except (OSError, ValueError, IndexError):
        pass
    finally:
        os.close(log)
    return found


def process_state(pid: int) -> tuple[str, str]:
    """The state letter and name of a process, empty where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _separator, rest = file.read().rpartition(b")")
        return rest.split()[0].decode(), head.partition(b"(")[2].decode("utf-8", "replace")
    except (OSError, IndexError):
        return "", ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# What a worker says when it was another one that failed.
ECHO = re.compile(r"Connection (closed|reset|refused)|closed by peer|Broken pipe|remote process (exited|has )|"
                  r"NCCL (communicator was aborted|error.*remote)|ncclRemoteError|[Ww]atchdog|Timed? ?out|timeout|"
                  r"failed to recv|Failed to (recv|send)|DistNetworkError|DistStoreError|RendezvousConnectionError|"
                  r"Socket (Timeout|error)|heartbeat", re.ASCII)


# What a worker says when a connection did not come about.
UNREACHED = re.compile(r"timed? ?out|connect", re.ASCII | re.IGNORECASE)
CLOSED = re.compile(r"(closed|reset) by (the )?(remote )?peer|remote process (exited|has )", re.ASCII | re.IGNORECASE)


def cause_from(code: int, report: Optional[JSON], tail: list[str]) -> JSON:
    """One cause from torchrun's exit code, the error.json it left and the end of its stderr.

    Keys: reason (exit, signal, error), error (text), exit_code, signal, rank, local_rank, each None where unknown;
    own: torchrun saw a worker fail before it was told to end; echo: reads like the consequence of another's failure.
    """
    cause: JSON = {"reason": "exit", "error": None, "exit_code": code, "signal": None, "rank": None, "local_rank": None,
                   "own": report is not None, "echo": False}
    if code < 0:
        cause.update(reason="signal", exit_code=None, signal=signal_name(-code), error="torchrun itself was killed")
    message = (report or {}).get("message")
    if isinstance(message, dict):
        message = message.get("message")
    if isinstance(message, str) and message.startswith("SignalException"):
        message, cause["own"] = None, False     # torchrun's own word for our SIGTERM
    if isinstance(message, str) and message:
        cause.update(reason="error", error=message)
    workers = failures_in("\n".join(tail))
    if workers:
        first = workers[0]
        if first["exitcode"] > 0 and ECHO.search(cause["error"] or "\n".join(tail)):
            # Only an echo: a worker that was killed by a signal comes before it.
            first = next((worker for worker in workers if worker["exitcode"] < 0
                          and worker["exitcode"] not in (-signal.SIGTERM, -signal.SIGABRT)), first)
        cause.update(rank=first["rank"], local_rank=first["local_rank"], own=True, exit_code=None, signal=None)
        if code < 0:
            cause.update(reason="exit", error=None)     # torchrun itself was killed, but had said who failed
        if isinstance(message, str) and message:
            cause.update(reason="error", error=message)
        if first["exitcode"] < 0:
            cause.update(reason="signal", signal=signal_name(-first["exitcode"]))
            if first["exitcode"] != -signal.SIGABRT:
                cause["error"] = None
        else:
            cause["exit_code"] = first["exitcode"]
    if cause["error"] is None and cause["signal"] in (None, "SIGABRT"):
        bare = [re.sub(r"^(\[[^\]]*\]:? ?)+", "", line) for line in tail]      # without [rank 0] and [rank0]:
        spoken = [line for line in bare if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)
                  and "ChildFailedError" not in line and "SignalException" not in line]
        cause["error"] = next((line for line in spoken if not ECHO.search(line)), spoken[0] if spoken else None)
    cause["echo"] = bool(cause["error"] and ECHO.search(cause["error"])) and cause["signal"] in (None, "SIGABRT")
    return cause


def failures_in(text: str) -> list[dict[str, int]]:
    """Ranks and exit codes from torchrun's report of failed workers, the one it saw first at the front."""
    _before, title, report = text.rpartition("Failures:")
    if not title:
        return []
    others, _title, root = report.partition("Root Cause (first observed failure)")
    found = []
    # The job can print such a report too, so numbers that no rank and no process has are none.
    for match in re.finditer(r"rank\s*: ([0-9]{1,7}) \(local_rank: ([0-9]{1,7})\)\s*exitcode\s*: (-?[0-9]{1,9})\b", root + others):
        found.append({"rank": int(match.group(1)), "local_rank": int(match.group(2)), "exitcode": int(match.group(3))})
    return found


def sendable(cause: JSON) -> JSON:
    """A cause as peers take it: what the job has had a hand in and has another shape is said to be unknown."""
    try:
        return check(cause, OWN_CAUSE)
    except Odd as odd:
        return {**NO_CAUSE, "reason": "exit", "error": f"not known, since {odd}", "time": time.time(), "own": bool(cause.get("own")),
                "echo": False}


def describe(cause: JSON) -> str:
    """A cause as one sentence."""
    who = cause.get("host") or "an unknown node"
    if cause.get("rank") is not None:
        who += f", rank {cause['rank']}" + (f" (local rank {cause['local_rank']})" if cause.get("local_rank") is not None else "")
    reason = str(cause.get("reason"))
    how = None
    if cause.get("signal"):
        how = f"killed by {cause['signal']}"
    elif cause.get("exit_code"):
        how = f"exit code {cause['exit_code']}"
    parts = [how if reason in ("exit", "signal", "error") else f"{reason} ({how})" if how else reason]
    return ": ".join([who] + [part for part in parts + [(cause.get("error") or "")[:300]] if part])


# ---------------------------------------------------------------------------------------------------------------------
# Progress and local checks


class Watch(threading.Thread):
    """Counts new checkpoints. A thread, since a file system may hang."""

    PERIOD = 2.0
    LONGEST = 60.0      # seconds for one look: a folder whose walk was cut short would seem to have new names later
    SET_ASIDE = "set-aside-"    # folders of the verb restart: what lies there belongs to an earlier run

    def __init__(self, folder: str, pattern: str, on_answer: Callable[[], None] = lambda: None) -> None:
        super().__init__(daemon=True)
        self.folder, self.pattern, self.on_answer = folder, pattern, on_answer
        self.count = 0
        self.newest: Optional[JSON] = None
        self.seen: Optional[set[str]] = None
        self.soon = threading.Event()
        self.asked = self.answered = 0
        self.odd = ""

    def ask(self) -> int:
        """Look now. Returns the number that ``answered`` has once a look is over that began after this."""
        self.asked += 1
        self.soon.set()
        return self.asked

    def look(self) -> None:
        """A name never seen before is progress; so is a rewrite where the pattern matches only one file."""
        found = {}
        for entry in find(self.folder, self.pattern, seconds=self.LONGEST):
            path = os.path.join(self.folder, entry.path)
            if not entry.path.startswith(self.SET_ASIDE) and not path.endswith(".tmp"):
                stamp = mtime(path)
                if stamp is not None:
                    found[path] = stamp
        newest = max(found, key=lambda path: (found[path], path)) if found else None
        previous = self.newest
        if newest is not None:
            self.newest = {"path": printable(newest, 1024), "time": min(max(0.0, found[newest]), LAST_MOMENT)}
        if self.seen is None:
            self.seen = set(found)
            return
        rewritten = len(found) == 1 and previous is not None and self.newest is not None \
            and self.newest["time"] > previous["time"]
        if rewritten or not self.seen.issuperset(found):
            self.count += 1
            self.seen.update(found)

    def run(self) -> None:
        while True:
            self.soon.clear()
            asked = self.asked
            try:
                self.look()
            except Exception as error:  # whatever it is, later checkpoints have to count
                text = f"cannot look for checkpoints in {self.folder}: {kind_and_text(error)}"
                if text != self.odd:
                    self.odd = text
                    say(text)
            if asked != self.answered:
                self.answered = asked
                self.on_answer()
            self.soon.wait(self.PERIOD)


def kind_and_text(error: Exception) -> str:
    """An error for a sentence, with its kind: many have a text that says little without."""
    return one_line(f"{type(error).__name__}: {error}", 200)


def size_text(value: float) -> str:
    """Bytes for people: 12 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def check_room(path: str, wanted: int) -> str:
    """Empty, or why the file system of path has not enough room."""
    try:
        stat = os.statvfs(path)
    except OSError as error:
        return f"{path} cannot be used: {error.strerror}"
    free = stat.f_bavail * stat.f_frsize
    if stat.f_flag & os.ST_RDONLY:
        return f"{path} is mounted read-only"
    return "" if free >= wanted else f"{path} has {size_text(free)} free, {size_text(wanted)} expected"


def check_port(port: int) -> str:
    """Empty, or why torchrun could not listen on the port."""
    family = socket.AF_INET6 if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind(("", port))
            sock.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} is held by another process (ss -ltnp 'sport = :{port}' names it)"
        return f"port {port} cannot be used: {error.strerror}"
    return ""


def check_release(path: str, wanted: str) -> str:
    """Empty, or which release the link or folder is instead."""
    found = os.path.basename(os.path.realpath(path)) if os.path.exists(path) else "nothing"
    return "" if found == wanted else f"{path} leads to {found}, release {wanted} expected"


def smi(query: str) -> list[list[str]]:
    """Rows of an nvidia-smi query; none where there is no such tool."""
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else []
    return [[field.strip() for field in row.split(",")] for row in rows]


def check_gpus(wanted: int, visible: Optional[str]) -> list[str]:
    """Missing GPUs, and processes that hold one of those this job uses."""
    found = len(glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*"))     # a container may lack the first
    if found < wanted:
        return [f"{found} GPU(s) answer, {wanted} expected"]
    if not wanted:
        return []
    index = {row[1]: row[0] for row in smi("--query-gpu=index,uuid") if len(row) == 2}
    ours = set(visible.replace(" ", "").split(",")) if visible else set()
    problems = []
    for row in smi("--query-compute-apps=gpu_uuid,pid,process_name"):
        if len(row) == 3 and "mps-server" not in row[2] and (not ours or ours & {row[0], index.get(row[0])}):
            problems.append(f"GPU {index.get(row[0], row[0])} is held by process {row[1]} ({row[2]})")
    return problems


def run_checks(checks: list[tuple[str, str]], visible: Optional[str]) -> list[JSON]:
    """What keeps this node from starting: [{check, text}]."""
    problems: list[JSON] = []
    for kind, value in checks:
        if kind == "gpus":
            texts = check_gpus(int(value), visible)
        elif kind == "shm":
            texts = [check_room("/dev/shm", int(value))]
        elif kind == "disk":
            path, _colon, size = value.rpartition(":")
            texts = [check_room(path, int(size))]
        elif kind == "release":
            path, _colon, wanted = value.rpartition(":")
            texts = [check_release(path, wanted)]
        else:
            texts = [check_port(int(value))]
        problems += [{"check": kind, "text": one_line(text, 300)} for text in texts if text]
    return problems[:8]


def parse_check(text: str) -> tuple[str, str]:
    """One --check argument; raises ValueError where it cannot be understood."""
    kind, _equals, value = text.partition("=")
    number = value.rpartition(":")[2] if kind == "disk" else value
    if kind in ("gpus", "shm", "disk", "port"):
        int(number)
    elif kind != "release" or ":" not in value:
        raise ValueError(text)
    return kind, value


def own_unit() -> str:
    """The service that this process belongs to, empty where it is none's."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            parts = [part for line in file for part in line.rstrip("\n").partition("::")[2].split("/")]
    except OSError:
        return ""
    return next((part for part in reversed(parts) if part.endswith(".service")), "")


def systemctl(*words: str) -> Optional[str]:
    """What systemctl prints, whatever its exit code; None where systemd does not answer."""
    try:
        done = subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode and done.stderr.strip() else done.stdout.decode("utf-8", "replace").strip()


def why_ended(unit: str, patience: float = 5.0) -> str:
    """Why this unit was sent SIGTERM: "stop" where somebody has asked systemd to stop it, else one of LEAVING.

    systemd tells it by the job that it has for the unit. Where its bus is restarted in this very moment it is asked
    again; a systemd that says nothing has not said that the job has to end on every node.
    """
    if not unit or not os.path.exists("/run/systemd/system"):
        return "signal"
    deadline = time.monotonic() + patience
    while True:
        state = systemctl("is-system-running")
        if state == "stopping":
            return "shutdown"
        jobs = systemctl("list-jobs", "--no-legend", "--plain", unit)
        if state not in (None, "", "unknown", "offline") and jobs is not None:
            return job_of(unit, jobs)
        if time.monotonic() > deadline:
            return "unknown"
        time.sleep(0.2)


def job_of(unit: str, jobs: str) -> str:
    """"stop", "restart" or "signal" (no job at all), from systemctl list-jobs: number, unit, type, state."""
    rows = [line.split() for line in jobs.splitlines()]
    kinds = [row[2] for row in rows if len(row) >= 3 and row[1] == unit]
    # A start that waits: a stop, and a start before it was over.
    return "signal" if not kinds else "stop" if kinds[0] == "stop" else "restart"


# ---------------------------------------------------------------------------------------------------------------------
# One loop


class Link:
    """A socket with its session."""

    def __init__(self, sock: socket.socket, session: Session, now: float) -> None:
        self.sock, self.session, self.heard, self.since = sock, session, now, now
        self.source = source_of(sock)
        self.number = 0                     # of the authenticated session, given by rank 0
        self.view: Optional[JSON] = None    # last view sent
        self.order: Optional[JSON] = None   # last order sent


class End(NamedTuple):
    """How a torchrun has ended. What is ordered while the end is not reported yet had no hand in it."""

    code: int
    cause: Optional[JSON]
    ordered: bool
    asked: int          # the look for checkpoints that is waited for
    until: float


def source_of(sock: socket.socket) -> str:
    """The address at the other end, empty where there is none yet."""
    try:
        return str(sock.getpeername()[0])
    except (OSError, IndexError):
        return ""


def connected(sock: socket.socket) -> bool:
    """Whether the other end has answered at all."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def unreached(why: str, answered: bool, source: str, target: str, port: str) -> str:
    """Why rank 0's supervisor was not reached, and what that tells of firewalls.

    source: this node's address, empty for any. target, port: those of rank 0's supervisor.
    """
    tcp = f"TCP from {source} to port {port}" if source else f"TCP to port {port}"
    if answered:
        return why
    if why == "no handshake":
        return f"{target} drops {tcp}: look at its firewall, or it is off"
    if why == "connection refused":
        return f"{target} refuses {tcp}: it does not run yet, or a firewall rejects it"
    if why in ("no route to host", "permission denied"):
        return f"{target} rejects {tcp}, {why}: look at its firewall, or it is off"
    return why


class Supervisor:
    """The process: sockets, child, files; everything is decided by the two machines."""

    HANDSHAKE_TIME, STRANGERS = 3.0, 16
    PACE = 0.1      # seconds at least between looks at what costs time for every node
    LAST_LOOK = 2.0     # seconds that torchrun's end waits for a look for checkpoints: a file system may hang
    ASK_AGAIN = 2.0     # seconds: a restart that takes long may become a stop
    STILL_ENDED = 10.0  # seconds after which it is no start of all nodes that is under way

    def __init__(self, options: argparse.Namespace, limits: Limits, secret: bytes) -> None:
        self.options, self.limits, self.secret = options, limits, secret
        self.rank: int = options.node_rank
        self.state_file = os.path.join(options.state_dir, "state.json")
        self.done_file = os.path.join(options.state_dir, "done")
        self.attention = Attention(limits, time.monotonic())
        self.selector = selectors.DefaultSelector()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.selector.register(self.wake_read, selectors.EVENT_READ, None)
        self.events: collections.deque[tuple[str, Any]] = collections.deque()   # from threads
        self.unit, self.next_ask = own_unit(), 0.0
        marker = os.path.abspath(options.state_dir)     # one per job and node
        unit = CgroupTree.unit_path()
        self.torchrun = Torchrun(CgroupTree(unit) if unit else MarkedTree(marker), marker,
                                 os.path.join(options.state_dir, "errors"), options.log_dir,
                                 lambda: self.post("closing", None))
        self.watch = Watch(options.checkpoint_dir, options.checkpoint_glob, self.wake) if options.checkpoint_dir else None
        old = read_known(self.state_file, STATE)
        goes_on = old.get("release") == options.release and old.get("job") == options.job
        generation = int(old.get("generation") or 0) if goes_on else 0
        self.member = Member(options.host, options.nnodes, options.release, limits, generation)
        self.first, self.began = generation, time.monotonic()
        self.ended = old.get("text") if goes_on and old.get("result") in ("stopped", "failed") else None
        self.coordinator: Optional[Coordinator] = None
        self.view: JSON = {"state": "waiting", "text": "not connected to rank 0 yet", "generation": generation,
                           "restarts": 0, "restarts_left": limits.max_restarts, "first_cause": None, "stopped_by": None,
                           "checkpoint_hosts": hosts_within(old.get("checkpoint_hosts") or []),
                           "checkpoints": old.get("checkpoints") or {}}
        if self.rank == 0:
            kept = old if goes_on and not old.get("result") else {}
            done = read_known(self.done_file, DONE)
            left = kept.get("restarts_left")
            self.coordinator = Coordinator(options.nnodes, limits, options.release, generation,
                                           None if left is None else min(left, limits.max_restarts), done.get("unacknowledged"),
                                           time.monotonic())
            self.coordinator.first_cause, self.coordinator.restarts = kept.get("first_cause"), kept.get("restarts") or 0
            self.coordinator.history = [cause for cause in kept.get("history") or [] if cause]
            self.coordinator.remember(self.view["checkpoint_hosts"], self.view["checkpoints"])
            self.view = self.coordinator.view()
            self.coordinator.join(0, 0, time.monotonic())
        self.listener: Optional[socket.socket] = None
        self.links: dict[int, Link] = {}        # by file descriptor; on a member only the one to rank 0
        self.numbers = 0
        self.next_connect = 0.0
        self.next_report = 0.0
        self.sent_report: Optional[JSON] = None
        self.clock: Optional[tuple[float, float]] = None      # round trip, offset to rank 0 in seconds
        self.clock_at = 0.0         # when that was measured: a clock that was set, or a machine that was paused, changes it
        self.kill_at: Optional[float] = None
        self.end: Optional[End] = None      # of a torchrun, until the last look for its checkpoints is over
        self.last_exit: Optional[JSON] = None
        self.written: JSON = {}
        self.said, self.text, self.text_since = "", "", 0.0
        self.said_cause: Optional[JSON] = self.view["first_cause"]
        self.since = time.time()
        self.code: Optional[int] = None
        self.quit_by = 0.0
        self.odd = self.unreached = self.unwritten = ""
        self.next_odd = 0.0
        self.next_tick = self.next_state = self.next_blocked = 0.0
        self.state_due = False

    # -- from signals and threads

    def post(self, kind: str, value: Any) -> None:
        """Hand an event to the loop, from any thread."""
        self.events.append((kind, value))
        self.wake()

    def wake(self) -> None:
        try:
            os.write(self.wake_write, b"\0")
        except BlockingIOError:
            pass

    def in_background(self, kind: str, function: Callable[[], Any], otherwise: Callable[[str], Any]) -> None:
        """Call what may take long; its result comes back as an event, and so does what stands for an error."""
        def work() -> None:
            try:
                value = function()
            except Exception as error:  # no event at all would be waited for
                value = otherwise(kind_and_text(error))
            self.post(kind, value)
        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError as error:   # no more threads: at the limit of the unit's tasks, say
            self.post(kind, otherwise(kind_and_text(error)))

    def on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT:         # Ctrl-C, or asked for by name; systemd sends SIGTERM
            self.post("stop", "stop")
        elif number == signal.SIGTERM:
            self.ask_why()

    def ask_why(self) -> None:
        """Ask systemd in the background why this unit has to end."""
        self.next_ask = time.monotonic() + self.ASK_AGAIN
        self.in_background("stop", lambda: why_ended(self.unit), lambda _error: "unknown")

    # -- the loop

    def look(self, now: float) -> float:
        """The time by which connections are judged, as the machines judge: what this loop has missed does not count."""
        woke = self.attention.woke
        seen = self.attention.time(now)
        if self.attention.woke != woke:
            say(f"stood still for {self.attention.gap:.1f} s (paused, or the machine gave it no time): nobody is taken for lost by that")
        return seen

    def run(self) -> int:
        """Until the job's end reaches this node; returns the exit code."""
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self.on_signal)
        self.clear_leftovers()
        if self.options.nnodes > 1 and self.coordinator:
            self.listen()
        if self.watch:
            self.watch.start()
        notify("READY=1")
        while True:
            now = time.monotonic()
            self.turn(now)
            unsent = any(link.session.outgoing for link in self.links.values())
            if self.code is not None and (now >= self.quit_by or not unsent):
                return self.code
            for key, mask in self.selector.select(max(0.0, self.wake_at(now) - now)):
                self.ready(key, mask, time.monotonic())

    def wake_at(self, now: float) -> float:
        times = [self.member.wake_at(now), self.next_report]
        if self.coordinator:
            times.append(max(self.coordinator.wake_at(now), self.next_tick))
        if self.state_due:
            times.append(self.next_state)
        if self.kill_at is not None:
            times.append(now + 0.05)
        if self.end:
            times.append(self.end.until)
        return max(min(times), now + 0.01)

    def turn(self, now: float) -> None:
        """One round: take in events, let the machines decide, carry out, tell the others."""
        while self.events:
            self.event(*self.events.popleft(), now)
        if self.member.leaving and self.member.why != "shutdown" and now >= self.next_ask and self.code is None:
            self.ask_why()
        self.reap(now)
        self.keep_links(now)
        if self.coordinator and now >= self.next_tick:
            self.next_tick = now + self.PACE
            self.coordinator.tick(now)
        for _round in range(8):
            self.exchange_locally(now)
            actions = self.member.step(now)
            for action in actions:
                self.perform(action, now)
            if not actions:
                break
        self.exchange(now)
        if now >= self.next_state or self.code is not None:
            self.next_state = now + self.PACE
            self.state_due = False
            self.write_state()
            self.speak(now)
        else:
            self.state_due = True
        if now >= self.next_report:
            self.next_report = now + self.limits.heartbeat
            if self.member.phase != "idle" and now >= self.next_blocked:
                self.next_blocked = now + BLOCKED_PERIOD
                self.torchrun.look_for_blocked(self.options.bind.strip("[]"))
            if "WATCHDOG_USEC" in os.environ:
                notify("WATCHDOG=1")

    def event(self, kind: str, value: Any, now: float) -> None:
        if kind == "stop":
            member = self.member
            if value == "stop" and member.stop_at is None:
                say(f"stop requested on {self.options.host}")
            elif value != "stop" and member.stop_at is None and not member.leaving:
                say(f"leaves for a while: {LEAVING[value][1]}; the job goes on once it is back")
            if value in ("stop", "shutdown") or member.stop_at is None:
                member.stop(now, value != "stop", value)
        elif kind == "closing":
            self.member.fail()
        elif kind == "checked":
            problems = value
            if self.clock and abs(self.clock[1]) - self.clock[0] / 2 > 1.0:
                text = f"the clock is {abs(self.clock[1]):.1f} s {'behind' if self.clock[1] > 0 else 'ahead of'} rank 0's"
                problems = problems + [{"check": "clock", "text": text}]
            self.member.checked(problems, now)

    def perform(self, action: Action, now: float) -> None:
        """Carry out what the member has decided."""
        kind = action[0]
        if kind == "check":
            checks, visible = list(self.options.checks), os.environ.get("CUDA_VISIBLE_DEVICES")
            self.in_background("checked", lambda: run_checks(checks, visible), lambda error: [
                {"check": "internal", "text": one_line(f"the local checks cannot be made: {error}", 300)}])
        elif kind == "start":
            self.kill_at = self.end = None
            self.torchrun.start(self.options.command, action[1])
            self.reap(now)
        elif kind == "terminate":
            self.torchrun.terminate(bool(self.member.order.get("hang")))
        elif kind == "spare":
            self.torchrun.spare()
        elif kind == "kill":
            self.torchrun.kill()
        elif kind == "result":
            if action[1] == "done":
                self.write_done()
        elif kind == "exit" and self.code is None:
            member = self.member
            leave = (member.leaving or member.stop_at is not None) if member.result == "done" else member.leaving and not member.result
            if self.coordinator is None or (self.coordinator.depart(now) if leave else self.coordinator.finished(now)):
                if self.coordinator and member.result == "done":
                    self.write_done()       # who has been told by now, so that a reboot does not wait for them
                self.code, self.quit_by = action[1], now + 2.0
                self.tell_view()

    def reap(self, now: float) -> None:
        """torchrun has exited: kill what it left behind, then report its end."""
        if self.member.phase == "idle" or self.torchrun.exit_code() is None:
            return
        left = self.torchrun.left()
        if left:
            self.kill_at = self.kill_at or now
            self.member.unkillable = left if now - self.kill_at > 5.0 else []
            self.torchrun.tree.kill()
            return
        self.kill_at = None
        self.end = self.end or self.note_end(now)
        code, cause, self.member.ordered, asked, until = self.end
        # A stop's checkpoint is younger than the last look, and who hears of the end may be gone before the next.
        if self.watch and self.watch.answered < asked and now < until:
            return
        self.end = None
        self.member.ended(code, cause, now)
        self.last_exit = dict(self.member.exit or {}, time=time.time())
        if code and not (self.member.ordered and not (cause or {}).get("own")):
            say(f"torchrun failed on {describe(dict(cause or {}, host=self.options.host))}")
        else:
            say(f"torchrun of generation {self.member.generation} has ended on {self.options.host}"
                + (" as ordered" if self.member.ordered else ""))

    def note_end(self, now: float) -> End:
        """Nothing of torchrun is alive: how it ended. Has checkpoints looked for once more."""
        self.torchrun.close()
        code = self.torchrun.exit_code() or 0
        cause = sendable(self.torchrun.cause()) if code else None
        if cause and self.clock:
            cause["time"] = min(max(0.0, cause["time"] + self.clock[1]), LAST_MOMENT)       # rank 0's clock
        return End(code, cause, self.member.ordered, self.watch.ask() if self.watch else 0, now + self.LAST_LOOK)

    def clear_leftovers(self) -> None:
        """Nothing of an earlier supervisor's torchrun may be alive when this node joins."""
        deadline = time.monotonic() + 10
        while self.torchrun.left():
            self.torchrun.tree.kill()
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, f"processes {self.torchrun.left()[:4]} of an earlier generation do not die")
            time.sleep(0.05)

    # -- the gang

    def listen(self) -> None:
        address, _colon, port = self.options.coordinator.rpartition(":")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(((self.options.bind or address).strip("[]"), int(port)))
        self.listener.listen(128)
        self.selector.register(self.listener, selectors.EVENT_READ, self.listener)

    def add_link(self, sock: socket.socket, rank: Optional[int], now: float) -> None:
        sock.setblocking(False)
        link = Link(sock, Session(self.secret, self.options.job, rank), self.look(now))
        self.links[sock.fileno()] = link
        self.selector.register(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if rank is not None else 0), link)

    def rank0(self) -> tuple[str, str]:
        """Address and port of rank 0's supervisor."""
        address, _colon, port = self.options.coordinator.rpartition(":")
        return address.strip("[]"), port

    def why_unreached(self, why: str, answered: bool) -> str:
        """A sentence on why rank 0's supervisor was not reached."""
        return unreached(why, answered, self.options.bind.strip("[]"), *self.rank0())

    def drop(self, link: Link, why: str, now: float) -> None:
        """Close a connection and draw the consequences."""
        descriptor = link.sock.fileno()
        if self.links.pop(descriptor, None) is None:
            return
        if not self.coordinator and not link.session.open:
            self.unreached = self.why_unreached(why, connected(link.sock))
        self.selector.unregister(link.sock)
        link.sock.close()
        if self.coordinator:
            if link.number and link.session.rank is not None:
                self.coordinator.leave(link.session.rank, link.number, why, now)
        else:
            if link.session.open and self.code is None:
                say(f"lost rank 0's supervisor: {why}")
            self.member.disconnect()
            self.next_connect = now + self.limits.heartbeat

    def keep_links(self, now: float) -> None:
        """Drop the silent; a member without a connection tries again."""
        seen = self.look(now)
        for link in list(self.links.values()):
            if not link.session.open and seen - link.since > self.HANDSHAKE_TIME:
                self.drop(link, "no handshake", now)
            elif link.session.open and seen - link.heard > self.limits.lost_after:
                self.drop(link, f"not heard for {self.limits.lost_after:g} s", now)
        if self.coordinator or self.links or now < self.next_connect or self.code is not None:
            return
        self.next_connect = now + self.limits.heartbeat
        address, port = self.rank0()
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            if self.options.bind:
                sock.bind((self.options.bind.strip("[]"), 0))
            code = sock.connect_ex((address, int(port)))
        except OSError as error:
            code = error.errno or errno.EINVAL
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            self.unreached = self.why_unreached(os.strerror(code).lower(), False)
            return
        self.sent_report, self.clock_at = None, float("-inf")
        self.add_link(sock, self.rank, now)

    def ready(self, key: selectors.SelectorKey, mask: int, now: float) -> None:
        """Something can be read or written."""
        if key.data is None:
            try:
                os.read(self.wake_read, 4096)
            except BlockingIOError:
                pass
            return
        if key.data is self.listener:
            self.accept(now)
            return
        link = key.data
        if link.sock.fileno() not in self.links:
            return
        try:
            if mask & selectors.EVENT_READ:
                data = link.sock.recv(65536)
                if not data:
                    self.drop(link, "connection closed", now)
                    return
                self.take(link, data, now)
            if link.sock.fileno() in self.links:
                self.flush(link)
        except BlockingIOError:
            pass
        except OSError as error:
            self.drop(link, str(error.strerror or error).lower(), now)

    def take(self, link: Link, data: bytes, now: float) -> None:
        """Bytes of a peer. Whatever they are: they are taken, or the connection is dropped."""
        try:
            self.received(link, link.session.feed(data), now)
        except ProtocolError as error:
            if link.session.open:
                self.say_odd(f"a bad message of {self.peer(link)}: {error}", now)
            self.drop(link, f"bad message: {error}", now)

    def peer(self, link: Link) -> str:
        """Who is at the other end of an authenticated connection."""
        if self.coordinator and link.session.rank is not None and link.session.rank < self.options.nnodes:
            return self.coordinator.seats[link.session.rank].name
        return f"rank {link.session.rank}" if self.coordinator else "rank 0's supervisor"

    def say_odd(self, text: str, now: float) -> None:
        """Once, and others not too often: who has the secret cannot flood the journal."""
        if text != self.odd and now >= self.next_odd:
            self.odd, self.next_odd = text, now + 5.0
            say(text)

    def accept(self, now: float) -> None:
        assert self.listener
        try:
            sock, _address = self.listener.accept()
        except OSError:
            return
        # Whoever has proved the secret is none. The oldest of the address that has most goes, so that a flood hits itself.
        strangers = [link for link in self.links.values() if not link.number and not link.session.open]
        if len(strangers) >= self.STRANGERS:
            crowd = collections.Counter(link.source for link in strangers)
            self.drop(min(strangers, key=lambda link: (-crowd[link.source], link.since)), "too many strangers", now)
        self.add_link(sock, None, now)

    def received(self, link: Link, messages: list[JSON], now: float) -> None:
        """Messages of an authenticated peer; on rank 0 the first makes it the one that speaks for its rank."""
        if link.session.open:
            link.heard = self.look(now)
        for message in messages:
            if self.coordinator:
                rank = link.session.rank
                assert rank is not None
                if not 0 < rank < self.options.nnodes:
                    raise ProtocolError(f"rank {rank} is not expected")
                message = check_report(message)
                if not link.number:
                    if not self.coordinator.admits(rank, message["host"]):
                        self.refuse(rank, message["host"])
                    self.numbers += 1
                    link.number = self.numbers
                    for other in list(self.links.values()):
                        if other is not link and other.number and other.session.rank == rank:
                            self.drop(other, "its supervisor started anew", now)
                    self.coordinator.join(rank, link.number, now)
                self.coordinator.hear(rank, link.number, message, now)
                self.send_order(link, message.get("sent"))
            else:
                self.unreached = ""
                message = expected(message, ORDER)
                self.member.receive(message)
                if "view" in message:
                    self.view = message["view"]
                if "echo" in message and "now" in message:
                    arrived = time.time()
                    trip = arrived - message["echo"]
                    offset = message["now"] - (arrived + message["echo"]) / 2
                    aged = now - self.clock_at > CLOCK_AGES
                    if trip >= 0 and (self.clock is None or aged or trip <= self.clock[0] * 1.5 + 0.001):
                        self.clock, self.clock_at = (trip, offset), now

    def refuse(self, rank: int, host: str) -> None:
        """Two hosts for one rank: the one that came first stays."""
        assert self.coordinator
        text = f"{host} asks for node rank {rank}, which {self.coordinator.seats[rank].name} has: refused"
        raise ProtocolError(text)

    def flush(self, link: Link) -> None:
        """Send what is queued, as far as the socket takes it."""
        if link.session.outgoing:
            sent = link.sock.send(link.session.outgoing)
            del link.session.outgoing[:sent]
        want = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.session.outgoing else 0)
        if self.selector.get_key(link.sock).events != want:
            self.selector.modify(link.sock, want, link)

    def transmit(self, link: Link, message: JSON) -> None:
        try:
            link.session.send(message)
            self.flush(link)
        except BlockingIOError:
            self.selector.modify(link.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, link)
        except (OSError, ProtocolError) as error:
            self.drop(link, str(error), time.monotonic())

    def send_order(self, link: Link, echo: Optional[float]) -> None:
        """The order for a rank: the answer to each of its reports, and again whenever it changes. Beside it the view."""
        assert self.coordinator
        link.order = self.coordinator.order()
        message = dict(link.order)
        if echo is not None:
            message.update(echo=echo, now=time.time())
        if self.view != link.view or message["order"] in FINAL:
            self.view = self.coordinator.view()
            link.view = message["view"] = self.view
        self.transmit(link, message)

    def tell_view(self) -> None:
        """The last word of rank 0 to all: until it is back, they are the ones that are asked."""
        if self.coordinator:
            self.date_causes()
            self.view = self.coordinator.view()
            for link in list(self.links.values()):
                if link.number:
                    self.send_order(link, None)

    def report(self) -> JSON:
        report = self.member.report()
        report["checkpoints"] = self.watch.count if self.watch else 0
        report["checkpoint"] = self.watch.newest if self.watch else None
        return report

    def exchange_locally(self, now: float) -> None:
        """Rank 0's own member needs no network."""
        if self.coordinator:
            self.coordinator.hear(0, 0, dict(self.report(), lines=self.torchrun.lines()), now)
            self.member.receive(self.coordinator.order())

    def exchange(self, now: float) -> None:
        """Orders that have changed; reports that have changed or are due."""
        if self.coordinator:
            order = self.coordinator.order()
            for link in list(self.links.values()):
                if link.number and link.order != order:
                    self.send_order(link, None)
            return
        report = self.report()
        for link in list(self.links.values()):
            if link.session.open and (report != self.sent_report or now >= self.next_report):
                self.sent_report = report
                self.transmit(link, dict(report, lines=self.torchrun.lines(), sent=time.time()))

    # -- files

    def write_done(self) -> None:
        left = self.coordinator.unacknowledged() if self.coordinator else []
        try:
            write_json(self.done_file, {"job": self.options.job, "release": self.options.release, "finished": time.time(),
                                        "unacknowledged": left})
        except OSError as error:
            say(f"cannot write {self.done_file}: {error.strerror}; the job would train again after a reboot")

    def date_causes(self) -> None:
        """Give a lost node's cause the time at which it was last heard; the coordinator knows no calendar."""
        assert self.coordinator
        for cause in [self.coordinator.first_cause, *self.coordinator.history[-2:]]:
            if cause and cause.get("time") is None:
                heard = cause.pop("at", None)
                cause["time"] = time.time() - (self.coordinator.age(heard, time.monotonic()) if heard else 0.0)

    def write_state(self) -> None:
        """state.json, journal and systemd's status line, each only when something has changed."""
        if self.coordinator:
            self.date_causes()
            self.view = self.coordinator.view()
        view, member, options = dict(self.view), self.member, self.options
        if not self.coordinator and not member.connected and view["state"] not in ("stopping",) + FINAL:
            why = f" ({self.unreached})" if self.unreached else ""
            view.update(state="waiting", text=f"waiting for rank 0's supervisor at {options.coordinator}{why}")
        alone = not member.connected or (self.coordinator and any(not seat.connected for seat in self.coordinator.seats))
        if self.ended and alone and view["state"] == "waiting" and member.generation == self.first \
                and time.monotonic() - self.began > self.STILL_ENDED:
            view["text"] += f". The job had ended ({self.ended}); start it on every node"
        if member.result and view["state"] != member.result:
            by = view["stopped_by"] or options.host
            view.update(state=member.result, stopped_by=by, text=f"{member.result} as requested on {by}")
        elif (member.stop_at is not None or member.leaving) and view["state"] not in FINAL:
            view.update(state="stopping", text=f"{options.host} leaves for a while: {LEAVING[member.why][1]}" if member.leaving
                        else view["text"])
        began = (view["state"], max(int(view["generation"]), member.generation))
        if began != (self.written.get("state"), self.written.get("generation")):
            self.since = time.time()
        state: JSON = {
            "version": 1, "job": options.job, "host": options.host, "rank": self.rank, "nnodes": options.nnodes,
            "release": options.release, "pid": os.getpid(), "max_restarts": options.max_restarts, "since": self.since,
            "node": {"phase": member.phase, "generation": member.generation, "problems": member.problems or [],
                     "connected": member.connected, "blocked": self.torchrun.still_blocked()},
            "checkpoint": self.watch.newest if self.watch else None, "last_exit": self.last_exit,
            "result": member.result, **view,
        }
        state["generation"] = began[1]
        if self.coordinator:
            state["history"] = self.coordinator.history
            state["members"] = {str(seat.rank): {
                "host": seat.host, "connected": seat.connected, "phase": seat.report.get("phase"),
                "generation": seat.report.get("generation"), "problems": seat.report.get("problems") or [],
                "checkpoint": seat.report.get("checkpoint")} for seat in self.coordinator.seats}
        if state == self.written:
            return
        if self.coordinator and member.result == "done" and self.written.get("members") != state["members"]:
            self.write_done()
        self.written = state
        try:
            write_json(self.state_file, dict(state, written=time.time()))
        except OSError as error:
            text = f"cannot write {self.state_file}: {error.strerror}; the job goes on"
            if text != self.unwritten:
                self.unwritten = text
                say(text)
        notify(f"STATUS={state['state']}: {state['text']}")
        cause = state["first_cause"]
        if cause and cause != self.said_cause:
            self.said_cause = cause
            say(f"generation {cause['generation']} ended early, first on {cause['text']} "
                f"({state['restarts_left']} of {state['max_restarts']} restarts left)")

    def speak(self, now: float) -> None:
        """The state in the journal: what one waits for only once it has lasted, everything else at once."""
        text = self.written["text"]
        if text != self.text:
            self.text, self.text_since = text, now
        if text != self.said and (self.written["state"] != "waiting" or now - self.text_since >= 1.0 or self.code is not None):
            self.said = text
            say(text)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; ends with exit code 2 and one sentence where they make no sense."""
    parser = argparse.ArgumentParser(prog="torchrun_supervisor", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--host", required=True, help="this node's inventory name")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--coordinator", default="", help="ADDRESS:PORT of rank 0's supervisor")
    parser.add_argument("--bind", default="", help="this node's address on the training interface")
    parser.add_argument("--secret-file", default="", help="the job's secret, the same on all nodes")
    parser.add_argument("--state-dir", required=True)
    parser.add_argument("--checkpoint-dir", default="")
    parser.add_argument("--checkpoint-glob", default="*", help="a new file that matches is progress")
    parser.add_argument("--log-dir", default="", help="torchrun's own --log-dir, searched for error.json")
    parser.add_argument("--max-restarts", type=int, default=3, help="failures in a row without progress")
    parser.add_argument("--hang-timeout", type=float, default=0.0, help="seconds without output or checkpoint; 0: off")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL at a requested stop")
    parser.add_argument("--abort-grace", type=float, default=2.0, help="the same when a generation is aborted")
    parser.add_argument("--heartbeat", type=float, default=1.0, help="seconds between reports")
    parser.add_argument("--lost-after", type=float, default=5.0, help="seconds of silence after which a node is lost")
    parser.add_argument("--release", default="")
    parser.add_argument("--check", action="append", default=[], metavar="KIND=VALUE",
                        help="before every start: gpus=N, shm=BYTES, disk=PATH:BYTES, release=LINK:NAME, port=N")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        options.command = options.command[1:]
    if not options.command:
        parser.error("no command given after --")
    if not 0 <= options.node_rank < options.nnodes:
        parser.error(f"--node-rank {options.node_rank} is not within --nnodes {options.nnodes}")
    if options.nnodes > 1 and not (options.secret_file and re.fullmatch(r".+:\d+", options.coordinator)):
        parser.error("with more than one node --secret-file and --coordinator ADDRESS:PORT are needed")
    options.checks = []
    for text in options.check:
        try:
            options.checks.append(parse_check(text))
        except ValueError:
            parser.error(f"--check {text} is not understood")
    for number, word in enumerate(options.command):
        match = re.fullmatch(r"--master[-_]port(?:=(\d+))?", word)
        if match and options.node_rank == 0:
            value = match.group(1) or (options.command + [""])[number + 1]
            if value.isdigit() and value != "0" and ("port", value) not in options.checks:
                options.checks.append(("port", value))
    return options


def tell_done(options: argparse.Namespace, text: str) -> None:
    """Leave a state.json that says so too, where it tells of a job that trains: whoever reads it looks at no other file."""
    state_file = os.path.join(options.state_dir, "state.json")
    told = read_known(state_file, STATE)
    if told.get("result") == "done" and told.get("release") == options.release:
        return
    now = time.time()
    told.update(version=1, job=options.job, host=options.host, rank=options.node_rank, nnodes=options.nnodes,
                release=options.release, state="done", result="done", text=text, since=now, written=now)
    try:
        write_json(state_file, told)
    except OSError as error:
        say(f"cannot write {state_file}: {error.strerror}")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    limits = Limits(options.max_restarts, options.hang_timeout, options.grace, options.abort_grace, options.heartbeat,
                    options.lost_after)
    secret = b""
    try:
        os.makedirs(options.state_dir, exist_ok=True)
        if options.nnodes > 1:
            with open(options.secret_file, "rb") as file:
                secret = file.read(4096).strip()
            if len(secret) < 16:
                raise OSError(errno.EINVAL, "holds fewer than 16 bytes", options.secret_file)
    except OSError as error:
        say(f"{options.host}: {error.filename}: {error.strerror}")
        return EXIT_USAGE
    done_file = os.path.join(options.state_dir, "done")
    done = read_known(done_file, DONE)
    if done and done.get("release") == options.release and not (options.node_rank == 0 and done.get("unacknowledged")):
        notify("READY=1")
        text = f"has finished already (release {options.release}); remove {done_file} to train anew"
        say(f"job {options.job} {text}")
        tell_done(options, f"the job {text}")
        return EXIT_OK
    if done and done.get("release") != options.release:
        try:
            os.unlink(done_file)
        except OSError as error:
            say(f"cannot remove {done_file}, which is of another release: {error.strerror}")
    try:
        return Supervisor(options, limits, secret).run()
    except OSError as error:
        say(f"{options.host}: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return EXIT_INTERNAL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
