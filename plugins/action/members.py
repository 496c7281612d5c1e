# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides which hosts take part: those of the group, with spares in the places of nodes that are out."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import spares
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, report
from ansible_collections.onprem.torch.plugins.plugin_utils import terminal


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.members)."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the members; fail where a group is empty or no spare is free."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "group": {"type": "str", "required": True},
                "spares": {"type": "str", "default": "spares"},
            }
        )
        groups, hostvars = task_vars["groups"], task_vars["hostvars"]
        reserve = list(groups.get(arguments["spares"], []))
        # A spare that has taken over before in this run is in both groups.
        names = [name for name in groups.get(arguments["group"], []) if name not in reserve]
        if not names:
            group = arguments["group"]
            cure = f"add the nodes' addresses to the group {group} of the inventory"
            problems = [Problem("", "cluster_group", f"the group {group} has no hosts", cure)]
            return {**result, "failed": True, "msg": report(problems), "problems": [problem.as_dict() for problem in problems]}
        out = {name: hostvars[name].get(spares.OUT, False) for name in [*names, *reserve]}
        members, problems = spares.take_over({name: out[name] for name in names}, {name: out[name] for name in reserve})
        replaced = {member.replaces: member.host for member in members if member.replaces}
        if problems:
            return {**result, "failed": True, "msg": report(problems), "problems": [problem.as_dict() for problem in problems]}
        for lost, spare in replaced.items():
            terminal.show([f"{spare} takes the place of {lost}, which is out ({spares.OUT})"])
        ranks = {name: hostvars[name].get("torchrun_node_rank") for name in replaced}
        result.update(
            changed=False,
            replaced=replaced,
            members=[
                {"host": member.host, "replaces": member.replaces, "rank": ranks.get(member.replaces)} for member in members
            ],
        )
        return result
