# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The two state machines against a simulated cluster: any order of faults, no sockets, no clock."""
from __future__ import annotations

import os
import pathlib
import sys

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from supervisor_support import load

supervisor = load()
STEP = 0.25


def failure(reason="signal", **more):
    """A cause as Torchrun.cause gives it."""
    return dict({"reason": reason, "signal": "SIGKILL", "error": None, "exit_code": None, "rank": 0, "local_rank": 0,
                 "own": True, "echo": False, "time": 0.0}, **more)


class Node:
    """One simulated machine: power, network, supervisor, torchrun, and what its disk keeps."""

    def __init__(self, rank):
        self.rank = rank
        self.powered = self.wired = True
        self.paused = False         # the supervisor gets no time: SIGSTOP, a swap storm, a virtual machine that stands still
        self.member = None
        self.alive = None           # the generation whose processes are alive
        self.dies_at = None         # a torchrun that has been told to end
        self.stubborn = False       # ends only when killed
        self.hung = False
        self.left_to_train = 0.0
        self.code = None            # exit code of the supervisor
        self.problems = []
        self.checkpoints = self.lines = 0
        self.disk = {"generation": 0, "done": False}
        self.starts = []
        self.session = None
        self.heard = 0.0
        self.next_report = 0.0


class World:
    """N nodes, one clock."""

    def __init__(self, nnodes, max_restarts=2, hang_timeout=0.0, train=20.0):
        self.limits = supervisor.Limits(max_restarts, hang_timeout, grace=3.0, abort_grace=1.0)
        self.limits.done_linger = 60.0
        self.now, self.train, self.sessions = 100.0, train, 0
        self.nodes = [Node(rank) for rank in range(nnodes)]
        self.coordinator = None
        self.charges_since_progress = 0
        self.seen_causes = 0
        for node in self.nodes:
            self.boot(node)

    # what a person or fate does

    def boot(self, node):
        """systemd starts the supervisor, unless the job is done or its end must not be restarted."""
        if not node.powered or node.member is not None or node.code in (0, 10):
            return
        if node.disk["done"] and not (node.rank == 0 and node.disk.get("unacknowledged")):
            node.code = 0
            return
        node.member = supervisor.Member(f"lab{node.rank + 1}", len(self.nodes), "r1", self.limits, node.disk["generation"])
        node.session, node.checkpoints, node.lines, node.paused = None, 0, 0, False
        if node.rank == 0:
            kept = node.disk.get("kept", {})
            self.coordinator = supervisor.Coordinator(len(self.nodes), self.limits, "r1", node.disk["generation"],
                                                      kept.get("restarts_left"), node.disk.get("unacknowledged"),
                                                      self.now)
            self.coordinator.history = list(kept.get("history", []))
            self.coordinator.first_cause, self.coordinator.restarts = kept.get("first_cause"), kept.get("restarts", 0)
            self.coordinator.join(0, 0, self.now)

    def kill_supervisor(self, node):
        """SIGKILL; systemd takes the rest of the unit with it."""
        node.member, node.alive, node.dies_at = None, None, None
        if node.rank == 0:
            self.coordinator = None
            for other in self.nodes[1:]:
                self.cut(other)
        else:
            self.close(node)

    def power_off(self, node):
        """No goodbye: connections just fall silent."""
        node.powered = False
        node.member, node.alive, node.dies_at = None, None, None
        if node.rank == 0:
            self.coordinator = None

    def worker_dies(self, node, cause=None):
        """torchrun exits with a failure of its own."""
        if node.alive is not None and node.member is not None:
            node.alive, node.dies_at = None, None
            node.member.ended(1, cause or failure(), self.now)

    def cut(self, node):
        """The connection is seen to be gone by the member."""
        if node.session is not None:
            node.session = None
            if node.member:
                node.member.disconnect()

    def close(self, node):
        """The connection is seen to be gone by rank 0."""
        if node.session is not None and self.coordinator:
            self.coordinator.leave(node.rank, node.session, "connection closed", self.now)
        node.session = None

    # time

    def reachable(self, node):
        first = self.nodes[0]
        return node.rank == 0 or (node.wired and node.powered and first.wired and first.powered and not first.paused)

    def run(self, seconds):
        for _step in range(int(seconds / STEP)):
            self.now += STEP
            self.step()
            self.check()

    def step(self):
        if self.coordinator and not self.nodes[0].paused:
            self.coordinator.tick(self.now)     # before anything is heard: the worst order
        for node in self.nodes:
            if node.member is None:
                if node.powered:
                    self.boot(node)
                continue
            if node.paused:
                continue
            self.processes(node)
            self.talk(node)
            self.act(node)
        self.remember()

    def processes(self, node):
        """torchrun as it trains, ends, or hangs."""
        if node.alive is None:
            return
        if node.dies_at is not None and self.now >= node.dies_at and not node.stubborn:
            node.alive, node.dies_at = None, None
            node.member.ended(1, failure("exit", own=False), self.now)
            return
        peers = all(other.alive == node.alive or node.alive in other.disk.get("finished", ()) for other in self.nodes)
        if peers and not node.hung and not any(other.hung for other in self.nodes) and node.dies_at is None:
            node.left_to_train -= STEP
            node.lines += 1
            if node.left_to_train <= 0:
                node.disk.setdefault("finished", set()).add(node.alive)
                node.alive = None
                node.member.ended(0, None, self.now)

    def talk(self, node):
        """Reports and orders, as Supervisor carries them."""
        report = dict(node.member.report(), checkpoints=node.checkpoints, lines=node.lines, checkpoint=None)
        if node.rank == 0:
            self.coordinator.hear(0, 0, report, self.now)
            node.member.receive(self.coordinator.order())
            return
        if self.reachable(node) and self.coordinator:
            if node.session is None:
                self.sessions += 1
                node.session, node.heard = self.sessions, self.now
                self.coordinator.join(node.rank, node.session, self.now)
            seat = self.coordinator.seats[node.rank]
            if not seat.connected or seat.session != node.session:      # rank 0 has closed it
                self.cut(node)
                return
            self.coordinator.hear(node.rank, node.session, report, self.now)
            node.member.receive(self.coordinator.order())
            node.heard = self.now
        elif node.session is not None and self.now - node.heard > self.limits.lost_after:
            self.cut(node)

    def act(self, node):
        for _round in range(8):
            actions = node.member.step(self.now)
            for action in actions:
                self.perform(node, action)
            if not actions or node.member is None:
                return

    def perform(self, node, action):
        kind = action[0]
        if kind == "check":
            node.member.checked(list(node.problems), self.now)
        elif kind == "start":
            assert node.alive is None, "two torchruns on one node"
            assert action[1] > node.disk["generation"], "a generation started twice"
            node.alive, node.dies_at, node.left_to_train = action[1], None, self.train
            node.disk["generation"] = action[1]
            node.starts.append(self.now)
            node.hung = node.stubborn = False
        elif kind == "terminate":
            node.dies_at = self.now + 0.5
        elif kind in ("kill", "spare"):
            if node.alive is not None:
                node.alive, node.dies_at = None, None
                node.member.ended(-9, failure("signal", own=False), self.now)
        elif kind == "result":
            if action[1] == "done":
                node.disk["done"] = True
        elif kind == "exit":
            leave = (node.member.leaving or node.member.stop_at is not None) if node.member.result == "done" else (
                node.member.leaving and not node.member.result)
            if node.rank == 0 and not (self.coordinator.depart(self.now) if leave else self.coordinator.finished(self.now)):
                return
            if node.rank:
                self.talk(node)     # the last report
            if node.member.leaving and node.member.why == "shutdown":
                node.powered = False
            node.code, node.member = action[1], None
            assert node.alive is None, "exit with torchrun alive"
            if node.rank == 0:
                self.remember()
                self.coordinator = None
                for other in self.nodes[1:]:
                    self.cut(other)
            else:
                self.close(node)

    def remember(self):
        """What rank 0 writes to its disk, and the budget's book-keeping."""
        if not self.coordinator:
            return
        disk = self.nodes[0].disk
        if self.coordinator.phase == "done":
            disk["unacknowledged"] = self.coordinator.unacknowledged()
        disk["kept"] = {"restarts_left": self.coordinator.restarts_left, "history": self.coordinator.history,
                        "first_cause": self.coordinator.first_cause, "restarts": self.coordinator.restarts}

    # what always holds

    def check(self):
        alive = {node.alive for node in self.nodes if node.alive is not None}
        assert len(alive) <= 1, f"generations {alive} are alive at once"
        if self.coordinator:
            assert 0 <= self.coordinator.restarts_left <= self.limits.max_restarts
            assert self.coordinator.phase in ("waiting", "running", "stopping", "done", "stopped", "failed")
            if self.coordinator.phase == "waiting" and not self.coordinator.abort and not any(
                    node.member and node.member.result for node in self.nodes):
                assert self.coordinator.text(), "waiting, and nobody knows for what"
            if self.coordinator.phase == "failed":
                assert self.coordinator.first_cause and self.coordinator.first_cause["text"]
                assert self.coordinator.restarts_left == 0
            if self.coordinator.phase == "done":
                assert all(self.coordinator.generation in node.disk.get("finished", ()) or node.disk["done"]
                           for node in self.nodes), "done, although a node has not finished"

    def heal(self):
        for node in self.nodes:
            node.powered = node.wired = True
            node.problems, node.hung, node.paused = [], False, False


