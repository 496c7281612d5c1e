# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules as nftables: a model, its text for `nft -f`, and the comparison with what `nft -j list ruleset` shows.

Two places are rendered from the same jobs:

* the guard, a table of our own that keeps others out where no other firewall does;
* the opening, sets and one chain inside a table of the user's whose chain drops by default. (An accept in our own
  table would not help there: in nftables a packet must be accepted by every base chain, a drop anywhere is final.)

Rules name sets, never addresses, so that any number of nodes is one rule and another node is one element. Each rule
carries a comment with a hash of its own text, by which a later run recognises it whatever way nft prints it.
The guard looks at SYN packets only and keeps no connection state: it neither breaks connections that exist when it
arrives, nor switches connection tracking on for NCCL's traffic.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

from ansible_collections.onprem.torch.plugins.module_utils.firewall_spec import JobRules, slug

OWN_FAMILY = "inet"
OWN_TABLE = "onprem_torch"
# Sets and the chain that we keep in a table of the user's begin with this; the chain is exactly this.
PREFIX = "onprem_torch"
MARKER = "onprem.torch"
# Before the usual filter chains (0), after connection tracking and NAT.
GUARD_PRIORITY = -10
HEADER = "# Made by onprem.torch (role firewall) and replaced by its next run: changes belong into the role's variables.\n"

Interval = "tuple[int, int]"


@dataclass(frozen=True)
class NftSet:
    """A named set; `elements` are addresses, networks, ports or port ranges ('a-b')."""

    name: str
    type: str
    elements: tuple[str, ...]
    interval: bool = False


@dataclass(frozen=True)
class NftChain:
    """A chain; `hook` is its declaration ('type filter hook input priority -10; policy accept;') or empty."""

    name: str
    rules: tuple[str, ...]
    hook: str = ""


@dataclass(frozen=True)
class NftTable:
    """Our share of a table: all of it when it is our own."""

    family: str
    name: str
    sets: tuple[NftSet, ...]
    chains: tuple[NftChain, ...]


def rule_comment(text: str) -> str:
    """The comment by which a rule is recognised: the marker and a hash of the rule's text."""
    return f"{MARKER} {hashlib.sha256(text.encode()).hexdigest()[:10]}"


def families_of(table_family: str) -> tuple[int, ...]:
    """IP versions that a table of this family sees."""
    return {"ip": (4,), "ip6": (6,)}.get(table_family, (4, 6))


def accept_parts(jobs: Iterable[JobRules], table_family: str, prefix: str) -> tuple[list[NftSet], list[str]]:
    """Sets and accepting rules of all jobs, for a table of this family."""
    sets: list[NftSet] = []
    rules: list[str] = []
    for job in sorted(jobs, key=lambda item: item.job):
        name = slug(job.job)
        ports_set = f"{prefix}ports_{name}"
        if not job.trust_peers:
            merged = intervals([*job.ports, f"{job.ephemeral[0]}-{job.ephemeral[1]}"])
            ports = tuple(str(low) if low == high else f"{low}-{high}" for low, high in merged)
            sets.append(NftSet(ports_set, "inet_service", ports, interval=True))
        for version in families_of(table_family):
            peers = job.peers4 if version == 4 else job.peers6
            if not peers:
                continue
            peers_set = f"{prefix}peers{version}_{name}"
            sets.append(NftSet(peers_set, f"ipv{version}_addr", peers))
            match = f'iifname "{job.interface}" {_ip(version)} saddr @{peers_set}'
            rules.append(f"{match} accept" if job.trust_peers else f"{match} tcp dport @{ports_set} accept")
        for row in job.monitoring:
            for version in families_of(table_family):
                sources = row.sources4 if version == 4 else row.sources6
                if not sources:
                    continue
                if any(ipaddress.ip_network(source).prefixlen == 0 for source in sources):
                    nfproto = f"meta nfproto ipv{version} " if len(families_of(table_family)) > 1 else ""
                    rules.append(f"{nfproto}tcp dport {row.port} accept")
                    continue
                sources_set = f"{prefix}sources{version}_{row.port}_{name}"
                sets.append(NftSet(sources_set, f"ipv{version}_addr", sources, interval=True))
                rules.append(f"{_ip(version)} saddr @{sources_set} tcp dport {row.port} accept")
    return sets, rules


