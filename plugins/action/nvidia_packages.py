# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells the module for which run it works, so that a long installation counts as a sign of life."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.plugin_utils import runs

MODULE = "onprem.torch.nvidia_packages"


class ActionModule(ActionBase):
    """Action of the module M(onprem.torch.nvidia_packages)."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the module's answer."""
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "run": runs.carried(task_vars)}
        return {**result, **self._execute_module(MODULE, arguments, task_vars=task_vars)}