# ---------------------------------------------------------------------------------------------------------------------
# Single stories


@pytest.fixture(params=[1, 2, 4])
def world(request):
    made = World(request.param)
    made.run(2)
    assert all(node.alive == 1 for node in made.nodes)
    return made


def test_finishes_and_says_so_everywhere(world):
    world.run(30)
    assert [node.code for node in world.nodes] == [0] * len(world.nodes)
    assert all(node.disk["done"] for node in world.nodes)


def test_failed_worker_restarts_all(world):
    world.worker_dies(world.nodes[-1])
    world.run(4)
    assert all(node.alive == 2 for node in world.nodes)
    cause = world.coordinator.first_cause
    assert (cause["host"], cause["signal"], cause["charged"]) == (f"lab{len(world.nodes)}", "SIGKILL", True)
    world.run(30)
    assert all(node.disk["done"] for node in world.nodes)


def test_crash_loop_ends_and_names_the_first(world):
    for _attempt in range(3):
        world.run(8)
        world.worker_dies(world.nodes[-1], failure("error", error="ValueError: bad", signal=None, exit_code=1))
        world.run(0.25)
    world.run(12)
    assert [node.code for node in world.nodes] == [10] * len(world.nodes)
    assert max(node.disk["generation"] for node in world.nodes) == 3
    assert "ValueError: bad" in world.nodes[0].disk["kept"]["history"][-1]["text"]


