# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which GPUs of a node a job cannot work with, although they are there: broken, not driven, cut into instances."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import Node, Variables, chosen_gpus, driver_of
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

Gpu = t.Mapping[str, t.Any]
DEVICES = "torchrun_devices"
# Drivers under which a GPU is meant to work for this machine; another one keeps it for somebody else.
OWN_DRIVERS = ("", "nvidia", "nouveau")


def called(gpu: Gpu) -> str:
    """Return how a person finds a GPU: its address, which nvidia-smi and dmesg print too, and its name."""
    return f"{gpu.get('pci')} ({gpu.get('name') or gpu.get('generation') or 'GPU'})"


def in_container(node: Node) -> bool:
    """Return whether a node is a container, which has some of its host's GPUs, and not all of its driver's programs."""
    return bool(((node.get("hardware") or {}).get("settings") or {}).get("container"))


def undriven(node: Node) -> list[Gpu]:
    """Return the GPUs that the running driver leaves out, though nobody asked it to."""
    found = (node.get("hardware") or {}).get("gpus") or []
    if in_container(node) or not any(gpu.get("minor") is not None for gpu in found):
        return []
    return [gpu for gpu in found if gpu.get("minor") is None and str(gpu.get("bound") or "") in OWN_DRIVERS]


def problems(host: str, variables: Variables, node: Node) -> list[Problem]:
    """Return what is wrong with a node's GPUs under the driver that runs.

    Args:
        host: inventory name.
        variables: the host's variables. GPUs that torchrun_devices leaves out may be as they are.
        node: what node_info found.
    """
    state = driver_of(node)
    if not state.get("loaded") or state.get("mismatch"):
        return []
    # The kernel's log says why: Xid 79 is a GPU that fell off the bus.
    look = "look for NVRM and Xid in dmesg, reset the GPU or reboot the node"
    if state.get("nvidia_smi") and (state.get("nvidia_smi_hangs") or not in_container(node)):
        return [Problem(host, "", f"nvidia-smi {state['nvidia_smi']}, so that a job would hang or fail", look)]
    found = []
    cards = chosen_gpus(variables, node)
    for gpu in cards:
        if gpu.get("answers") is False:
            found.append(Problem(host, "", f"the GPU {called(gpu)} is missing in nvidia-smi", f"{look}, or leave it out with {DEVICES}"))
        if gpu.get("mig"):
            text = f"the GPU {called(gpu)} is cut into instances (MIG), but each process of a job needs a whole GPU"
            cure = f"switch MIG off (nvidia-smi -i {gpu.get('pci')} -mig 0), or leave it out with {DEVICES}"
            found.append(Problem(host, DEVICES, text, cure))
    for gpu in [] if variables.get(DEVICES) else undriven(node):
        text = f"the driver {state['loaded']} does not run the GPU {called(gpu)}"
        found.append(Problem(host, "", text, f"{look}, or name the other GPUs in {DEVICES}"))
    return found
