# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with the role's variables, or with a node's firewalls, before anything changes."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import firewall_spec as spec
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

if t.TYPE_CHECKING:
    from ansible_collections.onprem.torch.plugins.module_utils.plan import Host

# A new SSH connection takes a second or two; less time than this would put back changes that work.
LEAST_ROLLBACK_SECONDS = 5


def check(hosts: t.Sequence[Host], ports: t.Mapping[str, int]) -> list[Problem]:
    """Return the problems of all hosts. ports: variable to port, the job's fixed ones."""
    first = hosts[0].variables
    if first.get("firewall_state") == "absent":
        return []
    return job_wide(first, ports) + [problem for host in hosts for problem in backend(host)]


def job_wide(variables: t.Mapping[str, t.Any], ports: t.Mapping[str, int]) -> list[Problem]:
    """Return the problems with what is the same on all hosts."""
    sentences: list[str] = []
    monitoring = spec.parse_monitoring(variables.get("firewall_monitoring_ports") or [], sentences)
    for row in monitoring:
        holder = next((name for name, port in ports.items() if port == row.port), "")
        if holder:
            sentences.append(f"firewall_monitoring_ports names port {row.port}, which is {holder}; the job's ports are for its peers only, name another.")
    trusted = variables.get("firewall_trust_peers") is not False
    if not trusted or variables.get("firewall_ephemeral_ports"):
        before = len(sentences)
        low, high = spec.parse_range(variables.get("firewall_ephemeral_ports"), "firewall_ephemeral_ports", sentences)
        for name, port in ports.items():
            if not trusted and len(sentences) == before and low <= port <= high:
                sentences.append(
                    f"firewall_ephemeral_ports is {low}-{high}, in which {name} ({port}) lies, so any connection may take it; choose a range without it."
                )
    wait = variables.get("firewall_rollback_after")
    if wait is not None and wait < LEAST_ROLLBACK_SECONDS:
        sentences.append(f"firewall_rollback_after is {wait}, but {LEAST_ROLLBACK_SECONDS} seconds or more were expected; a new SSH connection takes a moment.")
    return [problem("", sentence) for sentence in sentences]


def backend(host: Host) -> list[Problem]:
    """Return the problems with the firewalls of one host, by what node_info found."""
    found = host.node.get("firewalls")
    if not found:
        return []
    active, installed = list(found["active"]), list(found["installed"])
    asked = host.variables.get("firewall_backend") or "auto"
    variable = "firewall_backend"
    if len(active) > 1:
        text = f"{' and '.join(active)} are both active and overwrite each other's rules"
        return [Problem(host.name, "", text, "disable one of them")]
    deciding = active[0] if active else "nftables"
    if asked in ("auto", deciding):
        return []
    if asked not in installed and asked != "nftables":
        return [Problem(host.name, variable, f"{variable} is {asked}, which is not installed", f"install and enable it, or set {variable} to auto")]
    if active:
        return [Problem(host.name, variable, f"{variable} is {asked}, but {deciding} is active and decides", f"set {variable} to auto or {deciding}")]
    text = f"{variable} is {asked}, which is installed but not active"
    return [Problem(host.name, variable, text, f"enable it with your SSH access allowed, or set {variable} to auto")]


def problem(host: str, sentence: str) -> Problem:
    """Return a sentence of firewall_spec's as a problem."""
    text, _semicolon, cure = sentence.rstrip(".").partition("; ")
    return Problem(host, text.split(" ", 1)[0], text, cure)
