# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of NVIDIA's software a node gets: hardware x distribution x variables x manifest, a pure function.

docs/nvidia.md lists the keys of a decision. Nothing here asks a node or changes one.
"""

from __future__ import annotations

import difflib
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.hardware import version_key
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

CPU = "cpu"
# Packages whose version is the driver's, as patterns of apt_preferences(5). A pin by version touches no other package.
DRIVER_PATTERNS = (
    "nvidia-*",
    "libnvidia-*",
    "libcuda1",
    "libnvcuvid*",
    "libnvoptix*",
    "libcudadebugger*",
    "cuda-drivers*",
    "firmware-nvidia-*",
    "xserver-xorg-video-nvidia*",
)
NOUVEAU_FILE = "/etc/modprobe.d/onprem-torch-nouveau.conf"
MODULES_FILE = "/etc/modules-load.d/onprem-torch-nvidia.conf"


def nearest_line(wanted: str, manifest: t.Mapping[str, t.Any]) -> str:
    """Return the line of the manifest that is most like an unknown one: same major version, nearest minor."""
    lines = list(manifest["lines"])
    numbers = version_key(wanted)
    if not numbers:
        return next(iter(difflib.get_close_matches(wanted, [*lines, CPU], 1)), newest_line(manifest))
    score = {line: (abs(version_key(line)[0] - numbers[0]), abs(version_key(line)[1] - (numbers + (0,))[1])) for line in lines}
    return min(lines, key=lambda line: (score[line], lines.index(line)))


def newest_line(manifest: t.Mapping[str, t.Any]) -> str:
    """Return the newest CUDA line."""
    return max(manifest["lines"], key=version_key)


def gpus_of(hardware: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    """Return the GPUs that count: those that programs on the node can use."""
    return list(hardware.get("usable_gpus") or [])


def generations_of(hardware: t.Mapping[str, t.Any]) -> list[str]:
    """Return the known generations among a node's GPUs."""
    return sorted({str(gpu.get("generation") or "").lower() for gpu in gpus_of(hardware)} - {""})


def capability_of(gpu: t.Mapping[str, t.Any]) -> int:
    """Return the compute capability of a GPU times ten (90 of sm_90); 0 where unknown."""
    numbers = version_key(str(gpu.get("architecture") or ""))
    return numbers[0] if numbers else 0


def in_container(hardware: t.Mapping[str, t.Any]) -> bool:
    """Return whether the node is a container, whose driver is its host's."""
    return bool((hardware.get("settings") or {}).get("container"))


def branch_of(version: str) -> int:
    """Return the branch of a driver version: 580 of 580.159.03; 0 where it has none."""
    numbers = version_key(version)
    return numbers[0] if numbers else 0


def at_least(version: str, minimum: str) -> bool:
    """Return whether a driver version reaches a minimum."""
    return version_key(version) >= version_key(minimum)


def fits(line: str, manifest: t.Mapping[str, t.Any], hardware: t.Mapping[str, t.Any], variables: t.Mapping[str, t.Any]) -> bool:
    """Return whether a line can serve a node as it is: its GPUs, torch version and, where it is not ours, its driver."""
    entry = manifest["lines"][line]
    low, high = entry["capabilities"]
    if any(level and not low <= level <= high for level in map(capability_of, gpus_of(hardware))):
        return False
    torch = str(variables.get("pytorch_version") or "")
    if torch and any(torch in other["torch"] for other in manifest["lines"].values()) and torch not in entry["torch"]:
        return False
    driver = (hardware.get("driver") or {}).get("version") or ""
    fixed = not variables.get("nvidia_driver_manage", True) or in_container(hardware)
    return not fixed or not driver or at_least(driver, entry["driver_minimum"])


def choose_line(
    nodes: t.Mapping[str, tuple[t.Mapping[str, t.Any], t.Mapping[str, t.Any]]], manifest: t.Mapping[str, t.Any]
) -> tuple[str, list[Problem]]:
    """Return the CUDA line of the cluster and what is wrong with ``cuda_version``.

    Args:
        nodes: host → (hardware, variables).
        manifest: meta/versions.yml.
    """
    wanted = next((str(variables.get("cuda_version") or "") for _hardware, variables in nodes.values()), "")
    if wanted == CPU or wanted in manifest["lines"]:
        return wanted, []
    with_gpu = {host: pair for host, pair in nodes.items() if gpus_of(pair[0])}
    if wanted:
        near = nearest_line(wanted, manifest)
        known = ", ".join([*manifest["lines"], CPU])
        text = f"cuda_version is {wanted!r}, but one of {known} was expected"
        return near, [Problem("", "cuda_version", text, f"set cuda_version: {near!r}, the nearest")]
    if not with_gpu:
        return CPU, []
    for line in sorted(manifest["lines"], key=version_key, reverse=True):
        if all(fits(line, manifest, *pair) for pair in with_gpu.values()):
            return line, []
    return newest_line(manifest), []


