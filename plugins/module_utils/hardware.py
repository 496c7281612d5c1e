# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GPUs, NVSwitches, network adapters and driver of a node, from sysfs and procfs; nvidia-smi only adds to it.

Everything is read below a root, so that a recorded tree can stand for a node. docs/nvidia.md lists the keys.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
import typing as t
import xml.etree.ElementTree as ElementTree

from ansible_collections.onprem.torch.plugins.module_utils import gpu_table, pci

# nvidia-smi takes seconds on a node with eight GPUs and no persistence daemon, and for ever on a sick one.
SMI_SECONDS = 30.0
MIB = 1024**2
# PCI classes: 0x03.. display, 0x0680 other bridge (NVSwitch).
CLASS_DISPLAY = 0x03
CLASS_BRIDGE = 0x0680
# Keys that change while the hardware stays the same.
PASSING = frozenset({"pcie_speed_now", "pcie_width_now", "fabric", "state", "up", "usable", "nouveau", "driver", "smi_error"})


def collect(root: str = "/") -> dict[str, t.Any]:
    """Return the hardware of a node; empty lists and strings where it has none.

    Args:
        root: folder that holds sys, proc, dev, run and usr; for recordings also the files nvidia-smi-q.xml and
            nvidia-smi-nvlink.txt, in place of asking nvidia-smi.
    """
    gpus = find_gpus(root)
    driver = find_driver(root)
    if gpus and (driver["loaded"] or root != "/"):
        driver["smi_error"] = add_smi(gpus, root)
    container = is_container(root)
    mark_usable(gpus, root, container)
    switches = find_nvswitches(root)
    nics = find_nics(root, gpus)
    for gpu in gpus:
        del gpu["folder"]
    return {
        "gpus": gpus,
        "usable_gpus": [gpu for gpu in gpus if gpu["usable"]],
        "nvswitches": len(switches),
        "nvswitch_generation": switches[0] if switches else "",
        "nics": nics,
        "driver": driver,
        "container": container,
        "secure_boot": secure_boot(root),
        "iommu": iommu(root),
    }


def identity(hardware: t.Mapping[str, t.Any]) -> t.Any:
    """Return the hardware without what passes (link speeds of the moment, states, driver), for fingerprints."""

    def strip(value: t.Any) -> t.Any:
        if isinstance(value, dict):
            return {key: strip(entry) for key, entry in value.items() if key not in PASSING}
        return [strip(entry) for entry in value] if isinstance(value, list) else value

    kept = {key: hardware.get(key) for key in ("gpus", "nvswitches", "nics")}
    # Virtual interfaces come and go with containers.
    kept["nics"] = [nic for nic in kept["nics"] or [] if not nic["virtual"]]
    return {**strip(kept), "usable": len(hardware.get("usable_gpus") or [])}


def is_container(root: str) -> bool:
    """Return whether this is a container, whose /sys shows the host's devices."""
    return any(os.path.exists(os.path.join(root, path)) for path in ("run/systemd/container", ".dockerenv", "run/.containerenv"))


def find_gpus(root: str) -> list[dict[str, t.Any]]:
    """Return the NVIDIA GPUs in the order of their PCI addresses, which is nvidia-smi's."""
    found = []
    for address in pci.devices(root):
        path = pci.folder(root, address)
        kind = pci.number(os.path.join(path, "class"), 16) or 0
        if pci.number(os.path.join(path, "vendor"), 16) != gpu_table.NVIDIA or kind >> 16 != CLASS_DISPLAY:
            continue
        device = pci.number(os.path.join(path, "device"), 16) or 0
        model = gpu_table.lookup(device)
        slot = pci.link(path)
        information = gpu_information(root, address)
        found.append(
            {
                "index": len(found),
                "pci": address,
                "vendor_id": f"{gpu_table.NVIDIA:04x}",
                "device_id": f"{device:04x}",
                "name": information.get("Model") or model.name,
                "form": model.form,
                "generation": model.generation,
                "capability": model.capability,
                "architecture": f"sm_{model.capability}" if model.capability else "",
                "memory_bytes": None,
                "uuid": uuid_of(information),
                "minor": int(information["Device Minor"]) if information.get("Device Minor", "").isdigit() else None,
                "nvlinks": None,
                "nvlink_gbytes_per_second": None,
                "pcie_speed": slot["speed"],
                "pcie_width": slot["width"],
                "pcie_speed_now": slot["speed_now"],
                "pcie_width_now": slot["width_now"],
                "numa_node": pci.numa_node(path),
                "driver": pci.driver(path),
                "mig": None,
                "fabric": "",
                "usable": False,
                "folder": path,
            }
        )
    return found


