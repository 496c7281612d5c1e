# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role nvidia_driver does on a node: packages, pins, files, services, kernel modules, reboot."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import nvidia_sources
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import (
    TURING,
    Manifest,
    Node,
    Variables,
    capability,
    chosen_gpus,
    driver_of,
    fabric_of,
    has_rdma,
    is_good,
    manages,
    numbers,
    packages_of,
)

NOUVEAU = "/etc/modprobe.d/onprem-torch-nouveau.conf"
PEERMEM = "/etc/modules-load.d/onprem-torch-peermem.conf"
# With NVLink 5 the fabric manager and nvlsm reach the switches by management datagrams of InfiniBand, through /dev/infiniband/umad*
# (NVIDIA Fabric Manager User Guide); nothing else loads that module.
NVLINK5 = "/etc/modules-load.d/onprem-torch-nvlink.conf"
NVLINK5_MODULE = "ib_umad"
DEVICES_UNIT = "onprem-torch-gpu-devices.service"
PERSISTENCE_UNIT = "nvidia-persistenced.service"
FABRIC_UNIT = "nvidia-fabricmanager.service"
# The first kernel with which GPU memory is shared with adapters as a dma-buf, by the open modules alone (NVIDIA
# GPUDirect RDMA documentation, "Using DMA-BUF for GPUDirect RDMA").
DMA_BUF_KERNEL = (5, 12)
# torchrun's unit may gain no privileges, so the setuid program that makes these files for anybody else is of no use there.
DEVICES = """\
[Unit]
Description=Device files of the GPUs (onprem.torch)
DefaultDependencies=no
After=local-fs.target systemd-modules-load.service
Before=basic.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c '[ ! -x /usr/bin/nvidia-modprobe ] || exec /usr/bin/nvidia-modprobe -c0 -u'

[Install]
WantedBy=basic.target
"""


