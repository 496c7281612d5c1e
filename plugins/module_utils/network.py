# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which interface and address each node trains on."""

from __future__ import annotations

import ipaddress
import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

INTERFACE = "cluster_interface"
# Interfaces that containers and virtual machines bring along; their networks exist on every host and join none.
PRIVATE_PREFIXES = ("docker", "br-", "virbr", "veth", "cni", "flannel", "lxc", "lxd", "podman", "tun", "tap")


@dataclass(frozen=True)
class Endpoint:
    """The training interface of a node: its name, IPv4 address and, where it has one, IPv6 address."""

    interface: str
    address: str
    address6: str = ""


def networks(interfaces: t.Sequence[dict[str, t.Any]]) -> dict[str, Endpoint]:
    """Return the endpoint by IPv4 network of every interface that could carry training."""
    found: dict[str, Endpoint] = {}
    for link in interfaces:
        if link["loopback"] or not link["up"] or link["name"].startswith(PRIVATE_PREFIXES):
            continue
        for network, endpoint in endpoints(link).items():
            found.setdefault(network, endpoint)
    return found


def endpoints(link: dict[str, t.Any]) -> dict[str, Endpoint]:
    """Return the endpoints of one interface by IPv4 network; the first IPv6 address goes with each."""
    parsed = [ipaddress.ip_interface(text) for text in link["addresses"]]
    six = next((str(entry.ip) for entry in parsed if entry.version == 6), "")
    return {
        str(entry.network): Endpoint(link["name"], str(entry.ip), six)
        for entry in reversed(parsed)
        if entry.version == 4 and not entry.ip.is_loopback
    }


def addresses(end: Endpoint, interfaces: t.Sequence[dict[str, t.Any]], version: int) -> list[str]:
    """Return all addresses of one IP version that a node may be met by on its training interface, its own first.

    With several of them the kernel, NCCL and gloo each pick by rules of their own, so a firewall has to know all.
    """
    own = end.address if version == 4 else end.address6
    there = [ipaddress.ip_interface(text).ip for link in interfaces if end.interface and link["name"] == end.interface for text in link["addresses"]]
    return list(dict.fromkeys(text for text in [own, *(str(ip) for ip in there if ip.version == version)] if text))


def choose(
    nodes: t.Mapping[str, t.Sequence[dict[str, t.Any]]], wanted: t.Mapping[str, str]
) -> tuple[dict[str, Endpoint], list[Problem]]:
    """Return the endpoint of every host and the problems.

    Args:
        nodes: host → interfaces, as node_info gives them.
        wanted: host → ``cluster_interface`` ('' where it is not set).

    Hosts with ``cluster_interface`` take that interface's first IPv4 address. The others take the one network that
    all of them share; none, or more than one, is a problem.
    """
    chosen: dict[str, Endpoint] = {}
    problems: list[Problem] = []
    for host, name in wanted.items():
        if not name or host not in nodes:
            continue
        link = next((entry for entry in nodes[host] if entry["name"] == name), None)
        if link is None:
            there = ", ".join(entry["name"] for entry in nodes[host] if not entry["loopback"]) or "none"
            text = f"{INTERFACE} is {name!r}, but the node's interfaces are {there}"
            problems.append(Problem(host, INTERFACE, text, f"set {INTERFACE} for this host to one of them"))
            continue
        if link["loopback"]:
            text = f"{INTERFACE} is {name!r}, the loopback interface, which no other node can reach"
            problems.append(Problem(host, INTERFACE, text, "name the interface that the other nodes are reached by"))
            continue
        found = list(endpoints(link).values())
        if not found:
            text = f"{INTERFACE} is {name!r}, which has no IPv4 address"
            problems.append(Problem(host, INTERFACE, text, "give it one or name another interface"))
            continue
        chosen[host] = found[-1]
    open_hosts = [host for host in nodes if not wanted.get(host)]
    if not open_hosts:
        return chosen, problems
    found_networks = {host: networks(nodes[host]) for host in open_hosts}
    for host in open_hosts:
        if not found_networks[host]:
            text = "an IPv4 address on an interface that is up was expected, but only loopback has one"
            problems.append(Problem(host, INTERFACE, text, "configure the node's network"))
    if any(not entry for entry in found_networks.values()):
        return chosen, problems
    common = set.intersection(*(set(entry) for entry in found_networks.values()))
    fixed = {network for host in chosen for network, end in networks(nodes[host]).items() if end == chosen[host]}
    if fixed:
        common &= fixed
    if len(common) == 1 or (common and len(nodes) == 1):
        network = sorted(common)[0]  # a node that is alone may take any of its own networks
        chosen.update({host: found_networks[host][network] for host in open_hosts})
    elif not common:
        there = "; ".join(f"{host} is in {', '.join(sorted(found_networks[host]))}" for host in open_hosts[:3])
        more = " …" if len(open_hosts) > 3 else ""
        text = f"the nodes have no network in common ({there}{more})"
        problems.append(Problem("", INTERFACE, text, f"set {INTERFACE} to the interface the peers are reached by"))
    else:
        text = f"the nodes share several networks ({', '.join(sorted(common))})"
        names = sorted({found_networks[open_hosts[0]][network].interface for network in common})
        cure = f"set {INTERFACE} to the one to train on, such as {names[0]}"
        problems.append(Problem("", INTERFACE, text, cure))
    return chosen, problems
