# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the jobs and what the node has to what it should have: the backend, the files, the live rules, the differences.

Pure: `Facts` go in, a `Target` and sentences come out.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils import firewall_files as files
from ansible_collections.onprem.torch.plugins.module_utils import firewall_firewalld as firewalld
from ansible_collections.onprem.torch.plugins.module_utils import firewall_iptables as iptables
from ansible_collections.onprem.torch.plugins.module_utils import firewall_nft as nft
from ansible_collections.onprem.torch.plugins.module_utils import firewall_ufw as ufw
from ansible_collections.onprem.torch.plugins.module_utils import firewall_verdict as verdict
from ansible_collections.onprem.torch.plugins.module_utils.firewall_sets import Accept, accepts
from ansible_collections.onprem.torch.plugins.module_utils.firewall_spec import JobRules, SpecError, dump

BACKENDS = ("nftables", "firewalld", "ufw")
# The package that brings a backend's program, the same on all supported distributions.
PACKAGES = {"nft": "nftables", "ipset": "ipset"}
SOME_INTERFACE = ""  # one that no rule names
FIRST_UNPRIVILEGED, LAST_PORT = 1024, 65535


@dataclass
class Facts:
    """What the node has.

    programs: which of nft, firewall-cmd, ufw, ipset are installed. ruleset: `nft -j list ruleset`.
    filters: the same with what only iptables can show, which decides over packets, too. present: text of every file of ours that exists.
    shared: text of the user's files that may hold a block of ours (ufw's). enabled: whether our unit is.
    firewalld, ufw: what these hold, where they are installed (firewalld: active).
    """

    programs: frozenset[str] = frozenset()
    ruleset: Sequence[Mapping[str, Any]] = ()
    firewalld_active: bool = False
    ufw_enabled: bool = False
    filters: Sequence[Mapping[str, Any]] = ()
    management_ports: tuple[int, ...] = (22,)
    kernel_range: tuple[int, int] = (32768, 60999)
    present: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    enabled: bool = False
    firewalld: firewalld.Live = field(default_factory=firewalld.Live)
    ufw: ufw.Live = field(default_factory=ufw.Live)


@dataclass
class Target:
    """What the node should have.

    files: path to (text, mode). guard: our own table, None for none. openings: our share in tables of the user's.
    jumps: the chains of the user's that get our jump, with the reason. kernel_range: the range to set, None to leave it.
    accepts: what firewalld or ufw is to let in; empty for the other backends. shared: text of the user's files.
    """

    backend: str
    accepts: list[Accept] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    guard: Optional[nft.NftTable] = None
    openings: list[nft.NftTable] = field(default_factory=list)
    jumps: dict[tuple[str, str, str], str] = field(default_factory=dict)
    kernel_range: Optional[tuple[int, int]] = None
    unit: bool = False


