# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every fault once, on four booted nodes, with real training. Run as root: pytest tests/faults"""
from __future__ import annotations

import time

import faults
import pytest

CASES = [
    (faults.worker_killed, 2), (faults.torchrun_killed, 1), (faults.supervisor_killed, 0), (faults.worker_fails, 2),
    (faults.two_at_once, 1), (faults.port_taken, 2), (faults.worker_hangs, 1), (faults.reboot, 0), (faults.partition, 2),
    (faults.power_loss, 0), (faults.power_loss_of_all, 0),
]
# The same on nodes that have the other part in the job.
MORE = [(faults.worker_killed, 0), (faults.supervisor_killed, 3), (faults.reboot, 1), (faults.power_loss, 3)]


def case(fault, node, *marks):
    return pytest.param(fault, node, marks=marks, id=f"{fault.__name__}-{node + 1}")


@pytest.mark.parametrize("fault, node", [*(case(*one) for one in CASES), *(case(*one, pytest.mark.matrix) for one in MORE)])
def test_recovers(training, measured, fault, node):
    measured(faults.recovered(training, fault, node))


def test_full_disk_ends_clearly_and_nothing_is_corrupted(training):
    """A checkpoint disk without room: training stops, node and reason are named, and it goes on once there is room."""
    job, machine = training, training.machines[3]
    folder = f"{job.root}/checkpoints"
    last = job.steps(time.time() - 10)[-1][0]
    machine.shell(f"mkdir /run/small && mount -t tmpfs -o size=256k tmpfs /run/small && cp -p {folder}/step-*.json /run/small/ "
                  f"&& chown -R torchrun: /run/small && dd if=/dev/zero of=/run/small/filler bs=4k status=none; "
                  f"mount --bind /run/small {folder}", check=False)
    try:
        def refused(state):
            cause = state.get("first_cause") or {}
            return (state.get("state") == "waiting" and "fault4: " in state["text"] and "1 GiB expected" in state["text"]
                    and cause.get("host") == "fault4" and "No space left on device" in cause["text"])
        job.wait(lambda: all(map(refused, map(job.state, job.machines))), 90, "every node names the one without room, and the cause")
        generation = job.state()["generation"]
    finally:
        machine.shell(f"umount {folder}; umount /run/small; rmdir /run/small", check=False)
    _generation, step = job.trains(generation)
    assert job.resumed(step - 60) >= last - 20


def test_stop_on_one_node_stops_all(training):
    job = training
    since = time.time()
    job.machines[2].shell(f"systemctl stop {job.unit}")
    job.wait(lambda: set(job.units()) == {"inactive"}, 30, "the stop everywhere")
    for machine in job.machines:
        text = job.journal(machine, since)
        assert "stopped cleanly at step" in text and "stopped as requested on fault3" in text
        assert job.state(machine)["result"] == "stopped"
    stopped = job.stopped_at(since)
    job.start_again()
    _generation, step = job.trains(0)
    assert job.resumed(step - 60) == stopped, "the checkpoint of the stop was not used"


def test_finishes_with_every_step_done_once(training):
    """The final state is known beforehand, so a step lost or done twice in any of the restarts shows."""
    training.finish()


def test_finished_job_stays_finished_over_a_reboot_of_all_nodes(job):
    since = time.time()
    leaders = {machine: machine.leader() for machine in job.machines}
    for machine in job.machines:
        machine.reboot()
    for machine, leader in leaders.items():
        machine.wait_reboot(leader)
    job.hall.power_on()
    for machine in job.machines:
        job.wait(lambda machine=machine: "finished already" in job.journal(machine, since), 60, f"{machine.name} looks at the job")
        assert machine.shell(f"systemctl is-enabled {job.unit} || true").strip() == "enabled"
    assert set(job.units()) == {"inactive"}