def uuid_of(information: t.Mapping[str, str]) -> str:
    """Return the UUID that the driver tells; it tells question marks until the GPU is used for the first time."""
    found = information.get("GPU UUID", "")
    return "" if "?" in found else found


def gpu_information(root: str, address: str) -> dict[str, str]:
    """Return what the loaded driver tells of a GPU in procfs, such as Model and Device Minor."""
    lines = pci.read(os.path.join(root, "proc/driver/nvidia/gpus", address, "information")).splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def mark_usable(gpus: t.Sequence[dict[str, t.Any]], root: str, container: bool) -> None:
    """Say of each GPU whether programs on this node can use it.

    A container has those whose device file it was given, though /sys shows all of the host's. Elsewhere the device
    files appear with the first use of the driver, so that a node with none of them has all of its GPUs.
    """
    files = {name for name in pci.listing(os.path.join(root, "dev")) if re.match(r"^nvidia\d+$", name)}
    for gpu in gpus:
        minor = gpu["minor"] if gpu["minor"] is not None else gpu["index"]
        gpu["usable"] = f"nvidia{minor}" in files if files or container else True


def find_nvswitches(root: str) -> list[str]:
    """Return the generation of each NVSwitch on the PCI bus."""
    found = []
    for address in pci.devices(root):
        path = pci.folder(root, address)
        if pci.number(os.path.join(path, "vendor"), 16) != gpu_table.NVIDIA:
            continue
        kind = (pci.number(os.path.join(path, "class"), 16) or 0) >> 8
        device = pci.number(os.path.join(path, "device"), 16) or 0
        if device in gpu_table.NVSWITCHES:
            found.append(gpu_table.NVSWITCHES[device])
        elif kind == CLASS_BRIDGE:
            found.append("")
    return found


def find_driver(root: str) -> dict[str, t.Any]:
    """Return which driver is loaded and which is installed."""
    loaded = pci.read(os.path.join(root, "sys/module/nvidia/version"))
    text = pci.read(os.path.join(root, "proc/driver/nvidia/version"))
    libraries = [
        found.group(1)
        for path in glob.glob(os.path.join(root, "usr/lib/*/libcuda.so.*")) + glob.glob(os.path.join(root, "usr/lib64/libcuda.so.*"))
        for found in [re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)$", path)]
        if found
    ]
    library = max(libraries, key=version_key) if libraries else ""
    module = module_version(root)
    installed = module or library
    return {
        "version": loaded or installed,
        "loaded": loaded,
        "installed": installed,
        "library": library,
        "open": ("Open Kernel Module" in text) if text else None,
        "mismatch": bool(loaded and library and loaded != library),
        "reboot_pending": bool(loaded and module and loaded != module),
        "nouveau": os.path.isdir(os.path.join(root, "sys/module/nouveau")),
        "peermem": os.path.isdir(os.path.join(root, "sys/module/nvidia_peermem")),
        "smi_error": "",
    }


def module_version(root: str) -> str:
    """Return the version of the kernel module on disk for the running kernel; empty where there is none."""
    if root != "/":
        return pci.read(os.path.join(root, "modinfo-nvidia-version"))
    return command_output(["modinfo", "--field", "version", "nvidia"], 10.0)[0].strip()


