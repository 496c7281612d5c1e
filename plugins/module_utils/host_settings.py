# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of a node that GPUs and NCCL feel, read only: they are reported with advice and never changed unasked."""

from __future__ import annotations

import glob
import os
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text


GIB = 1024**3
# PCI Express Base Specification: the first extended capability, ACS's id, and the bits of its control register that send
# traffic between devices up to the root (source validation alone does not).
EXTENDED, ACS, REDIRECTS = 0x100, 0x000D, 0x04 | 0x08 | 0x10
BRIDGE_CLASS = "0x0604"
# What NCCL and data loaders put there; a container's usual 64 MiB are too little (NCCL, "Troubleshooting").
SHM_GIB_A_GPU = 1


def collect(root: str = "/") -> dict[str, t.Any]:
    """Return Secure Boot, IOMMU, ACS, CPU governor, size of /dev/shm and whether the node is a container.

    Args:
        root: folder that stands for ``/``.
    """
    return {
        "container": any(os.path.exists(os.path.join(root, path)) for path in ("run/systemd/container", "run/host/container-manager")),
        "secure_boot": secure_boot(root),
        "iommu": iommu(root),
        "acs_bridges": acs_bridges(root),
        "shm_bytes": shm_bytes(root),
        "governor": read_text(os.path.join(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip(),
    }


def secure_boot(root: str) -> t.Optional[bool]:
    """Return whether Secure Boot is on; None where the machine does not tell (no EFI)."""
    for path in glob.glob(os.path.join(root, "sys/firmware/efi/efivars/SecureBoot-*")):
        try:
            with open(path, "rb") as stream:
                # Four bytes of attributes, then the value (UEFI specification, 3.3).
                return stream.read()[-1:] == b"\x01"
        except OSError:
            return None
    return None


def iommu(root: str) -> str:
    """Return how the IOMMU works: ``pt`` (pass-through), ``on``, or empty where none does."""
    if not glob.glob(os.path.join(root, "sys/class/iommu/*")):
        return ""
    return "pt" if "iommu=pt" in read_text(os.path.join(root, "proc/cmdline")).split() else "on"


def acs_redirects(config: bytes) -> bool:
    """Return whether a PCI device's configuration space says that ACS redirects traffic between devices to the root.

    The space is cut at 64 or 256 bytes for users who may not read it all; then nothing is known, and False returned.
    """
    offset, seen = EXTENDED, set()
    while EXTENDED <= offset <= len(config) - 8 and offset not in seen:
        seen.add(offset)
        header = int.from_bytes(config[offset : offset + 4], "little")
        if header & 0xFFFF == ACS:
            return bool(int.from_bytes(config[offset + 6 : offset + 8], "little") & REDIRECTS)
        offset = header >> 20
    return False


def acs_bridges(root: str) -> list[str]:
    """Return the addresses of the PCI bridges at which ACS redirects."""
    found = []
    for folder in sorted(glob.glob(os.path.join(root, "sys/bus/pci/devices/*"))):
        if not read_text(os.path.join(folder, "class")).startswith(BRIDGE_CLASS):
            continue
        try:
            with open(os.path.join(folder, "config"), "rb") as stream:
                if acs_redirects(stream.read()):
                    found.append(os.path.basename(folder))
        except OSError:
            continue
    return found


def shm_bytes(root: str) -> t.Optional[int]:
    """Return the size of /dev/shm, None where there is none."""
    try:
        state = os.statvfs(os.path.join(root, "dev/shm"))
    except OSError:
        return None
    return state.f_frsize * state.f_blocks


def advice(hardware: t.Mapping[str, t.Any], memory_bytes: int = 0) -> list[str]:
    """Return what is worth changing by hand on a node with GPUs, a sentence each. Nothing of it is changed for the user.

    Args:
        hardware: what hardware.collect found.
        memory_bytes: memory of the node.
    """
    found: t.Mapping[str, t.Any] = hardware.get("settings") or {}
    cards = hardware.get("usable_gpus") or []
    if not cards:
        return []
    lines = []
    rdma = any(nic.get("rdma") for nic in hardware.get("nics") or [])
    switched = bool((hardware.get("fabric") or {}).get("required"))
    crosses = rdma or (len(cards) > 1 and not switched)
    if found.get("iommu") == "on" and crosses:
        lines.append("the IOMMU translates every access between PCI devices; add iommu=pt to the kernel's command line")
    if found.get("acs_bridges") and crosses and not found.get("container"):
        count = len(found["acs_bridges"])
        lines.append(
            f"ACS sends traffic between PCI devices through the CPU at {count} bridges; switch it off in the firmware, "
            "or with setpci at each boot, unless virtual machines need it"
        )
    if found.get("governor") not in ("", None, "performance"):
        lines.append(f"the CPU governor is {found['governor']}; performance keeps latency low (cpupower frequency-set -g performance)")
    if found.get("secure_boot"):
        lines.append("Secure Boot is on, so that DKMS's key must be enrolled before the driver loads (mokutil --import /var/lib/dkms/mok.pub)")
    shm = found.get("shm_bytes")
    if shm is not None and shm < SHM_GIB_A_GPU * GIB * len(cards):
        size = max(SHM_GIB_A_GPU * len(cards), memory_bytes // GIB // 2)
        lines.append(f"/dev/shm has {shm / GIB:.1f} GiB, but {SHM_GIB_A_GPU} GiB for each GPU is wanted; set nccl_shm_gib: {size}")
    for kind, entries in (("GPU", cards), ("adapter", [nic for nic in hardware.get("nics") or [] if not nic.get("virtual")])):
        for entry in entries:
            lanes, most = entry.get("pcie_width"), entry.get("pcie_max_width")
            if lanes and most and lanes < most:
                name = entry.get("interface") or entry.get("pci")
                # Some GPUs give lanes back while nothing runs on them (nvidia-smi, "pcie.link.width.current").
                look = "look again while it works, and see" if kind == "GPU" else "see"
                lines.append(f"the {kind} {name} uses {lanes} of its {most} PCIe lanes; {look} that it sits in a full slot, and firmly")
    return lines
