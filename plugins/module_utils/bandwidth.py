# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bandwidth of collectives: formulas, message sizes, the plateau and what hardware should reach.

All bandwidths are in GB/s (1e9 bytes per second), all times in seconds, all sizes in bytes.
Sources: nccl-tests doc/PERFORMANCE.md for algbw and busbw; NCCL src/graph/topo.h for the speeds of links.
docs/verify.md lists them with the figures that were measured.
"""

from __future__ import annotations

import statistics
import typing as t
from dataclasses import dataclass

# Bytes of one element.
DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1}
# nccl-tests' names of them, for rows in its JSON shape.
NCCL_TESTS_DTYPES = {
    "float64": "double",
    "float32": "float",
    "float16": "half",
    "bfloat16": "bfloat16",
    "int64": "int64",
    "int32": "int32",
    "int8": "int8",
    "uint8": "uint8",
}
OPERATIONS = ("sum", "min", "max")
SUFFIXES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# NCCL src/graph/topo.h, ncclTopoNVLinkBw: GB/s of one NVLink in one direction, by the first and last compute capability
# (times ten) that it holds for. What is newer is not known here, and is said to be unknown.
NVLINK_GBYTES_PER_SECOND = ((60, 69, 18.0), (70, 79, 20.0), (80, 85, 20.0), (86, 86, 12.0), (87, 89, 20.0), (90, 99, 20.6), (100, 106, 40.1))
# NCCL src/graph/topo.h, ncclTopoAddPci: width x kvDictPciGen[speed] / 80; the dictionary by GT/s of one lane.
PCI_LANE = {2.5: 15, 5.0: 30, 8.0: 60, 16.0: 120, 32.0: 240, 64.0: 480}
# Share of the derived figure that healthy hardware reaches (docs/verify.md, "Floors").
FLOORS = {"nvlink": 0.90, "pcie": 0.80, "rdma": 0.85, "tcp_slow": 0.80, "tcp_fast": 0.35}
# Kernel TCP on one connection per channel saturates a core long before a 100 Gb/s port.
FAST_TCP_MBITS = 100_000


class SizeError(ValueError):
    """A size, factor or type that cannot be measured; the text is the sentence for the user."""


def parse_size(value: int | str) -> int:
    """Return bytes of ``8``, ``"64K"``, ``"128M"``, ``"4G"`` (powers of 1024, as in nccl-tests).

    Raises:
        SizeError: it is no size.
    """
    text = str(value).strip().upper()
    digits = text.rstrip("KMGIB")
    suffix = text[len(digits) :].replace("IB", "").replace("B", "")
    if not digits.isdigit() or suffix not in SUFFIXES:
        raise SizeError(f"{value!r} is no size; write bytes such as 8, or 64K, 128M, 4G")
    return int(digits) * SUFFIXES[suffix]


def sizes(minimum: int, maximum: int, factor: int, dtype: str) -> list[int]:
    """Return the message sizes as nccl-tests steps through them: minimum, minimum * factor, … up to maximum.

    Raises:
        SizeError: a value cannot be measured.
    """
    if dtype not in DTYPES:
        raise SizeError(f"dtype is {dtype!r}, but one of {', '.join(DTYPES)} was expected")
    width = DTYPES[dtype]
    if minimum < width:
        raise SizeError(f"size_min is {minimum} bytes, but one {dtype} already takes {width}; set size_min to {width} or more")
    if minimum > maximum:
        raise SizeError(f"size_min is {minimum} bytes, which is above size_max, {maximum} bytes; swap or correct them")
    for name, value in (("size_min", minimum), ("size_max", maximum)):
        if value % width:
            raise SizeError(
                f"{name} is {value} bytes, which is no multiple of {width}, the bytes of one {dtype}; "
                f"set it to {value - value % width or width}"
            )
    if factor < 2:
        raise SizeError(f"size_factor is {factor}, but a whole number from 2 was expected; set 2 to double each size")
    found = []
    size = minimum
    while size <= maximum:
        found.append(size)
        size *= factor
    return found


def algorithm_bandwidth(size: int, seconds: float) -> float:
    """Return algbw: bytes of the message per second, in GB/s."""
    return size / 1e9 / seconds if seconds > 0 else 0.0


def bus_factor(collective: str, ranks: int) -> float:
    """Return busbw / algbw (nccl-tests, doc/PERFORMANCE.md).

    Raises:
        KeyError: the collective is not known.
    """
    if ranks < 2:
        return 1.0
    share = (ranks - 1) / ranks
    return {
        "all_reduce": 2 * share,
        "reduce_scatter": share,
        "all_gather": share,
        "broadcast": 1.0,
        "reduce": 1.0,
        "sendrecv": 1.0,
    }[collective]


def bus_bandwidth(size: int, seconds: float, ranks: int, collective: str = "all_reduce") -> float:
    """Return busbw in GB/s: what each link carries, whatever the number of ranks."""
    return algorithm_bandwidth(size, seconds) * bus_factor(collective, ranks)


def plateau(rows: t.Sequence[tuple[int, float]], near: float = 0.9) -> tuple[int, float]:
    """Return the size and bandwidth at the plateau: the median of the sizes within ``near`` of the best.

    A mean over all sizes would be ruled by the small ones, the single best would be ruled by luck.

    Args:
        rows: (size in bytes, busbw in GB/s).
        near: share of the best that still belongs to the plateau.
    """
    if not rows:
        return 0, 0.0
    best = max(value for _size, value in rows)
    flat = [(size, value) for size, value in rows if value >= near * best]
    return max(size for size, _value in flat), statistics.median(value for _size, value in flat)


def nccl_tests_row(
    size: int, dtype: str, operation: str, seconds: float, ranks: int, wrong: int | None, iterations: int
) -> dict[str, t.Any]:
    """Return a result in the shape of nccl-tests' JSON (version 3, src/util.cu).

    torch's all-reduce works in place, so ``out_of_place`` is null, as nccl-tests writes it where it does not measure it.
    """
    return {
        "size": size,
        "count": size // DTYPES[dtype],
        "type": NCCL_TESTS_DTYPES[dtype],
        "redop": operation,
        "root": "-1",
        "out_of_place": None,
        "in_place": {
            "time": seconds * 1e6,
            "alg_bw": algorithm_bandwidth(size, seconds),
            "bus_bw": bus_bandwidth(size, seconds, ranks),
            "nwrong": wrong,
        },
        "actual_iterations": iterations,
        "experiment_name": "all_reduce",
    }


@dataclass(frozen=True)
class Gpu:
    """A GPU as its node reports it.

    Attributes:
        name: product name.
        capability: compute capability times ten, such as 90; 0 where unknown.
        nvlinks: active NVLinks; None where nobody could tell.
        pcie_speed: GT/s of a lane that slot and card agree on; 0 where unknown.
        pcie_width: lanes; 0 where unknown.
    """

    name: str
    capability: int = 0
    nvlinks: int | None = None
    pcie_speed: float = 0.0
    pcie_width: int = 0


@dataclass(frozen=True)
class Nic:
    """A network adapter that carries the training traffic.

    Attributes:
        name: interface or RDMA device.
        mbits: speed of the port in Mbit/s; 0 where unknown, as on virtual ones.
        rdma: whether it is an InfiniBand or RoCE device.
        pcie_speed: as in Gpu; 0 where unknown.
        pcie_width: as in Gpu; 0 where unknown.
    """

    name: str
    mbits: float = 0.0
    rdma: bool = False
    pcie_speed: float = 0.0
    pcie_width: int = 0


@dataclass(frozen=True)
class Expected:
    """What the hardware should reach.

    Attributes:
        value: GB/s; None where the hardware is not known.
        minimum: GB/s that are needed to pass; None where unknown.
        arithmetic: how the value came about, or why there is none.
        blocks: whether falling below the minimum fails (else it warns).
    """

    value: float | None
    minimum: float | None
    arithmetic: str
    blocks: bool = True

    def as_dict(self) -> dict[str, t.Any]:
        """Return the fields as plain data."""
        return {"value": self.value, "minimum": self.minimum, "arithmetic": self.arithmetic, "blocks": self.blocks}


def pcie_bandwidth(speed: float, width: int) -> float:
    """Return the GB/s that NCCL counts for a PCIe link; 0 where unknown."""
    return width * PCI_LANE.get(speed, 0) / 80.0


def nvlink_bandwidth(capability: int) -> float:
    """Return the GB/s that NCCL counts for one NVLink of a compute capability; 0 where that is not known."""
    return next((value for first, last, value in NVLINK_GBYTES_PER_SECOND if first <= capability <= last), 0.0)


def inside_node(gpus: t.Sequence[Gpu]) -> Expected:
    """Return what an all-reduce between the GPUs of one node should reach (bus bandwidth)."""
    if len(gpus) < 2:
        return Expected(None, None, "one device per node: nothing to measure inside a node")
    names = sorted({gpu.name for gpu in gpus})
    if len(names) > 1:
        return Expected(None, None, f"unknown: different GPUs in one node ({', '.join(names)})")
    gpu = gpus[0]
    links = min((gpu.nvlinks if gpu.nvlinks is not None else -1) for gpu in gpus)
    if links > 0:
        each = nvlink_bandwidth(gpu.capability)
        if not each:
            return Expected(None, None, f"unknown: no NVLink speed is known for compute capability {gpu.capability / 10:.1f}")
        value = links * each
        floor = FLOORS["nvlink"]
        text = f"{links} NVLinks x {each:g} GB/s = {value:.1f} GB/s; {floor:.0%} of it = {value * floor:.1f} GB/s"
        return Expected(value, value * floor, text)
    if links < 0:
        return Expected(None, None, "unknown: the number of active NVLinks could not be read")
    slowest = min(gpus, key=lambda card: pcie_bandwidth(card.pcie_speed, card.pcie_width))
    value = pcie_bandwidth(slowest.pcie_speed, slowest.pcie_width)
    if not value:
        return Expected(None, None, "unknown: neither NVLink nor the PCIe link of the GPUs could be read")
    floor = FLOORS["pcie"]
    text = (
        f"no NVLink; PCIe {slowest.pcie_speed:g} GT/s x {slowest.pcie_width} lanes: {slowest.pcie_width} x "
        f"{PCI_LANE[slowest.pcie_speed]} / 80 = {value:.1f} GB/s; {floor:.0%} of it = {value * floor:.1f} GB/s"
    )
    # Whether peers reach each other directly or through a CPU's interconnect is not known, so this only warns.
    return Expected(value, value * floor, text, blocks=False)


def wire(nics: t.Sequence[Nic]) -> Expected:
    """Return what a node should send to another one, summed over its adapters."""
    if not nics:
        return Expected(None, None, "unknown: no network adapter was found")
    dark = [nic.name for nic in nics if nic.mbits <= 0]
    if dark:
        return Expected(None, None, f"unknown: {', '.join(dark)} reports no speed (a virtual adapter?)")
    parts = []
    total = 0.0
    for nic in nics:
        port = nic.mbits / 8000.0
        slot = pcie_bandwidth(nic.pcie_speed, nic.pcie_width)
        value = min(port, slot) if slot else port
        total += value
        limit = f", capped by its PCIe link at {slot:.1f}" if slot and slot < port else ""
        parts.append(f"{nic.name} {nic.mbits:.0f} Mb/s / 8000 = {port:.2f} GB/s{limit}")
    rdma = all(nic.rdma for nic in nics)
    fast = not rdma and any(nic.mbits >= FAST_TCP_MBITS for nic in nics)
    floor = FLOORS["rdma" if rdma else "tcp_fast" if fast else "tcp_slow"]
    text = f"{' + '.join(parts)}; sum {total:.2f} GB/s; {floor:.0%} of it = {total * floor:.2f} GB/s"
    return Expected(total, total * floor, text, blocks=not fast)


def application(inside: Expected, outside: Expected, nodes: int, local: int) -> Expected:
    """Return what the all-reduce over all ranks should reach: the slower of the node's inside and the wire.

    Tree and NVLS-tree carry half the traffic of a ring over two nodes' wire, so passing here says little of the wire.
    """
    if nodes < 2:
        return inside
    if local < 2:
        return Expected(outside.value, outside.minimum, f"one device per node, so the wire decides: {outside.arithmetic}", outside.blocks)
    if inside.value is None or outside.value is None:
        return Expected(None, None, (inside if inside.value is None else outside).arithmetic)
    slower = inside if inside.value < outside.value else outside
    text = f"min(inside {inside.value:.1f}, wire {outside.value:.1f}) = {slower.value:.1f} GB/s; {slower.arithmetic}"
    return Expected(slower.value, slower.minimum, text, slower.blocks)