def guard_table(jobs: Sequence[JobRules], management_ports: Iterable[int] = ()) -> NftTable:
    """Our own table: new TCP connections to the jobs' ports, and on the training interface to the ephemeral range,
    only from peers; everything else passes.

    management_ports: sshd's; never dropped, even where they lie in the ephemeral range.
    """
    sets, accepts = accept_parts(jobs, OWN_FAMILY, "")
    guarded = [job for job in jobs if job.protect]
    ports = tuple(str(port) for port in sorted({port for job in guarded for port in job.ports}))
    ranges = sorted({(job.interface, job.ephemeral) for job in guarded})
    spared = sorted({port for port in management_ports if any(low <= port <= high for _interface, (low, high) in ranges)})
    drops: list[str] = []
    if ports:
        sets.append(NftSet("job_ports", "inet_service", ports))
        drops.append("tcp dport @job_ports counter drop")
    if spared:
        sets.append(NftSet("management_ports", "inet_service", tuple(str(port) for port in spared)))
    for interface, (low, high) in ranges:
        spare = " tcp dport != @management_ports" if spared else ""
        drops.append(f'iifname "{interface}" tcp dport {low}-{high}{spare} counter drop')
    return NftTable(
        OWN_FAMILY,
        OWN_TABLE,
        tuple(sets),
        (
            NftChain("peers", tuple(accepts)),
            NftChain(
                "guard",
                ('iifname "lo" accept', "tcp flags & (fin | syn | rst | ack) != syn accept", "meta l4proto tcp jump peers", *drops),
                f"type filter hook input priority {GUARD_PRIORITY}; policy accept;",
            ),
        ),
    )


def opening_table(jobs: Sequence[JobRules], family: str, table: str) -> NftTable:
    """Our sets and our chain inside a table of the user's; the deciding chains jump to it."""
    sets, accepts = accept_parts(jobs, family, PREFIX + "_")
    return NftTable(family, table, tuple(sets), (NftChain(PREFIX, tuple(accepts)),))


def jump_rule() -> str:
    """The one rule that goes to the head of a deciding chain."""
    return f"jump {PREFIX}"


def commented(rule: str) -> str:
    """The rule as it is loaded, with the comment it is recognised by."""
    return f'{rule} comment "{rule_comment(rule)}"'


def render_own(table: NftTable) -> str:
    """Text for `nft -f` that replaces our own table as one transaction, whether it exists or not."""
    lines = [HEADER + f"table {table.family} {table.name}", f"delete table {table.family} {table.name}", f"table {table.family} {table.name} {{"]
    for item in table.sets:
        lines += ["\t" + line for line in _set_block(item)]
    for chain in table.chains:
        lines.append(f"\tchain {chain.name} {{")
        if chain.hook:
            lines.append(f"\t\t{chain.hook}")
        lines += [f"\t\t{commented(rule)}" for rule in chain.rules]
        lines.append("\t}")
    lines.append("}")
    return "\n".join(lines) + "\n"


def render_opening(table: NftTable) -> str:
    """Text for `nft -f` that makes our sets and chain in a table of the user's what they should be.

    Loading it twice is the same as loading it once. The jump is not part of it: nft has no "insert if missing".
    """
    where = f"{table.family} {table.name}"
    lines = [HEADER.rstrip("\n")]
    for chain in table.chains:
        lines += [f"add chain {where} {chain.name}", f"flush chain {where} {chain.name}"]
    for item in table.sets:
        lines.append(f"add set {where} {item.name} {{ {_set_kind(item)} }}")
        lines.append(f"flush set {where} {item.name}")
        lines.append(f"add element {where} {item.name} {{")
        lines += [f"\t{element}," for element in item.elements]
        lines.append("}")
    for chain in table.chains:
        lines += [f"add rule {where} {chain.name} {commented(rule)}" for rule in chain.rules]
    return "\n".join(lines) + "\n"


def differences(ruleset: Sequence[Mapping[str, Any]], wanted: NftTable, own: bool) -> list[str]:
    """What in the live ruleset differs from `wanted`, a sentence each; empty when nothing does.

    ruleset: the list under "nftables" of `nft -j list ruleset`.
    own: True where the whole table is ours, so that anything else in it is a difference too.
    """
    where = f"{wanted.family} {wanted.name}"
    if not any(_is(item, "table", wanted.family, wanted.name, own_name=True) for item in ruleset):
        return [f"Table {where} is not there."]
    found: list[str] = []
    live_sets = {item["set"]["name"]: item["set"] for item in ruleset if _is(item, "set", wanted.family, wanted.name)}
    for item in wanted.sets:
        live = live_sets.get(item.name)
        if live is None:
            found.append(f"Set {item.name} of table {where} is missing.")
        elif live.get("type") != item.type or bool("interval" in live.get("flags", [])) != item.interval:
            found.append(f"Set {item.name} of table {where} is of another kind.")
        else:
            have, want = intervals(live.get("elem", [])), intervals(item.elements)
            if have != want:
                found.append(f"Set {item.name} of table {where} holds other elements.")
    names = {item.name for item in wanted.sets}
    for name in sorted(live_sets):
        if name not in names and (own or name.startswith(PREFIX + "_")):
            found.append(f"Set {name} of table {where} is no longer wanted.")
    live_chains = {item["chain"]["name"]: item["chain"] for item in ruleset if _is(item, "chain", wanted.family, wanted.name)}
    for chain in wanted.chains:
        live_chain = live_chains.get(chain.name)
        if live_chain is None:
            found.append(f"Chain {chain.name} of table {where} is missing.")
            continue
        if chain.hook and (live_chain.get("hook"), live_chain.get("prio"), live_chain.get("policy")) != ("input", GUARD_PRIORITY, "accept"):
            found.append(f"Chain {chain.name} of table {where} has another hook, priority or policy.")
        comments = [item["rule"].get("comment", "") for item in ruleset if _is(item, "rule", wanted.family, wanted.name, chain.name)]
        if comments != [rule_comment(rule) for rule in chain.rules]:
            found.append(f"The rules of chain {chain.name} of table {where} differ.")
    if own:
        for name in sorted(set(live_chains) - {chain.name for chain in wanted.chains}):
            found.append(f"Chain {name} of table {where} is no longer wanted.")
    return found


