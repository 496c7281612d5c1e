# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node computes and communicates with: GPUs, NVSwitches, network adapters, driver.

Everything comes from sysfs and procfs, so that a bare node without a driver answers too. Where a driver runs,
nvidia-smi adds what only the driver knows: memory and NVLinks. Nothing is written.
Every function takes ``root``, the folder that stands for ``/``, so that recorded trees are fixtures.
"""

from __future__ import annotations

import glob
import os
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import gpu_names, host_settings, nvidia_smi
from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text

NVIDIA = "0x10de"
# PCI classes (PCI Code and ID Assignment, 1.14): a GPU is a display or 3D controller, an NVSwitch an "other bridge".
GPU_CLASSES = ("0x0300", "0x0302")
NVSWITCH_CLASS = "0x0680"
# With NVLink 5 (HGX B200) the switches are reached through ConnectX adapters that say so in their vital product data.
SWITCH_MANAGEMENT = b"SW_MNG"
# Drivers of adapters that carry no cable of their own.
VIRTUAL_DRIVERS = frozenset({"virtio_net", "veth", "vmxnet3", "xen_netfront", "hv_netvsc", "tun"})
# Drivers that keep a device for virtual machines.
KEPT_FOR_GUESTS = ("vfio-pci", "pci-stub", "xen-pciback")
Run = t.Callable[[t.Sequence[str]], str]


def pci_devices(root: str = "/") -> list[dict[str, str]]:
    """Return address, vendor, device, class and sysfs folder of every PCI device, by address."""
    found = []
    for folder in sorted(glob.glob(os.path.join(root, "sys/bus/pci/devices/*"))):
        entry = {key: read_text(os.path.join(folder, key)).strip() for key in ("vendor", "device", "class")}
        found.append({**entry, "pci": os.path.basename(folder), "folder": folder})
    return found


def number(text: str) -> int | None:
    """Return the number that a text begins with, None where it does not or where it is negative (the kernel's unknown)."""
    match = re.match(r"\s*(\d+)", text)
    return int(match.group(1)) if match else None


def pcie_link(folder: str) -> dict[str, t.Any]:
    """Return lanes in use and GT/s of a lane that both ends can do; an idle link runs slower, which is no fault.

    None stands for unknown, as behind a hypervisor.
    """
    width = number(read_text(os.path.join(folder, "current_link_width")))
    speeds = []
    for end in (folder, os.path.dirname(os.path.realpath(folder))):
        match = re.match(r"([\d.]+) GT/s", read_text(os.path.join(end, "max_link_speed")))
        if match:
            speeds.append(float(match.group(1)))
    return {
        "pcie_width": width or None,
        "pcie_max_width": number(read_text(os.path.join(folder, "max_link_width"))) or None,
        "pcie_speed_gts": min(speeds) if speeds else None,
        "numa": number(read_text(os.path.join(folder, "numa_node"))),
    }


def information(root: str, pci: str) -> dict[str, str]:
    """Return what the driver says of a GPU in /proc/driver/nvidia/gpus; empty without a driver."""
    text = read_text(os.path.join(root, "proc/driver/nvidia/gpus", pci, "information"))
    return {key.strip(): value.strip() for key, _colon, value in (line.partition(":") for line in text.splitlines())}


def parse_query(text: str) -> dict[str, dict[str, t.Any]]:
    """Return memory and compute capability by PCI address from ``nvidia-smi --query-gpu`` (see QUERY)."""
    found = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) != 4:
            continue
        memory = number(words[2])
        found[short_address(words[0])] = {
            "name": words[1],
            "memory_bytes": memory * 1024**2 if memory else None,
            "architecture": "sm_" + words[3].replace(".", "") if re.fullmatch(r"\d+\.\d", words[3]) else "",
        }
    return found


QUERY = ("--query-gpu=pci.bus_id,name,memory.total,compute_cap", "--format=csv,noheader,nounits")
# Asked by itself, since drivers that do not know it answer nothing at all.
QUERY_MIG = ("--query-gpu=pci.bus_id,mig.mode.current", "--format=csv,noheader")


def parse_mig(text: str) -> dict[str, bool]:
    """Return whether a GPU is cut into instances (MIG), by PCI address; those that cannot be are left out."""
    pairs = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    return {short_address(pair[0]): pair[1] == "Enabled" for pair in pairs if len(pair) == 2 and pair[1] in ("Enabled", "Disabled")}