def version_key(version: str) -> tuple[int, ...]:
    """Return a version such as 580.95.05 as numbers that sort."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def command_output(words: t.Sequence[str], seconds: float) -> tuple[str, str]:
    """Return what a command prints and, where it failed, why."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=seconds,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return "", f"{words[0]} did not answer within {seconds:.0f} s"
    except OSError:
        return "", f"{words[0]} is not installed"
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        why = (done.stderr.decode("utf-8", "replace").strip() or text.strip()).splitlines()
        return "", f"{words[0]} failed: {why[0] if why else 'no message'}"
    return text, ""


def add_smi(gpus: t.Sequence[dict[str, t.Any]], root: str) -> str:
    """Add what only the driver knows: memory, UUID, NVLinks, fabric. Return why it could not be asked."""
    if root == "/":
        text, error = command_output(["nvidia-smi", "-q", "-x"], SMI_SECONDS)
        links = "" if error else command_output(["nvidia-smi", "nvlink", "--status"], SMI_SECONDS)[0]
    else:
        text, error = pci.read(os.path.join(root, "nvidia-smi-q.xml")), ""
        links = pci.read(os.path.join(root, "nvidia-smi-nvlink.txt"))
    if error or not text:
        return error
    try:
        known = parse_smi(text)
    except ElementTree.ParseError as problem:
        return f"nvidia-smi -q -x printed no XML: {problem}"
    speeds = parse_nvlink(links)
    for gpu in gpus:
        told = known.get(gpu["pci"])
        if not told:
            continue
        for key, value in told.items():
            if value not in (None, ""):
                gpu[key] = value
        each = speeds.get(gpu["uuid"])
        if links or told:
            gpu["nvlinks"] = len(each or [])
            gpu["nvlink_gbytes_per_second"] = min(each) if each else None
    return ""


def parse_smi(text: str) -> dict[str, dict[str, t.Any]]:
    """Return by PCI address what ``nvidia-smi -q -x`` tells.

    Raises:
        xml.etree.ElementTree.ParseError: it is no XML.
    """
    found = {}
    for node in ElementTree.fromstring(text).iter("gpu"):

        def word(path: str, node: ElementTree.Element = node) -> str:
            value = (node.findtext(path) or "").strip()
            return "" if value in ("N/A", "[N/A]") else value

        # nvidia-smi writes 00000000:19:00.0, sysfs 0000:19:00.0.
        domain, _colon, rest = (node.get("id") or "").lower().partition(":")
        memory = re.match(r"(\d+) MiB", word("fb_memory_usage/total"))
        minor = word("minor_number")
        found[f"{domain[-4:]}:{rest}"] = {
            "name": word("product_name"),
            "uuid": word("uuid"),
            "memory_bytes": int(memory.group(1)) * MIB if memory else None,
            "minor": int(minor) if minor.isdigit() else None,
            "mig": {"Enabled": True, "Disabled": False}.get(word("mig_mode/current_mig")),
            "fabric": " ".join(filter(None, (word("fabric/state"), word("fabric/status")))),
        }
    return found


def parse_nvlink(text: str) -> dict[str, list[float]]:
    """Return by GPU UUID the GB/s of each NVLink that is up, from ``nvidia-smi nvlink --status``."""
    found: dict[str, list[float]] = {}
    uuid = ""
    for line in text.splitlines():
        heading = re.search(r"UUID:\s*(GPU-[0-9a-f-]+)", line)
        if heading:
            uuid = heading.group(1)
            found[uuid] = []
            continue
        speed = re.match(r"\s*Link \d+:\s*([0-9.]+) GB/s", line)
        if speed and uuid:
            found[uuid].append(float(speed.group(1)))
    return found


