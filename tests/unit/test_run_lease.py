"""Runs that take, keep, lose and give back nodes: never two at once, and nobody waits for the dead for ever."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import invoker, node_lock, run_lease
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

CONFTEST = os.path.join(os.path.dirname(__file__), "conftest.py")
NODES = ("n1", "n2", "n3")


def run(identity, verb="train", job="train", control="here", pid=1, start=0, since=0.0):
    return {"id": identity, "who": "ops@desk", "verb": verb, "job": job, "control": control, "pid": pid, "start": start, "since": since}


class Runs(RuleBasedStateMachine):
    """Runs of several control nodes on clusters that overlap, each as the action cluster_run does it: look, decide, look again."""

    made = Bundle("runs")

    def __init__(self):
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.folders = {node: os.path.join(self.root.name, node) for node in NODES}
        self.now = 1e6
        self.clock, run_lease.uptime = run_lease.uptime, lambda: self.now
        self.holds, self.lost = {}, set()
        self.count = 0

    def teardown(self):
        run_lease.uptime = self.clock
        self.root.cleanup()

    @rule(target=made, nodes=st.sets(st.sampled_from(NODES), min_size=1), verb=st.sampled_from(["train", "stop"]), job=st.sampled_from("ab"))
    def begin(self, nodes, verb, job):
        self.count += 1
        # Each on a control node of its own: all that others know of it are its signs of life.
        return {"nodes": sorted(nodes), "me": run(f"r{self.count}", verb, job, f"c{self.count}"), "dead": False}

    def attempt(self, each, take_over=False):
        """One go at all nodes, and another one over those that may be taken over; whether it has them."""
        over = []
        for _turn in range(2):
            told = {node: run_lease.told(each["me"], over, self.folders[node]) for node in each["nodes"]}
            now = run_lease.standing(told, each["me"], take_over)
            if now.free:
                self.holds[each["me"]["id"]] = {node for node in each["nodes"] if told[node]["taken"]}
                return True
            over = now.over
            if now.others:
                for node in each["nodes"]:
                    run_lease.give_back(each["me"]["id"], self.folders[node])
                self.holds.pop(each["me"]["id"], None)
                return False
            self.lost |= set(over)
        raise AssertionError("what may be taken over was not")

    @rule(each=made, take_over=st.booleans())
    def take(self, each, take_over):
        if not each["dead"] and each["me"]["id"] not in self.lost:
            self.attempt(each, take_over)

    @rule(each=made)
    def work(self, each):
        """A module: it works for a run that has the node, and for no other."""
        name = each["me"]["id"]
        for node in self.holds.get(name, ()):
            lease = {**each["me"], "boot": run_lease.boot()}
            if name in self.lost:
                try:
                    run_lease.require(lease, self.folders[node])
                except run_lease.Lost:
                    pass
            elif not each["dead"]:
                run_lease.require(lease, self.folders[node])

    @rule(each=made)
    def give_back(self, each):
        if not each["dead"]:
            for node in each["nodes"]:
                run_lease.give_back(each["me"]["id"], self.folders[node])
            self.holds.pop(each["me"]["id"], None)

    @rule(each=made)
    def die(self, each):
        each["dead"] = True

    @rule(seconds=st.floats(0, run_lease.STALE / 2))
    def pass_time(self, seconds):
        self.now += seconds
        # Whoever lives gives a sign of life on some node in time.
        for name, nodes in self.holds.items():
            for node in nodes:
                lease = run_lease.read(self.folders[node])
                if lease.get("id") == name and name not in self.lost and not self.is_dead(name):
                    run_lease.require(lease, self.folders[node])

    def is_dead(self, name):
        return any(each["dead"] for each in self.begun if each["me"]["id"] == name)

    @property
    def begun(self):
        return [self.names_to_values[reference.name] for reference in self.bundle("runs")]

    @rule(each=made)
    def the_dead_are_waited_for_no_longer_than_that(self, each):
        """With nobody alive, everybody gets all nodes once the last sign of life is old."""
        if each["dead"] or each["me"]["id"] in self.lost:
            return
        for other in self.begun:
            other["dead"] = other is not each
        self.now += run_lease.STALE
        self.lost |= {other["me"]["id"] for other in self.begun if other is not each}
        assert self.attempt(each)

    @invariant()
    def who_holds_nodes_holds_all_of_them_or_was_interrupted(self):
        for name, nodes in self.holds.items():
            if name not in self.lost and not self.is_dead(name):
                assert {node for node in nodes if run_lease.read(self.folders[node]).get("id") == name} == nodes

    @invariant()
    def nobody_else_holds_anything(self):
        for folder in self.folders.values():
            lease = run_lease.read(folder)
            assert not lease or lease["id"] in self.holds or lease["id"] in self.lost


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_module_of_a_run_that_has_lost_the_node_does_nothing(tmp_path):
    folder = str(tmp_path)
    old = run_lease.told(run("old"), (), folder)["lease"]
    run_lease.require(old, folder)
    run_lease.told(run("new", verb="stop"), ["old"], folder)
    with pytest.raises(run_lease.Lost, match=r"ops@desk \(stop of the job train, process 1, since .*\) has taken the node over"):
        run_lease.require(old, folder)
    assert not run_lease.give_back("old", folder) and run_lease.give_back("new", folder)
    with pytest.raises(run_lease.Lost, match="has given the node back"):
        run_lease.require(old, folder)


def test_a_node_that_was_restarted_is_still_its_runs(tmp_path):
    lease = {**run_lease.told(run("one"), (), str(tmp_path))["lease"], "boot": "an earlier one"}
    run_lease.give_back("one", str(tmp_path))
    run_lease.require(lease, str(tmp_path))
    assert run_lease.read(str(tmp_path))["id"] == "one"


def test_who_works_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lease, "SECONDS_BETWEEN_RENEWALS", 0.01)
    lease = run_lease.told(run("one"), (), str(tmp_path))["lease"]
    with run_lease.at_work(lease, str(tmp_path)):
        begun = run_lease.read(str(tmp_path))["renewed"]
        while run_lease.read(str(tmp_path))["renewed"] <= begun:
            pass
    with run_lease.at_work({}, str(tmp_path)):  # a role by itself has no lease
        pass


class Gone:
    """Whoever started the module, until it ends."""

    ended = ""

    def __enter__(self):
        return self

    def __exit__(self, *_reason):
        pass

    def gone(self):
        return Gone.ended


def test_a_module_for_which_nobody_waits_gives_no_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lease, "SECONDS_BETWEEN_RENEWALS", 0.01)
    monkeypatch.setattr(invoker, "Invoker", Gone)
    monkeypatch.setattr(Gone, "ended", "")
    lease = run_lease.told(run("one"), (), str(tmp_path))["lease"]
    before = set(threading.enumerate())
    with run_lease.at_work(lease, str(tmp_path)):
        (renewing,) = set(threading.enumerate()) - before
        Gone.ended = "the process that started it has ended"
        renewing.join(60)
        assert not renewing.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount /proc")
@pytest.mark.parametrize("hidepid", [0, 1, 2])
def test_a_process_that_is_hidden_is_not_dead(hidepid):
    """Two operators of one control node whose /proc shows everybody the own processes only."""
    look = f"""
