# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an nftables ruleset does with a new TCP connection: which chain decides, and by which rule.

Pure: works on the list under "nftables" of `nft -j list ruleset`. A condition that cannot be known from the ruleset
alone (a rate, a route, an extension of iptables) counts as not met, and is told apart in the result, so that a
caller can be careful: what remains is the ruleset's default, which is what the role wants to know.
"""

from __future__ import annotations

import ipaddress
import operator
from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils.firewall_nft import PREFIX, OWN_TABLE, intervals, is_our_jump

ACCEPT = "accept"
DROP = "drop"
_HOOKS = ("prerouting", "input")
_FILTERING = ("filter",)
# Statements that neither match nor decide.
_PASSIVE = frozenset(
    ("counter", "log", "mangle", "notrack", "set", "map", "flow", "dup", "secmark", "ct helper", "ct timeout", "ct expectation", "comment", "meter", "last")
)
# Statements that limit what matches: with "inv" (over), a well-behaved packet is not concerned; without it, it is.
_LIMITS = frozenset(("limit", "quota", "ct count", "connlimit"))
_MAX_DEPTH = 16
SAMPLES = 15  # ports that are looked at, evenly spaced, to tell what happens to most of a range
_COMPARED = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
_TCP_FLAGS = ("fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr")


class _Unknown(Exception):
    """The value of an expression cannot be told."""


@dataclass(frozen=True)
class Packet:
    """The first packet (SYN) of a TCP connection that arrives at the node.

    version: 4 or 6. source: the sender's address, or None for "some address that no rule names".
    destination: the node's own address, or None likewise.
    """

    version: int
    source: Optional[str]
    port: int
    interface: str
    destination: Optional[str] = None


@dataclass
class Verdict:
    """The outcome in one chain or in all.

    action: ACCEPT or DROP. where: for a drop, the chain and the rule or policy in words.
    chain: (family, table, chain) of the base chain. uncertain: conditions that were counted as not met.
    """

    action: str
    where: str = ""
    chain: tuple[str, str, str] = ("", "", "")
    uncertain: list[str] = field(default_factory=list)


class Ruleset:
    """An index over the list under "nftables" of `nft -j list ruleset`."""

    def __init__(self, items: Sequence[Mapping[str, Any]], skip_ours: bool = True) -> None:
        """skip_ours: leave out our own table, and our chain in tables of the user's."""
        self.chains: dict[tuple[str, str, str], Mapping[str, Any]] = {}
        self.rules: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        self.sets: dict[tuple[str, str, str], Mapping[str, Any]] = {}
        for item in items:
            if "chain" in item:
                body = item["chain"]
                self.chains[(body["family"], body["table"], body["name"])] = body
            elif "rule" in item:
                body = item["rule"]
                if not (skip_ours and is_our_jump(body)):
                    self.rules.setdefault((body["family"], body["table"], body["chain"]), []).append(body)
            elif "set" in item or "map" in item:
                body = item.get("set") or item["map"]
                self.sets[(body["family"], body["table"], body["name"])] = body
        self.skip_ours = skip_ours
        self._ranges: dict[tuple[str, str, str], Optional[list[tuple[int, int]]]] = {}

    def base_chains(self, version: int) -> list[tuple[str, str, str]]:
        """Filtering base chains on the way into the node, in the order a packet meets them."""
        families = ("inet", "ip" if version == 4 else "ip6")
        found = [
            (_HOOKS.index(body["hook"]), int(body.get("prio", 0)), key)
            for key, body in self.chains.items()
            if body.get("hook") in _HOOKS and body.get("type") in _FILTERING and key[0] in families and not (self.skip_ours and key[1] == OWN_TABLE)
        ]
        return [key for _hook, _prio, key in sorted(found)]

    def through(self, packet: Packet) -> Verdict:
        """The verdict of all chains together: the first drop, else accept."""
        uncertain: list[str] = []
        for key in self.base_chains(packet.version):
            verdict = self.chain_verdict(key, packet)
            uncertain += verdict.uncertain
            if verdict.action == DROP:
                verdict.uncertain = uncertain
                return verdict
        return Verdict(ACCEPT, uncertain=uncertain)

    def chain_verdict(self, key: tuple[str, str, str], packet: Packet) -> Verdict:
        """The verdict of one base chain."""
        uncertain: list[str] = []
        result = self._walk(key, packet, uncertain, 0)
        name = "chain " + " ".join(key)
        if result is None or result[0] == "return":
            policy = self.chains[key].get("policy", ACCEPT)
            return Verdict(DROP if policy == DROP else ACCEPT, f"the policy of {name} is {policy}", key, uncertain)
        action, where = result
        return Verdict(action, where, key, uncertain)

    def _walk(self, key: tuple[str, str, str], packet: Packet, uncertain: list[str], depth: int) -> Optional[tuple[str, str]]:
        """(verdict, where) of a chain, None at its end."""
        if depth > _MAX_DEPTH:
            return None
        for rule in self.rules.get(key, []):
            result = self._rule(key, rule, packet, uncertain, depth)
            if result is not None:
                return None if result[0] == "return" and depth else result
        return None

    def _rule(self, key: tuple[str, str, str], rule: Mapping[str, Any], packet: Packet, uncertain: list[str], depth: int) -> Optional[tuple[str, str]]:
        """(verdict, where) of one rule, None where it does not decide."""
        where = f"rule {rule.get('handle')} of chain {' '.join(key)}" + (f" ({rule['comment']})" if rule.get("comment") else "")
        for statement in rule.get("expr", []):
            for kind, body in statement.items():
                if kind in _PASSIVE:
                    continue
                if kind in _LIMITS:
                    if isinstance(body, Mapping) and body.get("inv"):
                        return None
                    continue
                if kind == "match":
                    try:
                        if not self._matches(key, body, packet):
                            return None
                    except _Unknown as unknown:
                        uncertain.append(f"{where}: {unknown}")
                        return None
                    continue
                if kind == "vmap":
                    try:
                        statement_verdict = self._vmap(key, body, packet)
                    except _Unknown as unknown:
                        uncertain.append(f"{where}: {unknown}")
                        return None
                    if statement_verdict is None:
                        continue
                    kind, body = next(iter(statement_verdict.items()))
                result = self._decision(key, kind, body, where, packet, uncertain, depth)
                if result is not None:
                    if result[0] == "unknown":
                        return None
                    return result
        return None

    def _decision(
        self, key: tuple[str, str, str], kind: str, body: Any, where: str, packet: Packet, uncertain: list[str], depth: int
    ) -> Optional[tuple[str, str]]:
        """The outcome of a verdict statement; ('unknown', …) ends the rule, None goes on."""
        if kind in (DROP, "reject", "tproxy", "synproxy"):
            return (DROP, where) if kind in (DROP, "reject") else (ACCEPT, where)
        if kind == ACCEPT or kind == "queue":
            return (ACCEPT, where)
        if kind == "return":
            return ("return", where)
        if kind == "continue":
            return None
        if kind in ("jump", "goto"):
            target = body["target"] if isinstance(body, Mapping) else str(body)
            if self.skip_ours and target == PREFIX:
                return None
            result = self._walk((key[0], key[1], target), packet, uncertain, depth + 1)
            if result is None and kind == "goto":
                return ("return", where)
            return result
        uncertain.append(f"{where}: {kind}")
        return ("unknown", where)

    def _vmap(self, key: tuple[str, str, str], body: Mapping[str, Any], packet: Packet) -> Optional[Mapping[str, Any]]:
        """The verdict that a verdict map holds for the packet, None for no entry."""
        value = self._value(body["key"], packet)
        data = body["data"]
        entries = data.get("set", []) if isinstance(data, Mapping) else self._elements(key, str(data))
        for pattern, verdict in entries:
            if self._equal(key, value, pattern):
                return verdict if isinstance(verdict, Mapping) else {str(verdict): None}
        return None

    def _elements(self, key: tuple[str, str, str], reference: str) -> list[Any]:
        """The elements of a named set or map."""
        return list(self.sets.get((key[0], key[1], reference.lstrip("@")), {}).get("elem", []))

    def _addresses(self, key: tuple[str, str, str], reference: str) -> Optional[list[tuple[int, int]]]:
        """The addresses of a named set as ranges of numbers, None for a set of something else. Kept: hundreds of peers are looked up."""
        place = (key[0], key[1], reference)
        if place not in self._ranges:
            try:
                self._ranges[place] = intervals(self._elements(key, reference))
            except (KeyError, TypeError, ValueError):
                self._ranges[place] = None  # a set of pairs, say: its elements are compared one by one
        return self._ranges[place]

    def _matches(self, key: tuple[str, str, str], body: Mapping[str, Any], packet: Packet) -> bool:
        """Whether the packet meets a condition. Raises _Unknown."""
        value = self._value(body["left"], packet)
        if value is _NO_SUCH_HEADER:
            return False
        op, right = body.get("op", "=="), body["right"]
        if isinstance(value, frozenset) and op in ("in", "!"):  # any of them, none of them
            return bool(value & _flags(right)) == (op == "in")
        if op in ("==", "in"):
            return self._equal(key, value, right)
        if op == "!=":
            return not self._equal(key, value, right)
        if op not in _COMPARED or not isinstance(value, int) or not isinstance(right, int):
            raise _Unknown(f"{op} of {value!r}")
        return bool(_COMPARED[op](value, right))

    def _value(self, left: Any, packet: Packet) -> Any:
        """The packet's value of an expression. Raises _Unknown."""
        if not isinstance(left, Mapping):
            return left
        kind, body = next(iter(left.items()))
        if kind == "payload":
            return _payload(body, packet)
        if kind == "meta":
            return _meta(body["key"], packet)
        if kind == "fib" and body.get("result") == "type" and body.get("flags") in ("daddr", ["daddr"]):
            return "local"
        if kind == "ct":
            known = {"state": frozenset(("new",)), "direction": "original", "mark": 0, "status": frozenset()}
            if body.get("key") in known:
                return known[body["key"]]
        if kind == "&":
            flags, mask = body
            value = self._value(flags, packet)
            if value is _NO_SUCH_HEADER:
                return value
            if isinstance(value, frozenset):
                return value & _flags(mask)
            if isinstance(value, int) and isinstance(mask, int):
                return value & mask
        if kind == "concat":
            values = [self._value(part, packet) for part in body]
            return _NO_SUCH_HEADER if any(value is _NO_SUCH_HEADER for value in values) else tuple(values)
        raise _Unknown(kind)

    def _equal(self, key: tuple[str, str, str], value: Any, right: Any) -> bool:
        """Whether a value is, or is among, the right side. Raises _Unknown."""
        if isinstance(right, str) and right.startswith("@"):
            ranges = self._addresses(key, right) if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)) else None
            if ranges is not None:
                return any(low <= int(value) <= high for low, high in ranges)
            return any(self._equal(key, value, element) for element in self._elements(key, right))
        if isinstance(right, Mapping) and "|" not in right:
            if "set" in right:
                members = right["set"] if isinstance(right["set"], list) else [right["set"]]
                return any(self._equal(key, value, member) for member in members)
            if "elem" in right:
                return self._equal(key, value, right["elem"]["val"])
            if "concat" in right:
                parts = right["concat"]
                return isinstance(value, tuple) and len(value) == len(parts) and all(self._equal(key, v, p) for v, p in zip(value, parts))
            if "prefix" in right:
                return _in_network(value, right["prefix"])
            if "range" in right:
                low, high = right["range"]
                return _in_range(value, low, high)
            raise _Unknown(next(iter(right)))
        if isinstance(value, _Nowhere):
            return False
        if isinstance(value, frozenset):
            return value == _flags(right)
        if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
            try:
                return value == ipaddress.ip_address(str(right))
            except ValueError as error:
                raise _Unknown(str(right)) from error
        if isinstance(right, str) and isinstance(value, str) and right.endswith("*"):
            return value.startswith(right[:-1])
        return str(value) == str(right)


