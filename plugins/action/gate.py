# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides once, from what all nodes told, whether the job is to be started, switched, followed or left finished."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import job_state
from ansible_collections.onprem.torch.plugins.plugin_utils import terminal


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.gate)."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the decision; fail where the nodes do not hold the same source."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "hosts": {"type": "list", "elements": "str", "required": True},
                "variable": {"type": "str", "default": "__torchrun_unit"},
            }
        )
        task_vars = task_vars or {}
        left_out = [host for host in arguments["hosts"] if host not in task_vars.get("ansible_play_hosts_all", [])]
        if left_out:
            sentence = f"the job needs every node and --limit leaves out {', '.join(left_out)}; run without --limit to start it"
            terminal.show([sentence])
            result.update(changed=False, decision="limited", msg=sentence)
            return result
        hostvars = task_vars["hostvars"]
        answers = {host: hostvars.raw_get(host).get(arguments["variable"]) or {} for host in arguments["hosts"]}
        lacking = [host for host, answer in answers.items() if "active" not in answer]
        if lacking:
            text = f"{', '.join(lacking)} could not be prepared, and the job needs every node; see the errors above"
            result.update(failed=True, msg=text)
            return result
        decision, sentence = job_state.decide(answers)
        if decision == "refuse" and self._task.check_mode:
            decision, sentence = "start", "the release would be staged and the job started"
        if decision == "refuse":
            result.update(failed=True, msg=sentence)
            return result
        terminal.show([sentence])
        result.update(changed=False, decision=decision, msg=sentence)
        return result
