# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules as ufw's: ipsets, and a block in before.rules and before6.rules that matches them.

Pure. ufw's own rules know no sets, so the block is where ufw's manual puts what its command cannot say. Everything
outside the block keeps its bytes. The sets must exist before ufw loads the block: the unit sees to that at boot.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils.firewall_nft import MARKER
from ansible_collections.onprem.torch.plugins.module_utils.firewall_sets import Accept, AddressSet, normal

SETTINGS = "/etc/default/ufw"
RULES_FILES = {4: "/etc/ufw/before.rules", 6: "/etc/ufw/before6.rules"}
CHAINS = {4: "ufw-before-input", 6: "ufw6-before-input"}
PROGRAMS = {4: "iptables", 6: "ip6tables"}
BEGIN = f"# begin {MARKER}: made by its role firewall and replaced by its next run\n"
END = f"# end {MARKER}\n"
# Takes all of ufw's rules out of the kernel, without disabling it.
FLUSH = "/lib/ufw/ufw-init flush-all"
# The set that new elements are gathered in before it takes the place of the old one.
SPARE_SET = "onp_new"


@dataclass
class Live:
    """What the kernel holds.

    rules: IP version to the comments of our rules in ufw's chain; None where ufw manages the version but the chain is gone.
    sets: our ipsets by name, (type, elements).
    """

    rules: dict[int, Optional[list[str]]] = field(default_factory=dict)
    sets: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)


def manages_ipv6(settings: str) -> bool:
    """Whether ufw looks after IPv6, by /etc/default/ufw."""
    values = re.findall(r"^\s*IPV6\s*=\s*[\"']?(\w+)", settings, re.M)
    return bool(values) and values[-1].lower() == "yes"


def rule_lines(wanted: Sequence[Accept], version: int) -> list[str]:
    """The rules of one IP version as iptables-restore takes them."""
    lines: list[str] = []
    for accept in wanted:
        if accept.source.version != version:
            continue
        interface = f" -i {accept.source.interface}" if accept.source.interface else ""
        for ports in [f" -p tcp -m tcp --dport {low}:{high}" if low != high else f" -p tcp -m tcp --dport {low}" for low, high in accept.ports] or [""]:
            rule = f"{interface}{ports} -m set --match-set {accept.source.name} src"
            lines.append(f'-A {CHAINS[version]}{rule} -m comment --comment "{comment(rule)}" -j ACCEPT')
    return lines


def comment(rule: str) -> str:
    """The comment by which a rule is recognised: the marker and a hash of the rule's text."""
    return f"{MARKER} {hashlib.sha256(rule.encode()).hexdigest()[:10]}"


def comments(text: str) -> list[str]:
    """The comments of our rules in the output of `iptables -S`, or in a block, in order."""
    return re.findall(rf'--comment "({re.escape(MARKER)} [0-9a-f]+)"', text)


def without_block(text: str) -> str:
    """The user's file as it is without us."""
    return re.sub(rf"^# begin {re.escape(MARKER)}\b.*\n(?:.*\n)*?# end {re.escape(MARKER)}\n", "", text, flags=re.M)


def with_block(text: str, lines: Sequence[str]) -> Optional[str]:
    """The user's file with our rules at the end of its filter table; None where it has no such table."""
    plain = without_block(text)
    if not lines:
        return plain
    table = re.search(r"^\*filter[ \t]*\n", plain, re.M)
    commit = re.compile(r"^COMMIT[ \t]*$", re.M).search(plain, table.end()) if table else None
    if not commit:
        return None
    return plain[: commit.start()] + BEGIN + "".join(f"{line}\n" for line in lines) + END + plain[commit.start() :]


def set_type(source: AddressSet) -> str:
    """The ipset's type and family, as `ipset save` shows them."""
    return f"hash:{'net' if source.networks else 'ip'} family {'inet' if source.version == 4 else 'inet6'}"


def ipsets_file(wanted: Sequence[Accept]) -> str:
    """Text for `ipset -exist restore` that makes the sets what they should be; each is replaced as one step."""
    lines: list[str] = []
    for accept in wanted:
        source = accept.source
        lines += [
            f"create {source.name} {set_type(source)}",
            f"create {SPARE_SET} {set_type(source)}",
            *(f"add {SPARE_SET} {element}" for element in source.elements),
            f"swap {SPARE_SET} {source.name}",
            f"destroy {SPARE_SET}",
        ]
    return "\n".join(lines) + "\n"


def parse_ipsets(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """The sets in the output of `ipset save`: name to (type and family, elements)."""
    types: dict[str, str] = {}
    elements: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["create"] and len(words) >= 5:
            types[words[1]] = f"{words[2]} family {words[4]}"
        elif words[:1] == ["add"] and len(words) >= 3 and words[1] in types:
            elements.setdefault(words[1], []).append(words[2])
    # Other kinds hold more than addresses and networks, and are none of ours.
    ours = {name: kind for name, kind in types.items() if kind.startswith(("hash:ip family", "hash:net family"))}
    return {name: (kind, normal(elements.get(name, ()))) for name, kind in ours.items()}


def differences(live: Live, wanted: Sequence[Accept]) -> list[str]:
    """What the kernel holds differently, a sentence each."""
    found: list[str] = []
    for version, have in live.rules.items():
        chain = CHAINS[version]
        want = comments("\n".join(rule_lines(wanted, version)))
        if have is None:
            if wanted:
                found.append(f"ufw is enabled, but its chain {chain} is gone from the kernel, as after a flush by hand.")
        elif have != want:
            found.append(f"Our rules in ufw's chain {chain} {'differ' if want else 'are no longer wanted'}.")
    names = {accept.source.name for accept in wanted}
    for accept in wanted:
        name = accept.source.name
        if name not in live.sets:
            found.append(f"The ipset {name} is missing.")
        elif live.sets[name] != (set_type(accept.source), normal(accept.source.elements)):
            found.append(f"The ipset {name} holds other elements.")
    found += [f"The ipset {name} is no longer wanted." for name in sorted(set(live.sets) - names)]
    return found


def flushed(live: Live) -> bool:
    """Whether ufw's chains are gone although it is enabled."""
    return any(have is None for have in live.rules.values())


def problems(wanted: Sequence[Accept], files: Mapping[str, str]) -> list[str]:
    """Why the rules cannot be written, a sentence each."""
    return [
        f"{path} has no filter table that ends with COMMIT, so the peers' rules have no place; put back ufw's own (/usr/share/ufw/iptables)."
        for version, path in RULES_FILES.items()
        if path in files and rule_lines(wanted, version) and with_block(files[path], rule_lines(wanted, version)) is None
    ]
