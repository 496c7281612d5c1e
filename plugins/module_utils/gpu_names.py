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
    (0x1300, 0x133F, "Kepler", "sm_35"),
    (0x1340, 0x13BF, "Maxwell", "sm_50"),
    (0x13C0, 0x15BF, "Maxwell", "sm_52"),
    (0x15C0, 0x15FF, "Pascal", "sm_60"),
    (0x1600, 0x171F, "Maxwell", "sm_52"),
    (0x1720, 0x172F, "Pascal", "sm_60"),
    (0x1730, 0x17FF, "Maxwell", "sm_52"),
    (0x1B00, 0x1D7F, "Pascal", "sm_61"),
    (0x1D80, 0x1DFF, "Volta", "sm_70"),
    (0x1E00, 0x1FFF, "Turing", "sm_75"),
    (0x2080, 0x20FF, "Ampere", "sm_80"),
    (0x2180, 0x21FF, "Turing", "sm_75"),
    (0x2200, 0x22FF, "Ampere", "sm_86"),
    (0x2300, 0x23FF, "Hopper", "sm_90"),
    (0x2400, 0x25FF, "Ampere", "sm_86"),
    (0x2600, 0x28FF, "Ada", "sm_89"),
    (0x2900, 0x29FF, "Blackwell", "sm_100"),
    (0x2B80, 0x2DFF, "Blackwell", "sm_120"),
    (0x2E00, 0x2EFF, "Blackwell", "sm_121"),
    (0x2F00, 0x2FFF, "Blackwell", "sm_120"),
    # Its compute capability has not been told, and what is unknown is not refused.
    (0x3000, 0x30FF, "Rubin", ""),
    (0x3180, 0x31FF, "Blackwell", "sm_103"),
)
NAMES = {
    0x1023: "Tesla K40m",
    0x102D: "Tesla K80",
    0x15F7: "Tesla P100 PCIe 12GB",
    0x15F8: "Tesla P100 PCIe 16GB",
    0x15F9: "Tesla P100 SXM2 16GB",
    0x1B38: "Tesla P40",
    0x1BB3: "Tesla P4",
    0x1DB1: "Tesla V100 SXM2 16GB",
    0x1DB4: "Tesla V100 PCIe 16GB",
    0x1DB5: "Tesla V100 SXM2 32GB",
    0x1DB6: "Tesla V100 PCIe 32GB",
    0x1DB8: "Tesla V100 SXM3 32GB",
    0x1DF6: "Tesla V100S PCIe 32GB",
    0x1E30: "Quadro RTX 6000/8000",
    0x1EB8: "Tesla T4",
    0x20B0: "A100 SXM4 40GB",
    0x20B1: "A100 PCIe 40GB",
    0x20B2: "A100 SXM4 80GB",
    0x20B5: "A100 PCIe 80GB",
    0x20B7: "A30 PCIe",
    0x20BD: "A800 SXM4 40GB",
    0x20F1: "A100 PCIe 40GB",
    0x20F3: "A800 SXM4 80GB",
    0x20F5: "A800 PCIe 80GB",
    0x2204: "GeForce RTX 3090",
    0x2230: "RTX A6000",
    0x2231: "RTX A5000",
    0x2235: "A40",
    0x2236: "A10",
    0x2237: "A10G",
    0x2321: "H100 NVL",
    0x2322: "H800 PCIe",
    0x2324: "H800",
    0x2329: "H20",
    0x232C: "H20 HBM3e",
    0x2330: "H100 SXM5 80GB",
    0x2331: "H100 PCIe",
    0x2335: "H200 SXM 141GB",
    0x2337: "H100 SXM5 64GB",
    0x2338: "H100 SXM5 96GB",
    0x2339: "H100 SXM5 94GB",
    0x233B: "H200 NVL",
    0x2342: "GH200 120GB / 480GB",
    0x2348: "GH200 144GB HBM3e",
    0x25B6: "A2 / A16",
    0x2684: "GeForce RTX 4090",
    0x26B1: "RTX 6000 Ada Generation",
    0x26B2: "RTX 5000 Ada Generation",
    0x26B5: "L40",
    0x26B9: "L40S",
    0x26BA: "L20",
    0x27B6: "L2",
    0x27B8: "L4",
    0x2901: "B200",
    0x2941: "GB200",
    0x29BC: "B100",
    0x2B85: "GeForce RTX 5090",
    0x2BB1: "RTX PRO 6000 Blackwell Workstation Edition",
    0x2BB3: "RTX PRO 5000 Blackwell",
    0x2BB4: "RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    0x2BB5: "RTX PRO 6000 Blackwell Server Edition",
    0x2C02: "GeForce RTX 5080",
    0x2E12: "GB10",
    0x3182: "B300 SXM6 AC",
    0x31C2: "GB300",
    0x31C3: "GB300",
}


def lookup(device: int) -> Product:
    """Return the product of a PCI device id of vendor 0x10de."""
    generation, architecture = next(((gen, arch) for first, last, gen, arch in CHIPS if first <= device <= last), ("", ""))
    return Product(f"NVIDIA {NAMES[device]}" if device in NAMES else "", generation, architecture)
