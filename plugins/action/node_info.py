# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs node_info on a node; a node that cannot be asked is a finding, so that the plan names all of them."""

from __future__ import annotations

import getpass
import os
import time
import typing as t

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import connection_errors, folder_access, node_facts, nvidia
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, runs


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.node_info)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return what the module found, or why it could not run."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        name = self._task.delegate_to or task_vars["inventory_hostname"]
        arguments = dict(self._task.args)
        verb, job = str(arguments.pop("verb", "") or ""), str(arguments.pop("job", "") or "")
        arguments = arguments or self._questions(str(name), task_vars)
        # Where --limit leaves a node out, nothing of it is changed.
        if verb and not self._task.delegate_to and not task_vars.get("ansible_check_mode"):
            arguments["run"] = runs.identity(verb, job)
        before = time.time()
        try:
            answer = self._execute_module("onprem.torch.node_info", arguments, task_vars=task_vars)
        except AnsibleConnectionFailure as error:
            answer = {"unreachable": True, "msg": str(error)}
        except AnsibleError as error:
            answer = {"failed": True, "msg": str(error)}
        after = time.time()
        if answer.get("failed") or answer.get("unreachable") or "node" not in answer:
            host = task_vars["hostvars"][name]
            reason = connection_errors.explain(
                str(answer.get("msg") or answer.get("module_stderr") or ""),
                " ".join(str(answer.get(key) or "") for key in ("module_stderr", "module_stdout", "stderr")),
                bool(answer.get("unreachable")),
                user=str(host.get("ansible_user") or getpass.getuser()),
                address=str(host.get("ansible_host") or name),
                python=str(host.get("ansible_python_interpreter") or "/usr/bin/python3"),
                boot_command="make lab" if host.get("lab_subnet") else "",
                missing_key=missing(str(host.get("ansible_ssh_private_key_file") or "")),
            )
            result.update(changed=False, node={"error": reason})
            return result
        node = answer["node"]
        then = float(node.pop("time"))
        # Only an offset beyond the time that the question took is sure.
        node["clock_offset_seconds"] = min(then - before, 0.0) or max(then - after, 0.0)
        settings = (node.get("hardware") or {}).get("settings") or {}
        node["control_node"] = node_facts.same_machine(node_facts.machine(), node, bool(settings.get("container")))
        result.update(changed=False, node=node, run=answer.get("run") or {})
        return result

    def _questions(self, name: str, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Return the module's arguments from the host's variables; values that cannot be read are the plan's to name."""
        reader = catalog.Reader(catalog.load(self._loader, ("cuda", "pytorch", "torchrun")), self._templar, task_vars["hostvars"])
        variables = reader.host(name)[0].variables
        source = str(variables.get("torchrun_source") or "")
        remote = [source[len("remote:") :]] if source.startswith("remote:") else []
        environment = variables.get("pytorch_environment")
        job = f"{variables.get('torchrun_root')}/{variables.get('torchrun_job')}"
        folders = [str(variables[key]) for key in ("pytorch_root", "torchrun_root") if variables.get(key)]
        if variables.get("cuda_toolkit"):
            folders += [nvidia.TOOLKIT_FOLDER, nvidia.ARCHIVES_FOLDER]
        return {
            "job": str(variables.get("torchrun_job") or ""),
            "job_root": job,
            "checkpoint_dir": str(variables.get("torchrun_checkpoint_dir") or f"{job}/checkpoints"),
            "checkpoint_glob": str(variables.get("torchrun_checkpoint_glob") or "*"),
            "disk_paths": folders,
            "packages": nvidia.package_patterns(self._loader.load_from_file(catalog.MANIFEST)),
            "paths": [*map(str, variables.get("torchrun_data_paths") or []), *remote],
            "folders": folder_access.questions(variables, str(variables.get("torchrun_job") or "train")),
            "user": str(variables.get("torchrun_user") or "torchrun"),
            "environments": [str(environment)] if environment else [],
            "environments_root": str(variables.get("pytorch_root") or ""),
            "python": str(variables.get("pytorch_python") or "/usr/bin/python3"),
        }


def missing(path: str) -> str:
    """Return a path of the control node where nothing lies there, else an empty string."""
    return path if path and not os.path.exists(os.path.expanduser(path)) else ""
