# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Computes the plan once, on the control node, from the inventory and from what node_info found."""

from __future__ import annotations

import os
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import node_checks, pytorch_plan, source_tree, spares
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, report
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog

SUPERVISOR = os.path.join(catalog.ROLES, "torchrun", "files", "torchrun_supervisor.py")


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.plan)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the plan, or fail with every problem of the cluster."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "group": {"type": "str", "required": True},
                "nodes_variable": {"type": "str", "default": "__cluster_node"},
                "fail": {"type": "bool", "default": True},
                "starts": {"type": "bool", "default": False},
            }
        )
        group = arguments["group"]
        names = list(task_vars["groups"].get(group, []))
        if not names:
            cure = f"add the nodes' addresses to the group {group} of the inventory"
            empty = Problem("", "cluster_group", f"the group {group} has no hosts", cure)
            return {**result, "failed": True, "msg": report([empty]), "problems": [empty.as_dict()]}
        reader = catalog.Reader(catalog.load(self._loader), self._templar, task_vars["hostvars"])
        left_out = {
            entry[entry["ansible_loop_var"]]: entry
            for entry in (task_vars.get("__cluster_left_out_nodes") or {}).get("results") or []
        }
        hosts: list[planning.Host] = []
        problems: list[Problem] = []
        for name in names:
            host, found = reader.host(name)
            problems += found
            host.node = dict((reader.raw(name).get(arguments["nodes_variable"]) or left_out.get(name) or {}).get("node") or {})
            if not host.node:
                host.node = {"error": "the node was not looked at; run the play without --limit"}
            problems += node_checks.unreadable(host)
            if host.node.get("error"):
                host.node = {}
            host.replaces = str(reader.raw(name).get("_cluster_replaces") or "")
            hosts.append(host)
        release = self._release(hosts[0], task_vars)
        plan, found = planning.make(group, hosts, release, self._loader.load_from_file(catalog.MANIFEST), self._lock(hosts[0], task_vars))
        problems += found
        if arguments["starts"]:
            problems += spares.lost_checkpoints(hosts, plan["job"]["checkpoint_dir"])
        result.update(plan)
        result.update(changed=False, problems=[problem.as_dict() for problem in problems])
        if problems and arguments["fail"]:
            result.update(failed=True, msg=report(problems))
        return result

    def _lock(self, host: planning.Host, task_vars: dict[str, t.Any]) -> pytorch_plan.Lock:
        """Return the lock file of torch and its packages as it lies on the control node."""
        variable = "pytorch_lock"
        name = str(host.variables.get(variable) or "")
        if not name:
            return pytorch_plan.Lock()
        path = resolve(name, task_vars)
        try:
            with open(path, encoding="utf-8") as stream:
                return pytorch_plan.Lock(path, stream.read())
        except (OSError, UnicodeDecodeError) as error:
            text = f"{variable} is {name!r}, but {path} cannot be read ({getattr(error, 'strerror', '') or 'it is no text'})"
            cure = "correct the path (relative paths start at the inventory's folder)"
            return pytorch_plan.Lock(path, problems=(Problem("", variable, text, cure),))

    def _release(self, host: planning.Host, task_vars: dict[str, t.Any]) -> planning.Release:
        """Return the job's source as it lies on the control node."""
        variable = "torchrun_source"
        source = str(host.variables.get(variable) or "")
        script = str(host.variables.get("torchrun_script") or "")
        supervisor = source_tree.tree_hash({"supervisor": SUPERVISOR})
        if not source:
            text = f"{variable} is not set, but a script, a project folder or remote:PATH was expected"
            missing = Problem("", variable, text, f"set {variable} for the group")
            return planning.Release("", script, problems=(missing,))
        if source.startswith("remote:"):
            return planning.Release("", script or "train.py", source[len("remote:") :], supervisor)
        path = resolve(source, task_vars)
        try:
            members = source_tree.files(path)
        except source_tree.SourceError as error:
            cure = "correct the path (relative paths start at the inventory's folder)"
            problem = Problem("", variable, f"{variable} is {source!r}, but {error}", cure)
            return planning.Release("", script, path, problems=(problem,))
        if not script:
            script = os.path.basename(path) if os.path.isfile(path) else "train.py"
        problems = []
        if script not in members:
            text = f"torchrun_script is {script!r}, which is not in {path}"
            scripts = sorted(name for name in members if name.endswith(".py"))[:3]
            cure = f"name a script that is there, such as {scripts[0]}" if scripts else "add the script to the source"
            problems.append(Problem("", "torchrun_script", text, cure))
        return planning.Release(source_tree.tree_hash(members), script, path, supervisor, tuple(problems))


def resolve(source: str, task_vars: dict[str, t.Any]) -> str:
    """Return the absolute path of a source; relative ones start at the inventory's folder."""
    return os.path.normpath(os.path.join(task_vars.get("inventory_dir") or os.getcwd(), os.path.expanduser(source)))