def find_nics(root: str, gpus: t.Sequence[t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
    """Return the network interfaces and the InfiniBand devices without one."""
    rdma = rdma_devices(root)
    found = []
    for name in pci.listing(os.path.join(root, "sys/class/net")):
        base = os.path.join(root, "sys/class/net", name)
        if name == "lo" or not os.path.isdir(base):
            continue
        path = os.path.realpath(os.path.join(base, "device")) if os.path.exists(os.path.join(base, "device")) else ""
        speed = pci.number(os.path.join(base, "speed"))
        mine = [entry for entry in rdma if path and entry["folder"] == path]
        found.append(nic(name, path, gpus, mine, speed if speed and speed > 0 else None, pci.read(os.path.join(base, "operstate"))))
    taken = {device["name"] for entry in found for device in entry["rdma"]}
    for entry in rdma:
        if entry["name"] not in taken:
            found.append(nic("", entry["folder"], gpus, [entry], None, ""))
    return found


def nic(
    name: str,
    path: str,
    gpus: t.Sequence[t.Mapping[str, t.Any]],
    rdma: t.Sequence[t.Mapping[str, t.Any]],
    speed: t.Optional[int],
    state: str,
) -> dict[str, t.Any]:
    """Return one adapter; ``path`` is its device's folder, empty for a virtual interface."""
    address = os.path.basename(path)
    on_bus = bool(pci.ADDRESS.match(address))
    slot = pci.link(path) if on_bus else {"speed": 0.0, "width": 0}
    devices = [{key: value for key, value in entry.items() if key != "folder"} for entry in rdma]
    speeds = [entry["mbits"] for entry in devices if entry["mbits"]]
    return {
        "interface": name,
        "mbits": speed or (max(speeds) if speeds else None),
        "driver": pci.driver(path) if path else "",
        # A virtio port of a virtual machine has a device, but no speed that means anything.
        "virtual": not path,
        "pci": address if on_bus else "",
        "numa_node": pci.numa_node(path) if path else None,
        "pcie_speed": slot["speed"],
        "pcie_width": slot["width"],
        "up": state == "up" or any("ACTIVE" in entry["state"] for entry in devices),
        "rdma": devices,
        "distance": {gpu["pci"]: pci.distance(path, gpu["folder"]) for gpu in gpus} if on_bus else {},
    }


def rdma_devices(root: str) -> list[dict[str, t.Any]]:
    """Return the InfiniBand and RoCE devices with the state of their first port."""
    found = []
    for name in pci.listing(os.path.join(root, "sys/class/infiniband")):
        base = os.path.join(root, "sys/class/infiniband", name)
        ports = pci.listing(os.path.join(base, "ports"))
        port = os.path.join(base, "ports", ports[0]) if ports else ""
        rate = re.match(r"([0-9.]+) Gb/sec", pci.read(os.path.join(port, "rate"))) if port else None
        found.append(
            {
                "name": name,
                "link_layer": pci.read(os.path.join(port, "link_layer")) if port else "",
                "state": pci.read(os.path.join(port, "state")) if port else "",
                "mbits": int(float(rate.group(1)) * 1000) if rate else None,
                "folder": os.path.realpath(os.path.join(base, "device")),
            }
        )
    return found


def secure_boot(root: str) -> t.Optional[bool]:
    """Return whether Secure Boot is on; None where the machine does not tell (no EFI)."""
    for path in glob.glob(os.path.join(root, "sys/firmware/efi/efivars/SecureBoot-*")):
        try:
            with open(path, "rb") as stream:
                value = stream.read()
        except OSError:
            return None
        return value[-1:] == b"\x01"
    return None


def iommu(root: str) -> str:
    """Return how the kernel was told to use the IOMMU: off, pt (pass-through), on, or empty where it has none."""
    words = pci.read(os.path.join(root, "proc/cmdline")).split()
    if any(word in ("iommu=off", "intel_iommu=off", "amd_iommu=off") for word in words):
        return "off"
    if not pci.listing(os.path.join(root, "sys/class/iommu")):
        return ""
    return "pt" if "iommu=pt" in words else "on"
