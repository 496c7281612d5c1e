# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Computes the plan once, on the control node, from the inventory and from what node_info found."""

from __future__ import annotations

import os
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import (
    continuity,
    hostile_input,
    node_checks,
    pytorch_plan,
    source_tree,
)
from ansible_collections.onprem.torch.plugins.module_utils import plan as planning
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, masked, report
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, connection_variables, runs, shipped, terminal

# What goes with every release, beside its source.
PROGRAMS = os.path.join(catalog.ROLES, "torchrun", "files")
# The supervisor imports it, so it lies beside it in each release (roles/torchrun/vars/main.yml).
READER = os.path.join(os.path.dirname(catalog.ROLES), "plugins", "module_utils", "hostile_input.py")


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.plan)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _reads_source = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the plan, or fail with every problem of the cluster."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, arguments = self.validate_argument_spec(
            argument_spec={
                "group": {"type": "str", "required": True},
                "nodes_variable": {"type": "str", "default": "__cluster_node"},
                "nodes": {"type": "bool", "default": True},
                "spares": {"type": "str", "default": "spares"},
                "fail": {"type": "bool", "default": True},
                "starts": {"type": "bool", "default": False},
                "reads_source": {"type": "bool", "default": True},
            }
        )
        group = arguments["group"]
        names = list(task_vars["groups"].get(group, []))
        if not names:
            return failure(result, [empty_group(group, task_vars)])
        self._reads_source = arguments["reads_source"]
        reader = catalog.Reader(catalog.load(self._loader), self._templar, task_vars["hostvars"])
        if not arguments["nodes"]:
            return self._look_ahead(result, group, names, list(task_vars["groups"].get(arguments["spares"], [])), reader)
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
        plan, found = self._plan(group, hosts, reader)
        problems += found
        if arguments["starts"]:
            lost = lost_progress(plan, hosts)
            if hosts[0].variables.get(continuity.ACCEPT):
                for problem in lost:
                    terminal.warn(f"accepted with {continuity.ACCEPT}: {problem.sentence()}")
            else:
                problems += lost
        problems = masked(problems, reader.all_secrets(names))
        if problems and arguments["fail"]:
            held = runs.holding(task_vars.get("ansible_play_hosts_all") or [], task_vars["hostvars"])
            runs.give_back(self, held, task_vars["hostvars"])
            return failure(result, problems)
        return {**result, **plan, "changed": False, "problems": [problem.as_dict() for problem in problems]}

    def _look_ahead(
        self, result: dict[str, t.Any], group: str, names: t.Sequence[str], reserve: t.Sequence[str], reader: catalog.Reader
    ) -> dict[str, t.Any]:
        """Fail where Ansible could not connect to a host for its variables' sake, with all else that the inventory has wrong."""
        problems: list[Problem] = []
        for name in dict.fromkeys([*names, *reserve]):
            try:
                raw, templar = reader.environment(name)
            except Exception as error:  # a file of the inventory that is no YAML, or whose key is missing
                problems.append(unreadable_host(name, error))
                continue
            problems += connection_variables.check(name, raw, templar)
        if not problems:
            return {**result, "changed": False}
        unreadable = {problem.host for problem in problems if not problem.variable}
        hosts = []
        for name in names:
            if name not in unreadable:
                host, found = reader.host(name)
                problems += found
                hosts.append(host)
        if hosts:
            problems += self._plan(group, hosts, reader)[1]
        return failure(result, masked(problems, reader.all_secrets([*names, *reserve])))

    def _plan(self, group: str, hosts: t.Sequence[planning.Host], reader: catalog.Reader) -> tuple[dict[str, t.Any], list[Problem]]:
        """Return the plan and the problems that show in it."""
        folder = str(reader.raw(hosts[0].name).get("inventory_dir") or os.getcwd())
        manifest = self._loader.load_from_file(catalog.MANIFEST)
        return planning.make(group, hosts, self._release(hosts[0], folder), manifest, self._lock(hosts[0], folder))

    def _lock(self, host: planning.Host, folder: str) -> pytorch_plan.Lock:
        """Return the lock file of torch and its packages as it lies on the control node."""
        variable = "pytorch_lock"
        name = str(host.variables.get(variable) or "")
        if not name:
            return pytorch_plan.Lock()
        path = resolve(name, folder)
        try:
            with open(path, encoding="utf-8") as stream:
                return pytorch_plan.Lock(path, stream.read())
        except (OSError, UnicodeDecodeError) as error:
            text = f"{variable} is {name!r}, but {path} cannot be read ({getattr(error, 'strerror', '') or 'it is no text'})"
            cure = "correct the path (relative paths start at the inventory's folder)"
            return pytorch_plan.Lock(path, problems=(Problem("", variable, text, cure),))

    def _release(self, host: planning.Host, folder: str) -> planning.Release:
        """Return the job's source as it lies on the control node."""
        variable = "torchrun_source"
        source = str(host.variables.get(variable) or "")
        script = str(host.variables.get("torchrun_script") or "")
        if not self._reads_source:
            return planning.Release("", script or "train.py", was_read=False)
        programs = source_tree.tree_hash({**source_tree.files(PROGRAMS), **source_tree.files(READER)})
        if not source:
            text = f"{variable} is not set, but a script, a project folder or remote:PATH was expected"
            missing = Problem("", variable, text, f"set {variable} for the group")
            return planning.Release("", script, problems=(missing,))
        if source.startswith("remote:"):
            return planning.Release("", script or "train.py", source[len("remote:") :], programs)
        path = resolve(source, folder)
        try:
            members = shipped.members(path, bool(host.variables.get(shipped.LINKS)))
            whole = source_tree.tree_hash(members, source_tree.opened_straight)
        except shipped.ERRORS as error:
            return planning.Release("", script, path, problems=(shipped.problem(source, error),))
        if not script:
            script = os.path.basename(path) if list(members) == [os.path.basename(path)] and os.path.isfile(path) else "train.py"
        problems = []
        if script not in members:
            text = f"torchrun_script is {script!r}, which is not in {path}"
            scripts = sorted(hostile_input.shown(name) for name in members if name.endswith(".py"))[:3]
            cure = f"name a script that is there, such as {scripts[0]}" if scripts else "add the script to the source"
            problems.append(Problem("", "torchrun_script", text, cure))
        return planning.Release(whole, script, path, programs, tuple(problems))


