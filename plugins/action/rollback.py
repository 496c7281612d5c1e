# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides once, from what all nodes told, to which release a job goes back."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.onprem.torch.plugins.module_utils import job_state

display = Display()


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
        infos = {host: (hostvars.raw_get(host).get(arguments["variable"]) or {}).get("info") for host in arguments["hosts"]}
        silent = [host for host, info in infos.items() if not info]
        if silent:
            text = f"{', '.join(silent)} did not say which releases it has, and the job needs every node; run without --limit"
            return {**result, "failed": True, "msg": text}
        decision, sentence, release = job_state.decide_rollback(infos, arguments["release"])
        result.update(changed=False, decision=decision, release=release, msg=sentence, failed=decision == "refuse")
        if decision != "refuse":
            display.display(f"\n{sentence}\n")
        return result
