# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks the node first; only where torch is to be installed are wheels downloaded (once) and copied (those that lack)."""

from __future__ import annotations

import os
import shlex
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, given_up, runs, wheelhouse

MODULE = "onprem.torch.pytorch_environment"


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.pytorch_environment)."""

    TRANSFERS_FILES = True
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Provide the environment and return the module's answer."""
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "run": runs.carried(task_vars)}
        if arguments.get("lock"):
            try:
                with open(arguments["lock"], encoding="utf-8") as stream:
                    arguments["lock"] = stream.read()
            except OSError as error:
                return {**result, "failed": True, "msg": f"pytorch_lock {arguments['lock']} cannot be read ({error.strerror}); correct the path"}
        credentials = self._credentials(arguments, task_vars or {})
        if arguments.get("source") == "index":
            arguments["credentials"] = credentials
        with given_up.ends_with_task():
            answer = self._execute_module(MODULE, arguments, task_vars=task_vars)
            if answer.get("incomplete"):
                answer = self._install(arguments, credentials, task_vars)
        result.update(answer)
        return result

    def _credentials(self, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, str]:
        """Return C(user:password) by URL: of the host's variables, and of the arguments, whose URLs are left without."""
        reader = catalog.Reader(catalog.load(self._loader, ("cluster", "pytorch")), self._templar, task_vars["hostvars"])
        found = reader.credentials(task_vars["inventory_hostname"])
        for name in ("index_url", "extra_index_urls"):
            if arguments.get(name):
                found.update(catalog.credentials_of(arguments[name]))
                arguments[name] = catalog.without_credentials(arguments[name])
        return found

    def _install(
        self, arguments: dict[str, t.Any], credentials: t.Mapping[str, str], task_vars: dict[str, t.Any] | None
    ) -> dict[str, t.Any]:
        """Copy the wheels that the node lacks, then install."""
        try:
            wanted = wheelhouse.wanted_of(arguments, credentials)
            folder, wheels = wheelhouse.provide(arguments.get("wheelhouse", "~/.cache/onprem.torch/wheelhouse"), wanted)
        except wheelhouse.WheelhouseError as error:
            return {"failed": True, "msg": str(error)}
        arguments["wheels"] = wheels
        answer = self._execute_module(MODULE, arguments, task_vars=task_vars)
        if not answer.get("incomplete"):
            return answer
        target = os.path.join(arguments.get("root", "/opt/onprem.torch"), "wheels")
        for names in wheelhouse.batches({name: wheels[name] for name in answer["missing"]}):
            problem = self._copy(folder, names, target)
            if problem:
                return {"failed": True, "msg": problem}
        return self._execute_module(MODULE, arguments, task_vars=task_vars)

    def _copy(self, folder: str, names: t.Sequence[str], target: str) -> str:
        """Copy wheels to the node; return what is wrong, if anything. The login user cannot write to the target itself."""
        temporary = self._connection._shell.tmpdir or self._make_tmp_path()
        commands = []
        for name in names:
            remote = self._connection._shell.join_path(temporary, name)
            self._transfer_file(os.path.join(folder, name), remote)
            commands.append(moving(remote, f"{target}/{name}"))
        # One command for all, since each costs a round trip and a sudo.
        moved = self._low_level_execute_command(" && ".join(commands))
        if moved["rc"] == 0:
            return ""
        return f"{', '.join(names)} cannot be put into {target}: {moved['stderr'].strip()}"


def moving(remote: str, final: str) -> str:
    """Return the shell's commands that make a transferred file root's and give it its name when it is whole."""
    source, partial, path = (shlex.quote(each) for each in (remote, f"{final}.partial", final))
    return f"chmod 0644 {source} && mv {source} {partial} && chown root:root {partial} && mv {partial} {path}"
