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
                   "--release", "r1", "--grace", "5", "--abort-grace", "1", "--heartbeat", "0.3", "--lost-after", "2"]
        command = [word.replace("{rank}", str(rank)) for word in self.command]
        self.processes[rank] = subprocess.Popen([sys.executable, str(PATH), *options, *self.options, "--", *command],
                                                stdout=self.logs[rank], stderr=self.logs[rank], start_new_session=True)

    def state(self, rank=0):
        path = self.folder / f"state-{rank}" / "state.json"
        found = supervisor.read_json(str(path)) or {}
        if found:  # those who look at a job know every state that there is
            assert hostile_input.load(str(path.parent), path.name, supervisor_state.STATE)[1] == ""
        return found

    def log(self, rank=0):
        return (self.folder / f"log-{rank}").read_text()

    def wait(self, condition, seconds=20, what=""):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        logs = "\n".join(f"--- lab{rank + 1}\n{self.log(rank)}" for rank in range(self.nnodes))
        raise AssertionError(f"{what or condition} did not come about in {seconds} s\n{logs}")

    def running(self, generation, step=1):
        """Wait until this generation trains on all nodes."""
        def check():
            return all(self.state(rank).get("node", {}).get("generation") == generation
                       and self.state(rank).get("state") == "running" and self.pid("worker", rank)
                       and alive(self.pid("worker", rank)) for rank in range(self.nnodes))
        self.wait(check, what=f"generation {generation} on all nodes")
        time.sleep(0.2 * step)

    def pid(self, kind, rank):
        try:
            return int((self.folder / f"{kind}-{rank}").read_text())
        except (OSError, ValueError):
            return 0

    def exits(self, seconds=30):
        """Exit codes of all supervisors, once they have come."""
        self.wait(lambda: all(process.poll() is not None for process in self.processes), seconds, "the end of all")
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
    killed = time.monotonic()
    three.running(2, step=0)
    assert time.monotonic() - killed < 6
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
    assert three.exits(60) == [0, 0, 0] and not three.leftovers()


def test_stop_on_one_node_ends_the_job_cleanly_everywhere(gang):
    three = gang(3, steps=1000)
    three.running(1)
    before = {rank: len(list((three.folder / f"checkpoints-{rank}").iterdir())) for rank in range(3)}
    three.processes[1].terminate()
    assert three.exits() == [0, 0, 0] and not three.leftovers()
    for rank in range(3):
        assert three.state(rank)["result"] == "stopped"
        assert len(list((three.folder / f"checkpoints-{rank}").iterdir())) > before[rank], "no checkpoint at the stop"
        assert "stopped as requested on lab2" in three.log(rank)
        assert not (three.folder / f"state-{rank}" / "done").exists()


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
    two = gang(2, options=["--hang-timeout", "3"])
    two.running(1)
    hung = two.pid("worker", 1)
    os.kill(hung, signal.SIGSTOP)
    # The stand-in's ranks do not wait for each other; the other one is stopped as well, as a collective would.
    os.kill(two.pid("worker", 0), signal.SIGSTOP)
    two.running(2, step=0)
    cause = two.state()["first_cause"]
    assert cause["reason"] == "hang" and "is stopped (state T)" in cause["text"]
    assert not alive(hung)
    assert two.exits() == [0, 0]


def test_silent_member_is_lost(gang):
    """A stopped supervisor is a node that is not heard."""
    two = gang(2)
    two.running(1)
    two.processes[1].send_signal(signal.SIGSTOP)
    two.wait(lambda: "lab2: not connected" in two.state()["text"], 6, "the loss")
    two.wait(lambda: not alive(two.pid("worker", 0)), 3, "the end of lab1's torchrun")
    two.processes[1].send_signal(signal.SIGCONT)
    two.running(2)
    assert two.state()["first_cause"]["reason"] == "lost"
    assert two.exits() == [0, 0]


def test_second_host_for_a_rank_is_refused(gang):
    two = gang(2)
    two.running(1)
    other = two.folder / "other"
    other.mkdir()
    intruder = subprocess.Popen(
        [sys.executable, str(PATH), "--job", "j", "--host", "lab9", "--node-rank", "1", "--nnodes", "2", "--coordinator",
         f"127.0.0.1:{two.port}", "--secret-file", str(two.folder / "secret"), "--state-dir", str(other), "--release", "r1",
         "--", "true"], stdout=subprocess.DEVNULL)
    try:
        two.wait(lambda: "lab9 asks for node rank 1, which lab2 has: refused" in two.log(), 5, "the refusal")
        time.sleep(1)
        assert two.state()["generation"] == 1 and two.state()["state"] == "running"
    finally:
        intruder.terminate()
        intruder.wait(10)
    assert two.exits() == [0, 0]


def memory(pid):
    """Resident bytes."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds_of_cpu(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_hostile_network_neither_stops_the_job_nor_grows_memory(gang):
    two = gang(2, steps=1000)
    two.running(1)
    pid, before = two.processes[0].pid, memory(two.processes[0].pid)
    chance = random.Random(7)
    address = ("127.0.0.1", two.port)
    open_ones = []
    deadline = time.monotonic() + 6
    rounds = 0
    while time.monotonic() < deadline:
        rounds += 1
        sock = socket.create_connection(address, 2)
        sock.settimeout(2)
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
    assert rounds > 100
    assert two.state()["generation"] == 1 and two.state()["state"] == "running", two.log()
    assert memory(pid) - before < 4 << 20
    assert len(os.listdir(f"/proc/{pid}/fd")) < 50
    for sock in open_ones:
        sock.close()


def test_overhead_of_a_running_supervisor(gang):
    two = gang(2, steps=1000, options=["--heartbeat", "1"])
    two.running(1)
    time.sleep(1)
    before = [seconds_of_cpu(process.pid) for process in two.processes]
    time.sleep(8)
    spent = [(seconds_of_cpu(process.pid) - start) / 8 for process, start in zip(two.processes, before)]
    # The clock ticks at 10 ms, so 8 s tell 0.125 %.
    assert max(spent) <= 0.01, spent
    assert max(memory(process.pid) for process in two.processes) < 30 << 20