def lost_progress(plan: t.Mapping[str, t.Any], hosts: t.Sequence[planning.Host]) -> list[Problem]:
    """Return the problems of a start that would not go on from the newest checkpoint; none while a node does not answer."""
    if not all(host.node for host in hosts):
        return []
    job = plan["job"]
    seats = [continuity.seat(host, plan["nodes"][host.name]["rank"], job["unit"]) for host in hosts]
    return continuity.lost(seats, job["checkpoint_dir"], job["release"])


def resolve(source: str, folder: str) -> str:
    """Return the absolute path of a source; relative ones start at ``folder``, the inventory's."""
    return os.path.normpath(os.path.join(folder, os.path.expanduser(source)))


def failure(result: dict[str, t.Any], problems: t.Sequence[Problem]) -> dict[str, t.Any]:
    """Return a failed result that says what is wrong and nothing else, since a person reads it."""
    return {**result, "changed": False, "failed": True, "msg": report(problems)}


def unreadable_host(name: str, error: Exception) -> Problem:
    """Return the problem of a host whose variables Ansible cannot put together, because of a file of the inventory."""
    reason = " ".join(str(error).split()).rstrip(".")
    place = ""
    cause: BaseException | None = error
    while cause and not place:
        # Ansible's errors carry the place that they are about: a file with line and column.
        place = str(cause.obj) if getattr(getattr(cause, "obj", None), "path", None) else ""
        cause = cause.__cause__ or cause.__context__
    if "vault" in reason.lower() or "decrypt" in reason.lower():
        text = "variables lie in an encrypted file that cannot be read"
        return Problem(name, "", text, "give the right key with --vault-password-file or --ask-vault-pass")
    text = f"the inventory's variables cannot be read ({reason}{f', {place}' if place else ''})"
    return Problem(name, "", text, "correct that file")


def empty_group(group: str, task_vars: dict[str, t.Any]) -> Problem:
    """Return the problem of a group without hosts, with the likeliest cure."""
    sources = ", ".join(str(source) for source in task_vars.get("ansible_inventory_sources") or [])
    text = f"the group {group} has no hosts" + (f" in {sources}" if sources else "")
    elsewhere = set()
    for name in task_vars["groups"].get("all", []):
        try:
            elsewhere.add(task_vars["hostvars"].raw_get(name).get("cluster_group"))
        except Exception:  # named once the group is found
            continue
    elsewhere = {str(chosen) for chosen in elsewhere if isinstance(chosen, str) and chosen != group}
    if elsewhere:
        cure = f"choose the group on the command line, where plays can read it: -e cluster_group={min(elsewhere)}"
    elif not task_vars["groups"].get("all"):
        cure = "give an inventory that has hosts with -i"
    else:
        cure = f"add the nodes' addresses to the group {group}"
    return Problem("", "cluster_group", text, cure)
