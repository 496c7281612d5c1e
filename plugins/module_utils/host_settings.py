# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of a node that GPUs and NCCL feel, read only: they are reported with advice and never changed unasked."""

from __future__ import annotations

import glob
import os
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text


def collect(root: str = "/") -> dict[str, t.Any]:
    """Return Secure Boot, IOMMU, CPU governor and whether the node is a container.

    Args:
        root: folder that stands for ``/``.
    """
    return {
        "container": any(os.path.exists(os.path.join(root, path)) for path in ("run/systemd/container", "run/host/container-manager")),
        "secure_boot": secure_boot(root),
        "iommu": iommu(root),
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
