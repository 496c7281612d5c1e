# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens to supervisors and units on nodes all the time, and is no stop of the job: on the nodes of test_faults.py."""
from __future__ import annotations

import time

from test_life import answer

NEEDRESTART = "/etc/needrestart/conf.d/onprem.torch.conf"
UPDATE = "DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get install -y --reinstall libexpat1 zlib1g 2>&1"


def test_supervisors_that_stand_still(training):
    """Rank 0's supervisor and a member's are stopped for 20 s, one after the other: a generation each, and no budget."""
    job = training
    for number in (0, 2):
        before, machine = job.state()["generation"], job.machines[number]
        pid = machine.pid("supervisor")
        machine.shell(f"kill -STOP {pid}; sleep 20; kill -CONT {pid}")
        job.trains(before)
        state = job.state()
        # More only where the machine of the test itself stands still.
        assert state["history"][-1]["reason"] == "lost" and not state["history"][-1]["charged"], state["history"][-1]
        assert state["restarts_left"] == 3
        assert machine.pid("supervisor") == pid


def test_a_restart_of_units_is_no_stop(training):
    """systemctl restart of rank 0, of all at once, and a bare SIGTERM: each time the job goes on with all nodes."""
    job = training
    everyone = range(len(job.machines))
    for numbers, command in (([0], f"systemctl restart {job.unit}"), (everyone, f"systemctl --no-block restart {job.unit}"),
                             ([3], f"systemctl kill --kill-whom=main {job.unit}")):
        before, since = job.state()["generation"], time.time()
        for number in numbers:
            job.machines[number].shell(command)
        job.trains(before)
        assert set(job.units()) == {"active"}
        why = "was sent SIGTERM" if "kill" in command else "its unit was restarted"
        for number in numbers:
            assert why in job.journal(job.machines[number], since - 1)
        if numbers == [0]:
            # Rank 0 keeps the cause of its own restart over that restart.
            told = answer(job.playbook("playbooks/why.yml", "-e", '{"why_format": "json"}'))
            assert why in told["sentence"] and told["cause"]["host"] == job.machines[0].name, told
        assert not any("stopped as requested" in job.journal(machine, since) for machine in job.machines)
    assert job.state()["restarts_left"] == 3


def test_needrestart_after_a_package_update(training):
    """The real package, with our file and without it."""
    job, machine = training, training.machines[1]
    try:
        machine.shell("apt-get update 2>&1 && DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install -y needrestart 2>&1", timeout=300)
        before, pid = job.state()["generation"], machine.pid("supervisor")
        told = machine.shell(UPDATE, timeout=300)
        assert machine.pid("supervisor") == pid and job.state()["generation"] == before, told
        machine.shell(f"mv {NEEDRESTART} /run/")
        told = machine.shell(UPDATE, timeout=300)
        assert job.unit in told, told
        job.trains(before)
        assert set(job.units()) == {"active"} and job.state()["restarts_left"] == 3
    finally:
        machine.shell(f"[ ! -e /run/onprem.torch.conf ] || mv /run/onprem.torch.conf {NEEDRESTART}", check=False)
        machine.shell("DEBIAN_FRONTEND=noninteractive apt-get purge -y needrestart >/dev/null 2>&1", check=False, timeout=300)
        machine.shell(f"test -e {NEEDRESTART}")
