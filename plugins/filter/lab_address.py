# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Addresses of a lab's network."""

from __future__ import annotations

import ipaddress
import typing as t

from ansible.errors import AnsibleFilterError


def lab_address(network: str, host: int | str, prefix: bool = False) -> str:
    """Return the address of a host in a network.

    Args:
        network: network as ADDRESS/LENGTH; empty gives an empty string.
        host: number of the host, or its IPv4 address, of which the last byte is taken.
        prefix: whether to add the prefix length.
    """
    if not network:
        return ""
    try:
        parsed = ipaddress.ip_network(network)
        number = host if isinstance(host, int) else int(str(host).split("/", maxsplit=1)[0].rsplit(".", 1)[-1])
        address = parsed[number]
    except (ValueError, IndexError) as error:
        raise AnsibleFilterError(f"{network} has no address for {host}: {error}") from error
    return f"{address}/{parsed.prefixlen}" if prefix else str(address)


class FilterModule:
    """Filters of the collection."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return filter functions by name."""
        return {"lab_address": lab_address}
