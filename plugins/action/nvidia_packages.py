# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hands the module what the plan does not have: a repository's user and password, and the run for which it works."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.plugin_utils import catalog, given_up, runs

MODULE = "onprem.torch.nvidia_packages"


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.nvidia_packages)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; URLs of its arguments are left without user and password."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        arguments = {**self._task.args, "run": runs.carried(task_vars)}
        settings = dict(arguments.get("settings") or {})
        repository = dict(settings.get("repository") or {})
        if repository:
            reader = catalog.Reader(catalog.load(self._loader, ("cluster", "cuda")), self._templar, task_vars["hostvars"])
            credentials = reader.credentials(task_vars["inventory_hostname"])
            for name in ("url", "key_url"):
                if repository.get(name):
                    credentials.update(catalog.credentials_of(repository[name]))
                    repository[name] = catalog.without_credentials(repository[name])
            arguments["settings"] = {**settings, "repository": repository}
            arguments["credentials"] = credentials
        with given_up.ends_with_task():
            result.update(self._execute_module(MODULE, arguments, task_vars=task_vars))
        return result
