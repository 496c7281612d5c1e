# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong. Each function does one thing to a running job, undoes what a person would undo, and returns
(moment of the fault, moment from which recovery was possible, what the first cause must say or None)."""
from __future__ import annotations

import random
import time

# Seconds for which a node stays off, and is cut off: longer than it takes to be missed. tests/soak.py takes full lengths.
AWAY, PARTITION = 8, 12


def _kill(machine, kind, signal="KILL"):
    pid, moment = machine.pid(kind), time.time()
    machine.shell(f"kill -{signal} {pid}")
    return moment


def worker_killed(job, number):
    moment = _kill(job.machines[number], "worker")
    return moment, moment, {"host": job.machines[number].name, "signal": "SIGKILL"}


def torchrun_killed(job, number):
    moment = _kill(job.machines[number], "torchrun")
    return moment, moment, {"host": job.machines[number].name, "signal": "SIGKILL"}


def supervisor_killed(job, number):
    moment = _kill(job.machines[number], "supervisor")
    return moment, moment, {"host": job.machines[number].name, "reason": "lost"} if number else None


def worker_fails(job, number):
    moment = _kill(job.machines[number], "worker", "USR1")
    return moment, moment, {"host": job.machines[number].name, "error": "ValueError: bad sample"}


def worker_hangs(job, number):
    moment = _kill(job.machines[number], "worker", "STOP")
    return moment, moment, {"host": job.machines[number].name, "reason": "hang"}


def reboot(job, number):
    machine = job.machines[number]
    leader = machine.leader()
    moment = machine.reboot()
    machine.wait_reboot(leader)
    return moment, machine.started(), {"host": job.machines[number].name, "reason": "shutdown"} if number else None


def power_loss(job, number):
    machine = job.machines[number]
    moment = machine.power_off()
    time.sleep(AWAY)
    job.hall.power_on()
    return moment, machine.started(), {"host": job.machines[number].name, "reason": "lost"} if number else None


def power_loss_of_all(job, _number=0):
    moment = [machine.power_off() for machine in job.machines][0]
    time.sleep(2)
    job.hall.power_on()
    return moment, max(machine.started() for machine in job.machines), None


def partition(job, number):
    machine = job.machines[number]
    moment = time.time()
    machine.cable(False)
    time.sleep(PARTITION)
    machine.cable(True)
    return moment, time.time(), {"host": job.machines[number].name, "reason": "lost"} if number else None


HOLD = """
import socket, time
deadline = time.time() + 30
while time.time() < deadline:
    holder = socket.socket(socket.AF_INET6)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind(("::", 29500)); holder.listen(); print("held", flush=True); time.sleep(12); break
    except OSError:
        holder.close(); time.sleep(0.005)
"""


def port_taken(job, number):
    """Somebody takes MASTER_PORT in the moment in which torchrun leaves it, for 12 s."""
    first = job.machines[0]
    first.shell(f"cat >/run/hold.py <<'END'\n{HOLD}\nEND\nsystemd-run --quiet --unit=hold --collect python3 /run/hold.py")
    moment = _kill(job.machines[number or 1], "worker")
    job.wait(lambda: "inactive" in first.shell("systemctl is-active hold || true"), 60, "the port's release")
    held = first.shell("journalctl --quiet --output=cat --unit=hold | grep -c held || true").strip()
    assert held != "0", "nobody held the port"
    return moment, time.time(), None


def two_at_once(job, number):
    other = (number + 2) % len(job.machines)
    moment = _kill(job.machines[number], "worker")
    time.sleep(3)
    _kill(job.machines[other], "supervisor")
    return moment, moment + 3, None


SIMPLE = [worker_killed, torchrun_killed, supervisor_killed, worker_fails, reboot, power_loss, partition, two_at_once]


def recovered(job, fault, number):
    """Do it, wait until the job trains again; returns what was measured. Raises AssertionError where it does not."""
    before = job.state()
    last = job.steps(time.time() - 10)[-1][0]
    moment, possible, expected = fault(job, number)
    generation, step = job.trains(before["generation"])
    resumed = job.resumed(step - 60)
    assert resumed >= last - 2 * 10, f"resumed from step {resumed}, although step {last} was done"
    started = job.generation_started(generation)
    state = job.state()
    if expected:
        told = next((cause for cause in reversed(state["history"]) if cause["generation"] >= before["generation"]), {})
        told = next((cause for cause in state["history"] if cause["generation"] == before["generation"]), told)
        for key, value in expected.items():
            assert value in str(told.get(key)), f"the first cause is told as {told.get('text')}, expected {expected}"
    assert not job.strays(), job.strays()
    return {"fault": fault.__name__, "node": number, "generation": generation, "to_step": step - moment,
            "to_start": (started or step) - moment, "from_return": step - possible,
            "start_from_return": (started or step) - possible, "torch": step - (started or step)}


def pick(chance: random.Random):
    """A random fault on a random node."""
    return chance.choice(SIMPLE), chance.randrange(4)