def test_progress_gives_the_budget_back(world):
    for _attempt in range(6):
        world.run(8)
        world.nodes[-1].checkpoints += 1
        world.run(1)
        world.worker_dies(world.nodes[0])
    world.run(40)
    assert [node.code for node in world.nodes] == [0] * len(world.nodes)


def test_restart_without_delay_at_first_then_slower():
    world = World(2, max_restarts=5)
    world.run(2)
    gaps = []
    for _attempt in range(4):
        world.worker_dies(world.nodes[1])
        failed, starts = world.now, len(world.nodes[0].starts)
        while len(world.nodes[0].starts) == starts:
            world.run(STEP)
        gaps.append(world.now - failed)
        world.run(1)
    assert gaps[0] <= 2.0
    assert gaps[1] + 0.9 <= gaps[2] + 1e-9 <= gaps[3] - 0.9


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_power_loss_and_return(victim):
    world = World(4)
    world.run(2)
    world.power_off(world.nodes[victim])
    world.run(60)
    assert all(node.alive is None for node in world.nodes)
    if victim:
        assert f"lab{victim + 1}: not connected" in world.coordinator.text()
    world.nodes[victim].powered = True
    world.run(10)
    assert all(node.alive == 2 for node in world.nodes)
    assert victim == 0 or world.coordinator.restarts_left == 2, "a lost node costs no budget"
    world.run(40)
    assert all(node.code == 0 for node in world.nodes)


