# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with the nodes themselves: each check looks at one thing and returns its problems."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import folder_access
from ansible_collections.onprem.torch.plugins.module_utils.network import Endpoint
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem
from ansible_collections.onprem.torch.plugins.module_utils.room import Need

if t.TYPE_CHECKING:
    from ansible_collections.onprem.torch.plugins.module_utils.plan import Host

# Distributions that the roles know, by os-release's ID and VERSION_ID.
DISTRIBUTIONS = {("debian", "12"), ("debian", "13"), ("ubuntu", "22.04"), ("ubuntu", "24.04")}
ARCHITECTURES = ("x86_64", "aarch64")
# The offset that a clock may have before certificates, logs and progress times mislead.
CLOCK_TOLERANCE_SECONDS = 1.0
# Measured: wheels, cache and environment take 1.3 GiB for a CPU build; CUDA builds bring 6 GiB of libraries, kept twice.
CPU_TORCH_GIB = 2
CUDA_TORCH_GIB = 14


def unreadable(host: Host) -> list[Problem]:
    """The node could not be asked: no SSH, no sudo, no Python."""
    error = host.node.get("error")
    if not error:
        return []
    text, _separator, cure = str(error).partition("; ")
    return [Problem(host.name, "ansible_host", text, cure or "repair the connection")]


def supported(host: Host) -> list[Problem]:
    """Distribution, architecture and systemd are ones that the roles can handle."""
    problems = []
    found = host.node["distribution"]
    if (found["id"], found["version"]) not in DISTRIBUTIONS:
        text = f"the distribution is {found['name'] or 'unknown'}, but Debian 12 or 13 or Ubuntu 22.04 or 24.04 was expected"
        problems.append(Problem(host.name, "", text, "install one of these or take the host out of the group"))
    if host.node["architecture"] not in ARCHITECTURES:
        text = f"the architecture is {host.node['architecture']}, but {' or '.join(ARCHITECTURES)} was expected"
        problems.append(Problem(host.name, "", text, "take the host out of the group"))
    if host.node.get("uid", 0) != 0:
        text = f"modules run as the user with id {host.node['uid']}, but root was expected"
        problems.append(Problem(host.name, "ansible_become", text, "set ansible_become: true for the group"))
    if not host.node["systemd"]:
        text = "systemd is not the first process, but the job is a systemd unit"
        problems.append(Problem(host.name, "", text, "boot the node with systemd"))
    elif not host.node.get("system_bus", True):
        text = "there is no system D-Bus, over which the job's supervisor asks systemd whether its unit is stopped or restarted"
        problems.append(Problem(host.name, "", text, "install it (apt-get install dbus)"))
    return problems


def python(host: Host) -> list[Problem]:
    """The Python that torch is to run with is there."""
    found = host.node["python"]
    if found["version"]:
        return []
    text = f"pytorch_python is {found['path']}, but no Python answers there"
    return [Problem(host.name, "pytorch_python", text, "install it or name another Python")]


def clock(host: Host) -> list[Problem]:
    """The clock agrees with the control node's."""
    offset = host.node.get("clock_offset_seconds", 0.0)
    if abs(offset) <= CLOCK_TOLERANCE_SECONDS:
        return []
    way = "ahead of" if offset > 0 else "behind"
    text = f"the clock is at least {abs(offset):.1f} s {way} the control node's, but at most {CLOCK_TOLERANCE_SECONDS:.0f} s was expected"
    return [Problem(host.name, "", text, "synchronise it (systemd-timesyncd or chrony)")]


def torch_needs(host: Host, torch: t.Mapping[str, t.Any]) -> list[Need]:
    """Return the room for the environment that is still to be built.

    Args:
        host: the host.
        torch: which environment it gets (pytorch_plan.environment).
    """
    root = str(host.variables.get("pytorch_root") or "")
    there = {path.rstrip("/"): version for path, version in (host.node.get("torch") or {}).items() if version}
    if torch["source"] not in ("wheelhouse", "index") or torch["environment"] in there:
        return []
    # Wheels and cache of the same torch are there already, and the environments share its files.
    builds = host.node.get("torch_builds") or {}
    same = any(
        version.split("+", maxsplit=1)[0] == torch["version"].split("+", maxsplit=1)[0]
        and (not torch["gpus"] or torch["cuda"] in ("", (builds.get(path) or builds.get(f"{path}/") or {}).get("cuda")))
        for path, version in there.items()
        if path.startswith(f"{root}/")
    )
    needed = CUDA_TORCH_GIB if torch["gpus"] and not same else CPU_TORCH_GIB
    return [Need(root, needed, "torch", "pytorch_root", "set pytorch_root to a larger file system")]