def torch_problems(line: str, entry: t.Mapping[str, t.Any], variables: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]) -> list[Problem]:
    """Return a problem where the line has no wheels of the wanted torch."""
    torch = str(variables.get("pytorch_version") or "")
    if not torch or torch in entry["torch"] or variables.get("pytorch_source") in ("existing", "distribution"):
        return []
    lines = [name for name, other in manifest["lines"].items() if torch in other["torch"]]
    if not lines:
        return []  # a version that the manifest does not know: the index decides
    text = f"pytorch_version is {torch}, which has no wheels for CUDA {line}"
    near = max(lines, key=version_key)
    return [Problem("", "cuda_version", text, f"set cuda_version: {near!r} or one of the torch versions {', '.join(entry['torch'])}")]


def gpu_problems(host: str, line: str, entry: t.Mapping[str, t.Any], hardware: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]) -> list[Problem]:
    """Return a problem where a GPU is too old or too new for the line."""
    low, high = entry["capabilities"]
    found = []
    for gpu in gpus_of(hardware):
        level = capability_of(gpu)
        if not level or low <= level <= high:
            continue
        others = [name for name, other in manifest["lines"].items() if other["capabilities"][0] <= level <= other["capabilities"][1]]
        age = "old" if level < low else "new"
        text = (
            f"{gpu.get('name') or 'its GPU'} (compute capability {level / 10:.1f}) is too {age} for CUDA {line}, whose torch "
            f"wheels are built for {low / 10:.1f} to {high / 10:.1f}"
        )
        near = max(others, key=version_key) if others else ""
        cure = f"set cuda_version: {near!r}" if near else "take the host out of the group"
        found.append(Problem(host, "cuda_version", text, cure))
        break
    return found


def modules_for(
    host: str, hardware: t.Mapping[str, t.Any], variables: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]
) -> tuple[str, list[Problem]]:
    """Return which kernel modules the GPUs need, open or proprietary, and what is wrong with the wish for others."""
    wanted = str(variables.get("nvidia_driver_modules") or "auto")
    needs = {name: manifest["generations"][name]["modules"] for name in generations_of(hardware) if name in manifest["generations"]}
    kinds = set(needs.values()) - {"any"}
    if len(kinds) > 1:
        names = ", ".join(sorted(needs))
        text = f"its GPUs are of generations that no one driver serves ({names})"
        return "open", [Problem(host, "nvidia_driver_modules", text, "take GPUs out of the node or the host out of the group")]
    needed = kinds.pop() if kinds else ""
    if wanted == "auto":
        return needed or "open", []
    if needed and wanted != needed:
        names = ", ".join(sorted(needs))
        text = f"nvidia_driver_modules is {wanted}, but {names} GPUs need the {needed} kernel modules"
        return needed, [Problem(host, "nvidia_driver_modules", text, "set nvidia_driver_modules: auto")]
    return wanted, []


def driver_version(variables: t.Mapping[str, t.Any], entry: t.Mapping[str, t.Any], hardware: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]) -> str:
    """Return the driver version to install: the variable's, else the line's, else an older one for old GPUs."""
    wanted = str(variables.get("nvidia_driver_version") or "")
    if wanted:
        return wanted
    branch = branch_of(entry["driver"])
    limits = [manifest["generations"].get(name, {}).get("branch_maximum", 9999) for name in generations_of(hardware)]
    if branch <= min(limits, default=9999):
        return str(entry["driver"])
    older = [other["driver"] for other in manifest["lines"].values() if branch_of(other["driver"]) <= min(limits)]
    return str(max(older, key=version_key)) if older else str(entry["driver"])