def test_partition_of_thirty_seconds():
    world = World(4)
    world.run(2)
    world.nodes[2].wired = False
    world.run(30)
    assert all(node.alive is None for node in world.nodes)
    world.nodes[2].wired = True
    world.run(5)
    assert all(node.alive == 2 for node in world.nodes)


def test_echo_is_not_taken_for_the_cause():
    world = World(3)
    world.run(2)
    world.worker_dies(world.nodes[0], failure("error", signal=None, exit_code=1, echo=True, time=1.0,
                                              error="Connection reset by peer"))
    world.worker_dies(world.nodes[2], failure("signal", time=1.5))
    world.run(3)
    assert world.coordinator.first_cause["host"] == "lab3"


def test_lost_node_is_the_cause_of_the_failures_that_follow():
    world = World(3)
    world.run(2)
    world.power_off(world.nodes[1])
    world.run(1)
    world.worker_dies(world.nodes[0], failure("error", signal=None, exit_code=1, echo=True, error="Connection closed by peer"))
    world.run(10)
    world.nodes[1].powered = True
    world.run(6)
    cause = world.coordinator.first_cause
    assert (cause["host"], cause["reason"], cause["charged"]) == ("lab2", "lost", False)


def test_stop_on_one_node_stops_all(world):
    world.nodes[-1].member.stop(world.now, False)
    world.run(2)
    assert [node.code for node in world.nodes] == [0] * len(world.nodes)
    assert not any(node.disk["done"] for node in world.nodes)


def test_stop_gives_the_full_grace():
    world = World(2)
    world.run(2)
    for node in world.nodes:
        node.stubborn = True
    world.nodes[0].member.stop(world.now, False)
    world.run(2.5)
    assert all(node.alive == 1 for node in world.nodes)
    world.run(2)
    assert [node.code for node in world.nodes] == [0, 0]


@pytest.mark.parametrize("asked", [[1], [0, 1, 2]])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_who_ends_first_at_a_stop_hears_of_the_others_checkpoints(asked, last):
    """On whichever nodes a stop is asked for, each stays for rank 0's last word, as far as its own grace goes."""
    world = World(3)
    world.run(2)
    world.nodes[last].stubborn = True
    for rank in asked:
        world.nodes[rank].member.stop(world.now, False)
    world.run(1.5)
    assert all(node.member and (node.alive is None) == (node.rank != last) for node in world.nodes)
    orders = []
    for node in world.nodes:
        node.member.receive = lambda order, node=node, receive=node.member.receive: (orders.append((node.rank, order["order"])), receive(order))
    world.run(8)
    assert [node.code for node in world.nodes] == [0, 0, 0]
    assert {rank for rank, order in orders if order == "stopped"} == {0, 1, 2}


def test_a_stop_does_not_wait_for_who_never_ends():
    """A process that cannot be killed on one node keeps the others' units no longer than systemd waits."""
    limits = supervisor.Limits(grace=30.0)
    member = supervisor.Member("lab2", 2, "r1", limits)
    member.receive({"order": "stop", "generation": 1})
    member.stop(0.0, False)
    now = 0.0
    while not member.step(now):
        now += 0.5
    assert 30 < now < 40


