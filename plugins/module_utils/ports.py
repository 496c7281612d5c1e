# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The fixed TCP ports of a job, checked against each other and against what rank 0 already uses."""

from __future__ import annotations

import typing as t

if t.TYPE_CHECKING:
    from ansible_collections.onprem.torch.plugins.module_utils.plan import Host

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

MASTER = "torchrun_master_port"
SUPERVISOR = "torchrun_supervisor_port"
VERIFIER = "nccl_verify_port"


def check(
    ports: t.Mapping[str, int], host: str, node: t.Mapping[str, t.Any], own_units: t.Collection[str]
) -> list[Problem]:
    """Return what is wrong with the ports of a job.

    Args:
        ports: variable → port.
        host: the host with rank 0, which listens on them.
        node: what node_info found on it (empty where it could not be read).
        own_units: units whose listening sockets are no clash: the job's own.
    """
    problems: list[Problem] = []
    seen: dict[int, str] = {}
    usable: dict[str, int] = {}
    derived = ports.get(SUPERVISOR) == ports.get(MASTER, 0) + 1 and not 1024 <= ports[MASTER] <= 65535
    for variable, port in ports.items():
        if variable == SUPERVISOR and derived:
            continue  # it follows from the master's, which is named already
        if not 1024 <= port <= 65535:
            text = f"{variable} is {port}, but a port from 1024 to 65535 was expected"
            problems.append(Problem("", variable, text, "choose another, such as 29500"))
        elif port in seen:
            text = f"{variable} is {port}, which is {seen[port]} already"
            problems.append(Problem("", variable, text, "give each a port of its own"))
        else:
            seen[port] = variable
            usable[variable] = port
    if not node:
        return problems
    first, last = node["ephemeral_ports"]
    for variable, port in usable.items():
        if first <= port <= last:
            text = (
                f"{variable} is {port}, inside the range {first} to {last} from which the kernel hands out ports, "
                "so any connection may take it"
            )
            problems.append(Problem(host, variable, text, f"choose a port below {first}"))
        for entry in node["listening"]:
            if entry["port"] != port or entry["unit"] in own_units:
                continue
            holder = f"{entry['command'] or 'an unknown process'} (pid {entry['pid']})" if entry["pid"] else "a process"
            if entry["unit"].startswith("torchrun-"):
                job = entry["unit"][len("torchrun-") : -len(".service")]
                holder = f"the job {job!r}"
            elif entry["unit"]:
                holder += f" of {entry['unit']}"
            text = f"{variable} is {port}, which {holder} holds"
            problems.append(Problem(host, variable, text, "choose another port or end that process"))
            break
    return problems


def reserved(ports: t.Mapping[str, int], hosts: t.Sequence[Host], job: str) -> list[Problem]:
    """Return a problem for each port that an active job beside this one has for itself, whether it listens now or not.

    A job's torchrun listens only while it trains: between two starts, another job could take its port. Both jobs' ports have
    to differ on every node that they share, since either may come to have rank 0 there.
    """
    problems = []
    told = set()
    for host in hosts:
        for other in host.node.get("jobs") or []:
            if other["job"] == job or not other["active"]:
                continue
            theirs = {other["master_port"]: MASTER, other["supervisor_port"]: SUPERVISOR}
            for variable, port in ports.items():
                if variable not in (MASTER, SUPERVISOR) or port not in theirs or (variable, other["job"]) in told:
                    continue
                told.add((variable, other["job"]))
                text = f"{variable} is {port}, which is {theirs[port]} of the job {other['job']!r} on this node"
                problems.append(Problem(host.name, variable, text, "give each job ports of its own, such as 29510 and 29511"))
    return problems
