# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints lines for a person, without quotes and brackets around them."""

from __future__ import annotations

import json
import time
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, job_causes, job_state
from ansible_collections.onprem.torch.plugins.plugin_utils import terminal


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.show)."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Print the plan, the status or the cause, and return its lines."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "view": {"type": "str", "choices": ["plan", "status", "why"], "required": True},
                "plan": {"type": "dict", "required": True},
                "variable": {"type": "str", "default": "__torchrun_info"},
                "firewall_variable": {"type": "str", "default": "__firewall_status"},
                "format": {"type": "str", "choices": ["text", "json"], "default": "text"},
            }
        )
        plan = arguments["plan"]
        raw = (task_vars or {})["hostvars"].raw_get
        if arguments["view"] == "plan":
            data: t.Any = {key: plan[key] for key in ("group", "cuda_version", "order", "nodes", "peers", "job", "fingerprint")}
            lines = job_state.plan_lines(plan)
            nodes = {host: ((raw(host).get("__cluster_node") or {}).get("node") or {}) for host in plan["order"]}
            data["odd"] = job_state.odd_states(nodes)
            lines += data["odd"]
        else:
            infos = {
                host: job_state.received((raw(host).get(arguments["variable"]) or {}).get("info"))
                for host in plan["order"]
            }
            for host, info in infos.items():
                info["firewall"] = job_state.firewall(hostile_input.tidy(raw(host).get(arguments["firewall_variable"]) or {}))
            name = plan["job"]["name"]
            if arguments["view"] == "status":
                data = {"job": name, "time": time.time(), "nodes": infos}
                lines = job_state.status_lines(name, infos, plan["order"])
            else:
                data = {"job": name, "time": time.time(), **job_causes.explain(infos)}
                lines = job_causes.lines(name, data)
        if arguments["format"] == "json":
            lines = json.dumps(data, indent=2, sort_keys=True).splitlines()
        terminal.show(lines)
        result.update(changed=False, lines=lines)
        return result