@pytest.mark.parametrize("victims", [[0], [1], [0, 1, 2], [1, 2]])
@pytest.mark.parametrize("why", ["restart", "signal", "unknown"])
def test_a_restart_of_units_is_no_stop(victims, why):
    """systemctl restart, needrestart, kill: every supervisor comes back by itself, and so does the job."""
    world = World(3)
    world.run(2)
    for victim in victims:
        world.nodes[victim].member.stop(world.now, True, why)
    world.run(6)
    assert [node.alive for node in world.nodes] == [2, 2, 2], world.coordinator.text()
    assert (world.coordinator.restarts_left, world.coordinator.restarts) == (2, 1)
    assert world.coordinator.first_cause["reason"] == supervisor.LEAVING[why][0]
    assert world.coordinator.first_cause["host"] in [f"lab{victim + 1}" for victim in victims]
    assert supervisor.LEAVING[why][1] in world.coordinator.first_cause["text"]
    world.run(30)
    assert all(node.disk["done"] for node in world.nodes)


def test_a_restart_that_becomes_a_stop():
    world = World(3)
    world.run(2)
    world.nodes[1].stubborn = True
    world.nodes[1].member.stop(world.now, True, "restart")
    world.run(1)
    world.nodes[1].member.stop(world.now, False)
    world.run(8)
    assert [node.code for node in world.nodes] == [0, 0, 0]
    assert not any(node.disk["done"] for node in world.nodes)


@pytest.mark.parametrize("others", ["quick", "stubborn"])
def test_what_rank_0_leaves_behind_keeps_the_others_grace(others):
    """It is gone before they are quiet; what it wrote names it, and they still may write their checkpoints."""
    world = World(3)
    world.run(2)
    world.nodes[2].stubborn = others == "stubborn"
    world.nodes[0].member.stop(world.now, True)
    while world.nodes[0].member:
        world.run(STEP)
    cause = world.nodes[0].disk["kept"]["first_cause"]
    assert (cause["host"], cause["reason"], cause["generation"], cause["charged"]) == ("lab1", "shutdown", 1, False)
    if others == "stubborn":
        world.run(1)
        assert world.nodes[2].alive == 1, "its grace was cut short"


@pytest.mark.parametrize("why", sorted(supervisor.LEAVING))
@pytest.mark.parametrize("budget", [0, 2])
def test_a_failure_is_not_forgotten_where_rank_0_leaves_meanwhile(why, budget):
    """A worker has failed, and before all are quiet rank 0 is told to go: the failure is named and charged."""
    world = World(3, max_restarts=budget)
    world.run(2)
    world.nodes[2].stubborn = True
    world.worker_dies(world.nodes[1])
    world.run(STEP)
    world.nodes[0].member.stop(world.now, True, why)
    world.run(8)
    kept = world.nodes[0].disk["kept"]
    assert (kept["first_cause"]["host"], kept["first_cause"]["charged"]) == ("lab2", True)
    if not budget:
        assert [node.code for node in world.nodes] == [10] * 3
        return
    assert kept["restarts_left"] == 1
    world.nodes[0].powered = True
    world.run(40)
    assert all(node.disk["done"] for node in world.nodes)


@pytest.mark.parametrize("end", ["stop", "failure"])
@pytest.mark.parametrize("seconds", [3, 12, 25])
def test_who_is_being_restarted_while_the_job_ends_is_told(end, seconds):
    """systemd waits 2 s, then Python starts and connects, on a busy node later than one would think."""
    world = World(3, max_restarts=0)
    world.run(2)
    world.nodes[1].member.stop(world.now, True, "restart")
    while world.nodes[1].member:
        world.run(STEP)
    world.nodes[1].powered = False
    if end == "stop":
        world.nodes[2].member.stop(world.now, False)
    else:
        world.coordinator._enter("failed", world.now)
        world.coordinator.first_cause, world.coordinator.restarts_left = {"text": "lab3: bad"}, 0
    world.run(seconds)
    world.nodes[1].powered = True
    world.run(8)
    assert [node.code for node in world.nodes] == [0 if end == "stop" else 10] * 3


