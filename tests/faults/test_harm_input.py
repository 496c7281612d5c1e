# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a job can write is hostile input: its user spoils what the verbs read, and its processes print what acts on terminals."""
from __future__ import annotations

import json
import re
import shlex
import time

from test_life import answer, variables

# As somebody types it who wants the operator's terminal; and what once separated the parts of a look at a node.
PRINTED = r"\033]0;OWNED\007\033[2J\033[A fake: PLAY RECAP\n--onprem-torch--\n-- cursor: s=forged\n"
SPOILT = {
    "mkfifo state.json": "state.json is a FIFO",
    "ln -s /dev/zero state.json": "state.json is a link",
    "echo '[1]' >state.json": "the whole is a list, but an object was expected",
    "head -c 100000 /dev/zero | tr '\\0' '[' >state.json": "it is nested more than 32 deep",
}


def as_the_job(job, machine, command):
    """A shell command of the job's user in the folder of its supervisor's state."""
    user = machine.shell(f"stat -c %U {job.root}/state").strip()
    machine.shell(f"cd {job.root}/state && runuser -u {user} -- sh -c {shlex.quote(command)}")


def harmless(output):
    """The output of a verb, without a byte that acts on a terminal."""
    found = re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", output)
    assert not found, (found, output[-3000:])
    return output


def test_no_verb_is_stopped_or_misled_by_what_a_job_writes(training):
    job, (first, second, *_others) = training, training.machines
    # A process of the unit that talks to the journal itself; it stays until the journal has looked whose it is.
    says = shlex.quote(f"printf '{PRINTED}'; sleep 5")
    first.shell(f"echo $$ >/sys/fs/cgroup/system.slice/{job.unit}/supervisor/cgroup.procs; exec systemd-cat sh -c {says}")
    job.wait(lambda: "fake: PLAY RECAP" in job.journal(since=time.time() - 60), 30, "the line in the journal")
    # What would keep the job from starting does not keep it from stopping: a folder of its own, and a stranger at a port.
    as_the_job(job, second, "chmod 0500 ../cache")
    first.shell("systemd-run --quiet --collect --unit=stranger --property=User=nobody python3 -m http.server 29600")
    job.playbook("playbooks/stop.yml")
    assert set(job.units()) == {"inactive"}
    as_the_job(job, second, "chmod 0755 ../cache")
    first.shell("systemctl stop stranger")
    for machine, command in zip(job.machines, SPOILT):
        as_the_job(job, machine, f"rm -f state.json; {command}")
    name = "step-\033[2J.json"
    folder = f"{job.root}/checkpoints"
    as_the_job(job, first, f"touch '{folder}/{name}'")

    try:
        logs = harmless(job.playbook("playbooks/logs.yml", *variables(logs_follow=False)))
        assert r"\x1b]0;OWNED\x07\x1b[2J\x1b[A fake: PLAY RECAP" in logs
        assert "--onprem-torch--" in logs and "-- cursor: s=forged" in logs, "they are lines like all others"
        assert "stopped cleanly at step" in logs, "what comes after them is read"

        status = harmless(job.playbook("playbooks/status.yml"))
        for machine, expected in zip(job.machines, SPOILT.values()):
            assert re.search(rf"^{machine.name} +\d +unknown ", status, re.M), status
            assert re.search(rf"^{machine.name}: .*{re.escape(expected)}.*, which is not what a supervisor writes; stop and start the job", status, re.M)
        assert r"step-\x1b[2J.json" in status

        why = answer(harmless(job.playbook("playbooks/why.yml", *variables(why_format="json"))))
        assert why["sentence"].startswith("whether anything has ended the job early is not known") and len(why["odd"]) == 4

        harmless(job.playbook("playbooks/plan.yml", *variables(plan_format="json")))
    finally:
        as_the_job(job, first, f"rm '{folder}/{name}'")  # the project would read it as a checkpoint
    harmless(job.playbook("playbooks/start.yml"))
    job.trains(0)
    assert [json.dumps(job.state(machine).get("state")) for machine in job.machines] == ['"running"'] * 4