def driver_problems(
    host: str, version: str, variable: str, line: str, entry: t.Mapping[str, t.Any], hardware: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]
) -> list[Problem]:
    """Return why a driver version cannot serve the line or the GPUs."""
    found = []
    whose = f"{variable} is {version}" if variable == "nvidia_driver_version" else f"its NVIDIA driver is {version}"
    if not at_least(version, entry["driver_minimum"]) and branch_of(version) != 0 and (
        "." in version or branch_of(version) < branch_of(entry["driver_minimum"])
    ):
        lower = [name for name, other in manifest["lines"].items() if at_least(version, other["driver_minimum"])]
        cure = f"set nvidia_driver_version: {entry['driver']}" if variable == "nvidia_driver_version" else "let nvidia_driver_manage be true, or update the driver yourself"
        if lower:
            cure += f", or cuda_version: {max(lower, key=version_key)!r}"
        text = f"{whose}, but CUDA {line} needs {entry['driver_minimum']} or newer"
        found.append(Problem(host, variable, text, cure))
    for name in generations_of(hardware):
        known = manifest["generations"].get(name, {})
        branch = branch_of(version)
        low, high = known.get("branch_minimum", 0), known.get("branch_maximum", 9999)
        if low <= branch <= high:
            continue
        text = f"{whose}, but {name.capitalize()} GPUs need branch {low} or newer" if branch < low else f"{whose}, but branch {high} is the last that knows {name.capitalize()} GPUs"
        found.append(Problem(host, variable, text, f"set nvidia_driver_version: {driver_version({}, entry, hardware, manifest)}"))
    return found


def needs_fabric_manager(hardware: t.Mapping[str, t.Any]) -> bool:
    """Return whether the GPUs are joined by NVSwitches that this node has to manage."""
    return bool((hardware.get("fabric") or {}).get("required")) and not in_container(hardware)


def nvlink5(hardware: t.Mapping[str, t.Any]) -> bool:
    """Return whether the NVSwitches are those of NVLink 5, which show as bridges on InfiniBand adapters only."""
    return bool((hardware.get("fabric") or {}).get("nvlink_bridges"))


def fabric_packages(version: str, hardware: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]) -> list[dict[str, str]]:
    """Return the packages of the fabric manager, at the driver's own version."""
    branch = branch_of(version)
    name = next(entry["package"] for entry in manifest["fabric_manager"] if entry["branches"][0] <= branch <= entry["branches"][1])
    packages = [{"name": name.format(branch=branch), "version": pattern(version)}]
    if nvlink5(hardware):
        # They have versions of their own, whatever the repository offers with this driver.
        packages += [{"name": extra, "version": ""} for extra in manifest["fabric_nvlink5"]]
    return packages


def pattern(version: str) -> str:
    """Return the pattern of package versions for a driver version.

    NVIDIA's packages end in -1, -1ubuntu1, -0ubuntu1 or -2ubuntu1, differently within one branch, so the end is left to
    the repository. A branch alone, such as 580, allows each of its releases.
    """
    return f"{version}-*" if "." in version else f"{version}.*"


def repository(distribution: t.Mapping[str, t.Any], architecture: str, variables: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Return NVIDIA's apt repository for a node, or the one of the variables; empty where there is none."""
    known = manifest["distributions"].get(f"{distribution.get('id')}-{distribution.get('version')}")
    source = manifest["repository"]
    machine = source["architectures"].get(architecture)
    url = str(variables.get("cuda_repository_url") or "")
    if not known or not machine:
        return {}
    if not url:
        mirror = str(variables.get("cluster_mirror") or "").rstrip("/")
        path = source["url"].format(folder=known["folder"], architecture=machine)
        url = f"{mirror}/{path.split('://', 1)[1]}" if mirror else path
    url = url.rstrip("/") + "/"
    return {
        "name": "onprem-torch-nvidia",
        "url": url,
        "suite": str(variables.get("cuda_repository_suite") or "/"),
        "key": str(variables.get("cuda_repository_key") or url + known["key"]),
        "fingerprint": str(variables.get("cuda_repository_fingerprint") or source["keys"][known["key"]]),
    }


def driver_packages(
    version: str, modules: str, distribution: t.Mapping[str, t.Any], kernel: str, variables: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]
) -> list[dict[str, str]]:
    """Return the packages of the driver, each with a pattern of its version, and the running kernel's headers."""
    names = manifest["names"][manifest["distributions"][f"{distribution.get('id')}-{distribution.get('version')}"]["names"]]
    branch = branch_of(version)
    own = [str(name) for name in variables.get("nvidia_driver_packages") or []]
    rule = next(entry for entry in names["driver"] if entry["branches"][0] <= branch <= entry["branches"][1])
    chosen = own or [name.format(branch=branch) for name in rule[modules]]
    headers = [{"name": names["headers"].format(kernel=kernel), "version": ""}] if variables.get("nvidia_driver_headers", True) else []
    return [*headers, *({"name": name, "version": pattern(version)} for name in chosen)]