@pytest.mark.parametrize("took", [0.0, 10.0, 30.0])
def test_a_stop_of_rank_0s_own_unit_ends_within_its_time(took):
    """systemd kills a unit that takes longer to stop than --grace and 10 s (docs/supervisor.md), whoever is still away."""
    coordinator = supervisor.Coordinator(2, supervisor.Limits(grace=30.0))
    report = dict(supervisor.Member("lab1", 2, "", supervisor.Limits()).report(), checkpoints=0, lines=0, checkpoint=None)
    coordinator.join(0, 0, 0.0)
    coordinator.join(1, 1, 0.0)
    coordinator.report(1, 1, dict(report, host="lab2", leaving=True, why="restart"), 0.0)
    coordinator.leave(1, 1, "connection closed", 0.0)
    moment = 0.0
    coordinator.report(0, 0, dict(report, phase="stopping", stop=True), moment)
    while not coordinator.finished(moment):
        moment += 0.5
        coordinator.report(0, 0, dict(report, phase="idle" if moment > took else "stopping", stop=True), moment)
    assert took + 5 <= moment < 40


def test_a_restart_during_a_stop_does_not_wait_for_ever():
    world = World(3)
    world.run(2)
    world.nodes[2].stubborn = True
    world.nodes[1].member.stop(world.now, True, "restart")
    world.nodes[2].member.stop(world.now, False)
    world.run(15)
    assert [node.code for node in world.nodes] == [0, 0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_shutdown_of_a_node_is_not_a_stop(victim):
    world = World(3)
    world.run(2)
    world.nodes[victim].member.stop(world.now, True)
    world.run(4)
    assert world.nodes[victim].code == supervisor.EXIT_AGAIN
    assert [node.code for node in world.nodes if node.rank != victim] == [None, None]
    world.nodes[victim].powered = True
    world.run(6)
    assert all(node.alive == 2 for node in world.nodes)
    assert (world.coordinator.first_cause["host"], world.coordinator.first_cause["reason"]) == (f"lab{victim + 1}", "shutdown")
    assert world.coordinator.restarts_left == 2


def as_it_was_seen(coordinator):
    """Rank 0 of two nodes stands still after its first report, longer than a node may be silent."""
    report = dict(supervisor.Member("lab1", 2, "", supervisor.Limits()).report(), checkpoints=0, lines=0, checkpoint=None)
    coordinator.join(0, 0, 0)
    coordinator.report(0, 0, report, 0.1)
    coordinator.tick(6.0)
    coordinator.report(0, 0, report, 6.0)
    return report


def test_rank_0_never_loses_itself():
    coordinator = supervisor.Coordinator(2, supervisor.Limits())
    report = as_it_was_seen(coordinator)
    assert coordinator.seats[0].connected
    for moment in range(7, 10 ** 6, 9999):
        coordinator.tick(moment)
        coordinator.leave(0, 0, "connection closed", moment)
        coordinator.tick(moment + 100)
        assert coordinator.seats[0].connected
        coordinator.report(0, 0, report, moment + 100)
    assert [host for host, _text in coordinator.problems()] == ["lab1", "rank 1"]


def test_what_rank_0_has_missed_counts_for_nobody():
    limits = supervisor.Limits()
    coordinator = supervisor.Coordinator(2, limits)
    report = as_it_was_seen(coordinator)
    coordinator.join(1, 1, 6.0)
    coordinator.report(1, 1, dict(report, host="lab2"), 6.0)
    coordinator.tick(3600.0)
    assert coordinator.seats[1].connected, "nobody looked for an hour, so nobody was silent for one"
    moment = 3600.0
    while coordinator.seats[1].connected and moment < 3700:
        moment += 0.5
        coordinator.tick(moment)
    assert 3602 < moment < 3606, f"who stays silent afterwards is lost {moment - 3600} s later"


@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("seconds", [2, 4.5, 7, 60, 4000])
def test_a_supervisor_that_stands_still(victim, seconds):
    world = World(4, train=60.0)
    world.run(2)
    world.nodes[victim].paused = True
    world.run(seconds)
    world.nodes[victim].paused = False
    world.run(8)
    alive = {node.alive for node in world.nodes}
    assert alive == {1} if seconds < 4 else alive <= {1, 2} and len(alive) == 1, world.coordinator.text()
    if alive == {2}:
        cause = world.coordinator.first_cause
        assert (cause["host"], cause["reason"], cause["charged"]) == (f"lab{victim + 1}", "lost", False)
        assert victim or "its supervisor stood still for" in cause["text"]
    world.run(80)
    assert all(node.disk["done"] for node in world.nodes)


def test_a_slow_loop_loses_nobody():
    """Every turn of rank 0's loop takes 4.9 s, as on a machine that swaps; members report all the time."""
    world = World(3, train=1000.0)
    world.run(2)
    for _turn in range(20):
        world.nodes[0].paused = True
        world.run(4.75)
        world.nodes[0].paused = False
        world.run(STEP)
    assert [node.alive for node in world.nodes] == [1, 1, 1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.5, 3.0, 4.75, 5.25, 9.0, 300.0])), max_size=6))