def paths(host: Host) -> list[Problem]:
    """Data folders, and a source that lies on the nodes, are there."""
    problems = []
    named = {str(path): "torchrun_data_paths" for path in host.variables.get("torchrun_data_paths") or []}
    source = str(host.variables.get("torchrun_source") or "")
    if source.startswith("remote:"):
        named[source[len("remote:") :]] = "torchrun_source"
    for path, variable in named.items():
        if host.node["paths"].get(path) is False:
            text = f"{variable} names {path}, which does not exist on this node"
            problems.append(Problem(host.name, variable, text, "mount or create it, or correct the path"))
    return problems


def folders(host: Host) -> list[Problem]:
    """The job's user can use the folders that the variables name."""
    return folder_access.problems(host.name, host.node.get("access") or [])


def devices(host: Host) -> list[Problem]:
    """torchrun_devices names GPUs that the node has, each once."""
    variable = "torchrun_devices"
    names = [entry.strip() for entry in str(host.variables.get(variable) or "").split(",") if entry.strip()]
    if not names:
        return []
    gpus = (host.node.get("hardware") or {}).get("usable_gpus") or []
    if not gpus:
        text = f"{variable} is {','.join(names)!r}, but the node has no NVIDIA GPU"
        return [Problem(host.name, variable, text, "remove it for a job on CPUs")]
    problems = []
    uuids = {str(gpu.get("uuid") or "") for gpu in gpus}
    # Only a driver tells UUIDs, so on a bare node those that are named cannot be checked yet.
    bare = not any(uuids)
    for name in names:
        if bare and name.startswith("GPU-"):
            continue
        if name not in uuids and not (name.isdigit() and int(name) < len(gpus)):
            text = f"{variable} names GPU {name}, but the node's GPUs are 0 to {len(gpus) - 1}"
            problems.append(Problem(host.name, variable, text, "name GPUs that nvidia-smi lists"))
    for name in sorted({name for name in names if names.count(name) > 1}):
        text = f"{variable} names GPU {name} more than once"
        problems.append(Problem(host.name, variable, text, "name each GPU once"))
    return problems


def other_jobs(host: Host, job: str) -> list[Problem]:
    """No other active job of ours uses the GPUs of this one."""
    mine = set(str(host.variables.get("torchrun_devices") or "").replace(" ", "").split(",")) - {""}
    gpus = (host.node.get("hardware") or {}).get("usable_gpus") or []
    if not gpus:
        return []
    problems = []
    for other in host.node.get("jobs") or []:
        if other["job"] == job or not other["active"]:
            continue
        theirs = set(other["devices"].split(",")) - {""}
        shared = sorted(mine & theirs) if mine and theirs else ["all"]
        if shared:
            text = f"GPU {', '.join(shared)} is in use by the job {other['job']!r}"
            cure = "set torchrun_devices of both jobs to different GPUs, or stop the other job"
            problems.append(Problem(host.name, "torchrun_devices", text, cure))
    return problems


def duplicates(hosts: t.Sequence[Host], chosen: t.Mapping[str, Endpoint]) -> list[Problem]:
    """No two inventory names mean one machine."""
    problems = []
    holders: dict[str, str] = {}
    for host in hosts:
        identity = str(host.node.get("machine_id") or "")
        address = chosen[host.name].address if host.name in chosen else ""
        if identity and f"id {identity}" in holders:
            other = holders[f"id {identity}"]
            text = f"the machine id is that of {other}, so both names mean one machine or a copy of it"
            cure = "remove one of them, or make a new id with: rm /etc/machine-id && systemd-machine-id-setup"
            problems.append(Problem(host.name, "ansible_host", text, cure))
        elif address and f"address {address}" in holders:
            other = holders[f"address {address}"]
            text = f"the address {address} is that of {other} too"
            problems.append(Problem(host.name, "ansible_host", text, "give each node an address of its own"))
        holders.setdefault(f"id {identity}", host.name)
        holders.setdefault(f"address {address}", host.name)
    return problems