def advice_for(hardware: t.Mapping[str, t.Any]) -> list[str]:
    """Return what the node's owner should know; nothing of it is changed."""
    found = []
    driver = hardware.get("driver") or {}
    settings = hardware.get("settings") or {}
    if not hardware.get("gpus"):
        return found
    if settings.get("secure_boot"):
        found.append("Secure Boot is on: the modules that DKMS builds load only after their key was enrolled (mokutil --import)")
    if settings.get("iommu") == "on":
        found.append("the IOMMU translates traffic between GPUs and adapters: the kernel parameter iommu=pt avoids it")
    if settings.get("governor") not in (None, "", "performance"):
        found.append(f"the CPU governor is {settings['governor']}: performance shortens the launch of collectives")
    if driver.get("mismatch"):
        found.append(f"the driver {driver['loaded']} is loaded, but {driver['installed']} is installed: reboot the node")
    return found


def nvidia_decision(
    host: str, line: str, node: t.Mapping[str, t.Any], variables: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]
) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return what a node gets and what is wrong.

    Args:
        host: inventory name.
        line: the cluster's CUDA line, or cpu (see choose_line).
        node: what node_info found: distribution, architecture, kernel, hardware, disk.
        variables: the host's public variables of the roles.
        manifest: meta/versions.yml.

    Returns:
        The decision (see docs/nvidia.md for its keys) and the problems.
    """
    hardware = node.get("hardware") or {}
    gpus = gpus_of(hardware)
    decision: dict[str, t.Any] = {
        "line": line,
        "gpus": len(gpus),
        "torch_index": (manifest[CPU] if line == CPU else manifest["lines"][line])["torch_index"],
        "torch_nccl": "",
        "repository": {},
        "driver": {"action": "none", "version": "", "modules": "", "packages": [], "patterns": [], "files": [], "services": []},
        "toolkit": {"packages": []},
        "nccl": {"packages": []},
        "fabric_manager": False,
        "reboot": False,
        "advice": advice_for(hardware),
        "skip": True,
    }
    forced = bool(variables.get("nvidia_driver_without_gpu"))
    if line == CPU or not (gpus or forced or variables.get("cuda_toolkit") or variables.get("nccl_package")):
        return decision, []
    entry = manifest["lines"][line]
    decision["skip"] = False
    decision["torch_nccl"] = str(entry["torch"].get(str(variables.get("pytorch_version") or ""), ""))
    problems = gpu_problems(host, line, entry, hardware, manifest)
    distribution = node.get("distribution") or {}
    decision["repository"] = repository(distribution, str(node.get("architecture") or ""), variables, manifest)
    if gpus or forced:
        driver, found = decide_driver(host, line, entry, node, variables, manifest)
        decision["driver"] = driver
        decision["fabric_manager"] = needs_fabric_manager(hardware)
        decision["reboot"] = driver["action"] == "install" and bool(driver["replaces"] or driver["nouveau"])
        problems += found
    if variables.get("cuda_toolkit"):
        kit = entry["toolkit"]
        decision["toolkit"]["packages"] = [{"name": kit["package"], "version": str(variables.get("cuda_toolkit_version") or kit["version"])}]
        free = (node.get("disk") or {}).get("/usr/local")
        if free is not None and free < kit["disk_bytes"]:
            text = f"/usr/local has {free / 1e9:.1f} GB free, but {kit['package']} takes about {kit['disk_bytes'] / 1e9:.0f} GB"
            problems.append(Problem(host, "cuda_toolkit", text, "free space, or set cuda_toolkit: false, since torch needs no toolkit"))
    if variables.get("nccl_package"):
        version = str(variables.get("nccl_package_version") or entry["nccl"]["package_version"])
        decision["nccl"]["packages"] = [{"name": name, "version": version} for name in ("libnccl2", "libnccl-dev")]
    wanted = decision["driver"]["action"] == "install" or decision["toolkit"]["packages"] or decision["nccl"]["packages"]
    if wanted and not decision["repository"]:
        known = ", ".join(manifest["distributions"])
        text = f"{distribution.get('name') or distribution.get('id') or 'its distribution'} on {node.get('architecture')} has no repository in the manifest (known: {known})"
        problems.append(Problem(host, "nvidia_driver_manage", text, "install the driver yourself and set nvidia_driver_manage: false"))
        decision["driver"]["packages"] = []
    return decision, problems


def decide_driver(
    host: str, line: str, entry: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any], variables: t.Mapping[str, t.Any], manifest: t.Mapping[str, t.Any]
) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return what happens to a node's driver: action check, keep or install, with packages, files and services."""
    hardware = node.get("hardware") or {}
    present = hardware.get("driver") or {}
    have = str(present.get("version") or "")
    result: dict[str, t.Any] = {
        "action": "check",
        "version": have,
        "modules": "",
        "packages": [],
        "patterns": [],
        "files": [],
        "services": [],
        "replaces": "",
        "nouveau": False,
    }
    foreign = not variables.get("nvidia_driver_manage", True) or bool(in_container(hardware))
    if foreign:
        if have:
            return result, driver_problems(host, have, "nvidia_driver_manage", line, entry, hardware, manifest)
        if in_container(hardware):
            text, cure = "it is a container with GPUs but without a driver", "give the container the host's driver (NVIDIA Container Toolkit)"
        else:
            text, cure = "it has no NVIDIA driver and nvidia_driver_manage is false", "install a driver or set nvidia_driver_manage: true"
        return result, [Problem(host, "nvidia_driver_manage", text, cure)]
    modules, problems = modules_for(host, hardware, variables, manifest)
    wished = str(variables.get("nvidia_driver_version") or "")
    target = driver_version(variables, entry, hardware, manifest)
    problems += driver_problems(host, target, "nvidia_driver_version", line, entry, hardware, manifest)
    good = bool(have) and not driver_problems(host, have, "", line, entry, hardware, manifest)
    reached = have == target or ("." not in target and branch_of(have) == branch_of(target))
    known = f"{(node.get('distribution') or {}).get('id')}-{(node.get('distribution') or {}).get('version')}" in manifest["distributions"]
    keep = good and not reached and not wished
    version = have if keep else target
    result.update(action="keep" if keep else "install", version=version, modules=modules)
    fabric = needs_fabric_manager(hardware)
    if known:
        if not keep:
            kernel = str(node.get("kernel") or "")
            result["packages"] = driver_packages(version, modules, node.get("distribution") or {}, kernel, variables, manifest)
        if fabric:
            result["packages"] += fabric_packages(version, hardware, manifest)
    if result["packages"]:
        result["patterns"] = [{"packages": list(DRIVER_PATTERNS), "version": pattern(version)}]
    result["replaces"] = "" if keep or reached else have
    result["nouveau"] = not keep and bool(present.get("nouveau"))
    load = ["nvidia", "nvidia-uvm", *(["nvidia-peermem"] if wants_peermem(hardware, variables) else []), *(["ib_umad"] if fabric and nvlink5(hardware) else [])]
    if not keep:
        result["files"].append({"path": NOUVEAU_FILE, "content": "blacklist nouveau\noptions nouveau modeset=0\n", "apply": ["update-initramfs", "-u"]})
    result["files"].append({"path": MODULES_FILE, "content": "\n".join(load) + "\n", "apply": []})
    result["services"] = [*(["nvidia-persistenced.service"] if variables.get("nvidia_driver_persistence", True) else []), *(["nvidia-fabricmanager.service"] if fabric else [])]
    return result, problems


