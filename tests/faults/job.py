# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The job on the machines: deployed by the collection's own playbooks, looked at through its journal and state.json."""
from __future__ import annotations

import json
import re
import subprocess
import time

from machines import ROOT, Hall, run

FOREVER = 10 ** 9


def unchanged(text):
    """What a play has printed, which changed nothing on any host."""
    assert set(re.findall(r"changed=(\d+)", text)) <= {"0"}, text[-3000:]
    return text


class Job:
    """A job, by its name."""

    def __init__(self, hall: Hall, name: str = "train") -> None:
        self.root, self.unit = f"/var/lib/torchrun/{name}", f"torchrun-{name}.service"
        self.machines = hall.machines
        self.hall = hall

    def playbook(self, name, *options):
        return run("ansible-playbook", name, "-i", str(self.hall.place.inventory), *options, cwd=ROOT, timeout=900)

    def deploy(self, *options):
        """train.yml, as a user would type it; returns once the first step is done."""
        names = "\n".join(f"{machine.address} {machine.name}" for machine in self.machines)
        for machine in self.machines:
            # torch asks for the names of its peers; without an answer each start waits for the resolver's timeout.
            machine.shell(f"grep -q {self.machines[-1].address} /etc/hosts || echo '{names}' >>/etc/hosts")
        self.target(FOREVER)
        return self.playbook("train.yml", *options)

    def target(self, steps):
        """How many steps the job has to do."""
        for machine in self.machines:
            machine.shell(f"mkdir -p /var/lib/torchrun; echo {steps} >/var/lib/torchrun/target.new; "
                          "chmod 644 /var/lib/torchrun/target.new; mv /var/lib/torchrun/target.new /var/lib/torchrun/target")

    def state(self, machine=None):
        """state.json of a node (rank 0's), {} while it cannot be read."""
        try:
            return json.loads((machine or self.machines[0]).shell(f"cat {self.root}/state/state.json"))
        except (RuntimeError, ValueError, subprocess.TimeoutExpired):
            return {}

    def units(self):
        """ActiveState of the unit on every node."""
        return [machine.shell(f"systemctl is-active {self.unit} || true").strip() for machine in self.machines]

    def journal(self, machine=None, since=0.0):
        """The unit's journal of a node since a moment."""
        return (machine or self.machines[0]).shell(
            f"journalctl --quiet --no-pager --output=cat --unit={self.unit} --since=@{since:.6f}", check=False)

    def steps(self, since):
        """(step, time) that rank 0 has done after a moment."""
        found = re.findall(r"step (\d+) at ([\d.]+)", self.journal(since=since - 1))
        return [(int(step), float(moment)) for step, moment in found if float(moment) > since]

    def resumed(self, since):
        """The step from which the last start has gone on."""
        return int(re.findall(r"resumes from step (\d+)", self.journal(since=since))[-1])

    def stopped_at(self, since):
        """The step at which a stop has left the job."""
        return int(re.findall(r"stopped cleanly at step (\d+)", self.journal(since=since))[-1])

    def generation_started(self, generation):
        """When the supervisors started a generation, from rank 0's journal."""
        text = self.machines[0].shell(f"journalctl --quiet --no-pager --output=short-unix --unit={self.unit} "
                                      f"--grep='generation {generation} runs on' | tail -n 1", check=False)
        return float(text.split()[0]) if text.strip() else None

    def wait(self, condition, seconds, what):
        """The first true value of a condition."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                value = condition()
            except RuntimeError:        # a machine that is off
                value = None
            if value:
                return value
            time.sleep(0.5)
        raise AssertionError(f"{what}: not within {seconds} s\n{self.report()}")

    def report(self):
        """What a person needs after a failed test."""
        parts = []
        for machine in self.machines:
            text = self.journal(machine, time.time() - 120) if machine.leader() else "off"
            parts.append(f"--- {machine.name}\n" + "\n".join(
                line for line in text.splitlines() if " step " not in line)[-5000:])
        return "\n".join(parts)

    def trains(self, after, seconds=120):
        """Wait until a generation newer than the given one does a step; returns (generation, moment of that step)."""
        def check():
            state = self.state()
            if state.get("state") != "running" or state["generation"] <= after:
                return None
            steps = self.steps(state["since"])
            return (state["generation"], steps[0][1]) if steps else None
        return self.wait(check, seconds, "training goes on")

    def strays(self):
        """Processes of the job that no supervisor holds, or more than one generation has."""
        found = {}
        for machine in self.machines:
            lines = machine.shell("ps -eo pid,cgroup:200,args | grep -E '[t]rain.py' | grep -v torchrun_supervisor.py",
                                  check=False).splitlines()
            if len(lines) > 1 + self.hall.place.workers or any(f"{self.unit}/torchrun" not in line for line in lines):
                found[machine.name] = lines
        return found

    def finish(self, seconds=90):
        """Let the job end; checks its result, its marker and its units."""
        steps = self.wait(lambda: self.steps(time.time() - 20), 60, "a step")[-1][0] + 40
        since = time.time()
        self.target(steps)
        self.wait(lambda: set(self.units()) == {"inactive"}, seconds, "the end of the job")
        for machine in self.machines:
            text = self.journal(machine, since)
            (step, state, expected), = re.findall(r"finished: step (\d+) state (\d+) expected (\d+)", text)
            assert int(step) == steps, f"{machine.name} ended at step {step}, not {steps}"
            assert state == expected, f"{machine.name}: a step was lost or done twice"
            assert self.state(machine)["result"] == "done"
            machine.shell(f"test -s {self.root}/state/done")
        assert not self.strays()
        return steps

    def start_again(self):
        """A finished job trains on with a new target."""
        self.target(FOREVER)
        for machine in self.machines:
            machine.shell(f"rm -f {self.root}/state/done; systemctl reset-failed {self.unit}; systemctl start {self.unit}",
                          check=False)
