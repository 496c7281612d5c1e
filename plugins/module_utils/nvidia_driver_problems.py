# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a driver cannot work on a node: too old for the CUDA line, or made for other GPUs."""

from __future__ import annotations

import re

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
    return [*version_problems(name, host, variables, node, manifest), *module_problems(host, variables, node)]


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


def version_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with the version of the driver that would be installed."""
    variable = "nvidia_driver_version"
    known = manifest["driver"]
    version = str(variables.get(variable) or known["version"])
    if not re.fullmatch(r"\d{3,}\.\d+(\.\d+)?", version):
        text = f"{variable} is {version!r}, but a full version such as {known['version']} was expected"
        return [Problem(host, variable, text, "give all of its numbers, since drivers are pinned exactly")]
    problems = []
    cure = f"remove it for {known['version']}"
    if name and numbers(version) < numbers(manifest["lines"][name]["compatible_driver"]):
        text = f"{variable} is {version}, but CUDA {name} needs {manifest['lines'][name]['minimum_driver']} or newer"
        problems.append(Problem(host, variable, text, f"{cure}, or set an older cuda_version"))
    branch = numbers(version)[0]
    levels = [capability(gpu) for gpu in chosen_gpus(variables, node)]
    old = [level for level in levels if 0 < level < TURING]
    if old and branch > known["last_branch_before_turing"]:
        text = f"{variable} is {version}, but the branch {known['last_branch_before_turing']} is the last one for GPUs of sm_{old[0]}"
        problems.append(Problem(host, variable, text, cure))
    if any(level >= BLACKWELL for level in levels) and branch < known["first_branch_for_blackwell"]:
        text = f"{variable} is {version}, but Blackwell GPUs need the branch {known['first_branch_for_blackwell']} or newer"
        problems.append(Problem(host, variable, text, cure))
    if name and without_packages(node) and (variables.get(variable) or not is_good(manifest["lines"][name], node)):
        text = f"the driver {driver_of(node)['installed']} was not installed as packages, which would overwrite it half"
        cure = "remove it (nvidia-uninstall for NVIDIA's runfile) and reboot, or set nvidia_driver_manage: false"
        problems.append(Problem(host, "nvidia_driver_manage", text, cure))
    return problems


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
