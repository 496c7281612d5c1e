# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA GPUs and NVSwitches by PCI device id, so that hardware is known before any driver is installed.

Sources: the PCI ID database (vendor 10de) for ids and names; NVIDIA's CUDA GPUs page for compute capabilities.
An id that is not named here still has a generation, since NVIDIA numbers its chips in ranges.
"""

from __future__ import annotations

import typing as t

NVIDIA = 0x10DE

# device id → name, form factor (sxm: on a baseboard with NVLink; pcie: a card; super: with a Grace CPU).
MODELS: dict[int, tuple[str, str]] = {
    0x15F8: ("Tesla P100-PCIE-16GB", "pcie"),
    0x15F9: ("Tesla P100-SXM2-16GB", "sxm"),
    0x1DB1: ("Tesla V100-SXM2-16GB", "sxm"),
    0x1DB4: ("Tesla V100-PCIE-16GB", "pcie"),
    0x1DB5: ("Tesla V100-SXM2-32GB", "sxm"),
    0x1DB6: ("Tesla V100-PCIE-32GB", "pcie"),
    0x1DB8: ("Tesla V100-SXM3-32GB", "sxm"),
    0x1EB8: ("Tesla T4", "pcie"),
    0x20B0: ("NVIDIA A100-SXM4-40GB", "sxm"),
    0x20B2: ("NVIDIA A100-SXM4-80GB", "sxm"),
    0x20B5: ("NVIDIA A100 80GB PCIe", "pcie"),
    0x20B7: ("NVIDIA A30", "pcie"),
    0x20F1: ("NVIDIA A100-PCIE-40GB", "pcie"),
    0x20F3: ("NVIDIA A800-SXM4-80GB", "sxm"),
    0x20F5: ("NVIDIA A800 80GB PCIe", "pcie"),
    0x2204: ("NVIDIA GeForce RTX 3090", "pcie"),
    0x2230: ("NVIDIA RTX A6000", "pcie"),
    0x2235: ("NVIDIA A40", "pcie"),
    0x2236: ("NVIDIA A10", "pcie"),
    0x2321: ("NVIDIA H100 NVL", "pcie"),
    0x2324: ("NVIDIA H800", "sxm"),
    0x2329: ("NVIDIA H20", "sxm"),
    0x2330: ("NVIDIA H100 80GB HBM3", "sxm"),
    0x2331: ("NVIDIA H100 PCIe", "pcie"),
    0x2335: ("NVIDIA H200", "sxm"),
    0x233B: ("NVIDIA H200 NVL", "pcie"),
    0x2342: ("NVIDIA GH200 480GB", "super"),
    0x2684: ("NVIDIA GeForce RTX 4090", "pcie"),
    0x26B1: ("NVIDIA RTX 6000 Ada Generation", "pcie"),
    0x26B5: ("NVIDIA L40", "pcie"),
    0x26B9: ("NVIDIA L40S", "pcie"),
    0x27B8: ("NVIDIA L4", "pcie"),
    0x2901: ("NVIDIA B200", "sxm"),
    0x2941: ("NVIDIA GB200", "super"),
    0x2B85: ("NVIDIA GeForce RTX 5090", "pcie"),
    0x2BB1: ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "pcie"),
    0x2BB5: ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "pcie"),
    0x3182: ("NVIDIA B300 SXM6 AC", "sxm"),
    0x31C2: ("NVIDIA GB300", "super"),
}

# first id, last id, generation, compute capability times ten.
RANGES: tuple[tuple[int, int, str, int], ...] = (
    (0x1340, 0x13BF, "maxwell", 50),
    (0x13C0, 0x15EF, "maxwell", 52),
    (0x15F0, 0x15FF, "pascal", 60),
    (0x1600, 0x17FF, "maxwell", 52),
    (0x1B00, 0x1D7F, "pascal", 61),
    (0x1D80, 0x1DFF, "volta", 70),
    (0x1E00, 0x1FFF, "turing", 75),
    (0x2080, 0x20FF, "ampere", 80),
    (0x2180, 0x21FF, "turing", 75),
    (0x2200, 0x22FF, "ampere", 86),
    (0x2300, 0x23FF, "hopper", 90),
    (0x2400, 0x25FF, "ampere", 86),
    (0x2600, 0x28FF, "ada", 89),
    (0x2900, 0x29FF, "blackwell", 100),
    (0x2B80, 0x2DFF, "blackwell", 120),
    (0x2E00, 0x2EFF, "blackwell", 121),
    (0x2F00, 0x2FFF, "blackwell", 120),
    (0x3180, 0x31FF, "blackwell", 103),
)

# NVSwitches that show on the PCI bus. Those of NVLink 5 (B200 and later) do not: they are reached through
# InfiniBand management functions, so such baseboards are known by their GPUs.
NVSWITCHES: dict[int, str] = {0x1AC2: "volta", 0x1AF1: "ampere", 0x22A3: "hopper"}


class Model(t.NamedTuple):
    """What a device id says.

    Attributes:
        name: product name; empty where the id is not in the table.
        form: sxm, pcie or super; empty where unknown.
        generation: such as hopper; empty where unknown.
        capability: compute capability times ten; 0 where unknown.
    """

    name: str
    form: str
    generation: str
    capability: int


def lookup(device: int) -> Model:
    """Return what is known of an NVIDIA GPU by its PCI device id."""
    name, form = MODELS.get(device, ("", ""))
    generation, capability = next(((word, level) for first, last, word, level in RANGES if first <= device <= last), ("", 0))
    return Model(name, form, generation, capability)
