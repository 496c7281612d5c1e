# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a driver cannot work on a node: too old for the CUDA line, or made for other GPUs."""

from __future__ import annotations

import fnmatch
import re

from ansible_collections.onprem.torch.plugins.module_utils import nvidia_sources
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import (
    BLACKWELL,
    TURING,
    Manifest,
    Node,
    Variables,
    capability,
    chosen_gpus,
    cuda_lines,
    driver_of,
    fabric_of,
    is_good,
    manages,
    numbers,
    without_packages,
)
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

VERSION = "nvidia_driver_version"
FULL_VERSION = r"\d{3,}\.\d+(\.\d+)?"


def driver_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return all that is wrong with the driver that a node has or would get.

    Args:
        name: the cluster's line; empty for what is wrong whatever the line.
        host: inventory name.
        variables: the host's variables.
        node: what node_info found.
        manifest: what fits together.
    """
    if not manages(variables):
        return found_problems(name, host, node, manifest)
    return [
        *version_problems(name, host, variables, node, manifest),
        *package_problems(host, variables, node, manifest),
        *module_problems(host, variables, node),
    ]


def found_problems(name: str, host: str, node: Node, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with a driver of somebody else."""
    state = driver_of(node)
    if not state.get("version"):
        text = "the node has NVIDIA GPUs but no driver, and nvidia_driver_manage is false"
        return [Problem(host, "nvidia_driver_manage", text, "install a driver, or set nvidia_driver_manage: true")]
    problems = []
    if state.get("mismatch"):
        libraries = f"its libraries are {state['installed']}" if state["installed"] else "its libraries have another version"
        text = f"the kernel runs the driver {state['loaded']}, but {libraries}"
        problems.append(Problem(host, "nvidia_driver_manage", text, "reboot the node"))
    # After that reboot the libraries' version counts.
    version = str(state.get("installed") or state["version"]) if state.get("mismatch") else str(state["version"])
    if name and numbers(version) < numbers(manifest["lines"][name]["compatible_driver"]):
        text = f"the driver is {version}, but CUDA {name} needs {manifest['lines'][name]['minimum_driver']} or newer"
        fits = [other for other in cuda_lines(manifest) if numbers(manifest["lines"][other]["compatible_driver"]) <= numbers(version)]
        cure = f"set cuda_version: {fits[0]!r}, or upgrade the driver" if fits else "upgrade the driver"
        problems.append(Problem(host, "cuda_version", text, cure))
    joined = fabric_of(node)
    if joined.get("required") and joined.get("state") not in ("", None, "Completed") and not joined.get("manager_running"):
        text = f"the GPUs are joined by NVSwitches, whose fabric is {joined['state']!r}, and no fabric manager runs"
        cure = f"start nvidia-fabricmanager {version}, or set nvidia_driver_manage: true"
        problems.append(Problem(host, "nvidia_driver_manage", text, cure))
    return problems


def would_install(name: str, variables: Variables, node: Node, manifest: Manifest) -> bool:
    """Return whether a driver would be installed: it is asked for by its version, or none runs that is good enough for the line."""
    good = is_good(manifest["lines"][name], node) if name else bool(driver_of(node).get("loaded"))
    return bool(variables.get(VERSION)) or not good


