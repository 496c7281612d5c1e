# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the module of the same name and, after a change, confirms it over a new connection to the node."""

from __future__ import annotations

import time
from typing import Any, Mapping, Optional

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.plugin_utils import given_up, runs

MODULE = "onprem.torch.peer_firewall"
# Time that the node may take to put the rules back and to answer again, in seconds.
SLACK = 20


class ActionModule(ActionBase):
    """See the module's documentation."""

    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: Optional[str] = None, task_vars: Optional[Mapping[str, Any]] = None) -> dict[str, Any]:
        """The module's result, confirmed."""
        super().run(tmp, task_vars)
        variables = dict(task_vars or {})
        host = variables.get("inventory_hostname", "this host")
        arguments = {**self._task.args, "run": runs.carried(variables)}
        with given_up.ends_with_task():
            result: dict[str, Any] = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=variables)
        if result.get("failed"):
            if result.get("problems"):
                result["msg"] = " ".join(f"{host}: {problem}" for problem in result["problems"])
            return result
        if result.get("pending"):
            result.update(self._confirmed(host, result["change"], int(arguments.get("rollback_after") or 60), variables))
        return result

    def _confirmed(self, host: str, change: str, rollback_after: int, variables: dict[str, Any]) -> dict[str, Any]:
        """Drop the connection that the change was made over, confirm over a new one; keep trying until it is rolled back."""
        deadline = time.monotonic() + rollback_after + SLACK
        while True:
            answer = self._ask(change, variables)
            if answer is not None and not answer.get("failed") and answer.get("rolled_back") is False:
                return {"pending": False}
            if answer is not None and answer.get("rolled_back"):
                reason = (
                    f"no new SSH connection got through the changed firewall rules within {rollback_after} s, so the node put them back; "
                    "see which address and port you come in by, and keep them apart from the job's ports and the ephemeral range "
                    "(firewall_ephemeral_ports), or set firewall_protect to false."
                    if answer.get("expired")
                    else "the node put the changed firewall rules back before they were confirmed, "
                    "because it was restarted or another run came in between; run it again."
                )
                return {"failed": True, "pending": False, "rolled_back": True, "msg": f"{host}: {reason}"}
            if time.monotonic() > deadline:
                detail = (answer or {}).get("msg", "it does not answer")
                return {
                    "failed": True,
                    "msg": f"{host}: the changed firewall rules could not be confirmed ({detail}); "
                    f"the node puts them back {rollback_after} s after the change.",
                }
            time.sleep(1)

    def _ask(self, change: str, variables: dict[str, Any]) -> Optional[dict[str, Any]]:
        """The module's answer to the confirmation over a new connection, None where the node cannot be reached."""
        try:
            self._connection.reset()
            answer: dict[str, Any] = self._execute_module(module_name=MODULE, module_args={"state": "verified", "confirm": change}, task_vars=variables)
        except (AnsibleConnectionFailure, AnsibleError):
            return None
        return None if answer.get("unreachable") else answer