def first_packets(jobs: Sequence[JobRules]) -> list[verdict.Packet]:
    """Connections that must come through: from the peers of each job to its ports and into its range, from those that monitor."""
    packets: list[verdict.Packet] = []
    for job in jobs:
        low, high = job.ephemeral
        ports = [*job.ports, low, (low + high) // 2, high]
        for version, peers in ((4, job.peers4), (6, job.peers6)):
            packets += [verdict.Packet(version, peer, port, job.interface) for peer in sorted({*peers[:1], *peers[-1:]}) for port in ports]
            # A rule of the user's may name some of the nodes; most treat all ports of one alike.
            packets += [verdict.Packet(version, peer, port, job.interface) for peer in peers[1:-1] for port in (ports[0], high)]
    return packets + from_monitors(jobs)


def from_monitors(jobs: Sequence[JobRules], interface: Optional[str] = None) -> list[verdict.Packet]:
    """Connections of those that monitor, on the training interface or another one."""
    return [
        verdict.Packet(version, str(ipaddress.ip_network(source).network_address), row.port, job.interface if interface is None else interface)
        for job in jobs
        for row in job.monitoring
        for version, sources in ((4, row.sources4), (6, row.sources6))
        for source in sources
    ]


def of_a_manager(key: tuple[str, str, str], facts: Facts) -> bool:
    """Whether a chain belongs to the active firewalld or ufw, which is then asked instead of changed with nft."""
    if key[1] == iptables.LEGACY:
        return facts.firewalld_active or facts.ufw_enabled
    if key[1] == "firewalld":
        return facts.firewalld_active
    return (facts.firewalld_active or facts.ufw_enabled) and verdict.managed_by_iptables(key)


def choose_backend(asked: str, jobs: Sequence[JobRules], facts: Facts) -> tuple[str, dict[tuple[str, str, str], str]]:
    """The backend, and the chains of plain nftables that would drop what the jobs need.

    Raises SpecError: two firewalls are active, the one asked for is not there, or rules that we must not touch decide.
    """
    problems: list[str] = []
    if facts.firewalld_active and facts.ufw_enabled:
        problems.append("firewalld and ufw are both active; they overwrite each other's rules, disable one of them.")
    active = "firewalld" if facts.firewalld_active else "ufw" if facts.ufw_enabled else "nftables"
    program = {"firewalld": "firewall-cmd", "ufw": "ufw", "nftables": "nft"}
    if asked != "auto" and asked != active:
        if program[asked] not in facts.programs:
            problems.append(f"firewall_backend is {asked}, which is not installed; install and enable it, or set firewall_backend to auto.")
        elif asked == "nftables":
            problems.append(f"firewall_backend is nftables, but {active} is active and decides; set firewall_backend to auto or {active}.")
        else:
            problems.append(
                f"firewall_backend is {asked}, which is installed but not active; enable it with your SSH access allowed, or set firewall_backend to auto."
            )
    chains = verdict.deciding_chains(facts.filters, first_packets(jobs))
    ours = {key: reason for key, reason in chains.items() if not of_a_manager(key, facts)}
    if active == "nftables":
        # Those that monitor may come in by any interface. What only iptables could open is left to whoever made its rules for one.
        elsewhere = verdict.deciding_chains(facts.filters, from_monitors(jobs, SOME_INTERFACE))
        ours.update({key: reason for key, reason in elsewhere.items() if key[1] != iptables.LEGACY and not verdict.managed_by_iptables(key)})
    for key, reason in ours.items():
        name = " ".join(key)
        if key[1] == iptables.LEGACY:
            problems.append(
                f"Rules of legacy iptables drop the jobs' connections ({reason}), and nftables cannot open what they drop; "
                "allow the peers there, or move these rules to nftables (iptables-translate), firewalld or ufw."
            )
        elif verdict.managed_by_iptables(key):
            problems.append(
                f"Rules made with iptables drop the jobs' connections ({reason}), and nft must not write into tables of iptables; "
                "allow the peers there, or move these rules to nftables (iptables-translate), firewalld or ufw."
            )
        elif active != "nftables":
            problems.append(f"{active} is active, but chain {name} of nftables drops the jobs' connections as well ({reason}); keep one of the two.")
    if active == "firewalld" and facts.firewalld.backend != "nftables":
        problems.append(
            f"firewalld writes to {facts.firewalld.backend}, which cannot be compared with what it should hold; set FirewallBackend=nftables in "
            "/etc/firewalld/firewalld.conf and restart firewalld."
        )
    if problems:
        raise SpecError(problems)
    return active, ours


def stranger_gets_in(jobs: Sequence[JobRules], facts: Facts) -> bool:
    """Whether no firewall of the user's keeps an address that no rule names away from the training interface.

    That a rule drops some ports is not enough: most of the range that listeners get their ports from, and most of the others
    that a job's ports can be chosen from, have to be closed.
    """
    if flushed(facts):
        return files.GUARD_FILE in facts.present  # the node's own rules come back in this run: leave it at what they called for
    for job in jobs:
        low, high = job.ephemeral
        others = [*range(FIRST_UNPRIVILEGED, low), *range(high + 1, LAST_PORT + 1)]
        for ports in (range(low, high + 1), others):
            if job.protect and ports and not all(verdict.keeps_strangers_out(facts.filters, version, job.interface, ports) for version in (4, 6)):
                return True
    return False


def flushed(facts: Facts) -> bool:
    """Whether the active firewalld's or ufw's rules are gone from the kernel."""
    if facts.firewalld_active:
        return not any("table" in item and (item["table"]["family"], item["table"]["name"]) == firewalld.TABLE for item in facts.ruleset)
    return facts.ufw_enabled and ufw.flushed(facts.ufw)


def target(asked: str, jobs: Sequence[JobRules], facts: Facts) -> Target:
    """What the node should have for these jobs; with no jobs: nothing of ours. Raises SpecError."""
    if not jobs:
        return Target(backend="none", shared={path: ufw.without_block(text) for path, text in facts.shared.items()})
    backend, chains = choose_backend(asked, jobs, facts)
    wanted = Target(backend=backend)
    _managers(backend, jobs, facts, wanted)
    for job in jobs:
        wanted.files[f"{files.JOBS_DIR}/{job.job}.json"] = (dump(job), 0o644)
    if stranger_gets_in(jobs, facts):
        wanted.guard = nft.guard_table(jobs, facts.management_ports)
        wanted.files[files.GUARD_FILE] = (nft.render_own(wanted.guard), 0o644)
    if backend == "nftables" and chains:
        for family, table in sorted({(key[0], key[1]) for key in chains}):
            opening = nft.opening_table(jobs, family, table)
            wanted.openings.append(opening)
            wanted.files[files.opening_file(family, table)] = (nft.render_opening(opening), 0o644)
        wanted.jumps = dict(sorted(chains.items()))
        wanted.files[files.JUMPS_FILE] = ("".join(" ".join(key) + "\n" for key in wanted.jumps), 0o644)
    if wanted.guard or wanted.openings or backend == "ufw":
        wanted.unit = True
        wanted.files[files.SCRIPT] = (files.restore_script(), 0o755)
        wanted.files[files.UNIT_FILE] = (files.unit_file("ufw.service " if backend == "ufw" else ""), 0o644)
        wanted.files[files.DROP_IN] = (files.drop_in(), 0o644)
    _narrow(jobs, facts, wanted)
    return wanted


def _managers(backend: str, jobs: Sequence[JobRules], facts: Facts, wanted: Target) -> None:
    """firewalld's policy and sets, ufw's sets and blocks; whichever is not the backend loses its own. Raises SpecError."""
    if backend == "firewalld":
        wanted.accepts = firewalld.with_interface(facts.firewalld.version, accepts(jobs))
        wanted.files[firewalld.POLICY_FILE] = (firewalld.policy_file(wanted.accepts), 0o644)
        for accept in wanted.accepts:
            wanted.files[firewalld.ipset_path(accept.source)] = (firewalld.ipset_file(accept.source), 0o644)
    if backend == "ufw":
        wanted.accepts = accepts(jobs)
        wanted.files[files.IPSETS_FILE] = (ufw.ipsets_file(wanted.accepts), 0o644)
        problems = ufw.problems(wanted.accepts, facts.shared)
        if problems:
            raise SpecError(problems)
    for version, path in ufw.RULES_FILES.items():
        if path in facts.shared:
            lines = ufw.rule_lines(wanted.accepts, version) if backend == "ufw" else []
            wanted.shared[path] = ufw.with_block(facts.shared[path], lines) or facts.shared[path]


def missing_packages(wanted: Target, facts: Facts) -> list[str]:
    """Packages without which the rules cannot be loaded, or the node's own rules not be read."""
    programs = (["nft"] if wanted.backend != "none" else []) + (["ipset"] if wanted.backend == "ufw" else [])
    return [PACKAGES[program] for program in programs if program not in facts.programs]


def _narrow(jobs: Sequence[JobRules], facts: Facts, wanted: Target) -> None:
    """The kernel's range where the peers are not trusted, and what it was before, to be put back at the end."""
    narrow = [job.ephemeral for job in jobs if job.narrow]
    if narrow:
        wanted.kernel_range = narrow[0]
        before = facts.present.get(files.BEFORE_FILE) or json.dumps({"ip_local_port_range": list(facts.kernel_range)}) + "\n"
        wanted.files[files.BEFORE_FILE] = (before, 0o644)
        wanted.files[files.SYSCTL_FILE] = (files.sysctl_file(*narrow[0]), 0o644)


def range_before(facts: Facts) -> Optional[tuple[int, int]]:
    """The kernel's range before we narrowed it, None where we did not."""
    text = facts.present.get(files.BEFORE_FILE)
    if not text:
        return None
    try:
        first, last = json.loads(text)["ip_local_port_range"]
        return int(first), int(last)
    except (ValueError, KeyError, TypeError):
        return None


def wanted_range(wanted: Target, facts: Facts) -> Optional[tuple[int, int]]:
    """The range to set now, None where the kernel's is right or none of our business."""
    want = wanted.kernel_range or range_before(facts)
    return want if want and want != facts.kernel_range else None


def file_changes(wanted: Target, facts: Facts) -> dict[str, tuple[Optional[str], Optional[str]]]:
    """Path to (text now, text then) of every file that changes; None stands for no file."""
    changes: dict[str, tuple[Optional[str], Optional[str]]] = {}
    for path, (text, _mode) in wanted.files.items():
        if facts.present.get(path) != text:
            changes[path] = (facts.present.get(path), text)
    for path, text in facts.present.items():
        if path not in wanted.files:
            changes[path] = (text, None)
    for path, text in wanted.shared.items():
        if facts.shared[path] != text:
            changes[path] = (facts.shared[path], text)
    return dict(sorted(changes.items()))


def live_differences(wanted: Target, facts: Facts) -> list[str]:
    """What the live rules lack or have too much, a sentence each."""
    found: list[str] = []
    items = facts.ruleset
    if wanted.guard:
        found += nft.differences(items, wanted.guard, own=True)
    elif any("table" in item and item["table"]["name"] == nft.OWN_TABLE and item["table"]["family"] == nft.OWN_FAMILY for item in items):
        found.append(f"Table {nft.OWN_FAMILY} {nft.OWN_TABLE} is no longer wanted.")
    for opening in wanted.openings:
        found += nft.differences(items, opening, own=False)
    live_jumps = [jump[:3] for jump in nft.jumps(items)]
    found += [f"Chain {' '.join(key)} does not jump to our rules." for key in wanted.jumps if key not in live_jumps]
    found += [f"Chain {' '.join(key)} still jumps to our rules." for key in live_jumps if key not in wanted.jumps]
    found += [f"Our rules in table {family} {table} are no longer wanted." for family, table in leftover_tables(wanted, facts)]
    if facts.firewalld_active:
        found += firewalld.differences(facts.firewalld, wanted.accepts if wanted.backend == "firewalld" else [], items)
    found += ufw.differences(facts.ufw, wanted.accepts if wanted.backend == "ufw" else [])
    if wanted.unit and not facts.enabled:
        found.append(f"{files.UNIT} is not enabled.")
    change = wanted_range(wanted, facts)
    if change:
        found.append(f"net.ipv4.ip_local_port_range is {facts.kernel_range[0]} {facts.kernel_range[1]}, not {change[0]} {change[1]}.")
    return found


def leftover_tables(wanted: Target, facts: Facts) -> list[tuple[str, str]]:
    """Tables of the user's in which something of ours is no longer wanted."""
    return nft.leftovers(facts.ruleset, [(opening.family, opening.name) for opening in wanted.openings])


def transaction(wanted: Target, facts: Facts) -> str:
    """Text for `nft -f` that takes the live rules to the target as one step; empty for no rules before and after."""
    items = facts.ruleset
    parts: list[str] = []
    live_jumps = nft.jumps(items)
    parts += [
        f"delete rule {family} {table} {chain} handle {handle}"
        for family, table, chain, handle in live_jumps
        if (family, table, chain) not in wanted.jumps and (family, table) in {(o.family, o.name) for o in wanted.openings}
    ]
    for family, table in leftover_tables(wanted, facts):
        parts += nft.removal(items, family, table)
    for opening in wanted.openings:
        parts.append(nft.render_opening(opening).rstrip("\n"))
        parts += nft.removal(items, opening.family, opening.name, [item.name for item in opening.sets], keep_chain=True)
    present = {jump[:3] for jump in live_jumps}
    parts += [f"insert rule {' '.join(key)} {nft.commented(nft.jump_rule())}" for key in wanted.jumps if key not in present]
    if wanted.guard:
        parts.append(nft.render_own(wanted.guard).rstrip("\n"))
    elif any("table" in item and (item["table"]["family"], item["table"]["name"]) == (nft.OWN_FAMILY, nft.OWN_TABLE) for item in items):
        parts.append(f"delete table {nft.OWN_FAMILY} {nft.OWN_TABLE}")
    return "\n".join(parts) + "\n" if parts else ""
