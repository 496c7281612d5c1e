# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Follows a job: rank 0's journal as it is written, until the first step, the end or a failure."""

from __future__ import annotations

import time
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import journal, progress
from ansible_collections.onprem.torch.plugins.plugin_utils import connections, terminal

# A look costs the node a few milliseconds; a person does not read faster.
SECONDS_BETWEEN_LOOKS = 1.0
# While no step is seen, the other nodes are asked every so often what keeps them, this many at once.
SECONDS_BETWEEN_QUESTIONS = 15.0
AT_ONCE = 32


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.follow)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Follow and return the outcome; fail where the job failed."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "job": {"type": "dict", "required": True},
                "host": {"type": "str", "required": True},
                "wait_for": {"type": "str", "choices": ["first_step", "finished"], "default": "first_step"},
                "again": {"type": "str", "default": ""},
                "others": {"type": "list", "elements": "str", "default": []},
            }
        )
        result.update(changed=False)
        if self._task.check_mode:
            result.update(skipped=True, msg="nothing is started in check mode, so there is nothing to follow")
            return result
        self.others = Others(self, arguments["job"], arguments["others"], (task_vars or {}).get("hostvars"))
        found = self._follow(arguments["job"], arguments["host"], arguments["wait_for"], arguments["again"])
        result.update(found)
        terminal.show(progress.summary(arguments["job"], arguments["host"], found))
        return result

    def _follow(self, job: dict[str, t.Any], host: str, until: str, again: str) -> dict[str, t.Any]:
        """Look every second until there is something to say."""
        terminal.show([f"The journal of {host} (rank 0). Ctrl-C leaves the job running; follow it again with: {again}"])
        cursor = ""
        last_step = last_line = ""
        first_checkpoint: str | None = None
        seen = time.monotonic()
        while True:
            look = self._look(job, host, cursor)
            if look is None:
                silent = time.monotonic() - seen
                if silent > job["start_timeout"]:
                    text = f"{host} has not answered for {silent:.0f} s; the job may run on: see {again}"
                    return {"failed": True, "msg": text, "outcome": "unknown"}
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            cursor = look.cursor or cursor
            if first_checkpoint is None:
                first_checkpoint = look.checkpoint
            texts = [line.text for line in look.lines]
            for line in look.lines:
                terminal.show(f"  {line.text}")
                if line.rank == 0:
                    last_line = line.text.strip()
            last_step = progress.last_step(texts, job["step_pattern"]) or last_step
            if look.lines or look.checkpoint != first_checkpoint:
                seen = time.monotonic()
            outcome = progress.outcome(look)
            found = {"outcome": outcome, "last_step": last_step, "last_line": last_line, "checkpoint": look.checkpoint}
            if outcome == "failed":
                cause = look.state.get("first_cause") or {}
                return {**found, "failed": True, "msg": progress.ending(job, outcome, look), "cause": cause}
            if outcome in ("stopped", "finished", "unknown"):
                return {**found, "failed": outcome != "finished", "msg": progress.ending(job, outcome, look)}
            if outcome == "running" and not last_step:
                self.others.ask()
            if until == "first_step" and (last_step or look.checkpoint != first_checkpoint):
                return {**found, "msg": f"the job {job['name']} trains"}
            if time.monotonic() - seen > job["start_timeout"] and not last_step:
                text = (
                    f"{host} has printed nothing for {job['start_timeout']} s and no step was seen; "
                    f"the job runs on: see {again}, or raise torchrun_start_timeout"
                )
                text = "; ".join([*self.others.obstacles, text])
                return {**found, "failed": True, "msg": text}
            if not (look.more and look.lines):
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _look(self, job: dict[str, t.Any], host: str, cursor: str) -> journal.Look | None:
        """Look once; None where the node does not answer at the moment."""
        try:
            answer = self._low_level_execute_command(progress.command(job, cursor))
        except AnsibleConnectionFailure:
            return None
        return journal.parse(host, answer["stdout"])


class Others:
    """The nodes of other ranks, which know what rank 0's journal does not: why they cannot reach it."""

    def __init__(self, action: ActionBase, job: dict[str, t.Any], hosts: t.Sequence[str], hostvars: t.Any) -> None:
        self.action, self.job, self.hosts, self.hostvars = action, job, hosts, hostvars
        self.shells: dict[str, connections.Shell] = {}
        self.obstacles: list[str] = []
        self.asked = time.monotonic()
        self.until = self.asked + float(job["start_timeout"])  # a job that says nothing of its steps is left alone then

    def ask(self) -> None:
        """Ask all of them, unless that was a moment ago, and show what is new."""
        now = time.monotonic()
        if not self.hosts or now - self.asked < SECONDS_BETWEEN_QUESTIONS or now > self.until:
            return
        if not self.shells:
            self.shells = {host: connections.shell(self.action, host, self.hostvars) for host in self.hosts}
        with ThreadPoolExecutor(min(AT_ONCE, len(self.hosts))) as pool:
            words = journal.state_command(self.job["root"])
            states = dict(zip(self.hosts, pool.map(lambda host: self.shells[host].output(words), self.hosts)))
        before, self.obstacles = self.obstacles, progress.obstacles(states)
        for sentence in self.obstacles:
            if sentence not in before:
                terminal.show(f"  {sentence}")
        self.asked = time.monotonic()