def wants_peermem(hardware: t.Mapping[str, t.Any], variables: t.Mapping[str, t.Any]) -> bool:
    """Return whether nvidia-peermem is loaded: asked for, or proprietary modules beside RDMA.

    Open modules on kernels from 5.12 on let NCCL use dma-buf, which needs no further module.
    """
    wanted = variables.get("nvidia_driver_peermem")
    if wanted in ("present", "absent"):
        return wanted == "present"
    rdma = any(nic.get("rdma") for nic in hardware.get("nics") or [])
    old = {"maxwell", "pascal", "volta"} & set(generations_of(hardware))
    return rdma and (variables.get("nvidia_driver_modules") == "proprietary" or bool(old))


def decide_all(
    nodes: t.Mapping[str, tuple[t.Mapping[str, t.Any], t.Mapping[str, t.Any]]], manifest: t.Mapping[str, t.Any]
) -> tuple[dict[str, dict[str, t.Any]], list[Problem]]:
    """Return the decision of every node and all problems of the cluster.

    Args:
        nodes: host → (what node_info found, the host's variables).
        manifest: meta/versions.yml.
    """
    line, problems = choose_line({host: (node.get("hardware") or {}, variables) for host, (node, variables) in nodes.items()}, manifest)
    decisions = {}
    for host, (node, variables) in nodes.items():
        decisions[host], found = nvidia_decision(host, line, node, variables, manifest)
        problems += found
    first = next(iter(nodes.values()), None)
    if first and line != CPU:
        problems += torch_problems(line, manifest["lines"][line], first[1], manifest)
    return decisions, problems


def nvidia_problems(nodes: t.Mapping[str, tuple[t.Mapping[str, t.Any], t.Mapping[str, t.Any]]], manifest: t.Mapping[str, t.Any]) -> list[Problem]:
    """Return only the problems of decide_all."""
    return decide_all(nodes, manifest)[1]
