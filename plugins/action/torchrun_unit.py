# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies the job's source to a node that does not have the release yet, and hands over the job's environment."""

from __future__ import annotations

import os
import tempfile
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import systemd
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, given_up, runs, shipped

MODULE = "onprem.torch.torchrun_unit"


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.torchrun_unit)."""

    TRANSFERS_FILES = True
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; where it asks for the source, pack and copy it and run the module again."""
        result = super().run(tmp, task_vars)
        with given_up.ends_with_task():
            return {**result, **self._provide(task_vars)}

    def _provide(self, task_vars: dict[str, t.Any] | None) -> dict[str, t.Any]:
        """Return the module's answer."""
        arguments = {**self._task.args, "run": runs.carried(task_vars)}
        if arguments.get("state") == "started":
            arguments["environment"] = self._environment(task_vars or {})
        answer = self._execute_module(MODULE, arguments, task_vars=task_vars)
        if answer.get("needs_archive"):
            with tempfile.TemporaryDirectory() as folder:
                local = os.path.join(folder, "source.tar.gz")
                try:
                    shipped.pack(arguments["source_path"], self._links(task_vars or {}), arguments["source_hash"], local)
                except shipped.ERRORS as error:
                    return {**answer, "failed": True, "msg": f"the source cannot be sent ({shipped.reason(error)}); run the play again"}
                temporary = self._make_tmp_path()
                arguments["archive"] = self._transfer_file(local, self._connection._shell.join_path(temporary, "source.tar.gz"))
                before = answer.get("changed", False)
                answer = self._execute_module(MODULE, arguments, task_vars=task_vars)
                answer["changed"] = bool(answer.get("changed") or before)
                self._remove_tmp_path(temporary)
        return answer

    def _links(self, task_vars: dict[str, t.Any]) -> bool:
        """Return whether links may lead out of the source."""
        reader = catalog.Reader(catalog.load(self._loader, ("torchrun",)), self._templar, task_vars["hostvars"])
        return bool(reader.value(task_vars["inventory_hostname"], shipped.LINKS))

    def _environment(self, task_vars: dict[str, t.Any]) -> str:
        """Return the text of the environment's file: read here and now, since whatever holds the values could show them."""
        reader = catalog.Reader(catalog.load(self._loader, ("torchrun",)), self._templar, task_vars["hostvars"])
        values = reader.value(task_vars["inventory_hostname"], "torchrun_environment") or {}
        return systemd.environment_file({str(name): str(value) for name, value in values.items()})
