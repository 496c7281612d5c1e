# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The IPv6 network of a lab."""

from __future__ import annotations

import ipaddress
import typing as t

from ansible.errors import AnsibleFilterError

PREFIX = int(ipaddress.ip_address("fdc6:1815::"))


def lab_subnet6(wanted: str, subnet: str) -> str:
    """Return the IPv6 network of a lab: the one that is wanted, or for ``auto`` one that follows from its IPv4 network.

    Args:
        wanted: an IPv6 network, ``auto`` or empty.
        subnet: the IPv4 network.
    """
    if wanted != "auto":
        return wanted
    try:
        number = int(ipaddress.IPv4Network(subnet, strict=False).network_address)
    except ValueError as error:
        raise AnsibleFilterError(f"lab_subnet {subnet} is no IPv4 network: {error}") from error
    return f"{ipaddress.IPv6Address(PREFIX | number << 64)}/64"


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return filter functions by name."""
        return {"lab_subnet6": lab_subnet6}
