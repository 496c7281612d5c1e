# Copyright: Contributors to the onprem.torch project
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0
"""The plan: what every node of the cluster is and does, from the inventory and from what the nodes report.

``make`` is pure. It returns the plan together with every problem, so that a person can repair an inventory in one go.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import typing as t
from dataclasses import dataclass, field

from ansible_collections.onprem.torch.plugins.module_utils import network, node_checks, ports, ranks
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

# Variables that describe one node. All others describe the job and are the same on every host.
PER_HOST = frozenset(
    {
        "torchrun_node_rank",
        "torchrun_nproc_per_node",
        "torchrun_devices",
        "torchrun_node_out",
        "cluster_interface",
        "pytorch_python",
    }
)


@dataclass
class Host:
    """One host of the group.

    Attributes:
        name: inventory name.
        variables: public variables of the roles, typed, defaults filled in.
        node: what node_info found; empty where the host could not be read.
        address: ansible_host where it is set, else the name.
    """

    name: str
    variables: dict[str, t.Any]
    node: dict[str, t.Any] = field(default_factory=dict)
    address: str = ""


@dataclass(frozen=True)
class Release:
    """The job's source as the control node sees it: hash, script inside it, and what is wrong with it."""

    hash: str
    script: str
    problems: tuple[Problem, ...] = ()