def short_address(address: str) -> str:
    """Return a PCI address as sysfs writes it; nvidia-smi's domain has eight digits."""
    domain, _colon, rest = address.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def parse_nvlinks(text: str) -> dict[str, int]:
    """Return the active NVLinks by the GPU's UUID from ``nvidia-smi nvlink --status``."""
    found: dict[str, int] = {}
    uuid = ""
    for line in text.splitlines():
        match = re.search(r"\(UUID: (GPU-[0-9a-f-]+)\)", line)
        if match:
            uuid = match.group(1)
            found[uuid] = 0
        elif uuid and re.search(r"Link \d+: [\d.]+ GB/s", line):
            found[uuid] += 1
    return found


def parse_fabric(text: str) -> str:
    """Return the state of the NVSwitch fabric from ``nvidia-smi -q``: the worst one of all GPUs, empty where none tells.

    A GPU says "Completed" once the fabric manager has set up its links, "In Progress" until then.
    """
    states = re.findall(r"^\s+Fabric\s*\n\s+State\s+: (.+?)\s*$", text, re.MULTILINE)
    told = [state for state in states if state != "N/A"]
    return next((state for state in told if state != "Completed"), told[0] if told else "")


def gpus(root: str, devices: t.Sequence[t.Mapping[str, str]]) -> list[dict[str, t.Any]]:
    """Return all GPUs of the machine, by PCI address, as documented in docs/nvidia.md, before nvidia-smi is asked."""
    found = []
    for entry in devices:
        if entry["vendor"] != NVIDIA or entry["class"][:6] not in GPU_CLASSES:
            continue
        told = information(root, entry["pci"])
        product = gpu_names.lookup(int(entry["device"], 16))
        found.append(
            {
                "pci": entry["pci"],
                "vendor": entry["vendor"],
                "device": entry["device"],
                "name": told.get("Model") or product.name,
                "generation": product.generation,
                "architecture": product.architecture,
                "uuid": told.get("GPU UUID", "") if "?" not in told.get("GPU UUID", "") else "",
                "minor": number(told.get("Device Minor", "")),
                "nvlinks": None,
                "memory_bytes": None,
                "mig": None,
                "bound": bound_driver(entry["folder"]),
                "excluded": told.get("GPU Excluded", "").lower() == "yes",
                "answers": None,
                **pcie_link(entry["folder"]),
            }
        )
    return found


def ask(found: t.Sequence[dict[str, t.Any]], run: Run) -> None:
    """Add to the GPUs that a driver runs what nvidia-smi says of them, and whether it says anything."""
    driven = [gpu for gpu in found if gpu["minor"] is not None]
    asked = parse_query(run(QUERY)) if driven else {}
    if not asked:
        return
    links = parse_nvlinks(run(("nvlink", "--status")))
    cut = parse_mig(run(QUERY_MIG))
    for gpu in driven:
        answer = asked.get(gpu["pci"])
        gpu["answers"] = bool(answer)
        if answer:
            gpu.update({key: value for key, value in answer.items() if value})
            gpu["nvlinks"] = links.get(gpu["uuid"], 0)
            gpu["mig"] = cut.get(gpu["pci"])


def bound_driver(folder: str) -> str:
    """Return the kernel's driver of a PCI device, empty where it has none: ``vfio-pci`` keeps one for virtual machines."""
    path = os.path.join(folder, "driver")
    return os.path.basename(os.path.realpath(path)) if os.path.exists(path) else ""


def usable(root: str, found: t.Sequence[dict[str, t.Any]]) -> list[dict[str, t.Any]]:
    """Return the GPUs that a job here may use, in the order of CUDA_DEVICE_ORDER=PCI_BUS_ID.

    With a driver these are the ones whose device file is here: a container sees all GPUs in sysfs, but has the files of
    some. Without a driver a machine will have all of them, and a container none.
    """
    if any(gpu["minor"] is not None for gpu in found):
        driven = [gpu for gpu in found if gpu["minor"] is not None and not gpu["excluded"]]
        return [gpu for gpu in driven if os.path.exists(os.path.join(root, f"dev/nvidia{gpu['minor']}"))]
    return [] if in_container(root) else [gpu for gpu in found if gpu["bound"] not in KEPT_FOR_GUESTS]


def in_container(root: str) -> bool:
    """Return whether the node is a container, which sees all of its host's PCI devices and owns some or none."""
    return any(os.path.exists(os.path.join(root, path)) for path in ("run/systemd/container", "run/host/container-manager"))


