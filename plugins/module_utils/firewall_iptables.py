# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules of iptables in the form of `nft -j list ruleset`, so that one reading of a ruleset serves both.

Pure: works on what `iptables -S` prints. nft does not show legacy rules at all, and of the others it hides what extensions
match (multiport, conntrack), which decides whether the peers get in. What is not known here stays hidden: an "xt".
"""

from __future__ import annotations

import ipaddress
import shlex
from typing import Any, Iterator, Mapping, Sequence

# What the table of legacy iptables goes by here; no table of nft's has such a name.
LEGACY = "filter (legacy)"
Items = list[Mapping[str, Any]]
# Extensions whose options are read below, or that match nothing themselves.
_KNOWN = frozenset(("tcp", "udp", "comment", "conntrack", "state", "multiport", "limit"))
_OPTIONS = {"-s": "saddr", "-d": "daddr"}
_IGNORED = frozenset(("--comment", "--limit", "--limit-burst", "--reject-with", "--log-prefix", "--log-level"))
_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject", "RETURN": "return"}
# Targets that leave the packet to the next rule.
_PASSING = frozenset(("LOG", "NFLOG", "MARK", "CONNMARK", "TCPMSS", "CT", "SET", "AUDIT"))
_ALL_FLAGS = ("fin", "syn", "rst", "psh", "ack", "urg")


def items(text: str, version: int, table: str) -> Items:
    """The chains and rules of the filter table; `table` is the name they go by.

    text: what `iptables -S`, or `ip6tables -S`, prints. Only INPUT is tied to a hook: the others are not on the way in.
    """
    family = "ip" if version == 4 else "ip6"
    found: Items = []
    for number, line in enumerate(text.splitlines()):
        words = shlex.split(line)
        if words[:1] in (["-P"], ["-N"]):
            chain: dict[str, Any] = {"family": family, "table": table, "name": words[1]}
            if words[:2] == ["-P", "INPUT"]:
                chain.update(type="filter", hook="input", prio=0, policy=words[2].lower())
            found.append({"chain": chain})
        elif words[:1] == ["-A"]:
            rule = {"family": family, "table": table, "chain": words[1], "handle": number, "expr": list(_expressions(words[2:], version)), "comment": line}
            found.append({"rule": rule})
    return found


def hidden_from_nft(ruleset: Sequence[Mapping[str, Any]]) -> list[int]:
    """The IP versions for which rules of iptables-nft's filter table have parts that nft does not show."""
    rules = [item["rule"] for item in ruleset if "rule" in item and item["rule"]["table"] == "filter"]
    families = {rule["family"] for rule in rules if any("xt" in part for part in rule.get("expr", []))}
    return [version for version, family in ((4, "ip"), (6, "ip6")) if family in families]


def replaced(ruleset: Sequence[Mapping[str, Any]], shown: Mapping[int, str]) -> Items:
    """The ruleset with iptables-nft's filter tables as iptables itself shows them: IP version to the text of `iptables -S`."""
    families = {"ip" if version == 4 else "ip6" for version in shown}
    bodies = [(item, item.get("chain") or item.get("rule") or {}) for item in ruleset]
    kept = [item for item, body in bodies if not (body.get("table") == "filter" and body["family"] in families)]
    return kept + [item for version, text in shown.items() for item in items(text, version, "filter")]


def _expressions(words: Sequence[str], version: int) -> Iterator[Mapping[str, Any]]:
    """The parts of one rule, in nft's JSON."""
    rest = list(words)
    while rest:
        negated = rest[0] == "!"
        option = rest.pop(1) if negated else rest[0]
        rest.pop(0)
        op = "!=" if negated else "=="
        if option == "-m":
            name = rest.pop(0)
            if name not in _KNOWN:
                yield {"xt": {"name": name}}
        elif option in _IGNORED:
            rest.pop(0)
        elif option in ("-j", "-g"):
            yield _target(option, rest.pop(0))
        elif option in _OPTIONS:
            yield _match(op, {"payload": {"protocol": "ip" if version == 4 else "ip6", "field": _OPTIONS[option]}}, _network(rest.pop(0)))
        elif option == "-i":
            yield _match(op, {"meta": {"key": "iifname"}}, rest.pop(0).replace("+", "*"))
        elif option == "-p":
            yield _match(op, {"meta": {"key": "l4proto"}}, rest.pop(0))
        elif option in ("--dport", "--dports"):
            yield _match(op, {"payload": {"protocol": "tcp", "field": "dport"}}, {"set": [_ports(part) for part in rest.pop(0).split(",")]})
        elif option in ("--ctstate", "--state"):
            yield _match(op, {"ct": {"key": "state"}}, {"set": rest.pop(0).lower().split(",")})
        elif option == "--tcp-flags":
            mask, wanted = _flags(rest.pop(0)), _flags(rest.pop(0))
            yield _match(op, {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, mask]}, wanted)
        else:
            # How many values the option takes is not known either; the next one begins with a dash.
            yield {"xt": {"name": option}}
            while rest and not rest[0].startswith("-") and rest[0] != "!":
                rest.pop(0)


def _match(op: str, left: Mapping[str, Any], right: Any) -> Mapping[str, Any]:
    """A condition."""
    return {"match": {"op": op, "left": left, "right": right}}


def _target(option: str, name: str) -> Mapping[str, Any]:
    """What a rule does with what it matches."""
    if name in _VERDICTS:
        return {_VERDICTS[name]: None}
    if name in _PASSING:
        return {"log": None}
    return {"goto" if option == "-g" else "jump": {"target": name}}


def _network(text: str) -> Any:
    """An address, or a network."""
    network = ipaddress.ip_network(text, strict=False)
    if network.prefixlen == network.max_prefixlen:
        return str(network.network_address)
    return {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}


def _ports(text: str) -> Any:
    """A port, or a range of them."""
    low, colon, high = text.partition(":")
    return {"range": [int(low), int(high)]} if colon else int(low)


def _flags(text: str) -> list[str]:
    """TCP flags, which may be all or none."""
    return [] if text == "NONE" else list(_ALL_FLAGS) if text == "ALL" else text.lower().split(",")
