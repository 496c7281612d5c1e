# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What one job asks of a node's firewall: parsed, checked, and kept as JSON.

Pure: nothing here looks at the node. `parse_job` reports every problem at once, each as one sentence that
names the role's variable, what was expected and what to do.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass, replace
from typing import Any, Iterable, Mapping, Sequence

SPEC_VERSION = 1
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_INTERFACE = re.compile(r"[^\s/\"'*\\;{}]{1,15}")


class SpecError(ValueError):
    """The request cannot be carried out; `problems` holds one sentence for each reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Monitoring:
    """A TCP port that its own sources (networks in CIDR form) may reach."""

    port: int
    sources4: tuple[str, ...]
    sources6: tuple[str, ...]


@dataclass(frozen=True)
class JobRules:
    """One job's rules on this node.

    ports: TCP ports of the job (rendezvous, supervisor, verifier), for its peers only.
    peers4, peers6: the addresses of all nodes of the job.
    interface: the training interface, on which the peers are let in.
    trust_peers: True lets in everything from the peers, False only `ports` and `ephemeral`.
    ephemeral: first and last port of the range from which the kernel picks listening ports.
    narrow: True means that `ephemeral` is to be made the kernel's range (sysctl).
    protect: True means that others are kept out of `ports` and `ephemeral` where no firewall does so already.
    """

    job: str
    ports: tuple[int, ...]
    peers4: tuple[str, ...]
    peers6: tuple[str, ...]
    interface: str
    trust_peers: bool
    ephemeral: tuple[int, int]
    narrow: bool
    protect: bool
    monitoring: tuple[Monitoring, ...] = ()


def slug(job: str) -> str:
    """The job's name as part of an identifier (at most 18 characters, for ipset's limit of 31); never shared by two jobs."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", job)
    if plain == job and len(job) <= 18 and not re.fullmatch(r".*_[0-9a-f]{6}", job):
        return job
    return plain[:11] + "_" + hashlib.sha256(job.encode()).hexdigest()[:6]


def parse_ports(values: Iterable[Any], variable: str, problems: list[str]) -> tuple[int, ...]:
    """Distinct port numbers in ascending order; problems are appended to `problems`."""
    seen: set[int] = set()
    for value in values:
        try:
            port = int(value)
        except (TypeError, ValueError, OverflowError):
            port = 0
        if not 1 <= port <= 65535:
            problems.append(f"{variable} holds {value!r}, which is no port; give whole numbers from 1 to 65535.")
        elif port in seen:
            problems.append(f"{variable} names port {port} twice; each service of a job needs a port of its own.")
        else:
            seen.add(port)
    return tuple(sorted(seen))


def parse_range(value: Any, variable: str, problems: list[str]) -> tuple[int, int]:
    """A range of ports, 'first-last' or [first, last]."""
    parts = value if isinstance(value, (list, tuple)) else re.split(r"[-:\s]+", str(value).strip())
    try:
        first, last = (int(part) for part in parts)
    except (TypeError, ValueError):
        first, last = 0, 0
    if not 1024 <= first < last <= 65535:
        problems.append(f"{variable} is {value!r}, which is no range of ports; give first-last between 1024 and 65535, as in 50000-60999.")
        return (32768, 60999)
    return (first, last)


