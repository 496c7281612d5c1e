# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The job on the machines: deployed by the collection's own playbooks, looked at through its journal and state.json."""
from __future__ import annotations

import json
import pathlib
import re
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOREVER = 10 ** 9
INVENTORY = """\
all:
  vars:
    ansible_user: root
    ansible_ssh_private_key_file: {key}
    ansible_ssh_common_args: -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ControlPersist=60s
    ansible_python_interpreter: /usr/bin/python3
    pytorch_environment: {environment}
    pytorch_source: existing
    torchrun_source: {project}
    torchrun_script: train.py
    torchrun_args: [/var/lib/torchrun/target]
    torchrun_checkpoint_glob: step-*.json
    torchrun_wait_for: first_step
    torchrun_hang_timeout: 20
    torchrun_stop_timeout: 20
train:
  hosts:
"""


class Job:
    """One job named train on all machines of a hall."""

    root = "/var/lib/torchrun/train"

    def __init__(self, hall):
        self.hall, self.machines = hall, hall.machines
        self.inventory = hall.folder / "inventory.yml"

    def deploy(self):
        """train.yml, as a user would type it; returns once the first step is done."""
        text = INVENTORY.format(key=self.hall.key, environment=self.hall.environment, project=HERE / "project")
        text += "".join(f"    {machine.name}: {{ansible_host: {machine.address}}}\n" for machine in self.machines)
        self.inventory.write_text(text)
        self.target(FOREVER)
        return self.playbook("train.yml")

    def playbook(self, name, *options, check=True):
        done = subprocess.run(["ansible-playbook", name, "-i", str(self.inventory), *options], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=600)
        if check and done.returncode:
            raise RuntimeError(done.stdout[-6000:])
        return done.stdout

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

    def journal(self, machine=None, since=0.0):
        """The unit's journal of a node since a moment."""
        return (machine or self.machines[0]).shell(
            f"journalctl --quiet --no-pager --output=cat --unit=torchrun-train --since=@{since:.6f}", check=False)

    def steps(self, since):
        """(step, time) that rank 0 has done after a moment."""
        found = re.findall(r"step (\d+) at ([\d.]+)", self.journal(since=since - 1))
        return [(int(step), float(moment)) for step, moment in found if float(moment) > since]

    def wait(self, condition, seconds, what):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                value = condition()
            except RuntimeError:        # a machine that is off
                value = None
            if value:
                return value
            time.sleep(0.25)
        raise AssertionError(f"{what}: not within {seconds} s\n{self.report()}")

    def report(self):
        """What a person needs after a failed test."""
        parts = []
        for machine in self.machines:
            if machine.leader():
                parts.append(f"--- {machine.name}\n{self.journal(machine, time.time() - 90)[-5000:]}")
            else:
                parts.append(f"--- {machine.name} is off")
        return "\n".join(parts)

    def generation(self):
        return self.state().get("generation", 0)

    def trains(self, generation=None, seconds=90, since=None):
        """Wait for a step of a generation newer than the one given; returns the moment of its first step."""
        since = time.time() if since is None else since

        def check():
            state = self.state()
            if state.get("state") != "running" or (generation is not None and state["generation"] <= generation):
                return None
            after = [moment for _step, moment in self.steps(max(since, state["since"]))]
            return after[0] if after else None
        return self.wait(check, seconds, "training goes on")

    def orphans(self):
        """Processes of the job beyond what one generation has: per node one supervisor, one torchrun, one worker."""
        found = {}
        for machine in self.machines:
            lines = machine.shell("ps -eo pid,ppid,cgroup:200,args | grep -E 'train.py|distributed.run' | "
                                  "grep -v -e grep -e torchrun_supervisor.py", check=False).splitlines()
            strays = [line for line in lines if "torchrun-train.service/torchrun" not in line]
            if len(lines) > 2 or strays:
                found[machine.name] = lines
        return found
