# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan: what every node of the cluster is and does, from the inventory and from what the nodes report.

``make`` is pure. It returns the plan together with every problem, so that a person can repair an inventory in one go.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import typing as t
from dataclasses import dataclass, field, replace

from ansible_collections.onprem.torch.plugins.module_utils import (
    firewall_checks,
    launch,
    network,
    node_checks,
    nvidia,
    ports,
    pytorch_plan,
    ranks,
    room,
    secret_texts,
    verify_config,
)
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
        "firewall_backend",
        # A driver may be somebody else's on some of the nodes.
        "nvidia_driver_fabric_manager",
        "nvidia_driver_kernel_modules",
        "nvidia_driver_manage",
        "nvidia_driver_packages",
        "nvidia_driver_peermem",
        "nvidia_driver_reboot",
        "nvidia_driver_reboot_timeout",
        "nccl_shm_gib",
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
        replaces: the node that is out and whose place this spare takes; empty for a host in its own place.
    """

    name: str
    variables: dict[str, t.Any]
    node: dict[str, t.Any] = field(default_factory=dict)
    address: str = ""
    replaces: str = ""


@dataclass(frozen=True)
class Release:
    """The job's source as the control node sees it.

    Attributes:
        hash: hash of its files; empty for a source that lies on the nodes.
        script: the script inside it.
        path: its path on the control node, or on the nodes.
        programs: hash of the supervisor and the other programs that go with it.
        problems: what is wrong with it.
        was_read: whether it was looked at; a verb that ships nothing does not, and its plan names no release.
    """

    hash: str
    script: str
    path: str = ""
    programs: str = ""
    problems: tuple[Problem, ...] = ()
    was_read: bool = True


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
            theirs = first.variables[name]
            if isinstance(value, dict) and isinstance(theirs, dict):
                # Values of a mapping may be secrets.
                keys = sorted(str(key) for key in {*value, *theirs} if value.get(key) != theirs.get(key))
                text = f"{name} differs from {first.name}'s in {', '.join(keys)}, but a job has one"
            else:
                text = f"{name} is {value!r} here and {theirs!r} on {first.name}, but a job has one"
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


def without_gpus(host: Host) -> Host:
    """Return a host as a job on CPUs finds it: its GPUs are there, and none is used."""
    if not host.node.get("hardware"):
        return host
    return replace(host, node={**host.node, "hardware": {**host.node["hardware"], "usable_gpus": []}})


def devices_of(host: Host) -> list[str]:
    """Return the entries of ``torchrun_devices`` of a host."""
    return [entry.strip() for entry in str(host.variables.get("torchrun_devices") or "").split(",") if entry.strip()]


def make(
    group: str,
    hosts: t.Sequence[Host],
    release: Release,
    manifest: t.Mapping[str, t.Any] | None = None,
    lock: pytorch_plan.Lock = pytorch_plan.Lock(),
) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return the plan and all problems.

    Args:
        group: name of the inventory group.
        hosts: its hosts in inventory order; at least one.
        release: the job's source.
        manifest: which versions of NVIDIA's stack and torch fit together.
        lock: the lock file of torch and its packages.

    Returns:
        The plan (see docs/plan.md for its keys) and the problems. Where there are problems, the plan shows what could
        be decided.
    """
    problems = list(release.problems)
    first = hosts[0].variables
    if first.get(nvidia.VARIABLE) == "cpu":
        hosts = [without_gpus(host) for host in hosts]
    problems += agreeing(hosts)
    problems += pytorch_plan.lock_problems(first, lock)
    rank_of, found = ranks.assign({host.name: host.variables.get("torchrun_node_rank") for host in hosts})
    problems += found
    order = sorted(rank_of, key=rank_of.__getitem__)
    known = {host.name: host.node["interfaces"] for host in hosts if host.node}
    wanted = {host.name: host.variables.get("cluster_interface") or "" for host in hosts}
    chosen, found = network.choose(known, wanted)
    problems += found
    master_addr, found = master(hosts, order, chosen)
    problems += found

    name_of_job = str(first.get("torchrun_job") or "train")
    unit = f"torchrun-{name_of_job}.service"
    master_port = first.get(ports.MASTER) or 29500
    numbers = {
        ports.MASTER: master_port,
        ports.SUPERVISOR: first.get(ports.SUPERVISOR) or master_port + 1,
        ports.VERIFIER: first.get(ports.VERIFIER) or 29600,
    }
    by_name = {host.name: host for host in hosts}
    problems += ports.check(numbers, order[0], by_name[order[0]].node, {unit})
    problems += firewall_checks.check(hosts, numbers)
    told = {problem.variable for problem in problems}
    problems += [problem for problem in ports.reserved(numbers, hosts, name_of_job) if problem.variable not in told]
    problems += node_checks.check_all(hosts, chosen, name_of_job)
    problems += verify_config.problems_of(hosts)
    line, stacks, found = nvidia.decide_all(
        [(host.name, pytorch_plan.with_locked(host.variables, lock), host.node) for host in hosts],
        manifest or {},
        {name: end.interface for name, end in chosen.items()},
    )
    problems += found

    nodes: dict[str, dict[str, t.Any]] = {}
    links = {name: by_name[name].node.get("interfaces") or [] for name in order}
    ends = {name: chosen.get(name, network.Endpoint("", "")) for name in order}
    for name in order:
        host = by_name[name]
        count, found = process_count(host)
        problems += found
        end = ends[name]
        torch = pytorch_plan.environment(host.variables, host.node, line, lock)
        needs = [*node_checks.torch_needs(host, torch), *nvidia.toolkit_needs(str(line.get("name") or ""), host.variables, host.node, manifest or {})]
        problems += room.problems(name, needs, host.node.get("disk") or {}, host.node.get("file_systems") or {})
        nodes[name] = {
            "host": name,
            "rank": rank_of[name],
            "replaces": host.replaces or None,
            "address": end.address,
            "address6": end.address6 or None,
            "interface": end.interface,
            "nproc": count,
            "devices": ",".join(devices_of(host)) or None,
            "python": torch["executable"],
            "pytorch": {key: value for key, value in torch.items() if key != "executable"},
            "user_there": any(entry.get("exists") for entry in host.node.get("access") or []),
            "distribution": host.node.get("distribution", {}),
            "architecture": host.node.get("architecture", ""),
            "hardware": host.node.get("hardware", {}),
            "nvidia": stacks.get(name, {}),
        }
    job = {
        "name": name_of_job,
        "unit": unit,
        "master_addr": master_addr,
        "master_port": numbers[ports.MASTER],
        "supervisor_port": numbers[ports.SUPERVISOR],
        "verifier_port": numbers[ports.VERIFIER],
        "nnodes": len(order),
        "world_size": sum(node["nproc"] for node in nodes.values()),
        "python": nodes[order[0]]["python"],
        **job_settings(first, name_of_job, release, lock.digest),
    }
    job.update(launch.job_paths(job, [str(path) for path in first.get("torchrun_data_paths") or []]))
    job["new_secret"] = len({secret_id(host, name_of_job) for host in hosts} - {""}) != 1 or any(
        not secret_id(host, name_of_job) for host in hosts
    )
    for node in nodes.values():
        node["environment"] = launch.environment(job, node)
        node["command"] = launch.torchrun_command(job, node)
        node["supervisor_command"] = launch.supervisor_command(job, node)
    shape = {name: [node[key] for key in ("rank", "address", "nproc", "devices", "hardware")] for name, node in nodes.items()}
    plan = {
        "group": group,
        "cuda_version": str(line.get("name") or ""),
        "order": order,
        "nodes": nodes,
        "peers": {f"ipv{version}": [text for name in order for text in network.addresses(ends[name], links[name], version)] for version in (4, 6)},
        "job": job,
        "fingerprint": digest({"shape": shape, "torch": [nodes[order[0]]["pytorch"][key] for key in ("requirements", "constraints", "lock_sha256")]}),
    }
    return plan, problems