def parse_addresses(values: Iterable[Any], variable: str, problems: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Host addresses as (IPv4, IPv6), distinct, in numeric order."""
    found: dict[int, set[Any]] = {4: set(), 6: set()}
    for value in values:
        try:
            address = ipaddress.ip_address(str(value).strip())
        except ValueError:
            problems.append(f"{variable} holds {value!r}, which is no IP address; give the nodes' addresses on the training interface, not names.")
            continue
        if address.is_unspecified or address.is_multicast or address.is_loopback:
            problems.append(f"{variable} holds {value}, which is no address of a node; give the nodes' addresses on the training interface.")
            continue
        found[address.version].add(address)
    return tuple(str(a) for a in sorted(found[4])), tuple(str(a) for a in sorted(found[6]))


def parse_networks(values: Iterable[Any], variable: str, problems: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Addresses or networks as (IPv4, IPv6) in CIDR form; overlapping ones are merged."""
    found: dict[int, list[Any]] = {4: [], 6: []}
    for value in values:
        try:
            network = ipaddress.ip_network(str(value).strip(), strict=False)
        except ValueError:
            problems.append(f"{variable} names the source {value!r}, which is neither an address nor a network; give for instance 198.18.0.5 or 198.18.0.0/24.")
            continue
        found[network.version].append(network)
    return (
        tuple(str(n) for n in ipaddress.collapse_addresses(found[4])),
        tuple(str(n) for n in ipaddress.collapse_addresses(found[6])),
    )


def parse_monitoring(values: Iterable[Any], problems: list[str]) -> tuple[Monitoring, ...]:
    """The list firewall_monitoring_ports: [{port: 9400, sources: [198.18.9.0/24]}]."""
    rows: list[Monitoring] = []
    ports: list[Any] = []
    for value in values:
        if not isinstance(value, Mapping) or "port" not in value:
            problems.append(f"firewall_monitoring_ports holds {value!r}; give {{port: 9400, sources: [198.18.9.0/24]}}.")
            continue
        ports.append(value["port"])
        sources = value.get("sources") or []
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            sources = [sources]
        if not sources:
            problems.append(
                f"firewall_monitoring_ports names no sources for port {value['port']}; give addresses or networks (0.0.0.0/0 and ::/0 for everyone)."
            )
        sources4, sources6 = parse_networks(sources, "firewall_monitoring_ports", problems)
        rows.append(Monitoring(0, sources4, sources6))
    before = len(problems)
    numbers = parse_ports(ports, "firewall_monitoring_ports", problems)
    if len(problems) > before or len(numbers) != len(rows):
        return ()
    merged = (Monitoring(int(port), row.sources4, row.sources6) for port, row in zip(ports, rows))
    return tuple(sorted(merged, key=lambda row: row.port))


def parse_job(
    job: Any,
    ports: Iterable[Any],
    peers: Iterable[Any],
    interface: Any,
    trust_peers: bool,
    kernel_range: tuple[int, int],
    narrow_range: Any = None,
    protect: bool = True,
    monitoring: Iterable[Any] = (),
    management_ports: Iterable[int] = (),
) -> JobRules:
    """The checked request.

    kernel_range: the node's net.ipv4.ip_local_port_range; used as it is while the peers are trusted.
    narrow_range: the range the kernel is to use when they are not.
    management_ports: ports of sshd, which no job may claim.
    Raises SpecError with all problems.
    """
    problems: list[str] = []
    name = str(job or "")
    if not _JOB_NAME.fullmatch(name):
        problems.append(f"torchrun_job is {name!r}; give a name of letters, digits, '_', '.' and '-' that begins with a letter or digit (at most 63).")
    before = len(problems)
    numbers = parse_ports(ports, "the job's ports (torchrun_master_port, torchrun_supervisor_port, nccl_verify_port)", problems)
    if not numbers and len(problems) == before:
        problems.append("The job has no ports; give at least torchrun_master_port.")
    for port in sorted(set(numbers) & set(management_ports)):
        problems.append(f"The job's port {port} is where sshd listens on this node; set torchrun_master_port (and the ports derived from it) to others.")
    before = len(problems)
    peers4, peers6 = parse_addresses(peers, "the peers' list", problems)
    if not peers4 and not peers6 and len(problems) == before:
        problems.append("The peers' list is empty; the job's nodes need addresses (ansible_host, or cluster_interface with an address).")
    if not _INTERFACE.fullmatch(str(interface or "")):
        problems.append(f"cluster_interface is {interface!r}; give the name of the training interface, as `ip link` shows it.")
    ephemeral = kernel_range
    narrow = not trust_peers and narrow_range not in (None, "")
    if narrow:
        ephemeral = parse_range(narrow_range, "firewall_ephemeral_ports", problems)
    rows = parse_monitoring(monitoring, problems)
    if problems:
        raise SpecError(problems)
    return JobRules(name, numbers, peers4, peers6, str(interface), bool(trust_peers), ephemeral, narrow, bool(protect), rows)


def check_together(jobs: Sequence[JobRules]) -> None:
    """Raise SpecError where jobs on one node ask for two different ranges of one kernel.

    A port that two jobs share is fine here: the verifier's port is the same for all jobs, and the plan sees to the others.
    """
    problems: list[str] = []
    ranges = {rules.ephemeral for rules in jobs if rules.narrow}
    if len(ranges) > 1:
        shown = " and ".join(f"{first}-{last}" for first, last in sorted(ranges))
        problems.append(f"Jobs on this node ask for different firewall_ephemeral_ports ({shown}); a kernel has one range, give all of them the same.")
    if problems:
        raise SpecError(problems)


def with_range_of_the_kernel(jobs: Sequence[JobRules], usual: tuple[int, int]) -> list[JobRules]:
    """The jobs with the range that the kernel will have: one job that narrows it does so for all, and the last one to go gives it back.

    usual: the kernel's range where nobody narrows it.
    """
    ephemeral = next((rules.ephemeral for rules in jobs if rules.narrow), usual)
    return [replace(rules, ephemeral=ephemeral) for rules in jobs]


def dump(rules: JobRules) -> str:
    """The job's file on the node: JSON, one key a line, stable."""
    value = {
        "version": SPEC_VERSION,
        "job": rules.job,
        "ports": list(rules.ports),
        "peers4": list(rules.peers4),
        "peers6": list(rules.peers6),
        "interface": rules.interface,
        "trust_peers": rules.trust_peers,
        "ephemeral": list(rules.ephemeral),
        "narrow": rules.narrow,
        "protect": rules.protect,
        "monitoring": [{"port": m.port, "sources4": list(m.sources4), "sources6": list(m.sources6)} for m in rules.monitoring],
    }
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def load(text: str) -> JobRules:
    """The inverse of `dump`. Raises ValueError for what `dump` did not write."""
    try:
        value = json.loads(text)
        if value["version"] != SPEC_VERSION:
            raise ValueError(f"version {value['version']} is not {SPEC_VERSION}")
        first, last = value["ephemeral"]
        return JobRules(
            job=value["job"],
            ports=tuple(value["ports"]),
            peers4=tuple(value["peers4"]),
            peers6=tuple(value["peers6"]),
            interface=value["interface"],
            trust_peers=value["trust_peers"],
            ephemeral=(first, last),
            narrow=value["narrow"],
            protect=value["protect"],
            monitoring=tuple(Monitoring(m["port"], tuple(m["sources4"]), tuple(m["sources6"])) for m in value["monitoring"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a job's firewall file: {error}") from error
