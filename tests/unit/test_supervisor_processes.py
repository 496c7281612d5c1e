# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several real supervisors on 127.0.0.x, with real processes, real signals and a hostile network."""
from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, supervisor_state
from supervisor_support import PATH, load

supervisor = load()
SECRET = "0123456789abcdef0123456789abcdef"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def alive(pid):
    return supervisor.process_state(pid)[0] not in ("", "Z", "X")


class Gang:
    """N supervisors as N units would run them; restart() does what systemd does after a failure."""

    def __init__(self, folder, nnodes, steps=40, options=(), command=None, port=None, through=()):
        self.folder, self.nnodes, self.steps, self.options = folder, nnodes, steps, list(options)
        self.port, self.master_port = port or free_port(), free_port()
        self.through = dict(through)        # rank → the port at which it takes rank 0's supervisor to be
        self.command = command or [sys.executable, str(HERE / "fake_torchrun.py"), str(folder), "{rank}", str(steps),
                                   f"--master-port={self.master_port}"]
        (folder / "secret").write_text(SECRET + "\n")
        self.logs = [open(folder / f"log-{rank}", "ab") for rank in range(nnodes)]
        self.processes = [None] * nnodes
        for rank in range(nnodes):
            self.start(rank)

    def start(self, rank):
        options = ["--job", "j", "--host", f"lab{rank + 1}", "--node-rank", str(rank), "--nnodes", str(self.nnodes),
                   "--coordinator", f"127.0.0.1:{self.through.get(rank, self.port)}", "--bind", f"127.0.0.{rank + 1}",
                   "--secret-file", str(self.folder / "secret"), "--state-dir", str(self.folder / f"state-{rank}"),
                   "--checkpoint-dir", str(self.folder / f"checkpoints-{rank}"), "--checkpoint-glob", "step-*",
                   "--release", "r1", "--grace", "5", "--abort-grace", "1", "--heartbeat", "0.3", "--lost-after", "8"]     # a busy machine is no lost node
        command = [word.replace("{rank}", str(rank)) for word in self.command]
        self.processes[rank] = subprocess.Popen([sys.executable, str(PATH), *options, *self.options, "--", *command],
                                                stdout=self.logs[rank], stderr=self.logs[rank], start_new_session=True)

    def state(self, rank=0):
        path = self.folder / f"state-{rank}" / "state.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        if found:  # those who look at a job know every state that there is
            assert hostile_input.load(str(path.parent), path.name, supervisor_state.STATE)[1] == ""
        return found

    def log(self, rank=0):
        return (self.folder / f"log-{rank}").read_text()

    def wait(self, condition, what="", seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        logs = "\n".join(f"--- lab{rank + 1}\n{self.log(rank)}" for rank in range(self.nnodes))
        raise AssertionError(f"{what or condition} did not come about in {seconds} s\n{logs}")

    def running(self, generation, step=1):
        """Wait until this generation, or one after it where the machine is too busy for this one, trains on all nodes."""
        def check():
            generations = {self.state(rank).get("node", {}).get("generation", 0) for rank in range(self.nnodes)}
            return len(generations) == 1 and generations.pop() >= generation and all(
                self.state(rank).get("state") == "running" and self.pid("worker", rank) and alive(self.pid("worker", rank)) for rank in range(self.nnodes))
        self.wait(check, what=f"generation {generation} on all nodes")
        time.sleep(0.2 * step)

    def pid(self, kind, rank):
        try:
            return int((self.folder / f"{kind}-{rank}").read_text())
        except (OSError, ValueError):
            return 0

    def exits(self, seconds=120):
        """Exit codes of all supervisors, once they have come."""
        self.wait(lambda: all(process.poll() is not None for process in self.processes), "the end of all", seconds)
        return [process.returncode for process in self.processes]

    def leftovers(self):
        """Processes of any torchrun of this gang that are alive."""
        return [pid for rank in range(self.nnodes)
                for pid in supervisor.MarkedTree(str(self.folder / f"state-{rank}")).pids() if alive(pid)]

    def close(self):
        for process in self.processes:
            if process and process.poll() is None:
                process.kill()
                process.wait()
        supervisor.kill_each(self.leftovers())
        for log in self.logs:
            log.close()


@pytest.fixture
def gang(tmp_path):
    made = []

    def make(*arguments, **options):
        made.append(Gang(tmp_path, *arguments, **options))
        return made[-1]
    yield make
    for one in made:
        one.close()


def test_alone_without_network(gang):
    one = gang(1, steps=5)
    assert one.exits() == [0] and not one.leftovers()
    assert one.state()["result"] == "done"
    one.start(0)
    assert one.exits() == [0]
    assert "finished already" in one.log()


def test_who_finds_the_job_done_says_so_in_its_state_too(gang):
    """The job can write the file too; status and `why` read state.json only, and would tell of a job that trains."""
    one = gang(1, steps=1000)
    one.running(1)
    one.processes[0].kill()
    one.processes[0].wait()
    assert one.state()["result"] is None
    (one.folder / "state-0" / "done").write_text(json.dumps({"job": "j", "release": "r1", "finished": 1.0}))
    one.start(0)
    assert one.exits() == [0]
    state = one.state()
    assert (state["state"], state["result"], state["release"]) == ("done", "done", "r1")
    assert "finished already" in state["text"] and "state-0/done" in state["text"]


def test_all_finish(gang):
    three = gang(3, steps=10)
    assert three.exits() == [0, 0, 0] and not three.leftovers()
    for rank in range(3):
        assert json.loads((three.folder / f"state-{rank}" / "done").read_text())["release"] == "r1"
        assert three.state(rank)["result"] == "done"


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("victim", ["worker", "agent"])
def test_killed_worker_or_torchrun(gang, rank, victim):
    three = gang(3)
    three.running(1)
    os.kill(three.pid(victim, rank), signal.SIGKILL)
    three.running(2, step=0)
    cause = three.state()["first_cause"]
    assert (cause["host"], cause["signal"], cause["charged"]) == (f"lab{rank + 1}", "SIGKILL", True)
    # A follower hears of it with the answer to its next heartbeat.
    three.wait(lambda: (three.state(1)["first_cause"] or {}).get("text") == cause["text"], what="every node knows")
    assert three.exits() == [0, 0, 0] and not three.leftovers()


@pytest.mark.parametrize("rank", [0, 2])
def test_killed_supervisor(gang, rank):
    three = gang(3, steps=150)     # the orphan must not finish before the others have noticed
    three.running(1)
    orphan = three.pid("worker", rank)
    three.processes[rank].kill()
    three.processes[rank].wait()
    three.wait(lambda: not any(alive(three.pid("worker", other)) for other in range(3) if other != rank),
               what="end of the others' torchrun")
    assert alive(orphan), "this test needs an orphan, which systemd would have killed"
    three.start(rank)
    three.running(2, step=0)
    assert not alive(orphan)
    assert three.state()["restarts_left"] == 3
    assert three.exits() == [0, 0, 0] and not three.leftovers()


def test_stop_on_one_node_ends_the_job_cleanly_everywhere(gang):
    three = gang(3, steps=1000)
    three.running(1)
    before = {rank: len(list((three.folder / f"checkpoints-{rank}").iterdir())) for rank in range(3)}
    three.processes[1].send_signal(signal.SIGINT)      # Ctrl-C; under systemd that tells, see test_why_ended
    assert three.exits() == [0, 0, 0] and not three.leftovers()
    for rank in range(3):
        assert three.state(rank)["result"] == "stopped"
        assert len(list((three.folder / f"checkpoints-{rank}").iterdir())) > before[rank], "no checkpoint at the stop"
        assert "stopped as requested on lab2" in three.log(rank)
        assert not (three.folder / f"state-{rank}" / "done").exists()
    # What was written at the stop is known on every node: who looks for the last checkpoint asks any of them.
    for rank in range(3):
        last = max((three.folder / f"checkpoints-{rank}").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        assert [three.state(other)["checkpoints"][str(rank)]["path"] for other in range(3)] == [str(last)] * 3
        assert three.state(rank)["checkpoint_hosts"] == ["lab1", "lab2", "lab3"]


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_that_nobody_asked_systemd_for_is_no_stop(gang, victim):
    two = gang(2, steps=1000)
    two.running(1)
    two.processes[victim].terminate()
    assert two.processes[victim].wait(60) == supervisor.EXIT_AGAIN
    assert not alive(two.pid("worker", victim))
    other = two.state(1 - victim)
    text = "its supervisor was sent SIGTERM"
    if victim:
        two.wait(lambda: text in two.state()["text"] or "lab2: not connected" in two.state()["text"], "rank 0 waits")
    else:
        two.wait(lambda: text in (two.state(1)["first_cause"] or {}).get("text", ""), "rank 0's last word on the other node")
        assert two.state()["restarts"] == 1 and other["generation"] == 1
    two.start(victim)
    two.running(2, step=0)
    for rank in range(2):
        cause = two.wait(lambda rank=rank: two.state(rank)["first_cause"], "the cause on every node")
        assert (cause["host"], cause["reason"], cause["charged"]) == (f"lab{victim + 1}", "restart", False)
        assert text in cause["text"]


def test_a_unit_started_alone_after_a_stop_says_that_the_job_was_stopped(gang):
    two = gang(2, steps=1000)
    two.running(1)
    two.processes[0].send_signal(signal.SIGINT)
    assert two.exits() == [0, 0]
    for rank in (1, 0):
        two.start(rank)
        two.wait(lambda: "The job had ended (stopped as requested on lab1); start it on every node" in two.state(rank)["text"],
                 what=f"the word of rank {rank} alone")
        two.processes[rank].kill()
        two.processes[rank].wait()
    for rank in (0, 1):
        two.start(rank)
    two.running(2, step=0)
    assert "had ended" not in two.state()["text"]


@pytest.mark.parametrize("state, jobs, expected", [
    ("running", "12 torchrun-train.service stop running", "stop"),
    ("degraded", "11 a.service start running\n12 torchrun-train.service stop running", "stop"),
    ("running", "12 torchrun-train.service restart running", "restart"),
    ("running", "12 torchrun-train.service start waiting", "restart"),
    ("running", "", "signal"),
    ("running", "No jobs running.", "signal"),
    ("stopping", "12 torchrun-train.service stop running", "shutdown"),
    ("", "12 torchrun-train.service stop running", "unknown"),
    ("running", None, "unknown"),
    (None, None, "unknown"),
])
def test_why_ended(monkeypatch, state, jobs, expected):
    """What systemd answers; that it does answer so is seen on nodes (tests/faults/test_harm_supervisor.py)."""
    monkeypatch.setattr(supervisor, "systemctl", lambda *words: state if words[0] == "is-system-running" else jobs)
    monkeypatch.setattr(supervisor.os.path, "exists", lambda _path: True)
    assert supervisor.why_ended("torchrun-train.service", patience=0.0) == expected


def test_crash_loop_ends_with_the_first_cause(gang):
    two = gang(2, steps=1000, options=["--max-restarts", "1"])
    (two.folder / "fail").write_text("1")
    assert two.exits() == [10, 10] and not two.leftovers()
    for rank in range(2):
        state = two.state(rank)
        assert state["result"] == "failed" and state["restarts_left"] == 0
        assert state["first_cause"]["host"] == "lab2" and state["first_cause"]["rank"] == 1
        assert "ValueError: bad sample" in state["first_cause"]["text"]
        assert "ValueError: bad sample" in two.log(rank)
    assert len(two.state()["history"]) == 2


def test_taken_master_port_is_waited_for(gang):
    port = free_port()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        two = gang(2, steps=5, options=["--check", f"port={port}"])
        two.wait(lambda: f"port {port} is held by another process" in two.state(1).get("text", ""), what="the port's name")
        time.sleep(1)
        assert two.state()["generation"] == 0 and two.state()["restarts_left"] == 3
    assert two.exits() == [0, 0]


def test_hung_worker(gang):
    two = gang(2, steps=1000, options=["--hang-timeout", "15"])
    two.running(1)
    hung = two.pid("worker", 1)
    os.kill(hung, signal.SIGSTOP)
    # The stand-in's ranks do not wait for each other; the other one is stopped as well, as a collective would.
    os.kill(two.pid("worker", 0), signal.SIGSTOP)
    two.running(2, step=0)
    cause = two.state()["first_cause"]
    assert cause["reason"] == "hang" and "is stopped (state T)" in cause["text"]
    assert not alive(hung)


def test_silent_member_is_lost(gang):
    """A stopped supervisor is a node that is not heard."""
    two = gang(2, steps=1000, options=["--lost-after", "3"])
    two.running(1)
    two.processes[1].send_signal(signal.SIGSTOP)
    two.wait(lambda: "lab2: not connected" in two.state()["text"], "the loss")
    two.wait(lambda: not alive(two.pid("worker", 0)), "the end of lab1's torchrun")
    two.processes[1].send_signal(signal.SIGCONT)
    two.running(2)
    assert two.state()["first_cause"]["reason"] == "lost"


@pytest.mark.parametrize("seconds, lost", [(2, False), (10, True)])
def test_rank_0_stands_still(gang, seconds, lost):
    """Shorter than a node may be silent, and longer: the job goes on by itself, and rank 0 is not lost to itself."""
    two = gang(2, steps=1000, options=["--lost-after", "3"] if lost else [])
    two.running(1)
    two.processes[0].send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    if lost:
        two.wait(lambda: not alive(two.pid("worker", 1)), "lab2 gives rank 0 up")
    two.processes[0].send_signal(signal.SIGCONT)
    two.running(2 if lost else 1, step=5)
    assert two.state()["restarts_left"] == 3
    if lost:
        assert "lab1: lost: its supervisor stood still for" in two.state()["first_cause"]["text"]
    else:
        assert two.state()["generation"] == 1, two.log()


def test_second_host_for_a_rank_is_refused(gang):
    two = gang(2, steps=1000)
    two.running(1)
    other = two.folder / "other"
    other.mkdir()
    intruder = subprocess.Popen(
        [sys.executable, str(PATH), "--job", "j", "--host", "lab9", "--node-rank", "1", "--nnodes", "2", "--coordinator",
         f"127.0.0.1:{two.port}", "--secret-file", str(two.folder / "secret"), "--state-dir", str(other), "--release", "r1",
         "--", "true"], stdout=subprocess.DEVNULL)
    try:
        two.wait(lambda: "lab9 asks for node rank 1, which lab2 has: refused" in two.log(), "the refusal")
        time.sleep(1)
        assert two.state()["generation"] == 1 and two.state()["state"] == "running"
    finally:
        intruder.terminate()
        intruder.wait(60)


def memory(pid):
    """Resident bytes."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_hostile_network_neither_stops_the_job_nor_grows_memory(gang):
    two = gang(2, steps=1000)
    two.running(1)
    pid, before = two.processes[0].pid, memory(two.processes[0].pid)
    chance = random.Random(7)
    address = ("127.0.0.1", two.port)
    open_ones = []
    for rounds in range(400):
        sock = socket.create_connection(address, 60)
        sock.settimeout(60)
        kind = rounds % 6
        try:
            if kind == 0:
                sock.sendall(chance.randbytes(chance.randrange(1, 100000)))
            elif kind == 1:
                sock.sendall(b"\x7f\xff\xff\xff" + b"x" * 60000)
            elif kind == 2:
                session = supervisor.Session(b"x" * 32, "j", 1)     # the wrong secret, with our own proof all the same
                sock.sendall(session.outgoing)
                sock.recv(4096)
                payload = json.dumps({"proof": session._derive("client").hex()}).encode()
                sock.sendall(len(payload).to_bytes(4, "big") + payload)
            elif kind == 3:
                sock.sendall(b"\x00\x00\x01")
            elif kind == 4:
                payload = b"[" * 500
                sock.sendall(len(payload).to_bytes(4, "big") + payload)
        except OSError:
            pass
        if kind in (3, 5):
            open_ones.append(sock)      # half-open, silent
        else:
            sock.close()
        time.sleep(0.005)
    assert two.state()["generation"] == 1 and two.state()["state"] == "running", two.log()
    assert memory(pid) - before < 4 << 20
    assert len(os.listdir(f"/proc/{pid}/fd")) < 50
    for sock in open_ones:
        sock.close()


def test_a_running_supervisor_takes_little_memory(gang):
    two = gang(2, steps=1000, options=["--heartbeat", "1"])
    two.running(1)
    time.sleep(1)
    assert max(memory(process.pid) for process in two.processes) < 30 << 20