def secret_id(host: Host, job: str) -> str:
    """Return what tells the job's secret on a node from another one, without telling the secret."""
    return str((host.node.get("secret_ids") or {}).get(job, ""))


def job_settings(variables: t.Mapping[str, t.Any], name: str, release: Release, lock: str = "") -> dict[str, t.Any]:
    """Return what the user's variables say of the job, and the release that follows from it."""
    root = f"{variables.get('torchrun_root') or '/var/lib/torchrun'}/{name}"
    user_environment = variables.get("torchrun_environment") or {}
    settings = {
        "script": release.script,
        "args": [str(word) for word in variables.get("torchrun_args") or []],
        # The plan is shown and kept by callbacks, so it has the names only; torchrun_unit's action reads the values itself.
        "environment_names": sorted(str(key) for key in user_environment),
        "checkpoint_dir": str(variables.get("torchrun_checkpoint_dir") or f"{root}/checkpoints"),
        "checkpoint_glob": str(variables.get("torchrun_checkpoint_glob") or "*"),
        "root": root,
        "log_dir": f"{variables.get('torchrun_log_root') or '/var/log/torchrun'}/{name}",
        "user": str(variables.get("torchrun_user") or "torchrun"),
        "max_restarts": variables.get("torchrun_max_restarts") or 0,
        "hang_timeout": variables.get("torchrun_hang_timeout") or 0,
        "stop_timeout": variables.get("torchrun_stop_timeout") or 120,
        "shm_free_mib": variables.get("torchrun_shm_free_mib") or 0,
        "disk_free_mib": variables.get("torchrun_disk_free_mib") or 0,
        "memory_max": str(variables.get("torchrun_memory_max") or ""),
        "wait_for": str(variables.get("torchrun_wait_for") or "first_step"),
        "start_timeout": variables.get("torchrun_start_timeout") or 600,
        "step_pattern": str(variables.get("torchrun_step_pattern") or ""),
        "source": str(variables.get("torchrun_source") or ""),
        "source_path": release.path,
        "source_hash": release.hash,
        "programs_hash": release.programs,
    }
    made_of = {key: settings[key] for key in ("script", "args", "source", "source_hash", "programs_hash")}
    made_of["environment"] = secret_texts.fingerprint(user_environment, f"torchrun_environment of {root}")
    if release.hash:
        made_of.pop("source")  # the same files from another folder are the same release
    made_of["torch"] = [variables.get(f"pytorch_{key}") for key in ("version", "packages", "environment")]
    made_of["torch"] += [variables["pytorch_constraints"]] if variables.get("pytorch_constraints") else []
    made_of["torch"] += [lock] if lock else []
    return {**settings, "release": digest(made_of) if release.was_read else ""}