def same_python(hosts: t.Sequence[Host]) -> list[Problem]:
    """All nodes run torch under one minor version of Python: pickles and wheels depend on it."""
    minors: dict[str, list[str]] = {}
    for host in hosts:
        version = host.node["python"]["version"]
        if version:
            minors.setdefault(".".join(version.split(".")[:2]), []).append(host.name)
    if len(minors) < 2:
        return []
    usual = max(minors, key=lambda minor: len(minors[minor]))
    return [
        Problem(
            name,
            "pytorch_python",
            f"Python is {minor} here and {usual} on {minors[usual][0]}, but one version was expected on all nodes",
            "set pytorch_python to the same version everywhere",
        )
        for minor, names in minors.items()
        if minor != usual
        for name in names
    ]


def same_torch(hosts: t.Sequence[Host]) -> list[Problem]:
    """Environments that exist already hold one version of torch."""
    variable = "pytorch_environment"
    versions: dict[str, list[str]] = {}
    problems = []
    for host in hosts:
        if host.variables.get("pytorch_source") != "existing":
            continue
        environment = str(host.variables.get(variable) or "")
        version = host.node["torch"].get(environment, "")
        wanted = str(host.variables.get("pytorch_version") or "")
        if not environment:
            text = "pytorch_source is existing, but pytorch_environment does not say which environment"
            problems.append(Problem(host.name, variable, text, "set pytorch_environment to its folder"))
        elif not version:
            text = f"{variable} is {environment}, in which there is no torch"
            problems.append(Problem(host.name, variable, text, "name the folder of an environment with torch"))
        elif wanted and version.split("+", maxsplit=1)[0] != wanted.split("+", maxsplit=1)[0]:
            text = f"pytorch_version is {wanted}, but {environment} holds torch {version}"
            problems.append(Problem(host.name, "pytorch_version", text, "leave it empty for whatever is there, or correct it"))
        else:
            versions.setdefault(version, []).append(host.name)
    if len(versions) > 1:
        usual = max(versions, key=lambda version: len(versions[version]))
        for version, names in versions.items():
            for name in names if version != usual else []:
                text = f"torch is {version} here and {usual} on {versions[usual][0]}, but one version was expected on all nodes"
                problems.append(Problem(name, variable, text, "install the same torch everywhere"))
    return problems


def mixed_hardware(hosts: t.Sequence[Host]) -> list[Problem]:
    """Either every node has GPUs or none, unless nothing asks for them."""
    without = [host.name for host in hosts if not (host.node.get("hardware") or {}).get("usable_gpus")]
    line = str(hosts[0].variables.get("cuda_version") or "")
    if line == "cpu":
        return []
    if without and line:
        text = f"cuda_version is {line!r}, but the node has no NVIDIA GPU"
        cure = "set cuda_version: cpu for a job on CPUs, or take the host out of the group"
        return [Problem(name, "cuda_version", text, cure) for name in without]
    if without and len(without) < len(hosts):
        text = "the node has no NVIDIA GPU that can be used, but other nodes of the group have"
        return [Problem(name, "", text, "repair it, or take the host out of the group") for name in without]
    return []


def check_all(hosts: t.Sequence[Host], chosen: t.Mapping[str, Endpoint], job: str) -> list[Problem]:
    """Return all problems of all nodes that could be read."""
    problems: list[Problem] = []
    readable = [host for host in hosts if host.node]
    for host in readable:
        for check in (supported, python, clock, paths, folders, devices):
            problems += check(host)
        problems += other_jobs(host, job)
    if readable:
        for compare in (same_python, same_torch, mixed_hardware):
            problems += compare(readable)
        problems += duplicates(readable, chosen)
    return problems