def kernel_modules(variables: Variables, cards: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    """Return ``open`` or ``proprietary``: open ones wherever every GPU can (Turing and newer)."""
    wanted = str(variables.get("nvidia_driver_kernel_modules") or "auto")
    if wanted != "auto":
        return wanted
    return "proprietary" if any(0 < capability(gpu) < TURING for gpu in cards) else "open"


def wants_fabric_manager(variables: Variables, node: Node) -> bool:
    """Return whether the fabric manager runs: where NVSwitches are, unless a variable decides."""
    wanted = str(variables.get("nvidia_driver_fabric_manager") or "auto")
    return wanted == "present" if wanted != "auto" else bool(fabric_of(node).get("required"))


def names_of(version: str, node: Node, manifest: Manifest) -> dict[str, list[str]]:
    """Return the names of a driver's packages for a distribution, by their purpose."""
    branch = numbers(version)[0]
    ubuntu = (node.get("distribution") or {}).get("id") == "ubuntu"
    names = manifest["packages"]["debian" if not ubuntu else "ubuntu" if branch < 580 else "ubuntu_580" if branch < 590 else "ubuntu_590"]
    fabric = manifest["packages"]["fabric_manager"]
    found = {**names, "fabric_manager": fabric["until_575" if branch < 580 else "from_580"], "nvlink5": fabric["nvlink5"]}
    return {purpose: [name.format(branch=branch) for name in entries] for purpose, entries in found.items()}


def fabric_packages(version: str, node: Node, manifest: Manifest) -> list[dict[str, str]]:
    """Return the packages of the fabric manager of a driver's version; NVLink 5 needs a subnet manager beside it."""
    names = names_of(version, node, manifest)
    found = [{"name": name, "version": f"{version}-*"} for name in names["fabric_manager"]]
    return found + [{"name": name, "version": ""} for name in names["nvlink5"] if fabric_of(node).get("nvlink_bridges")]


def nvlink5_files(fabric: bool, node: Node) -> dict[str, str]:
    """Return the file that loads, at each boot, what the fabric manager of NVLink 5 needs of the kernel."""
    if not fabric or not fabric_of(node).get("nvlink_bridges"):
        return {}
    return {NVLINK5: f"# The fabric manager reaches the NVSwitches through it (onprem.torch.nvidia_driver).\n{NVLINK5_MODULE}\n"}


def headers(node: Node) -> list[str]:
    """Return the packages of kernel headers that DKMS needs: for the running kernel, and for those that boot later.

    A newer kernel that is installed already is booted next. A package without a version in its name, such as
    linux-image-amd64, brings later ones, and its counterpart their headers.
    """
    running = str(node.get("kernel") or "")
    found = [f"linux-headers-{running}"]
    for name, entry in sorted(packages_of(node).items()):
        match = re.fullmatch(r"linux-image-(?!unsigned-|extra-)(\S+?)", name)
        if not match or entry.get("state") != "installed" or name.endswith(("-dbg", "-unsigned")):
            continue
        release = match.group(1)
        if not release[0].isdigit() or kernel_numbers(release) > kernel_numbers(running):
            found.append(f"linux-headers-{release}")
    return found


def kernel_numbers(release: str) -> list[int]:
    """Return a kernel release's numbers, for comparing: ``6.1.0-30-amd64`` → [6, 1, 0, 30, 64]."""
    return [int(part) for part in re.findall(r"\d+", release)]


def driver_packages(version: str, modules: str, fabric: bool, node: Node, manifest: Manifest) -> list[dict[str, str]]:
    """Return the packages of a driver with exact versions, the headers of the kernels first."""
    found = [{"name": name, "version": ""} for name in headers(node)]
    found += [{"name": name, "version": f"{version}-*"} for name in names_of(version, node, manifest)[modules]]
    return [*found, *(fabric_packages(version, node, manifest) if fabric else [])]


def gpudirect(variables: Variables, node: Node, modules: str) -> tuple[str, list[str]]:
    """Return how adapters reach GPU memory, and advice: ``dma-buf``, ``peermem`` or an empty text for not at all.

    With the open modules and a kernel from 5.12 nothing is needed. Older kernels and the proprietary modules need
    nvidia-peermem, which loads only beside an RDMA stack that knows peer memory (DOCA-OFED).
    """
    wanted = str(variables.get("nvidia_driver_peermem") or "auto")
    if wanted == "present":
        return "peermem", []
    if wanted == "absent" or not has_rdma(node):
        return "", []
    if modules == "open" and numbers(str(node.get("kernel") or ""))[:2] >= DMA_BUF_KERNEL:
        return "dma-buf", []
    if driver_of(node).get("peer_memory"):
        return "peermem", []
    return "", [
        f"GPUDirect RDMA is off: with the {modules} modules and kernel {node.get('kernel')} it needs nvidia-peermem, "
        "which needs DOCA-OFED's RDMA stack; install it and run this again"
    ]


def reboot_word(variables: Variables, node: Node, expected: bool) -> str:
    """Return what happens where the running kernel needs a reboot: ``once``, or why not."""
    if not expected:
        return ""
    if node.get("control_node"):
        return "by hand, since this is the machine that Ansible runs on, which is never rebooted"
    if variables.get("nvidia_driver_reboot") is False:
        return "by hand, since nvidia_driver_reboot is false"
    return "once"


def is_ours(node: Node, manifest: Manifest) -> bool:
    """Return whether this collection has installed a node's driver: its pins name the family, and not a single package."""
    return not set(manifest["driver_family"]).isdisjoint(node.get("own_pins") or [])


def settings_of(
    packages: list[dict[str, str]], pinned: t.Sequence[str], version: str, source: t.Mapping[str, t.Any], manifest: Manifest
) -> dict[str, t.Any]:
    """Return the settings of the module nvidia_packages for a driver or its fabric manager."""
    pins = [{"packages": list(pinned), "version": f"{version}-*"}]
    # NVLink 5's subnet manager has a version of its own, at which it is held.
    loose = [entry["name"] for entry in packages if entry["name"] in manifest["packages"]["fabric_manager"]["nvlink5"]]
    if loose:
        pins.append({"packages": loose, "version": ""})
    return {"name": "nvidia_driver", "repository": dict(source), "packages": packages, "pins": pins, "refuse_distribution": True}


def kept(
    variables: Variables, node: Node, source: t.Mapping[str, t.Any], manifest: Manifest, running: str
) -> tuple[dict[str, t.Any], list[str]]:
    """Return what is done beside a good driver, which is left alone, and advice: its fabric manager where one lacks."""
    if not wants_fabric_manager(variables, node):
        return {"action": "keep"}, []
    if not source:
        return {"action": "keep"}, fabric_advice(node, running)
    packages = fabric_packages(running, node, manifest)
    there = packages_of(node)
    name = packages[0]["name"]
    if fabric_of(node).get("manager_running") and str((there.get(name) or {}).get("version", f"{running}-")).startswith(f"{running}-"):
        return {"action": "keep"}, []
    settings = settings_of(packages, [name], running, source, manifest)
    files = nvlink5_files(True, node)
    settings.update(services=[FABRIC_UNIT], kernel_module="nvidia", kernel_module_version=running)
    settings.update(files=files, modules=[NVLINK5_MODULE] if files else [])
    return {"action": "keep", "wanted": True, "settings": settings}, []


def fabric_advice(node: Node, version: str) -> list[str]:
    """Return what is worth saying of a fabric manager that does not run and is not ours to start."""
    if fabric_of(node).get("manager_running"):
        return []
    return [
        f"NVSwitches need the fabric manager of the driver's version {version}, which does not run; "
        "start nvidia-fabricmanager, or CUDA fails with error 802"
    ]


def installed(
    variables: Variables, node: Node, source: t.Mapping[str, t.Any], manifest: Manifest, version: str
) -> tuple[dict[str, t.Any], list[str]]:
    """Return what is done to have our driver, and advice."""
    state = driver_of(node)
    running = state.get("loaded", "")
    fabric = wants_fabric_manager(variables, node)
    modules = kernel_modules(variables, chosen_gpus(variables, node))
    path, advice = gpudirect(variables, node, modules)
    if state.get("nouveau"):
        advice.append("nouveau is loaded and gives way to NVIDIA's driver with the reboot")
    packages = variables.get("nvidia_driver_packages") or []
    chosen = [split(entry) for entry in packages] if packages else driver_packages(version, modules, fabric, node, manifest)
    files = {
        NOUVEAU: "# NVIDIA's driver is used (onprem.torch.nvidia_driver).\nblacklist nouveau\noptions nouveau modeset=0\n",
        f"/etc/systemd/system/{DEVICES_UNIT}": DEVICES,
    }
    if path == "peermem":
        files[PEERMEM] = "# Adapters reach GPU memory through it (onprem.torch.nvidia_driver).\nnvidia-peermem\n"
    files.update(nvlink5_files(fabric, node))
    switches = bool(running and state.get("open") is not None and state["open"] is not (modules == "open"))
    expected = bool(running and (running != version or switches)) or bool(state.get("nouveau"))
    return {
        "action": "install",
        "wanted": True,
        "version": version,
        "kernel_modules": modules,
        "gpudirect": path,
        "reboot_expected": expected,
        "reboot": reboot_word(variables, node, True),
        "settings": {
            **settings_of(chosen, manifest["driver_family"], version, source, manifest),
            # Packages of the user's choice may be the distribution's.
            "refuse_distribution": not packages,
            "files": files,
            # What was turned off by a variable since an earlier run.
            "absent_files": [] if path == "peermem" else [PEERMEM],
            "disabled": [FABRIC_UNIT] if variables.get("nvidia_driver_fabric_manager") == "absent" else [],
            "services": [PERSISTENCE_UNIT, DEVICES_UNIT, *([FABRIC_UNIT] if fabric else [])],
            "kernel_module": "nvidia",
            "kernel_module_version": version,
            "kernel_module_flavour": modules,
            "modules": [*([NVLINK5_MODULE] if NVLINK5 in files else []), *(["nvidia-peermem"] if path == "peermem" else [])],
        },
    }, advice


def decide(
    name: str, variables: Variables, node: Node, source: t.Mapping[str, t.Any], manifest: Manifest
) -> tuple[dict[str, t.Any], list[str]]:
    """Return what nvidia_driver does on a node, and advice.

    ``action`` is ``install`` (ours, at our version), ``keep`` (good as it is), ``check`` (not ours) or ``none`` (no GPU).

    Args:
        name: the cluster's line.
        variables: the host's variables.
        node: what node_info found.
        source: the repository.
        manifest: what fits together.
    """
    cards = chosen_gpus(variables, node)
    state = driver_of(node)
    result: dict[str, t.Any] = {"action": "none", "version": state.get("version", ""), "wanted": False, "reboot": ""}
    if not cards or name == "cpu":
        return result, []
    line = manifest["lines"][name]
    result["fabric_manager"] = fabric = wants_fabric_manager(variables, node)
    if not manages(variables):
        return {**result, "action": "check"}, unmanaged_advice(name, line, state, fabric, node)
    wanted = str(variables.get("nvidia_driver_version") or "")
    version = wanted or nvidia_sources.default_driver(node, manifest)
    running = state.get("loaded", "")
    if is_good(line, node) and not wanted:
        if not is_ours(node, manifest):
            found, advice = kept(variables, node, source, manifest, running)
            return {**result, **found}, advice
        # Ours stays whole at its version: pins of fewer packages would release the others.
        version = running
    found, advice = installed(variables, node, source, manifest, version)
    return {**result, **found}, advice


def unmanaged_advice(name: str, line: t.Mapping[str, t.Any], state: t.Mapping[str, t.Any], fabric: bool, node: Node) -> list[str]:
    """Return what is worth saying of a driver that somebody else manages."""
    advice = []
    if numbers(state.get("version", "")) < numbers(line["minimum_driver"]):
        advice.append(
            f"the driver {state.get('version')} runs CUDA {name} by minor-version compatibility only; "
            f"{line['minimum_driver']} or newer is what it was made for"
        )
    return advice + (fabric_advice(node, str(state.get("version"))) if fabric else [])


def split(entry: str) -> dict[str, str]:
    """Return name and version of a package as apt writes it: ``name=version``."""
    name, _equals, version = str(entry).partition("=")
    return {"name": name, "version": version}