def test_a_pause_costs_one_generation_at_most(nnodes, pauses):
    world = World(nnodes, train=10000.0)
    world.run(2)
    for index, seconds in pauses:
        node, before = world.nodes[index % nnodes], world.coordinator.generation
        node.paused = True
        world.run(seconds)
        node.paused = False
        world.run(12)
        assert len({each.alive for each in world.nodes}) == 1 and node.alive is not None, world.coordinator.text()
        assert node.alive - before <= (1 if seconds > 3.0 and nnodes > 1 else 0)
        assert world.coordinator.restarts_left == 2, "a pause costs no budget"


def test_failing_check_is_named_and_waited_for():
    world = World(3)
    world.nodes[2].problems = [{"check": "shm", "text": "/dev/shm has 12 MiB free, 1 GiB expected"}]
    world.run(30)
    assert world.coordinator.text() == "waiting for lab3: /dev/shm has 12 MiB free, 1 GiB expected"
    assert world.coordinator.restarts_left == 2 and all(node.alive is None for node in world.nodes)
    world.nodes[2].problems = []
    world.run(5)
    assert all(node.alive == 1 for node in world.nodes)


def test_hang_is_a_failure_only_where_asked_for():
    for timeout, generation in ((0.0, 1), (5.0, 2)):
        world = World(2, hang_timeout=timeout)
        world.run(2)
        world.nodes[1].hung = True
        world.run(12)
        assert [node.alive for node in world.nodes] == [generation] * 2
    assert world.coordinator.first_cause["reason"] == "hang"


def test_other_release_is_refused_with_its_name():
    world = World(2)
    world.nodes[1].member.release = "r2"
    world.run(5)
    assert world.coordinator.text() == "waiting for lab2: has release r2, rank 0 has r1"
    assert all(node.alive is None for node in world.nodes)


@pytest.mark.parametrize("after", [0.5, 20])
def test_stop_without_rank_0_ends_this_node(after):
    world = World(2)
    world.run(2)
    world.power_off(world.nodes[0])
    world.run(after)
    world.nodes[1].member.stop(world.now, False)
    world.run(6)
    assert world.nodes[1].code == 0 and world.nodes[1].alive is None


def test_two_hosts_for_one_rank():
    """A node whose rank a spare has taken over does not get it back by returning."""
    world = World(2)
    world.run(2)
    assert world.coordinator.admits(1, "lab2") and not world.coordinator.admits(1, "lab9")
    world.power_off(world.nodes[1])
    world.run(8)
    assert world.coordinator.admits(1, "lab9")


def test_a_node_that_missed_the_end_is_told_later():
    world = World(3, train=4.0)
    world.run(2)
    while world.coordinator.phase == "running":
        world.run(STEP)
        if 3 not in world.nodes[2].disk.get("finished", ()) and world.nodes[2].alive is None:
            world.nodes[2].wired = False    # finished, but cut off before the word came
    world.nodes[2].wired = False
    world.run(10)
    if world.nodes[2].disk["done"]:
        return
    assert world.nodes[0].member is not None, "rank 0 must not leave"
    world.kill_supervisor(world.nodes[0])
    world.run(3)
    world.nodes[2].wired = True
    world.run(5)
    assert [node.code for node in world.nodes] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Any story


