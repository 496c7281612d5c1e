# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides once, from what all nodes told, to which release a job goes back."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import job_state
from ansible_collections.onprem.torch.plugins.plugin_utils import terminal


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.rollback)."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the decision and the release; fail where the nodes cannot go back together."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "hosts": {"type": "list", "elements": "str", "required": True},
                "release": {"type": "str", "default": ""},
                "variable": {"type": "str", "default": "__torchrun_info"},
            }
        )
        hostvars = (task_vars or {})["hostvars"]
        found = {host: (hostvars.raw_get(host).get(arguments["variable"]) or {}).get("info") for host in arguments["hosts"]}
        silent = [host for host, info in found.items() if not info]
        if silent:
            text = f"{', '.join(silent)} did not say which releases it has, and the job needs every node; run without --limit"
            return {**result, "failed": True, "msg": text}
        infos = {host: job_state.received(info) for host, info in found.items()}
        decision, sentence, release = job_state.decide_rollback(infos, arguments["release"])
        result.update(changed=False, decision=decision, release=release, msg=sentence, failed=decision == "refuse")
        if decision != "refuse":
            terminal.show([sentence])
        return result
