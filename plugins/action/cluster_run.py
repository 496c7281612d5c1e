# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settles which run has the cluster: waits for another one, takes a dead one over, refuses, gives back."""

from __future__ import annotations

import random
import time
import typing as t

from ansible.errors import AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import problems, run_lease
from ansible_collections.onprem.torch.plugins.plugin_utils import runs, terminal

SECONDS_BETWEEN_LOOKS = 1.0


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.cluster_run)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Do what the state asks for; nodes are asked only where the look at them did not settle it."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "state": {"type": "str", "choices": ["taken", "looked", "given_back", "ended"], "default": "looked"},
                "verb": {"type": "str", "default": ""},
                "job": {"type": "raw", "default": ""},
                # What is no number or no truth is named by the plan, with all else that is wrong.
                "wait": {"type": "raw", "default": 60},
                "take_over": {"type": "raw", "default": False},
            }
        )
        result.update(changed=False)
        if arguments["state"] == "given_back":
            lease = runs.carried(task_vars)
            if not lease:
                return {**result, "skipped": True}
            self._give_back_one(str(task_vars.get("inventory_hostname")), lease, task_vars)
            return result
        self.hostvars = task_vars["hostvars"]
        if arguments["state"] == "ended":
            return {**result, "skipped": not self._ended(task_vars)}
        hosts = list(task_vars.get("ansible_play_hosts_all") or [])
        told = {host: runs.told(self.hostvars.raw_get(host)) for host in hosts}
        me = runs.identity(arguments["verb"], str(arguments["job"]))
        if arguments["state"] != "taken" or not arguments["verb"] or task_vars.get("ansible_check_mode"):
            holders = [run_lease.described(lease) for lease in run_lease.standing(told, me, False).others.values()]
            for text in holders:
                terminal.warn(f"{text} is changing this cluster")
            return {**result, "waited": False, "holders": holders}
        return {**result, **self._settle(me, told, seconds(arguments["wait"]), truth(arguments["take_over"]))}

    def _settle(self, me: dict[str, t.Any], told: dict[str, dict[str, t.Any]], wait: float, take_over: bool) -> dict[str, t.Any]:
        """Have all nodes or none. Those that could not be asked are the plan's to name."""
        deadline = time.monotonic() + wait
        waited, said = False, ""
        hosts = [host for host, answer in told.items() if answer]
        while True:
            sentences = [f"{host}: {answer['problem']}" for host, answer in told.items() if answer.get("problem")]
            if sentences:
                self._give_back(me, told)
                return {"failed": True, "msg": "nothing was changed: " + "; ".join(sentences)}
            now = run_lease.standing(told, me, take_over)
            if now.free:
                return {"waited": waited, "holders": []}
            waited = True
            if now.others:
                # Nobody keeps some nodes while waiting for others.
                self._give_back(me, told)
                text = " and ".join(run_lease.described(lease) for lease in now.others.values())
                if time.monotonic() >= deadline:
                    where = problems.listed([host for host, answer in told.items() if (answer.get("lease") or {}).get("id") in now.others])
                    silent = max(run_lease.silence(told, identity) for identity in now.others)
                    return {
                        "failed": True,
                        "msg": f"{text} is changing this cluster ({where}; last sign of life {silent:.0f} s ago), so nothing was changed; "
                        "run this again when it has ended, wait longer with -e cluster_wait=SECONDS, "
                        "or take the cluster over with -e cluster_take_over=true.",
                    }
                if text != said:
                    terminal.show([f"waiting up to {deadline - time.monotonic():.0f} s for {text}"])
                    said = text
                # Two runs that each got some nodes: who began earlier tries again earlier.
                older = all((me["since"], me["id"]) < (lease["since"], lease["id"]) for lease in now.others.values())
                time.sleep(SECONDS_BETWEEN_LOOKS * (0.2 if older else 1) * (1 + random.random()))
            else:
                for lease in now.interrupted.values():
                    terminal.warn(f"{run_lease.described(lease)} is interrupted: it changes nothing any more")
                for lease in now.dead.values():
                    terminal.show([f"{run_lease.described(lease)} has ended without giving the cluster back; it is taken over"])
            answers = runs.ask(self, {host: {"state": "taken", "run": me, "over": now.over} for host in hosts}, self.hostvars)
            told = {host: {"problem": answer["problem"]} if answer["problem"] else answer["run"] for host, answer in answers.items()}

    def _ended(self, task_vars: dict[str, t.Any]) -> bool:
        """Give all nodes back where a host of the play has failed; return whether one has.

        Ansible has no tasks that run after a play whose hosts have failed, but runs those of C(always) for all of them.
        """
        hosts = list(task_vars.get("ansible_play_hosts_all") or [])
        if len(task_vars.get("ansible_play_hosts") or []) == len(hosts):
            return False
        runs.give_back(self, runs.holding(hosts, self.hostvars), self.hostvars)
        return True

    def _give_back_one(self, host: str, lease: dict[str, t.Any], task_vars: dict[str, t.Any]) -> None:
        """Give back the node of the task. Where that cannot be, what the run has done is done all the same."""
        try:
            answer = self._execute_module(runs.MODULE, {"state": "given_back", "run": lease}, task_vars=task_vars)
        except AnsibleError as error:  # the connection failed, too
            answer = {"failed": True, "msg": str(error)}
        if answer.get("failed") or answer.get("unreachable"):
            runs.kept(host, runs.problem(answer))

    def _give_back(self, me: dict[str, t.Any], told: t.Mapping[str, t.Mapping[str, t.Any]]) -> None:
        """Give back the nodes that were taken."""
        runs.give_back(self, {host: me for host, answer in told.items() if answer.get("taken")}, self.hostvars)


def seconds(value: t.Any) -> float:
    """Return a number of seconds; the default's for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 60.0


def truth(value: t.Any) -> bool:
    """Return whether something is true; what is no truth value is not."""
    return boolean(value, strict=False)