import os, runpy, subprocess, sys
runpy.run_path({CONFTEST!r})
from ansible_collections.onprem.torch.plugins.module_utils import invoker, run_lease
subprocess.run(["mount", "-t", "proc", "-o", "hidepid={hidepid}", "proc", "/proc"], check=True)
me = os.getpid()
start = invoker.stat(me)[2]
ended = subprocess.Popen(["true"]); ended.wait()
def alive(pid, silent, start=start):
    return run_lease.alive({{"control": "here", "pid": pid, "start": start}}, silent, "here")
os.setgroups([]); os.setgid(65534)
reading, writing = os.pipe()
if not os.fork():
    os.setuid(65534)
    unseen = {hidepid} > 0
    assert bool(invoker.stat(me)) != unseen
    assert alive(me, 0) and alive(me, run_lease.STALE) != unseen
    assert alive(me, 0, start + 1) == unseen  # nobody can tell
    assert not any(alive(pid, 0) for pid in (ended.pid, 0, -1, 1 << 40))
    os.write(writing, b"fine")
    os._exit(0)
os.close(writing)
assert os.read(reading, 4) == b"fine"
"""
    subprocess.run(["unshare", "--mount", "--pid", "--fork", sys.executable, "-c", look], check=True, timeout=120)


def test_processes_of_the_same_control_node_are_looked_at():
    known = invoker.stat(os.getpid())
    here = run("one", pid=os.getpid(), start=known[2])
    assert run_lease.alive(here, 1e9, "here")
    assert not run_lease.alive({**here, "start": known[2] + 1}, 0, "here")  # the id was given to another process
    assert run_lease.alive(here, run_lease.STALE - 1, "there") and not run_lease.alive(here, run_lease.STALE, "there")


def _takes(folder, number, barrier, answers):
    barrier.wait()
    answers.put(run_lease.told(run(f"r{number}"), (), folder)["taken"])


def test_of_many_at_once_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_takes, args=(str(tmp_path), number, barrier, answers)) for number in range(8)]
    for process in processes:
        process.start()
    assert sum(answers.get(timeout=60) for _process in processes) == 1
    for process in processes:
        process.join()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"id": 1}', '{"id": ""}', "[" * 100000, '{"id": "x", "since": "soon", "who": "\x1b[2J"}'])
def test_what_is_no_lease_is_none(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    lease = run_lease.read(str(tmp_path))
    assert not lease or run_lease.described(lease).isprintable()
    assert run_lease.shaped(json.loads(json.dumps(lease))) == lease


def test_the_lease_is_no_link_and_no_fifo(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    assert run_lease.read(str(tmp_path)) == {}
    os.unlink(tmp_path / "run.json")
    (tmp_path / "run.json").symlink_to("/etc/hostname")
    assert run_lease.read(str(tmp_path)) == {}
    assert run_lease.told(run("one"), (), str(tmp_path))["taken"] and not (tmp_path / "run.json").is_symlink()
    assert isinstance(run_lease.Lost(""), node_lock.Busy)
