# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the decisions about NVIDIA's stack read of a node, its variables and the version manifest."""

from __future__ import annotations

import re
import typing as t

Manifest = t.Mapping[str, t.Any]
Node = t.Mapping[str, t.Any]
Variables = t.Mapping[str, t.Any]

TURING = 75
BLACKWELL = 100
# Beginnings of the names of the packages with a driver's libraries: NVIDIA's and Debian's, Ubuntu's, Debian's older branches.
LIBRARIES = ("libnvidia-ml", "libnvidia-compute", "libnvidia-tesla")


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, for comparing: ``580.65.06`` → (580, 65, 6)."""
    return tuple(int(part) for part in re.split(r"[-+*a-z]", version)[0].split(".") if part.isdigit())


def capability(gpu: t.Mapping[str, t.Any]) -> int:
    """Return a GPU's compute capability times ten, 0 where unknown: ``sm_90`` → 90."""
    text = str(gpu.get("architecture") or "")
    return int(text[3:]) if re.fullmatch(r"sm_\d+", text) else 0


def gpus_of(node: Node) -> list[dict[str, t.Any]]:
    """Return the GPUs that a node may use."""
    return list((node.get("hardware") or {}).get("usable_gpus") or [])


def chosen_gpus(variables: Variables, node: Node) -> list[dict[str, t.Any]]:
    """Return the GPUs that the job uses: those that torchrun_devices names by index or UUID, else all usable ones.

    An old card for the monitor, say, decides nothing once it is left out. Entries that name none are the plan's to refuse.
    """
    cards = gpus_of(node)
    names = [entry.strip() for entry in str(variables.get("torchrun_devices") or "").split(",") if entry.strip()]
    chosen = [gpu for index, gpu in enumerate(cards) if str(index) in names or (gpu.get("uuid") and gpu["uuid"] in names)]
    return chosen or cards


def driver_of(node: Node) -> dict[str, t.Any]:
    """Return the driver's state of a node."""
    return dict((node.get("hardware") or {}).get("driver") or {})


def is_good(line: Manifest, node: Node) -> bool:
    """Return whether the driver that runs is new enough for a line, whole, and one that the GPUs work with."""
    state = driver_of(node)
    proprietary = state.get("open") is False and any(capability(gpu) >= BLACKWELL for gpu in gpus_of(node))
    running = str(state.get("loaded") or "")
    return bool(running) and not state.get("mismatch") and numbers(running) >= numbers(line["minimum_driver"]) and not proprietary


def without_packages(node: Node) -> bool:
    """Return whether a driver's libraries lie on a node that no package has brought, as NVIDIA's runfile leaves it."""
    owners = [name for name, entry in packages_of(node).items() if name.startswith(LIBRARIES) and entry.get("state") != "config-files"]
    return bool(driver_of(node).get("installed")) and not owners


def cuda_lines(manifest: Manifest) -> list[str]:
    """Return the names of the CUDA lines, newest first."""
    return sorted((name for name in manifest.get("lines") or {} if name != "cpu"), key=numbers, reverse=True)


def manages(variables: Variables) -> bool:
    """Return whether the driver is ours to install."""
    return variables.get("nvidia_driver_manage") is not False


def fabric_of(node: Node) -> dict[str, t.Any]:
    """Return what is known of a node's NVSwitches and their fabric manager."""
    return dict((node.get("hardware") or {}).get("fabric") or {})


def has_rdma(node: Node) -> bool:
    """Return whether a node has an adapter that reads and writes memory by itself (InfiniBand, RoCE)."""
    return any(nic.get("rdma") for nic in (node.get("hardware") or {}).get("nics") or [])


def packages_of(node: Node) -> dict[str, dict[str, t.Any]]:
    """Return the packages of NVIDIA's that a node has, by name: C(version), C(want), C(state)."""
    return dict(node.get("packages") or {})