def rdma_devices(root: str) -> dict[str, list[dict[str, t.Any]]]:
    """Return the RDMA devices by the PCI address of their adapter."""
    found: dict[str, list[dict[str, t.Any]]] = {}
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/infiniband/*"))):
        port = next(iter(sorted(glob.glob(os.path.join(folder, "ports/*")))), "")
        rate = number(read_text(os.path.join(port, "rate"))) if port else None
        found.setdefault(pci_of(os.path.join(folder, "device")), []).append(
            {
                "device": os.path.basename(folder),
                "link_layer": read_text(os.path.join(port, "link_layer")).strip() if port else "",
                "mbits": rate * 1000 if rate else None,
            }
        )
    return found


def pci_of(link: str) -> str:
    """Return the PCI address of the adapter that a sysfs link leads to, an empty text where it leads to none."""
    if not os.path.exists(link):
        return ""
    return next(iter(re.findall(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", os.path.realpath(link))[::-1]), "")


def link_speed(folder: str) -> int | None:
    """Return Mbit/s of an interface; None where the kernel does not know, as with virtual or unplugged ones."""
    return number(read_text(os.path.join(folder, "speed"))) or None


def nics(root: str, cards: t.Sequence[t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
    """Return the network adapters, with the way from each to each GPU."""
    rdma = rdma_devices(root)
    container = in_container(root)
    found = []
    for folder in sorted(glob.glob(os.path.join(root, "sys/class/net/*"))):
        name = os.path.basename(folder)
        device = os.path.join(folder, "device")
        made_up = not os.path.exists(device) and not os.path.isdir(os.path.join(folder, "bonding"))
        # Bridges, tunnels and the like carry nothing of their own; a container has no others.
        if name == "lo" or not os.path.isdir(folder) or (made_up and not container):
            continue
        bound = os.path.join(device, "driver")
        driver = os.path.basename(os.path.realpath(bound)) if os.path.exists(bound) else ""
        pci = pci_of(device)
        mine = rdma.pop(pci, []) if pci else []
        virtual = not pci or driver in VIRTUAL_DRIVERS
        found.append(adapter(root, name, pci, driver, virtual, link_speed(folder), mine, cards))
    for pci, mine in sorted(rdma.items()):
        if pci:
            found.append(adapter(root, "", pci, "", False, None, mine, cards))
    return found


def adapter(
    root: str,
    name: str,
    pci: str,
    driver: str,
    virtual: bool,
    speed: int | None,
    rdma: list[dict[str, t.Any]],
    cards: t.Sequence[t.Mapping[str, t.Any]],
) -> dict[str, t.Any]:
    """Return one network adapter."""
    folder = os.path.join(root, "sys/bus/pci/devices", pci)
    link = pcie_link(folder) if pci else {"pcie_width": None, "pcie_max_width": None, "pcie_speed_gts": None, "numa": None}
    return {
        "interface": name,
        "speed_mbits": speed or next((entry["mbits"] for entry in rdma if entry["mbits"]), None),
        "driver": driver,
        "virtual": virtual,
        "pci": pci,
        **link,
        "rdma": rdma,
        "gpu_distance": {card["pci"]: distance(root, pci, card["pci"]) for card in cards} if pci and not virtual else {},
    }


def distance(root: str, one: str, other: str) -> str:
    """Return the way between two PCI devices in the words of ``nvidia-smi topo``.

    PIX: at most one bridge; PXB: several bridges of one root port; PHB: through the CPU's host bridge; NODE: several host
    bridges of one NUMA node; SYS: between NUMA nodes.
    """
    folders = [os.path.join(root, "sys/bus/pci/devices", pci) for pci in (one, other)]
    ways = [re.findall(r"pci[0-9a-f]{4}:[0-9a-f]{2}|[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", os.path.realpath(folder)) for folder in folders]
    common = 0
    for left, right in zip(*ways):
        if left != right:
            break
        common += 1
    if common == 0:
        nodes = [read_text(os.path.join(folder, "numa_node")).strip() for folder in folders]
        return "NODE" if nodes[0] == nodes[1] and nodes[0] not in ("", "-1") else "SYS"
    if common == 1:
        return "PHB"
    # A switch is an upstream port with downstream ports; devices below one switch share its upstream port.
    return "PIX" if max(len(way) - common for way in ways) <= 2 else "PXB"


def driver(root: str = "/") -> dict[str, t.Any]:
    """Return the NVIDIA driver's state.

    ``version`` is the loaded kernel module's, else that of the libraries; ``mismatch`` says that they differ, which is
    what an upgrade without a reboot leaves behind ("Driver/library version mismatch").
    """
    text = read_text(os.path.join(root, "proc/driver/nvidia/version"))
    match = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    loaded = match.group(1) if match else read_text(os.path.join(root, "sys/module/nvidia/version")).strip()
    libraries = []
    for pattern in ("usr/lib/*-linux-gnu", "usr/lib64", "usr/lib/*-linux-gnu/nvidia/current"):
        for path in glob.glob(os.path.join(root, pattern, "libnvidia-ml.so.*.*")):
            libraries.append(os.path.basename(path)[len("libnvidia-ml.so.") :])
    installed = max(libraries, key=version_key, default="")
    return {
        "version": loaded or installed,
        "loaded": loaded,
        "installed": installed,
        "open": "Open Kernel Module" in text if text else None,
        "mismatch": bool(loaded and installed and loaded != installed),
        "nouveau": os.path.isdir(os.path.join(root, "sys/module/nouveau")),
        "peermem": os.path.isdir(os.path.join(root, "sys/module/nvidia_peermem")),
        "peer_memory": peer_memory(root),
        # The licence daemon of a virtual GPU's driver, which no other driver brings.
        "vgpu": os.path.exists(os.path.join(root, "usr/bin/nvidia-gridd")),
    }


def peer_memory(root: str) -> bool:
    """Return whether the RDMA stack lets nvidia-peermem register (DOCA-OFED's does, the kernel's own does not)."""
    # The list of symbols is long, so it is read only where RDMA adapters are.
    if not glob.glob(os.path.join(root, "sys/class/infiniband/*")):
        return False
    return "ib_register_peer_memory_client" in read_text(os.path.join(root, "proc/kallsyms"))


def version_key(version: str) -> tuple[int, ...]:
    """Return a version's numbers, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def fabric(root: str, devices: t.Sequence[t.Mapping[str, str]], run: Run) -> dict[str, t.Any]:
    """Return whether the GPUs are joined by NVSwitches, the fabric manager that they need, and the state of the links."""
    switches = [entry for entry in devices if entry["vendor"] == NVIDIA and entry["class"][:6] == NVSWITCH_CLASS]
    bridges = 0
    for folder in glob.glob(os.path.join(root, "sys/class/infiniband/*")):
        try:
            with open(os.path.join(folder, "device/vpd"), "rb") as stream:
                bridges += SWITCH_MANAGEMENT in stream.read()
        except OSError:
            pass
    cgroups = ("sys/fs/cgroup/system.slice", "sys/fs/cgroup/systemd/system.slice", "sys/fs/cgroup/unified/system.slice")
    unit = "nvidia-fabricmanager.service/cgroup.procs"
    return {
        "nvswitches": len(switches),
        "nvlink_bridges": bridges,
        "required": bool(switches or bridges),
        "state": parse_fabric(run(("-q",))) if switches or bridges else "",
        "manager_installed": os.path.exists(os.path.join(root, "usr/bin/nv-fabricmanager")),
        "manager_running": any(read_text(os.path.join(root, path, unit)).strip() for path in cgroups),
    }


def collect(root: str = "/", run: Run | None = None) -> dict[str, t.Any]:
    """Return the hardware of a node.

    Args:
        root: folder that stands for ``/``.
        run: calls nvidia-smi with arguments; default: the real one for ``/``, none for another root.
    """
    smi = run or (nvidia_smi.NvidiaSmi() if root == "/" else lambda _words: "")
    devices = pci_devices(root)
    cards = gpus(root, devices)
    ask(cards, smi)
    joined = fabric(root, devices, smi)
    problem = getattr(smi, "problem", "")
    if any(gpu["answers"] for gpu in cards) and not getattr(smi, "hangs", False):
        problem = ""  # of the GPUs it told; not all have links that it could tell of
    state = driver(root)
    # Libraries may lie where they are not looked for.
    state["mismatch"] = state["mismatch"] or "version mismatch" in problem
    state.update(nvidia_smi=problem, nvidia_smi_hangs=bool(getattr(smi, "hangs", False)))
    return {
        "gpus": cards,
        "usable_gpus": usable(root, cards),
        "nvswitches": joined["nvswitches"],
        "nics": nics(root, cards),
        "driver": state,
        "fabric": joined,
        "settings": host_settings.collect(root),
    }