def unavailable(host: str, version: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return why NVIDIA's repository for the node's distribution has no driver to install there."""
    first = nvidia_sources.known_drivers(node, manifest).get("first_branch")
    # Packages of the user's choice may be the distribution's.
    if not first or not nvidia_sources.is_nvidias(variables) or variables.get("nvidia_driver_packages"):
        return []
    where = f"NVIDIA's repository for {node['distribution'].get('name') or node['distribution']['id']} on {node['architecture']}"
    last = manifest["driver"]["last_branch_before_turing"]
    old = [gpu for gpu in chosen_gpus(variables, node) if 0 < capability(gpu) < TURING]
    if old and first > last:
        product = f"{old[0].get('name') or old[0]['generation']} (sm_{capability(old[0])})"
        text = f"{where} begins with the driver branch {first}, but {last} is the last one for {product}"
        cure = "use Debian 12 or Ubuntu on x86_64, or install the driver yourself and set nvidia_driver_manage: false"
        return [Problem(host, "nvidia_driver_manage", text, cure)]
    if numbers(version)[0] < first:
        text = f"{VERSION} is {version}, but {where} begins with the branch {first}"
        cure = f"remove it for {nvidia_sources.default_driver(node, manifest)}, or set cuda_repository_url to a repository that has it"
        return [Problem(host, VERSION, text, cure)]
    return []


def version_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with the version of the driver that would be installed."""
    variable = VERSION
    known = manifest["driver"]
    default = nvidia_sources.default_driver(node, manifest)
    version = str(variables.get(variable) or default)
    if not re.fullmatch(FULL_VERSION, version):
        text = f"{variable} is {version!r}, but a full version such as {default} was expected"
        return [Problem(host, variable, text, "give all of its numbers, since drivers are pinned exactly")]
    if not would_install(name, variables, node, manifest):
        return []
    problems = unavailable(host, version, variables, node, manifest)
    if problems:
        return problems
    cure = f"remove it for {default}"
    if name and numbers(version) < numbers(manifest["lines"][name]["compatible_driver"]):
        text = f"{variable} is {version}, but CUDA {name} needs {manifest['lines'][name]['minimum_driver']} or newer"
        problems.append(Problem(host, variable, text, f"{cure}, or set an older cuda_version"))
    branch = numbers(version)[0]
    levels = [capability(gpu) for gpu in chosen_gpus(variables, node)]
    old = [level for level in levels if 0 < level < TURING]
    if old and branch > known["last_branch_before_turing"]:
        said = f"{variable} is" if variables.get(variable) else "the driver would be"
        text = f"{said} {version}, but the branch {known['last_branch_before_turing']} is the last one for GPUs of sm_{old[0]}"
        fits = numbers(default)[0] <= known["last_branch_before_turing"]
        problems.append(Problem(host, variable, text, cure if fits else f"set {variable}: {known['version']}, if your repository has it"))
    if any(level >= BLACKWELL for level in levels) and branch < known["first_branch_for_blackwell"]:
        text = f"{variable} is {version}, but Blackwell GPUs need the branch {known['first_branch_for_blackwell']} or newer"
        problems.append(Problem(host, variable, text, cure))
    if name and without_packages(node):
        text = f"the driver {driver_of(node)['installed']} was not installed as packages, which would overwrite it half"
        cure = "remove it (nvidia-uninstall for NVIDIA's runfile) and reboot, or set nvidia_driver_manage: false"
        problems.append(Problem(host, "nvidia_driver_manage", text, cure))
    return problems


def package_problems(host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return the problem of a driver's package whose version is not the driver's, which pins, checks and reboots go by."""
    wanted = str(variables.get(VERSION) or nvidia_sources.default_driver(node, manifest))
    for entry in variables.get("nvidia_driver_packages") or []:
        name, _equals, version = str(entry).partition("=")
        number = version.partition("-")[0].rstrip("*")
        if not version or number == wanted or not any(fnmatch.fnmatchcase(name, pattern) for pattern in manifest["driver_family"]):
            continue
        text = f"nvidia_driver_packages has {entry}, but the driver is to be {wanted}"
        full = re.fullmatch(FULL_VERSION, number)
        cure = f"set {VERSION}: {number}" if full else f"give the package's full version and set {VERSION} to it"
        return [Problem(host, VERSION, text, cure)]
    return []


def module_problems(host: str, variables: Variables, node: Node) -> list[Problem]:
    """Return the problem of kernel modules that the GPUs cannot work with."""
    variable = "nvidia_driver_kernel_modules"
    levels = [capability(gpu) for gpu in chosen_gpus(variables, node)]
    wanted = str(variables.get(variable) or "auto")
    if wanted == "open" and any(0 < level < TURING for level in levels):
        text = f"{variable} is open, but the open modules need Turing (sm_75) or newer"
        return [Problem(host, variable, text, f"set {variable}: proprietary, or leave it out")]
    if wanted == "proprietary" and any(level >= BLACKWELL for level in levels):
        text = f"{variable} is proprietary, but Blackwell GPUs work with the open modules only"
        return [Problem(host, variable, text, f"set {variable}: open, or leave it out")]
    if wanted == "proprietary" and any("GH200" in str(gpu.get("name")) for gpu in chosen_gpus(variables, node)):
        text = f"{variable} is proprietary, but Grace Hopper works with the open modules only"
        return [Problem(host, variable, text, f"set {variable}: open, or leave it out")]
    if any(0 < level < TURING for level in levels) and any(level >= BLACKWELL for level in levels):
        text = "the node has GPUs older than Turing and of Blackwell, which no driver serves together"
        return [Problem(host, "", text, "name GPUs of one kind in torchrun_devices")]
    return []