def digest(value: t.Any, length: int = 12) -> str:
    """Return the first hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def agreeing(hosts: t.Sequence[Host]) -> list[Problem]:
    """Return a problem for each job-wide variable that differs between hosts."""
    problems = []
    first = hosts[0]
    for host in hosts[1:]:
        for name, value in host.variables.items():
            if name in PER_HOST or name not in first.variables or value == first.variables[name]:
                continue
            text = f"{name} is {value!r} here and {first.variables[name]!r} on {first.name}, but a job has one"
            problems.append(Problem(host.name, name, text, "set it once for the group"))
    return problems


def master(hosts: t.Sequence[Host], order: t.Sequence[str], chosen: dict[str, network.Endpoint]) -> tuple[str, list[Problem]]:
    """Return MASTER_ADDR and the problems with it: an IP of the node with rank 0."""
    variable = "torchrun_master_addr"
    wanted = hosts[0].variables.get(variable) or ""
    rank0 = order[0]
    default = chosen[rank0].address if rank0 in chosen else ""
    if not wanted:
        return default, []
    try:
        address = ipaddress.ip_address(wanted)
    except ValueError:
        text = f"{variable} is {wanted!r}, but an IP address was expected (a name may resolve to loopback on its own host)"
        return default, [Problem("", variable, text, f"remove it or set the address of {rank0}")]
    if address.is_loopback:
        text = f"{variable} is {wanted}, a loopback address, which no other node can reach"
        return default, [Problem("", variable, text, f"remove it or set the address of {rank0}")]
    holders = [
        host.name
        for host in hosts
        for link in (host.node.get("interfaces") or [])
        for entry in link["addresses"]
        if entry.split("/")[0] == str(address)
    ]
    if holders and holders[0] != rank0:
        text = f"{variable} is {wanted}, which is {holders[0]}'s, but the node with rank 0 is {rank0}"
        cure = f"remove it, or give {holders[0]} the rank 0"
        return default, [Problem("", variable, text, cure)]
    if not holders and all(host.node for host in hosts):
        text = f"{variable} is {wanted}, which no host of the group has"
        return default, [Problem("", variable, text, f"remove it or set the address of {rank0}")]
    return str(address), []


def process_count(host: Host) -> tuple[int, list[Problem]]:
    """Return the processes of a node: as asked for, else one per GPU in use, else one."""
    variable = "torchrun_nproc_per_node"
    wanted = host.variables.get(variable, "auto")
    usable = len((host.node.get("hardware") or {}).get("usable_gpus") or [])
    devices = devices_of(host)
    limit = len(devices) if devices else usable
    if str(wanted) == "auto":
        return max(limit, 1), []
    expected = f"auto or a whole number from 1{f' to {limit}' if limit else ''} was expected"
    try:
        count = int(str(wanted))
    except ValueError:
        return max(limit, 1), [
            Problem(host.name, variable, f"{variable} is {wanted!r}, but {expected}", "set auto for one process per GPU")
        ]
    if count < 1 or (limit and count > limit):
        source = "torchrun_devices" if devices else "GPUs"
        text = f"{variable} is {count}, but {expected}" + (f" (the node has {limit} {source})" if limit else "")
        return max(limit, 1), [Problem(host.name, variable, text, "set auto for one process per GPU")]
    return count, []


def devices_of(host: Host) -> list[str]:
    """Return the entries of ``torchrun_devices`` of a host."""
    return [entry.strip() for entry in str(host.variables.get("torchrun_devices") or "").split(",") if entry.strip()]


def make(group: str, hosts: t.Sequence[Host], release: Release) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return the plan and all problems.

    Args:
        group: name of the inventory group.
        hosts: its hosts in inventory order; at least one.
        release: the job's source.

    Returns:
        The plan (see docs/plan.md for its keys) and the problems. Where there are problems, the plan shows what could
        be decided.
    """
    problems = list(release.problems)
    first = hosts[0].variables
    problems += agreeing(hosts)
    rank_of, found = ranks.assign({host.name: host.variables.get("torchrun_node_rank") for host in hosts})
    problems += found
    order = sorted(rank_of, key=rank_of.__getitem__)
    known = {host.name: host.node["interfaces"] for host in hosts if host.node}
    wanted = {host.name: host.variables.get("cluster_interface") or "" for host in hosts}
    chosen, found = network.choose(known, wanted)
    problems += found
    master_addr, found = master(hosts, order, chosen)
    problems += found

    job = str(first.get("torchrun_job") or "train")
    unit = f"torchrun-{job}.service"
    master_port = first.get(ports.MASTER) or 29500
    numbers = {
        ports.MASTER: master_port,
        ports.SUPERVISOR: first.get(ports.SUPERVISOR) or master_port + 1,
        ports.VERIFIER: first.get(ports.VERIFIER) or 29600,
    }
    by_name = {host.name: host for host in hosts}
    problems += ports.check(numbers, order[0], by_name[order[0]].node, {unit})
    problems += node_checks.check_all(hosts, chosen, job)

    nodes: dict[str, dict[str, t.Any]] = {}
    for name in order:
        host = by_name[name]
        count, found = process_count(host)
        problems += found
        end = chosen.get(name)
        nodes[name] = {
            "host": name,
            "rank": rank_of[name],
            "address": end.address if end else "",
            "address6": (end.address6 or None) if end else None,
            "interface": end.interface if end else "",
            "nproc": count,
            "devices": ",".join(devices_of(host)) or None,
            "distribution": host.node.get("distribution", {}),
            "architecture": host.node.get("architecture", ""),
            "hardware": host.node.get("hardware", {}),
            "variables": host.variables,
        }
    world = sum(node["nproc"] for node in nodes.values())
    shape = {name: {key: node[key] for key in ("rank", "address", "nproc", "devices")} for name, node in nodes.items()}
    plan = {
        "group": group,
        "order": order,
        "nodes": nodes,
        "peers": {
            "ipv4": [node["address"] for node in nodes.values() if node["address"]],
            "ipv6": [node["address6"] for node in nodes.values() if node["address6"]],
        },
        "job": {
            "name": job,
            "unit": unit,
            "master_addr": master_addr,
            "master_port": numbers[ports.MASTER],
            "supervisor_port": numbers[ports.SUPERVISOR],
            "verifier_port": numbers[ports.VERIFIER],
            "nnodes": len(order),
            "world_size": world,
            "script": release.script,
            "args": first.get("torchrun_args") or [],
            "environment": {key: str(value) for key, value in (first.get("torchrun_environment") or {}).items()},
            "checkpoint_dir": first.get("torchrun_checkpoint_dir") or "",
            "checkpoint_glob": first.get("torchrun_checkpoint_glob") or "*",
            "root": f"{first.get('torchrun_root')}/{job}",
            "log_dir": f"{first.get('torchrun_log_root')}/{job}",
            "user": first.get("torchrun_user"),
            "source_hash": release.hash,
        },
        "fingerprint": digest(
            {"shape": shape, "hardware": {name: node["hardware"] for name, node in nodes.items()}, "torch": first.get("pytorch_version")}
        ),
    }
    return plan, problems
