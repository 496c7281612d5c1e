# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose this machine's bridges and networks are, so that a lab takes nothing that is another's.

A lab's bridge carries the folder of its nodes as the alias of the interface: it ends with the bridge and cannot grow stale.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import nspawn

ALIAS = "onprem.torch "
# linux/if.h, IFALIASZ, with the byte that ends it.
LONGEST_ALIAS = 255
# Names that the kernel, nftables and shells all take.
BRIDGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")
OUTSIDER = "vo-"
PLUG = "vb-"  # what nspawn calls a node's end of the bridge
Network = t.Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Link(t.NamedTuple):
    """An interface of this machine."""

    name: str
    kind: str  # bridge, veth …, empty for hardware
    alias: str
    master: str
    namespace: str  # name of the one where the other end is
    up: bool
    addresses: tuple[str, ...]  # with prefix lengths, without those that the kernel gives

    @property
    def owner(self) -> str:
        """Folder of the nodes whose bridge it is, empty where it does not say so."""
        return self.alias[len(ALIAS) :] if self.alias.startswith(ALIAS) else ""

    @property
    def bare(self) -> bool:
        """Whether it is a bridge that nobody uses: a run that was killed right after making one leaves such a bridge."""
        return self.kind == "bridge" and not self.up and not self.alias and not self.addresses


class Lab(t.NamedTuple):
    """What a lab wants to have on this machine."""

    nodes: str  # folder of its nodes, without links
    bridge: str
    networks: tuple[str, ...]
    take_over: bool = False  # whether it may end another lab that has them


class Findings(t.NamedTuple):
    """What stands in a lab's way."""

    problems: list[str]
    end: list[nspawn.Machine]  # nodes of labs that are gone, or are taken over
    remove: list[str]  # bridges of such labs


def links(text: str, namespaces: str = "") -> list[Link]:
    """Return the interfaces that ``ip -json -details address show`` tells of.

    Args:
        text: its output.
        namespaces: what ``ip -json netns list`` tells, for the names of namespaces.
    """
    names = {item["id"]: str(item["name"]) for item in json.loads(namespaces or "[]") if "id" in item}
    return [
        Link(
            name=str(item["ifname"]),
            kind=str((item.get("linkinfo") or {}).get("info_kind") or ""),
            alias=str(item.get("ifalias") or ""),
            master=str(item.get("master") or ""),
            namespace=names.get(item.get("link_netnsid"), ""),
            up="UP" in (item.get("flags") or []),
            addresses=tuple(
                f"{entry['local']}/{entry['prefixlen']}" for entry in item.get("addr_info") or [] if "local" in entry and entry.get("scope") != "link"
            ),
        )
        for item in json.loads(text or "[]")
        if item.get("ifname")
    ]


def owner_of(text: str, bridge: str) -> str:
    """Return the folder of the nodes whose bridge it is, from ``ip -json -details address show``; empty where unknown."""
    return next((link.owner for link in links(text) if link.name == bridge), "")


def alias(nodes: str) -> str:
    """Return the alias of the bridge of a lab; one without a folder has the name alone.

    Raises:
        ValueError: the folder's path is too long for one.
    """
    text = f"{ALIAS}{nodes}" if nodes else ALIAS.strip()
    if len(text.encode(errors="surrogateescape")) > LONGEST_ALIAS or not text.isprintable():
        raise ValueError(f"the path {nodes} is too long, or holds characters that cannot be shown; set lab_state_dir to a short path")
    return text


def table(bridge: str) -> str:
    """Return the name of a bridge's nftables table."""
    return f"onprem_lab_{bridge}"


def unsigned(link: Link, found: t.Iterable[Link], rules: str) -> bool:
    """Return whether a bridge that does not say whose it is can only be a lab's.

    A run that was killed leaves one that nobody uses. Earlier releases did not sign their bridges; their table tells of them,
    but they took any bridge that had the name. One to which somebody has given another address or another port is not ours.

    Args:
        link: the bridge.
        found: interfaces of this machine.
        rules: the table of the bridge as nft lists it, empty where there is none.
    """
    foreign_port = any(port.master == link.name and not port.name.startswith((PLUG, OUTSIDER)) for port in found)
    if link.kind != "bridge" or link.alias or foreign_port:
        return False
    if link.bare:
        return not any(port.master == link.name for port in found)
    network = re.search(r"ip saddr (\S+) oifname", rules)
    theirs = [address for address in link.addresses if ":" not in address]
    return bool(rules) and all(network and overlapping([network[1]], [address]) for address in theirs)


def belongs(link: Link, nodes: str, found: t.Iterable[Link], rules: str) -> bool:
    """Return whether a bridge is that of a lab: it says so, or says nothing and can only be a lab's; see unsigned.

    Args:
        link: the bridge.
        nodes: folder of the lab's nodes; empty for a bridge that was made without one.
        found: interfaces of this machine.
        rules: the table of the bridge as nft lists it, empty where there is none.
    """
    signed = link.owner == nodes if nodes else link.alias == alias("")
    return link.kind == "bridge" and (signed or unsigned(link, found, rules))


