"""Folders that stand for ``/`` of machines with GPUs: one recorded, the others built as the kernel lays them out."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures" / "hardware"


# The machines that decisions are tested with, as ``machine`` builds them.
MACHINES: dict[str, dict[str, t.Any]] = {
    "1x H100": {"gpus": 1, "device": "0x2330", "nics": 1},
    "8x A100": {"gpus": 8, "device": "0x20b2", "switches": 6, "nics": 8},
    "8x H100": {"gpus": 8, "device": "0x2330", "switches": 4, "nics": 8},
    "8x B200": {"gpus": 8, "device": "0x2901", "bridges": 4, "nics": 8},
    "4x L40S, PCIe": {"gpus": 4, "device": "0x26b9", "nics": 1},
    "no GPU": {"nics": 1},
}


def put(root: Path, path: str, text: str = "") -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def link(root: Path, path: str, target: str) -> None:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def recorded(root: Path, name: str) -> t.Callable[[t.Sequence[str]], str]:
    """Lay out a recording and return its nvidia-smi."""
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    for path, text in data["files"].items():
        put(root, path, text)
    for path in data["folders"]:
        (root / path).mkdir(parents=True)
    for path, target in data["links"].items():
        link(root, path, target)
    return lambda words: data["nvidia_smi"].get(" ".join(words), "")


def pci(root: Path, way: str, **attributes: str) -> None:
    """Add a PCI device at ``way``, such as ``pci0000:00/0000:00:01.0/0000:01:00.0``."""
    folder = f"sys/devices/{way}"
    for key, text in attributes.items():
        put(root, f"{folder}/{key.rstrip('_')}", f"{text}\n")
    address = way.rsplit("/", 1)[1]
    link(root, f"sys/bus/pci/devices/{address}", f"../../../devices/{way}")


def machine(
    root: Path,
    gpus: int = 0,
    device: str = "0x2330",
    switches: int = 0,
    nics: int = 0,
    bridges: int = 0,
    driver: str = "",
    open_modules: bool = True,
    visible: t.Optional[t.Sequence[int]] = None,
    speed: str = "32.0 GT/s PCIe",
) -> Path:
    """Build a machine: each GPU and the adapter beside it below one PCIe switch; half of them on either socket."""
    (root / "sys/bus/pci/devices").mkdir(parents=True)
    for index in range(gpus):
        bus = 0x10 * (index + 1)
        numa = "0" if index < (gpus + 1) // 2 else "1"
        up = f"pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        address = f"0000:{bus + 3:02x}:00.0"
        for port in (f"pci0000:{bus:02x}/0000:{bus:02x}:01.0", up, f"{up}/0000:{bus + 2:02x}:00.0", f"{up}/0000:{bus + 2:02x}:01.0"):
            pci(root, port, vendor="0x8086", device="0x0001", class_="0x060400", max_link_speed=speed)
        link_state = {"current_link_width": "16", "max_link_speed": speed, "numa_node": numa}
        pci(root, f"{up}/0000:{bus + 2:02x}:00.0/{address}", vendor="0x10de", device=device, class_="0x030200", **link_state)
        if driver:
            text = f"Model: \t\t NVIDIA GPU\nGPU UUID: \t GPU-{index:08x}\nDevice Minor: \t {index}\n"
            put(root, f"proc/driver/nvidia/gpus/{address}/information", text)
            if visible is None or index in visible:
                put(root, f"dev/nvidia{index}")
        if index < nics:
            adapter(root, f"{up}/0000:{bus + 2:02x}:01.0/0000:{bus + 4:02x}:00.0", index, link_state)
    for index in range(switches):
        way = f"pci0000:00/0000:00:{index + 1:02x}.0"
        pci(root, way, vendor="0x10de", device="0x22a3", class_="0x068000")
    for index in range(bridges):
        way = f"pci0000:00/0000:00:{index + 10:02x}.0"
        pci(root, way, vendor="0x15b3", device="0x1021", class_="0x020700", vpd="ConnectX-7 SW_MNG")
        put(root, f"sys/class/infiniband/mlx5_{100 + index}/ports/1/link_layer", "InfiniBand\n")
        link(root, f"sys/class/infiniband/mlx5_{100 + index}/device", f"../../../devices/{way}")
    if driver:
        kind = "Open Kernel Module for x86_64" if open_modules else "x86_64 Kernel Module"
        put(root, "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX {kind}  {driver}  Release Build\n")
    return root


def adapter(root: Path, way: str, index: int, link_state: t.Mapping[str, str]) -> None:
    """Add an InfiniBand adapter."""
    pci(root, way, vendor="0x15b3", device="0x1021", class_="0x020700", **link_state)
    folder = f"sys/devices/{way}"
    (root / "sys/bus/pci/drivers/mlx5_core").mkdir(parents=True, exist_ok=True)
    link(root, f"{folder}/driver", str(root / "sys/bus/pci/drivers/mlx5_core"))
    put(root, f"{folder}/net/ib{index}/speed", "400000\n")
    link(root, f"{folder}/net/ib{index}/device", "../..")
    link(root, f"sys/class/net/ib{index}", f"../../devices/{way}/net/ib{index}")
    put(root, f"{folder}/infiniband/mlx5_{index}/ports/1/rate", "400 Gb/sec (4X NDR)\n")
    put(root, f"{folder}/infiniband/mlx5_{index}/ports/1/link_layer", "InfiniBand\n")
    link(root, f"{folder}/infiniband/mlx5_{index}/device", "../..")
    link(root, f"sys/class/infiniband/mlx5_{index}", f"../../devices/{way}/infiniband/mlx5_{index}")