def leftovers(ruleset: Sequence[Mapping[str, Any]], keep: Iterable[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """(family, table) of the user's tables, other than `keep`, that hold something of ours."""
    kept = set(keep)
    found: list[tuple[str, str]] = []
    for item in ruleset:
        for kind in ("set", "chain"):
            body = item.get(kind)
            if body and (body["name"] == PREFIX or body["name"].startswith(PREFIX + "_")):
                where = (body["family"], body["table"])
                if body["table"] != OWN_TABLE and where not in kept and where not in found:
                    found.append(where)
    return found


def is_our_jump(rule: Mapping[str, Any]) -> bool:
    """Whether a live rule is the jump that we inserted into a chain of the user's."""
    return rule.get("comment") == rule_comment(jump_rule())


def jumps(ruleset: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, int]]:
    """Our jumps in chains of the user's: (family, table, chain, handle)."""
    rules = (item["rule"] for item in ruleset if "rule" in item)
    return [(rule["family"], rule["table"], rule["chain"], rule["handle"]) for rule in rules if rule["table"] != OWN_TABLE and is_our_jump(rule)]


def removal(ruleset: Sequence[Mapping[str, Any]], family: str, table: str, keep_sets: Iterable[str] = (), keep_chain: bool = False) -> list[str]:
    """nft commands that take our things out of a table of the user's, and nothing else.

    keep_sets, keep_chain: what a new opening in this table goes on using.
    """
    commands: list[str] = []
    where = f"{family} {table}"
    has_chain = any(_is(item, "chain", family, table, PREFIX, own_name=True) for item in ruleset)
    if not keep_chain:
        commands += [f"delete rule {where} {chain} handle {handle}" for fam, tab, chain, handle in jumps(ruleset) if (fam, tab) == (family, table)]
    if has_chain and not keep_chain:
        commands += [f"flush chain {where} {PREFIX}", f"delete chain {where} {PREFIX}"]
    kept = set(keep_sets)
    for item in ruleset:
        if _is(item, "set", family, table):
            name = item["set"]["name"]
            if name.startswith(PREFIX + "_") and name not in kept:
                commands.append(f"delete set {where} {name}")
    return commands


def intervals(elements: Iterable[Any]) -> list[tuple[int, int]]:
    """Elements, as text or as nft's JSON, as sorted and merged (first, last) numbers, which is independent of the way nft prints them."""
    pairs = sorted(_interval(element) for element in elements)
    merged: list[tuple[int, int]] = []
    for low, high in pairs:
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _interval(element: Any) -> tuple[int, int]:
    """One element as (first, last)."""
    if isinstance(element, Mapping):
        if "elem" in element:
            return _interval(element["elem"]["val"])
        if "prefix" in element:
            network = ipaddress.ip_network(f"{element['prefix']['addr']}/{element['prefix']['len']}", strict=False)
            return int(network[0]), int(network[-1])
        low, high = element["range"]
        return _interval(low)[0], _interval(high)[1]
    text = str(element)
    if "/" in text:
        network = ipaddress.ip_network(text, strict=False)
        return int(network[0]), int(network[-1])
    if "-" in text:
        low, high = text.split("-")
        return _interval(low)[0], _interval(high)[1]
    number = int(text) if text.isdigit() else int(ipaddress.ip_address(text))
    return number, number


def _ip(version: int) -> str:
    """nft's word for an IP version's header."""
    return "ip" if version == 4 else "ip6"


def _set_kind(item: NftSet) -> str:
    """The declaration of a set without its elements."""
    return f"type {item.type};" + (" flags interval;" if item.interval else "")


def _set_block(item: NftSet) -> list[str]:
    """A set with its elements, one a line, so that a diff shows the node that came or went."""
    return [
        f"set {item.name} {{",
        f"\t{_set_kind(item)}",
        "\telements = {",
        *(f"\t\t{element}," for element in item.elements),
        "\t}",
        "}",
    ]


def _is(item: Mapping[str, Any], kind: str, family: str, table: str, chain: str | None = None, own_name: bool = False) -> bool:
    """Whether a JSON item is of this kind and place; `own_name` compares `chain` (or, for tables, `table`) with its own name."""
    body = item.get(kind)
    if not body or body.get("family") != family:
        return False
    if kind == "table":
        return bool(body["name"] == table)
    if body.get("table") != table:
        return False
    return chain is None or bool(body["name" if own_name else "chain"] == chain)
