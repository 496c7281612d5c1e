# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters for templates of units."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import systemd


def systemd_environment(values: t.Mapping[str, str]) -> list[str]:
    """Return the quoted assignments of a unit's Environment= lines, sorted by name."""
    return [systemd.assignment(name, str(value)) for name, value in sorted(values.items())]


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return filter functions by name."""
        return {"systemd_command": systemd.command, "systemd_environment": systemd_environment}
