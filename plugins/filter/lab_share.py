# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which of a machine's devices a lab node gets."""

from __future__ import annotations

import typing as t

from ansible.errors import AnsibleFilterError
from ansible_collections.onprem.torch.plugins.module_utils import host_root


def lab_share(devices: t.Sequence[str], nodes: int, index: int) -> list[str]:
    """Return the devices of one of several nodes."""
    try:
        return host_root.share(devices, nodes, index)
    except ValueError as error:
        raise AnsibleFilterError(f"{error}; list as many hosts in the inventory as divide them, or a multiple of them") from error


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return filter functions by name."""
        return {"lab_share": lab_share}