class AnyFaults(RuleBasedStateMachine):
    """Random faults in random order; afterwards all heals, and the job must end as it should."""

    @initialize(nnodes=st.integers(1, 4), hang=st.sampled_from([0.0, 6.0]), train=st.sampled_from([5.0, 15.0, 40.0]),
                may_stop=st.booleans())
    def start(self, nnodes, hang, train, may_stop):
        self.may_stop = may_stop
        self.world = World(nnodes, hang_timeout=hang, train=train)
        self.stopped = False

    def node(self, index):
        return self.world.nodes[index % len(self.world.nodes)]

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 3.0, 7.0]))
    def wait(self, seconds):
        self.world.run(seconds)

    @rule(index=st.integers(0, 3), echo=st.booleans())
    def worker_dies(self, index, echo):
        self.world.worker_dies(self.node(index), failure("error", echo=echo, signal=None, exit_code=1, error="x"))

    @rule(index=st.integers(0, 3))
    def torchrun_closes_its_workers(self, index):
        node = self.node(index)
        if node.member and node.alive is not None:
            node.member.fail()

    @rule(index=st.integers(0, 3))
    def kill_supervisor(self, index):
        if self.node(index).member:
            self.world.kill_supervisor(self.node(index))

    @rule(index=st.integers(0, 3))
    def power_off(self, index):
        self.world.power_off(self.node(index))

    @rule(index=st.integers(0, 3))
    def power_on(self, index):
        node = self.node(index)
        if not node.powered:
            node.powered, node.code = True, (node.code if node.code == 10 or node.disk["done"] or self.stopped else None)

    @rule(index=st.integers(0, 3), wired=st.booleans())
    def wire(self, index, wired):
        self.node(index).wired = wired

    @rule(index=st.integers(0, 3), paused=st.booleans())
    def pause(self, index, paused):
        self.node(index).paused = paused

    @rule(index=st.integers(0, 3))
    def progress(self, index):
        node = self.node(index)
        if node.alive is not None:
            node.checkpoints += 1

    @rule(index=st.integers(0, 3))
    def hang(self, index):
        if self.world.limits.hang_timeout:
            self.node(index).hung = True

    @rule(index=st.integers(0, 3))
    def ignore_sigterm(self, index):
        self.node(index).stubborn = True

    @rule(index=st.integers(0, 3), bad=st.booleans())
    def check_fails(self, index, bad):
        self.node(index).problems = [{"check": "disk", "text": "full"}] if bad else []

    @rule(index=st.integers(0, 3), why=st.sampled_from(sorted(supervisor.LEAVING)))
    def leave(self, index, why):
        """A shutdown is followed by power_on; after anything else systemd starts the supervisor again."""
        if self.node(index).member:
            self.node(index).member.stop(self.world.now, True, why)

    @rule(index=st.integers(0, 3))
    def stop(self, index):
        if self.node(index).member and self.may_stop:
            self.stopped = True
            self.node(index).member.stop(self.world.now, False)

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        for _attempt in range(4):
            world.heal()        # each time: a shutdown that was asked for last is still to come
            world.run(30)
        results = [(node.code, node.disk["done"]) for node in world.nodes]
        if any(node.code == 10 for node in world.nodes):
            # Whoever was away when the job failed waits for rank 0, with nothing alive.
            assert all(node.code in (10, None) or node.disk["done"] for node in world.nodes), results
            assert all(node.alive is None for node in world.nodes)
        elif self.stopped:
            assert all(node.alive is None or world.coordinator for node in world.nodes), results
        else:
            assert all(done for _code, done in results), (results, world.coordinator and world.coordinator.text())


AnyFaults.TestCase.settings = settings(max_examples=int(os.environ.get("SUPERVISOR_EXAMPLES", "300")), stateful_step_count=60, deadline=None,
                                       derandomize="SUPERVISOR_EXAMPLES" not in os.environ, suppress_health_check=list(HealthCheck))
TestAnyFaults = AnyFaults.TestCase