def shown(nodes: str) -> str:
    """Return the folder in which people know a lab: that of its inventory, or of its state where that lies elsewhere."""
    state = os.path.dirname(nodes) if os.path.basename(nodes) == "nodes" else nodes
    return os.path.dirname(state) if os.path.basename(state) == ".state" else state


def outsiders(bridge: str, found: t.Iterable[Link]) -> list[str]:
    """Return the network namespaces that are plugged into a bridge."""
    return sorted(link.namespace for link in found if link.master == bridge and link.namespace and link.name.startswith(OUTSIDER))


def bridges_of(nodes: str, found: t.Iterable[Link]) -> list[str]:
    """Return the bridges of a lab."""
    return sorted(link.name for link in found if link.kind == "bridge" and link.owner == nodes)


def overlapping(networks: t.Iterable[str], addresses: t.Iterable[str]) -> str:
    """Return the first of some networks in which one of the addresses, or its network, lies; empty for none."""
    theirs = [ipaddress.ip_interface(address).network for address in addresses]
    for text in networks:
        ours = ipaddress.ip_network(text, strict=False)
        if any(ours.version == network.version and ours.overlaps(network) for network in theirs):
            return text
    return ""


def routed(networks: t.Iterable[str], routes: str, besides: t.Container[str]) -> list[tuple[str, str]]:
    """Return networks that have a way of their own already, as narrow as theirs or narrower, with its interface.

    Args:
        networks: networks of a lab.
        routes: what ``ip -json route show`` tells, of one version of IP.
        besides: interfaces that do not count.
    """
    found = []
    for item in json.loads(routes or "[]"):
        device, target = str(item.get("dev") or ""), str(item.get("dst") or "default")
        if not device or device in besides or target == "default":
            continue
        way = ipaddress.ip_network(target, strict=False)
        for text in networks:
            ours = ipaddress.ip_network(text, strict=False)
            if ours.version == way.version and ours.supernet_of(way):  # type: ignore[arg-type]
                found.append((text, device))
    return found


def look(lab: Lab, found: t.Sequence[Link], routes: t.Sequence[str], machines: t.Sequence[nspawn.Machine], tables: t.Mapping[str, str]) -> Findings:
    """Return what stands in a lab's way on this machine, and what is left of labs that are gone.

    Args:
        lab: what it wants.
        found: interfaces of this machine.
        routes: what ``ip -json route show`` tells, of each version of IP.
        machines: nodes that run.
        tables: nftables tables by name; that of a bridge tells that it is a lab's.
    """
    problems: list[str] = []
    end: list[nspawn.Machine] = []
    remove: list[str] = []
    for link in found:
        network = overlapping(lab.networks, link.addresses)
        if link.name != lab.bridge and not network:
            continue
        plugged = [machine for machine in machines if machine.bridge == link.name]
        folders = {machine.nodes for machine in plugged} | ({link.owner} if link.owner else set())
        made = bool(link.owner) or unsigned(link, found, tables.get(table(link.name), ""))
        others = [machine for machine in plugged if machine.nodes != lab.nodes]
        alive = sorted({machine.nodes for machine in others if machine.kept})
        if alive and not lab.take_over:
            problems += [other_lab(lab, link, network, nodes, others) for nodes in alive]
            continue
        # Nodes that are plugged in prove nothing: earlier releases plugged them into bridges that they had found.
        if link.kind != "bridge" or not made:
            problems.append(foreign(lab, link, network))
            continue
        end += others
        if link.name != lab.bridge or folders - {lab.nodes}:
            remove.append(link.name)
    settled = {lab.bridge, *remove, *(link.name for link in found if overlapping(lab.networks, link.addresses))}
    for text in routes:
        for network, device in routed(lab.networks, text, settled):
            problems.append(f"this machine reaches {network} through {device} already; {another_network(lab, network)}")
    return Findings(list(dict.fromkeys(problems)), end, remove)


def another_network(lab: Lab, network: str) -> str:
    """Return what to do where a network is in use."""
    if ":" in network:
        return "set lab_subnet6 to another network, or leave it empty"
    return f"set lab_subnet, and ansible_host of each node, to another network in {shown(lab.nodes)}"


def foreign(lab: Lab, link: Link, network: str) -> str:
    """Return the sentence for an interface that is no lab's."""
    if link.name == lab.bridge:
        return f"{link.name} is an interface of this machine that no lab has made; it is left alone: set lab_bridge to another name"
    return f"the network {network} is in use by {link.name} of this machine ({', '.join(link.addresses)}); {another_network(lab, network)}"


def other_lab(lab: Lab, link: Link, network: str, nodes: str, machines: t.Iterable[nspawn.Machine]) -> str:
    """Return the sentence for a bridge that another lab uses."""
    names = ", ".join(sorted({machine.node for machine in machines if machine.nodes == nodes}))
    what = f"the bridge {link.name}" if link.name == lab.bridge else f"the network {network}, on the bridge {link.name},"
    return (
        f"{what} is in use by another lab on this machine, {shown(nodes)}, whose nodes run ({names}); nothing was changed. "
        "Remove that lab (make clean in its checkout, or -e lab_take_over=true here), or give this one a "
        f"bridge and a network of its own: lab_bridge, lab_subnet and ansible_host of each node in {shown(lab.nodes)}"
    )
