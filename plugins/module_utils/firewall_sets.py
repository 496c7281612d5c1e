# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules as sets of addresses and what each set may reach: the form that firewalld and ufw are given them in.

Pure. A set has a name of our own by which it is found again, whatever the inventory says by then.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Iterable, Sequence

from ansible_collections.onprem.torch.plugins.module_utils.firewall_nft import intervals
from ansible_collections.onprem.torch.plugins.module_utils.firewall_spec import JobRules, slug

# Sets of peers and of monitoring sources. ipset allows 31 characters, of which the job's slug takes up to 18.
OUR_SET = re.compile(r"onp_(?:p[46]|m[46]_\d+)_\w+")


@dataclass(frozen=True)
class AddressSet:
    """A named set of addresses of one IP version.

    networks: True where the elements are networks, False where they are single addresses.
    interface: the interface that they are let in on; empty for any.
    """

    name: str
    version: int
    elements: tuple[str, ...]
    networks: bool = False
    interface: str = ""


@dataclass(frozen=True)
class Accept:
    """The addresses of `source` may reach these TCP ports, (first, last) each; none named: everything."""

    source: AddressSet
    ports: tuple[tuple[int, int], ...] = ()


def accepts(jobs: Iterable[JobRules]) -> list[Accept]:
    """What all jobs together let in, in a stable order; one entry for each set."""
    found: list[Accept] = []
    for job in sorted(jobs, key=lambda item: item.job):
        name = slug(job.job)
        ports: tuple[tuple[int, int], ...] = ()
        if not job.trust_peers:
            ports = tuple(intervals([*job.ports, f"{job.ephemeral[0]}-{job.ephemeral[1]}"]))
        for version, peers in ((4, job.peers4), (6, job.peers6)):
            if peers:
                found.append(Accept(AddressSet(f"onp_p{version}_{name}", version, peers, interface=job.interface), ports))
        for row in job.monitoring:
            for version, sources in ((4, row.sources4), (6, row.sources6)):
                if sources:
                    source = AddressSet(f"onp_m{version}_{row.port}_{name}", version, whole_halves(sources), networks=True)
                    found.append(Accept(source, ((row.port, row.port),)))
    return found


def whole_halves(networks: Sequence[str]) -> tuple[str, ...]:
    """The networks, "everyone" in two halves: a set of networks takes no /0."""
    result: list[str] = []
    for text in networks:
        network = ipaddress.ip_network(text)
        result += [str(half) for half in network.subnets(1)] if network.prefixlen == 0 else [text]
    return tuple(result)


def normal(elements: Iterable[str]) -> frozenset[str]:
    """Elements in one way of writing: a network of one address is that address."""
    result: set[str] = set()
    for text in elements:
        address, comma, interface = text.partition(",")
        network = ipaddress.ip_network(address, strict=False)
        result.add(str(network.network_address if network.prefixlen == network.max_prefixlen else network) + comma + interface)
    return frozenset(result)
