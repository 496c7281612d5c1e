# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a driver cannot work on a node: too old for the CUDA line, or made for other GPUs."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import (
    BLACKWELL,
    TURING,
    Manifest,
    Node,
    Variables,
    capability,
    cuda_lines,
    driver_of,
    fabric_of,
    gpus_of,
    is_good,
    manages,
    numbers,
    without_packages,
)
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem


def driver_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with the driver that a node has or would get."""
    line = manifest["lines"][name]
    state = driver_of(node)
    levels = [capability(gpu) for gpu in gpus_of(node)]
    if not manages(variables):
        if not state.get("version"):
            text = "the node has NVIDIA GPUs but no driver, and nvidia_driver_manage is false"
            return [Problem(host, "nvidia_driver_manage", text, "install a driver, or set nvidia_driver_manage: true")]
        if state.get("mismatch"):
            text = f"the kernel runs the driver {state['loaded']}, but its libraries are {state['installed']}"
            return [Problem(host, "nvidia_driver_manage", text, "reboot the node")]
        if numbers(state["version"]) < numbers(line["compatible_driver"]):
            text = f"the driver is {state['version']}, but CUDA {name} needs {line['minimum_driver']} or newer"
            fits = [
                other
                for other in cuda_lines(manifest)
                if numbers(manifest["lines"][other]["compatible_driver"]) <= numbers(state["version"])
            ]
            cure = f"set cuda_version: {fits[0]!r}, or upgrade the driver" if fits else "upgrade the driver"
            return [Problem(host, "cuda_version", text, cure)]
        joined = fabric_of(node)
        if joined.get("required") and joined.get("state") not in ("", None, "Completed") and not joined.get("manager_running"):
            text = f"the GPUs are joined by NVSwitches, whose fabric is {joined['state']!r}, and no fabric manager runs"
            return [Problem(host, "nvidia_driver_manage", text, f"start nvidia-fabricmanager {state['version']}, or set nvidia_driver_manage: true")]
        return []
    variable = "nvidia_driver_version"
    wanted = str(variables.get(variable) or "")
    version = wanted or manifest["driver"]["version"]
    if not re.fullmatch(r"\d{3,}\.\d+(\.\d+)?", version):
        text = f"{variable} is {version!r}, but a full version such as {manifest['driver']['version']} was expected"
        return [Problem(host, variable, text, "give all of its numbers, since drivers are pinned exactly")]
    if numbers(version) < numbers(line["compatible_driver"]):
        text = f"{variable} is {version}, but CUDA {name} needs {line['minimum_driver']} or newer"
        return [Problem(host, variable, text, f"remove it for {manifest['driver']['version']}, or set an older cuda_version")]
    branch = numbers(version)[0]
    old = [level for level in levels if 0 < level < TURING]
    if old and branch > manifest["driver"]["last_branch_before_turing"]:
        last = manifest["driver"]["last_branch_before_turing"]
        text = f"{variable} is {version}, but the branch {last} is the last one for GPUs of sm_{old[0]}"
        return [Problem(host, variable, text, f"remove it for {manifest['driver']['version']}")]
    if any(level >= BLACKWELL for level in levels) and branch < manifest["driver"]["first_branch_for_blackwell"]:
        first = manifest["driver"]["first_branch_for_blackwell"]
        text = f"{variable} is {version}, but Blackwell GPUs need the branch {first} or newer"
        return [Problem(host, variable, text, f"remove it for {manifest['driver']['version']}")]
    if without_packages(node) and (wanted or not is_good(line, node)):
        text = f"the driver {state['installed']} was not installed as packages, which would overwrite it half"
        cure = "remove it (nvidia-uninstall for NVIDIA's runfile) and reboot, or set nvidia_driver_manage: false"
        return [Problem(host, "nvidia_driver_manage", text, cure)]
    return module_problems(host, variables, levels)


def module_problems(host: str, variables: Variables, levels: t.Sequence[int]) -> list[Problem]:
    """Return the problem of kernel modules that the GPUs cannot work with."""
    variable = "nvidia_driver_kernel_modules"
    wanted = str(variables.get(variable) or "auto")
    if wanted == "open" and any(0 < level < TURING for level in levels):
        text = f"{variable} is open, but the open modules need Turing (sm_75) or newer"
        return [Problem(host, variable, text, f"set {variable}: proprietary, or leave it out")]
    if wanted == "proprietary" and any(level >= BLACKWELL for level in levels):
        text = f"{variable} is proprietary, but Blackwell GPUs work with the open modules only"
        return [Problem(host, variable, text, f"set {variable}: open, or leave it out")]
    if any(0 < level < TURING for level in levels) and any(level >= BLACKWELL for level in levels):
        text = "the node has GPUs older than Turing and of Blackwell, which no driver serves together"
        return [Problem(host, "", text, "take one kind out of the node")]
    return []