def _flags(expression: Any) -> frozenset[str]:
    """The flags that an expression names: one, a list, "|" of some, or a number of TCP's bits. Raises _Unknown."""
    if isinstance(expression, Mapping):
        if set(expression) != {"|"}:
            raise _Unknown(next(iter(expression)))
        expression = expression["|"]
    if isinstance(expression, list):
        return frozenset().union(*map(_flags, expression))
    if isinstance(expression, int):
        return frozenset(name for bit, name in enumerate(_TCP_FLAGS) if expression >> bit & 1)
    return frozenset((str(expression),))


class _Nowhere:
    """An address that no rule names: in no set and no network but the one that holds everything."""


_NO_SUCH_HEADER = object()
_NOWHERE = _Nowhere()


def _address(text: Optional[str]) -> Any:
    """The address, or the one that no rule names."""
    return _NOWHERE if text is None else ipaddress.ip_address(text)


def _payload(body: Mapping[str, Any], packet: Packet) -> Any:
    """The value of a header field. Raises _Unknown."""
    protocol, name = body.get("protocol"), body.get("field")
    if protocol in ("ip", "ip6"):
        if (protocol == "ip") != (packet.version == 4):
            return _NO_SUCH_HEADER
        known = {"saddr": _address(packet.source), "daddr": _address(packet.destination), "protocol": "tcp", "nexthdr": "tcp"}
        if name in known:
            return known[name]
        raise _Unknown(f"{protocol} {name}")
    if protocol in ("tcp", "th"):
        if name == "dport":
            return packet.port
        if name == "flags":
            return frozenset(("syn",))
        raise _Unknown(f"{protocol} {name}")
    if protocol in ("udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "esp", "ah", "comp", "arp", "gre", "vxlan"):
        return _NO_SUCH_HEADER
    raise _Unknown(f"payload {protocol}")


def _meta(key: str, packet: Packet) -> Any:
    """The value of a meta key. Raises _Unknown."""
    known = {
        "iif": packet.interface,
        "iifname": packet.interface,
        "l4proto": "tcp",
        "protocol": "ip" if packet.version == 4 else "ip6",
        "nfproto": "ipv4" if packet.version == 4 else "ipv6",
        "mark": 0,
        "pkttype": "host",
    }
    if key in known:
        return known[key]
    raise _Unknown(f"meta {key}")


def _in_network(value: Any, prefix: Mapping[str, Any]) -> bool:
    """Whether an address lies in nft's {"addr", "len"}. Raises _Unknown."""
    if isinstance(value, _Nowhere):
        return int(prefix["len"]) == 0
    if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        return value in ipaddress.ip_network(f"{prefix['addr']}/{prefix['len']}", strict=False)
    raise _Unknown("prefix")


def _in_range(value: Any, low: Any, high: Any) -> bool:
    """Whether a number or address lies between two others. Raises _Unknown."""
    if isinstance(value, _Nowhere):
        return False
    try:
        if isinstance(value, int):
            return int(low) <= value <= int(high)
        if isinstance(value, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
            return int(ipaddress.ip_address(str(low))) <= int(value) <= int(ipaddress.ip_address(str(high)))
    except ValueError as error:
        raise _Unknown("range") from error
    raise _Unknown("range")


def deciding_chains(items: Sequence[Mapping[str, Any]], packets: Iterable[Packet]) -> dict[tuple[str, str, str], str]:
    """The chains of the user's that would drop one of these packets, each with the reason."""
    ruleset = Ruleset(items)
    found: dict[tuple[str, str, str], str] = {}
    for packet in packets:
        for key in ruleset.base_chains(packet.version):
            if key not in found:
                verdict = ruleset.chain_verdict(key, packet)
                if verdict.action == DROP:
                    found[key] = verdict.where
    return found


def keeps_strangers_out(items: Sequence[Mapping[str, Any]], version: int, interface: str, ports: Sequence[int]) -> bool:
    """Whether the user's rules alone drop new connections to most of `ports` from an address that no rule names.

    Most, since a rule may name some: one that lets a service in does not make a default of it, nor does one that drops it.
    """
    ruleset = Ruleset(items)
    sample = sorted({ports[(len(ports) - 1) * step // (SAMPLES - 1)] for step in range(SAMPLES)})
    dropped = [port for port in sample if ruleset.through(Packet(version, None, port, interface)).action == DROP]
    return 2 * len(dropped) > len(sample)


def managed_by_iptables(key: tuple[str, str, str]) -> bool:
    """Whether a chain belongs to iptables-nft: such tables must not be given nft rules, iptables would no longer list them."""
    family, table, chain = key
    return family in ("ip", "ip6") and table in ("filter", "mangle", "raw", "security", "nat") and chain.isupper()
