# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""PCI devices as sysfs shows them, and how far two of them are apart. Needs no driver and no lspci."""

from __future__ import annotations

import os
import re
import typing as t

ADDRESS = re.compile(r"^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
# From near to far, in the words of nvidia-smi topo.
DISTANCES = ("PIX", "PXB", "PHB", "NODE", "SYS")


def read(path: str) -> str:
    """Return the text of a file without white space around it; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()
    except (OSError, ValueError):
        return ""


def number(path: str, base: int = 10) -> t.Optional[int]:
    """Return the whole number in a file; None where there is none."""
    try:
        return int(read(path), base)
    except ValueError:
        return None


def listing(path: str) -> list[str]:
    """Return the sorted names in a folder; empty where there is none."""
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def gigatransfers(text: str) -> float:
    """Return GT/s of a text such as ``32.0 GT/s PCIe``; 0 where it says none."""
    found = re.match(r"([0-9.]+)\s*GT/s", text)
    return float(found.group(1)) if found else 0.0


def devices(root: str) -> list[str]:
    """Return the addresses of all PCI devices."""
    return [name for name in listing(os.path.join(root, "sys/bus/pci/devices")) if ADDRESS.match(name)]


def folder(root: str, address: str) -> str:
    """Return the device's folder below /sys/devices, which tells the bridges above it."""
    return os.path.realpath(os.path.join(root, "sys/bus/pci/devices", address))


def driver(path: str) -> str:
    """Return the name of the kernel driver that holds a device; empty where none does."""
    link = os.path.join(path, "driver")
    return os.path.basename(os.path.realpath(link)) if os.path.lexists(link) else ""


def chain(path: str) -> list[str]:
    """Return the parts of a device's path from its host bridge on, such as pci0000:00, a port, a switch, the device."""
    parts = path.split(os.sep)
    start = next((index for index, part in enumerate(parts) if part.startswith("pci")), len(parts))
    return parts[start:]


def link(path: str) -> dict[str, t.Any]:
    """Return speed and width of a device's PCIe link.

    ``speed`` (GT/s) and ``width`` (lanes) are what device and slot can do together; ``speed_now`` and ``width_now``
    what they do at the moment: an idle GPU lowers its speed.
    """
    own_speed = gigatransfers(read(os.path.join(path, "max_link_speed")))
    own_width = number(os.path.join(path, "max_link_width")) or 0
    above = os.path.dirname(path)
    slot_speed = gigatransfers(read(os.path.join(above, "max_link_speed")))
    slot_width = number(os.path.join(above, "max_link_width")) or 0
    return {
        "speed": min(own_speed, slot_speed) if own_speed and slot_speed else own_speed or slot_speed,
        # 255 is what devices without a link report.
        "width": min([lanes for lanes in (own_width, slot_width) if 0 < lanes < 64], default=0),
        "speed_now": gigatransfers(read(os.path.join(path, "current_link_speed"))),
        "width_now": number(os.path.join(path, "current_link_width")) or 0,
    }


def numa_node(path: str) -> t.Optional[int]:
    """Return the NUMA node of a device; None where the machine has none."""
    found = number(os.path.join(path, "numa_node"))
    return found if found is not None and found >= 0 else None


def distance(one: str, other: str) -> str:
    """Return how far two devices (their folders) are apart, in the words of ``nvidia-smi topo``.

    PIX: at most one PCIe bridge between them; PXB: several bridges, no host bridge; PHB: the same host bridge;
    NODE: the same NUMA node; SYS: across NUMA nodes.
    """
    first, second = chain(one), chain(other)
    if not first or not second or first[0] != second[0]:
        near, far = numa_node(one), numa_node(other)
        return "NODE" if near == far else "SYS"
    common = 0
    for left, right in zip(first, second):
        if left != right:
            break
        common += 1
    if common < 2:
        return "PHB"
    # Both sit below a common port; beyond the switch's own two ports there are further switches.
    hops = max(len(first), len(second)) - common
    return "PIX" if hops <= 2 else "PXB"
