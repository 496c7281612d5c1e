# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules as firewalld's: one policy of our own towards the host, and one ipset for each set of addresses.

Pure. A policy, not rich rules in the user's zones: firewalld keeps it in a file of its own, so that no file of the user's
is rewritten, and it holds whatever zone the training interface is moved to. Its priority is below 0, which lets it
decide before the zone does: a zone that drops ends there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping, Optional, Sequence
from xml.sax.saxutils import quoteattr

from ansible_collections.onprem.torch.plugins.module_utils.firewall_sets import Accept, AddressSet, normal

BUS = "org.fedoraproject.FirewallD1"
BUS_PATH = "/org/fedoraproject/FirewallD1"
POLICY = "onprem_torch"
POLICY_FILE = f"/etc/firewalld/policies/{POLICY}.xml"
IPSETS_DIR = "/etc/firewalld/ipsets"
TABLE = ("inet", "firewalld")
# Sets that name an interface match the outgoing one in older releases, that is, nothing on the way in.
SETS_WITH_INTERFACE = (2, 3)
# The lists that may be changed without being made permanent: key of a zone's or policy's settings to firewall-cmd's word.
LISTS = {
    "services": "service",
    "ports": "port",
    "protocols": "protocol",
    "source_ports": "source-port",
    "icmp_blocks": "icmp-block",
    "rules_str": "rich-rule",
    "rich_rules": "rich-rule",
    "sources": "source",
    "forward_ports": "forward-port",
    "ingress_zones": "ingress-zone",
    "egress_zones": "egress-zone",
}
SWITCHES = {"masquerade": "masquerade", "forward": "forward", "icmp_block_inversion": "icmp-block-inversion"}
# What only a reload can change, so that what is kept is not yet what is live.
FIXED = ("target", "priority", "ingress_priority", "egress_priority")
# Settings as firewalld gives them, now and permanently; None where there are none.
Both = tuple[Optional[Mapping[str, Any]], Optional[Mapping[str, Any]]]


