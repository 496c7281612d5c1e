# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which GPU a PCI device id means, so that a node without a driver can be planned for.

Names are those of the public PCI ID database (https://pci-ids.ucw.cz/read/PC/10de); compute capabilities those of
https://developer.nvidia.com/cuda-gpus. NVIDIA gives each chip a block of ids, so that an unknown product still tells
its generation.
"""

from __future__ import annotations

import typing as t


class Product(t.NamedTuple):
    """A GPU: its product name, generation and architecture (``sm_90``); empty texts where unknown."""

    name: str
    generation: str
    architecture: str


# First and last device id of a chip's block, generation, architecture.
CHIPS = (
    # Older than any CUDA line here: known, so that they are refused rather than taken for something new.
    (0x0040, 0x0FBF, "Fermi or older", "sm_20"),
    (0x0FC0, 0x0FFF, "Kepler", "sm_30"),
    (0x1000, 0x102C, "Kepler", "sm_35"),
    (0x102D, 0x102D, "Kepler", "sm_37"),
    (0x102E, 0x103F, "Kepler", "sm_35"),
    (0x1040, 0x117F, "Fermi or older", "sm_20"),
    (0x1180, 0x11FF, "Kepler", "sm_30"),
    (0x1200, 0x127F, "Fermi or older", "sm_20"),
    (0x1280, 0x12FF, "Kepler", "sm_35"),
    (0x1340, 0x15EF, "Maxwell", "sm_52"),
    (0x15F0, 0x15FF, "Pascal", "sm_60"),
    (0x1600, 0x17FF, "Maxwell", "sm_52"),
    (0x1B00, 0x1D7F, "Pascal", "sm_61"),
    (0x1D80, 0x1DFF, "Volta", "sm_70"),
    (0x1E00, 0x1FFF, "Turing", "sm_75"),
    (0x2080, 0x20FF, "Ampere", "sm_80"),
    (0x2180, 0x21FF, "Turing", "sm_75"),
    (0x2200, 0x22FF, "Ampere", "sm_86"),
    (0x2300, 0x237F, "Hopper", "sm_90"),
    (0x2380, 0x25FF, "Ampere", "sm_86"),
    (0x2600, 0x28FF, "Ada", "sm_89"),
    (0x2900, 0x297F, "Blackwell", "sm_100"),
    (0x2980, 0x2FFF, "Blackwell", "sm_120"),
    (0x3180, 0x31FF, "Blackwell", "sm_103"),
)
NAMES = {
    0x1023: "Tesla K40m",
    0x102D: "Tesla K80",
    0x15F8: "Tesla P100 PCIe 16GB",
    0x15F9: "Tesla P100 SXM2 16GB",
    0x1DB1: "Tesla V100 SXM2 16GB",
    0x1DB4: "Tesla V100 PCIe 16GB",
    0x1DB5: "Tesla V100 SXM2 32GB",
    0x1DB6: "Tesla V100 PCIe 32GB",
    0x1EB8: "Tesla T4",
    0x20B0: "A100 SXM4 40GB",
    0x20B2: "A100 SXM4 80GB",
    0x20B5: "A100 PCIe 80GB",
    0x20B7: "A30 PCIe",
    0x20F1: "A100 PCIe 40GB",
    0x2204: "GeForce RTX 3090",
    0x2230: "RTX A6000",
    0x2235: "A40",
    0x2236: "A10",
    0x2321: "H100 NVL",
    0x2330: "H100 SXM5 80GB",
    0x2331: "H100 PCIe",
    0x2335: "H200 SXM 141GB",
    0x233B: "H200 NVL",
    0x2342: "GH200 120GB",
    0x2684: "GeForce RTX 4090",
    0x26B1: "RTX 6000 Ada Generation",
    0x26B5: "L40",
    0x26B9: "L40S",
    0x27B8: "L4",
    0x2901: "B200",
    0x2941: "GB200",
    0x2B85: "GeForce RTX 5090",
    0x2BB1: "RTX PRO 6000 Blackwell Workstation Edition",
    0x2BB5: "RTX PRO 6000 Blackwell Server Edition",
    0x3182: "B300 SXM6 AC",
    0x31C2: "GB300",
}


def lookup(device: int) -> Product:
    """Return the product of a PCI device id of vendor 0x10de."""
    generation, architecture = next(((gen, arch) for first, last, gen, arch in CHIPS if first <= device <= last), ("", ""))
    return Product(f"NVIDIA {NAMES[device]}" if device in NAMES else "", generation, architecture)