@dataclass
class Live:
    """What firewalld says of itself.

    version: (major, minor). backend: what it writes to, nftables or iptables.
    rules: the rich rules of our policy; None where it is not loaded. sets: entries of our ipsets by name. kinds: their types.
    """

    version: tuple[int, int] = (0, 0)
    backend: str = "nftables"
    rules: Optional[frozenset[str]] = None
    sets: dict[str, frozenset[str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)


def with_interface(version: tuple[int, int], wanted: Iterable[Accept]) -> list[Accept]:
    """The rules as this release can hold them: an older one lets the peers in on every interface."""
    if version >= SETS_WITH_INTERFACE:
        return list(wanted)
    return [Accept(AddressSet(a.source.name, a.source.version, a.source.elements, a.source.networks), a.ports) for a in wanted]


def entries(source: AddressSet) -> tuple[str, ...]:
    """The ipset's entries."""
    suffix = f",{source.interface}" if source.interface else ""
    return tuple(element + suffix for element in source.elements)


def ipset_path(source: AddressSet) -> str:
    """The ipset's file."""
    return f"{IPSETS_DIR}/{source.name}.xml"


def kind(source: AddressSet) -> str:
    """The ipset's type."""
    return "hash:net,iface" if source.interface else "hash:net" if source.networks else "hash:ip"


def ipset_file(source: AddressSet) -> str:
    """The ipset as firewalld reads it, an entry a line."""
    lines = [
        '<?xml version="1.0" encoding="utf-8"?>',
        f'<ipset type="{kind(source)}">',
        "  <short>onprem.torch</short>",
        "  <description>Made by the role firewall and replaced by its next run: changes belong into its variables.</description>",
        f'  <option name="family" value="{"inet" if source.version == 4 else "inet6"}"/>',
        *(f"  <entry>{entry}</entry>" for entry in entries(source)),
        "</ipset>",
    ]
    return "\n".join(lines) + "\n"


def rules(wanted: Sequence[Accept]) -> list[tuple[str, str]]:
    """Each rule of the policy as (XML element, firewalld's own text)."""
    found: list[tuple[str, str]] = []
    for accept in wanted:
        family = f"ipv{accept.source.version}"
        source = quoteattr(accept.source.name)
        for ports in [f"{low}-{high}" if low != high else str(low) for low, high in accept.ports] or [""]:
            element = f'<port port="{ports}" protocol="tcp"/>' if ports else ""
            words = f' port port="{ports}" protocol="tcp"' if ports else ""
            found.append(
                (
                    f'<rule family="{family}"><source ipset={source}/>{element}<accept/></rule>',
                    f'rule family="{family}" source ipset={source}{words} accept',
                )
            )
    return found


def policy_file(wanted: Sequence[Accept]) -> str:
    """The policy as firewalld reads it."""
    lines = [
        '<?xml version="1.0" encoding="utf-8"?>',
        '<policy target="CONTINUE" priority="-100">',
        "  <short>onprem.torch</short>",
        "  <description>Made by the role firewall and replaced by its next run: changes belong into its variables.</description>",
        '  <ingress-zone name="ANY"/>',
        '  <egress-zone name="HOST"/>',
        *(f"  {element}" for element, _text in rules(wanted)),
        "</policy>",
    ]
    return "\n".join(lines) + "\n"


def needs_reload(live: Live, wanted: Sequence[Accept]) -> bool:
    """Whether what firewalld holds differs in more than the entries of sets: those can be changed without a reload.

    A set's type changes with firewalld's release: see with_interface.
    """
    texts = frozenset(text for _element, text in rules(wanted))
    return live.rules != (texts or None) or live.kinds != {accept.source.name: kind(accept.source) for accept in wanted}


def changed_sets(live: Live, wanted: Sequence[Accept]) -> dict[str, tuple[str, ...]]:
    """The sets that hold other entries than wanted: name to the wanted ones."""
    return {a.source.name: entries(a.source) for a in wanted if live.sets.get(a.source.name) != normal(entries(a.source))}


def differences(live: Live, wanted: Sequence[Accept], ruleset: Sequence[Mapping[str, Any]]) -> list[str]:
    """What firewalld, or the kernel beneath it, holds differently, a sentence each.

    ruleset: the list under "nftables" of `nft -j list ruleset`. Rules flushed by hand are missing there only.
    """
    found: list[str] = []
    texts = frozenset(text for _element, text in rules(wanted))
    if live.rules is None and texts:
        found.append(f"firewalld has not loaded the policy {POLICY}.")
    elif live.rules is not None and not texts:
        found.append(f"firewalld's policy {POLICY} is no longer wanted.")
    elif live.rules is not None and live.rules != texts:
        found.append(f"The rules of firewalld's policy {POLICY} differ.")
    names = {accept.source.name for accept in wanted}
    found += [f"firewalld's ipset {name} is missing." for name in sorted(names - set(live.sets))]
    found += [f"firewalld's ipset {name} is no longer wanted." for name in sorted(set(live.sets) - names)]
    found += [f"firewalld's ipset {name} holds other entries." for name in sorted(changed_sets(live, wanted)) if name in live.sets]
    if found or not wanted:
        return found
    if not any((item["table"]["family"], item["table"]["name"]) == TABLE for item in ruleset if "table" in item):
        return ["firewalld is active, but its rules are gone from the kernel, as after a flush by hand."]
    kernel = {item["set"]["name"]: item["set"] for item in ruleset if "set" in item and (item["set"]["family"], item["set"]["table"]) == TABLE}
    for accept in wanted:
        name = accept.source.name
        if name not in kernel:
            found.append(f"firewalld's ipset {name} is gone from the kernel.")
        elif normal(map(_element, kernel[name].get("elem", []))) != normal(entries(accept.source)):
            found.append(f"firewalld's ipset {name} holds other entries in the kernel.")
    chain = f"filter_IN_policy_{POLICY}_allow"
    live_rules = [item["rule"] for item in ruleset if "rule" in item and item["rule"]["chain"] == chain and item["rule"]["family"] == "inet"]
    if len(live_rules) != len(texts):
        found.append(f"The rules of firewalld's policy {POLICY} differ in the kernel.")
    return found


def _element(element: Any) -> str:
    """An element of nft's JSON as an ipset's entry."""
    if isinstance(element, Mapping):
        if "elem" in element:
            return _element(element["elem"]["val"])
        if "concat" in element:
            return ",".join(_element(part) for part in element["concat"])
        if "prefix" in element:
            return f"{element['prefix']['addr']}/{element['prefix']['len']}"
        return str(element["range"][0]) + "/0"  # no range of ours: differs from everything wanted
    return str(element)


def loaded_by_reload(kind: str, settings: Mapping[str, Both]) -> list[str]:
    """Reasons why a reload would do more than bring our own: what an administrator has kept, but not loaded yet.

    kind: "zone" or "policy". settings: name to (now, permanent).
    """
    found: list[str] = []
    for name, (now, permanent) in sorted(settings.items()):
        if permanent is None or name == POLICY:
            continue
        if now is None:
            found.append(f"the {kind} {name}")
        else:
            found += [f"{key} {permanent[key]} of the {kind} {name}" for key in FIXED if key in permanent and now.get(key) != permanent[key]]
    return found


def used_services(*settings: Mapping[str, Both]) -> list[str]:
    """The services that zones or policies let in, now or permanently; settings: name to (now, permanent)."""
    return sorted({service for both in settings for pair in both.values() for side in pair if side for service in side.get("services") or []})


def changed_by_reload(services: Mapping[str, Both]) -> list[str]:
    """Services whose definition a reload would replace: name to (now, permanent)."""
    return [f"the service {name}" for name, (now, permanent) in sorted(services.items()) if now != permanent]


def lost_by_reload(zones: Mapping[str, Both], policies: Mapping[str, Both], ipsets: Mapping[str, tuple[Iterable[str], Iterable[str]]]) -> list[list[str]]:
    """Commands that bring back what a reload forgets: settings of zones and policies and entries of ipsets that are not permanent.

    zones, policies: name to (settings now, permanent settings). ipsets: the same of entries. What goes comes first, since a
    source can be in one zone only.
    """
    gone: list[list[str]] = []
    back: list[list[str]] = []
    placed = {entry for now, _permanent in zones.values() for entry in (now or {}).get("interfaces") or []}
    for name, (now, permanent) in sorted(zones.items()):
        before, after = (now or {}).get("interfaces") or [], (permanent or {}).get("interfaces") or []
        gone += [["firewall-cmd", f"--zone={name}", f"--remove-interface={entry}"] for entry in after if entry not in placed]
        back += [["busctl", "call", BUS, BUS_PATH, BUS + ".zone", "changeZoneOfInterface", "ss", name, entry] for entry in before if entry not in after]
    for option, both in (("zone", zones), ("policy", policies)):
        for name, (now, permanent) in sorted(both.items()):
            if now is None or name == POLICY:
                continue
            permanent = permanent or {}
            where = ["firewall-cmd", f"--{option}={name}"]
            for key, word in LISTS.items():
                live, kept = [_word(key, entry) for entry in now.get(key) or []], [_word(key, entry) for entry in permanent.get(key) or []]
                gone += [[*where, f"--remove-{word}={entry}"] for entry in kept if entry not in live]
                back += [[*where, f"--add-{word}={entry}"] for entry in live if entry not in kept]
            for key, word in SWITCHES.items():
                if bool(now.get(key)) != bool(permanent.get(key)):
                    back.append([*where, f"--{'add' if now.get(key) else 'remove'}-{word}"])
    for name, entries_now_and_kept in sorted(ipsets.items()):
        have, keep = map(set, entries_now_and_kept)
        gone += [["firewall-cmd", f"--ipset={name}", f"--remove-entry={entry}"] for entry in sorted(keep - have)]
        back += [["firewall-cmd", f"--ipset={name}", f"--add-entry={entry}"] for entry in sorted(have - keep)]
    return gone + back


def _word(key: str, entry: Any) -> str:
    """An entry of a list as firewall-cmd takes it."""
    if key in ("ports", "source_ports"):
        return f"{entry[0]}/{entry[1]}"
    if key == "forward_ports":
        port, protocol, to_port, to_address = entry
        return f"port={port}:proto={protocol}" + (f":toport={to_port}" if to_port else "") + (f":toaddr={to_address}" if to_address else "")
    return str(entry)
