# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of NVIDIA's stack a node gets: from hardware, distribution and variables to packages, files and services.

Pure: the manifest (plugins/plugin_utils/versions.yml) and what node_info found go in; a decision and problems come out.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

Manifest = t.Mapping[str, t.Any]
Node = t.Mapping[str, t.Any]
Variables = t.Mapping[str, t.Any]

TURING = 75
BLACKWELL = 100
VARIABLE = "cuda_version"
NCCL_CONF = "/etc/nccl.conf"
NOUVEAU = "/etc/modprobe.d/onprem-torch-nouveau.conf"
PERSISTENCE_UNIT = "nvidia-persistenced.service"
FABRIC_UNIT = "nvidia-fabricmanager.service"


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, for comparing: ``580.65.06`` → (580, 65, 6)."""
    return tuple(int(part) for part in re.split(r"[-+*a-z]", version)[0].split(".") if part.isdigit())


def capability(gpu: t.Mapping[str, t.Any]) -> int:
    """Return a GPU's compute capability times ten, 0 where unknown: ``sm_90`` → 90."""
    text = str(gpu.get("architecture") or "")
    return int(text[3:]) if re.fullmatch(r"sm_\d+", text) else 0


def runs_on(line: t.Mapping[str, t.Any], level: int) -> bool:
    """Return whether torch's wheels of a line have code for a capability: same major, same or lower minor version."""
    built = [round(float(entry) * 10) for entry in line.get("architectures") or []]
    return level == 0 or any(entry // 10 == level // 10 and entry <= level for entry in built)


def gpus_of(node: Node) -> list[dict[str, t.Any]]:
    """Return the GPUs that a node may use."""
    return list((node.get("hardware") or {}).get("usable_gpus") or [])


def driver_of(node: Node) -> dict[str, t.Any]:
    """Return the driver's state of a node."""
    return dict((node.get("hardware") or {}).get("driver") or {})


def cuda_lines(manifest: Manifest) -> list[str]:
    """Return the names of the CUDA lines, newest first."""
    return sorted((name for name in manifest.get("lines") or {} if name != "cpu"), key=numbers, reverse=True)


def has_torch(line: t.Mapping[str, t.Any], version: str) -> bool:
    """Return whether a line's index has a version of torch; an empty version means the newest."""
    if not line.get("torch_first"):
        return True
    if not version:
        return not line["torch_last"]
    return numbers(line["torch_first"]) <= numbers(version) and (
        not line["torch_last"] or numbers(version) <= numbers(line["torch_last"])
    )


def manages(variables: Variables) -> bool:
    """Return whether the driver is ours to install."""
    return variables.get("nvidia_driver_manage") is not False


def own_index(variables: Variables) -> bool:
    """Return whether torch comes from somewhere else than the line's index."""
    return bool(variables.get("pytorch_index_url")) or variables.get("pytorch_source") in ("existing", "distribution")


def choose_line(nodes: t.Sequence[tuple[str, Variables, Node]], manifest: Manifest) -> tuple[str, list[Problem]]:
    """Return the cluster's line and the problems with it.

    Args:
        nodes: host name, variables and findings of every node that could be read; at least one.
        manifest: what fits together.
    """
    wanted = str(nodes[0][1].get(VARIABLE) or "")
    known = cuda_lines(manifest)
    if not known:
        return "", []
    if wanted:
        if wanted in (*known, "cpu"):
            return wanted, []
        near = min(known, key=lambda name: distance(wanted, name))
        text = f"{VARIABLE} is {wanted!r}, but one of {', '.join([*known, 'cpu'])} was expected"
        return near, [Problem("", VARIABLE, text, f"set {VARIABLE}: {near!r}, the nearest one, or leave it out for the newest that fits")]
    if not any(gpus_of(node) for _name, _variables, node in nodes):
        return "cpu", []
    found = {name: [problem for entry in nodes for problem in line_problems(name, *entry, manifest)] for name in known}
    # Some problems remain whatever the line; then the newest one that GPUs and torch fit is spoken of.
    about_line = {name: [each for each in problems if each.variable in (VARIABLE, "pytorch_version")] for name, problems in found.items()}
    return min(known, key=lambda name: (bool(found[name]), bool(about_line[name]))), []


def distance(wanted: str, name: str) -> float:
    """Return how far a wanted version is from a known one; what is no version is far from all."""
    asked = re.match(r"(\d+)(?:\.(\d+))?", wanted)
    major, minor = numbers(name)[:2]
    return abs(int(asked.group(1)) * 100 + int(asked.group(2) or 0) - major * 100 - minor) if asked else 1e9


def line_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return why a host cannot work with a line: GPU, driver of somebody else, or version of torch."""
    line = manifest["lines"][name]
    cards = gpus_of(node)
    if name == "cpu" or not cards:
        return []
    problems = []
    others = [other for other in cuda_lines(manifest) if other != name]
    for level in sorted({capability(gpu) for gpu in cards}):
        if runs_on(line, level):
            continue
        product = next(str(gpu.get("name") or gpu["generation"]) for gpu in cards if capability(gpu) == level)
        text = f"{product} (sm_{level}) is not supported by torch for CUDA {name}"
        fits = [other for other in others if runs_on(manifest["lines"][other], level)]
        problems.append(Problem(host, VARIABLE, text, f"set {VARIABLE}: {fits[0]!r}" if fits else "take the host out of the group"))
    torch = str(variables.get("pytorch_version") or "")
    if not own_index(variables) and not has_torch(line, torch):
        span = f"{line['torch_first']} to {line['torch_last']}" if line["torch_last"] else f"{line['torch_first']} and newer"
        fits = [other for other in others if has_torch(manifest["lines"][other], torch)]
        cure = f"set {VARIABLE}: {fits[0]!r} or another pytorch_version" if fits else "set another pytorch_version"
        text = f"pytorch_version is {torch or 'the newest'!s}, but {line['torch_index']} has {span}"
        problems.append(Problem(host, "pytorch_version", text, cure))
    return problems + driver_problems(name, host, variables, node, manifest)


def driver_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with the driver that a node has or would get."""
    line = manifest["lines"][name]
    state = driver_of(node)
    levels = [capability(gpu) for gpu in gpus_of(node)]
    if not manages(variables):
        if not state.get("version"):
            text = "the node has NVIDIA GPUs but no driver, and nvidia_driver_manage is false"
            return [Problem(host, "nvidia_driver_manage", text, "install a driver, or set nvidia_driver_manage: true")]
        if state.get("mismatch"):
            text = f"the kernel runs the driver {state['loaded']}, but its libraries are {state['installed']}"
            return [Problem(host, "nvidia_driver_manage", text, "reboot the node")]
        if numbers(state["version"]) < numbers(line["compatible_driver"]):
            text = f"the driver is {state['version']}, but CUDA {name} needs {line['minimum_driver']} or newer"
            fits = [
                other
                for other in cuda_lines(manifest)
                if numbers(manifest["lines"][other]["compatible_driver"]) <= numbers(state["version"])
            ]
            cure = f"set {VARIABLE}: {fits[0]!r}, or upgrade the driver" if fits else "upgrade the driver"
            return [Problem(host, VARIABLE, text, cure)]
        return []
    variable = "nvidia_driver_version"
    wanted = str(variables.get(variable) or "")
    version = wanted or manifest["driver"]["version"]
    if not re.fullmatch(r"\d{3,}\.\d+(\.\d+)?", version):
        text = f"{variable} is {version!r}, but a full version such as {manifest['driver']['version']} was expected"
        return [Problem(host, variable, text, "give all of its numbers, since drivers are pinned exactly")]
    if numbers(version) < numbers(line["compatible_driver"]):
        text = f"{variable} is {version}, but CUDA {name} needs {line['minimum_driver']} or newer"
        return [Problem(host, variable, text, f"remove it for {manifest['driver']['version']}, or set an older {VARIABLE}")]
    branch = numbers(version)[0]
    old = [level for level in levels if 0 < level < TURING]
    if old and branch > manifest["driver"]["last_branch_before_turing"]:
        last = manifest["driver"]["last_branch_before_turing"]
        text = f"{variable} is {version}, but the branch {last} is the last one for GPUs of sm_{old[0]}"
        return [Problem(host, variable, text, f"remove it for {manifest['driver']['version']}")]
    if any(level >= BLACKWELL for level in levels) and branch < manifest["driver"]["first_branch_for_blackwell"]:
        first = manifest["driver"]["first_branch_for_blackwell"]
        text = f"{variable} is {version}, but Blackwell GPUs need the branch {first} or newer"
        return [Problem(host, variable, text, f"remove it for {manifest['driver']['version']}")]
    return module_problems(host, variables, levels)


def module_problems(host: str, variables: Variables, levels: t.Sequence[int]) -> list[Problem]:
    """Return the problem of kernel modules that the GPUs cannot work with."""
    variable = "nvidia_driver_kernel_modules"
    wanted = str(variables.get(variable) or "auto")
    if wanted == "open" and any(0 < level < TURING for level in levels):
        text = f"{variable} is open, but the open modules need Turing (sm_75) or newer"
        return [Problem(host, variable, text, f"set {variable}: proprietary, or leave it out")]
    if wanted == "proprietary" and any(level >= BLACKWELL for level in levels):
        text = f"{variable} is proprietary, but Blackwell GPUs work with the open modules only"
        return [Problem(host, variable, text, f"set {variable}: open, or leave it out")]
    if any(0 < level < TURING for level in levels) and any(level >= BLACKWELL for level in levels):
        text = "the node has GPUs older than Turing and of Blackwell, which no driver serves together"
        return [Problem(host, "", text, "take one kind out of the node")]
    return []


def kernel_modules(variables: Variables, cards: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    """Return ``open`` or ``proprietary``: open ones wherever every GPU can (Turing and newer)."""
    wanted = str(variables.get("nvidia_driver_kernel_modules") or "auto")
    if wanted != "auto":
        return wanted
    return "proprietary" if any(0 < capability(gpu) < TURING for gpu in cards) else "open"


def wants_fabric_manager(variables: Variables, node: Node) -> bool:
    """Return whether the fabric manager runs: where NVSwitches are, unless a variable decides."""
    wanted = str(variables.get("nvidia_driver_fabric_manager") or "auto")
    return wanted == "present" if wanted != "auto" else bool(((node.get("hardware") or {}).get("fabric") or {}).get("required"))


def repository(host: str, variables: Variables, node: Node, manifest: Manifest) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return where NVIDIA's packages come from for a node's distribution."""
    source = manifest["repository"]
    release = node.get("distribution") or {}
    known = source["distributions"].get(f"{release.get('id')}-{release.get('version')}")
    platform = source["architectures"].get(str(node.get("architecture") or ""))
    url = str(variables.get("cuda_repository_url") or "")
    fingerprint = str(variables.get("cuda_repository_key_fingerprint") or "").replace(" ", "").upper()
    if not url and (not known or not platform):
        what = f"{release.get('name') or release.get('id') or 'this distribution'} on {node.get('architecture')}"
        names = ", ".join(sorted(source["distributions"]))
        text = f"NVIDIA's repository is known for {names} on {' and '.join(source['architectures'])}, but this is {what}"
        cure = "set cuda_repository_url, or install the driver yourself and set nvidia_driver_manage: false"
        return {}, [Problem(host, "cuda_repository_url", text, cure)]
    problems = []
    if fingerprint and not re.fullmatch(r"[0-9A-F]{40}", fingerprint):
        text = f"cuda_repository_key_fingerprint is {fingerprint!r}, but 40 hexadecimal digits were expected"
        problems.append(Problem(host, "cuda_repository_key_fingerprint", text, "print it with gpg --show-keys FILE"))
    if not known and not fingerprint:
        text = "cuda_repository_key_fingerprint is not set, but a repository of your own for this distribution needs it"
        problems.append(Problem(host, "cuda_repository_key_fingerprint", text, "print it with gpg --show-keys FILE"))
    default = f"{source['url']}/{known['path']}/{platform}" if known and platform else ""
    url = (url or default).rstrip("/")
    key = str(variables.get("cuda_repository_key_url") or "")
    return {
        "url": f"{url}/",
        "key_url": key or f"{url}/{known['key'] if known else 'key.pub'}",
        "key_fingerprint": fingerprint or (known or {}).get("fingerprint", ""),
    }, problems


def driver_packages(version: str, modules: str, fabric: bool, node: Node, manifest: Manifest) -> list[dict[str, str]]:
    """Return the packages of a driver with exact versions, the headers of the running kernel first."""
    branch = numbers(version)[0]
    kind = str((node.get("distribution") or {}).get("id") or "debian")
    names = manifest["packages"]["debian" if kind != "ubuntu" else "ubuntu" if branch < 590 else "ubuntu_590"]
    exact = f"{version}-*"
    found = [{"name": f"linux-headers-{node.get('kernel')}", "version": ""}]
    found += [{"name": name.format(branch=branch), "version": exact} for name in names[modules]]
    if fabric:
        found += [{"name": name.format(branch=branch), "version": exact} for name in names["fabric_manager"]]
        if ((node.get("hardware") or {}).get("fabric") or {}).get("nvlink_bridges"):
            found += [{"name": name, "version": ""} for name in names["fabric_manager_nvlink5"]]
    return found


def driver(
    name: str, variables: Variables, node: Node, source: t.Mapping[str, t.Any], manifest: Manifest
) -> tuple[dict[str, t.Any], list[str]]:
    """Return what nvidia_driver does on a node with GPUs, and advice.

    ``action`` is ``install`` (ours, at our version), ``keep`` (good as it is), ``check`` (not ours) or ``none`` (no GPU).
    """
    cards = gpus_of(node)
    state = driver_of(node)
    line = manifest["lines"][name]
    advice = []
    result: dict[str, t.Any] = {"action": "none", "version": state.get("version", ""), "wanted": False}
    if not cards or name == "cpu":
        return result, []
    result["fabric_manager"] = fabric = wants_fabric_manager(variables, node)
    if not manages(variables):
        if numbers(state.get("version", "")) < numbers(line["minimum_driver"]):
            advice.append(
                f"the driver {state.get('version')} runs CUDA {name} by minor-version compatibility only; "
                f"{line['minimum_driver']} or newer is what it was made for"
            )
        return {**result, "action": "check"}, advice
    wanted = str(variables.get("nvidia_driver_version") or "")
    version = wanted or manifest["driver"]["version"]
    modules = kernel_modules(variables, cards)
    running = state.get("loaded", "")
    fits = (
        running
        and not state.get("mismatch")
        and numbers(running) >= numbers(line["minimum_driver"])
        and not (state.get("open") is False and any(capability(gpu) >= BLACKWELL for gpu in cards))
    )
    if fits and not wanted and running != version:
        if fabric and not ((node.get("hardware") or {}).get("fabric") or {}).get("manager_running"):
            advice.append(
                f"NVSwitches need the fabric manager of the driver's version {running}, which does not run; "
                "install nvidia-fabricmanager, or set nvidia_driver_version to have the driver managed"
            )
        return {**result, "action": "keep"}, advice
    if state.get("nouveau"):
        advice.append("nouveau is loaded and gives way to NVIDIA's driver with the reboot")
    packages = variables.get("nvidia_driver_packages") or []
    chosen = [split(entry) for entry in packages] if packages else driver_packages(version, modules, fabric, node, manifest)
    result.update(
        action="install",
        wanted=True,
        version=version,
        kernel_modules=modules,
        reboot_expected=bool(running and running != version) or bool(state.get("nouveau")),
        settings={
            "name": "nvidia_driver",
            "repository": dict(source),
            "packages": chosen,
            "pins": [{"packages": list(manifest["driver_family"]), "version": f"{version}-*"}],
            "files": {NOUVEAU: "# NVIDIA's driver is used (onprem.torch.nvidia_driver).\nblacklist nouveau\noptions nouveau modeset=0\n"},
            "services": [PERSISTENCE_UNIT, *([FABRIC_UNIT] if fabric else [])],
            "kernel_module": "nvidia",
            "kernel_module_version": version,
        },
    )
    return result, advice


def split(entry: str) -> dict[str, str]:
    """Return name and version of a package as apt writes it: ``name=version``."""
    name, _equals, version = str(entry).partition("=")
    return {"name": name, "version": version}


def cuda(name: str, variables: Variables, source: t.Mapping[str, t.Any], manifest: Manifest) -> dict[str, t.Any]:
    """Return what the role cuda does: nothing unless the toolkit is asked for, since torch brings its own CUDA."""
    if not variables.get("cuda_toolkit") or name == "cpu":
        return {"wanted": False}
    line = manifest["lines"][name]
    version = str(variables.get("cuda_toolkit_version") or line["toolkit_version"])
    return {
        "wanted": True,
        "settings": {
            "name": "cuda",
            "repository": dict(source),
            "packages": [{"name": line["toolkit"], "version": version}],
            "pins": [{"packages": [line["toolkit"]], "version": version}],
        },
    }


def nccl(
    name: str, variables: Variables, node: Node, interface: str, source: t.Mapping[str, t.Any], manifest: Manifest
) -> dict[str, t.Any]:
    """Return what the role nccl does: the library where asked for, and /etc/nccl.conf on nodes with GPUs."""
    chosen = {str(key): str(value) for key, value in (variables.get("nccl_configuration") or {}).items()}
    library = bool(variables.get("nccl_library")) and name != "cpu"
    if gpus_of(node) and name != "cpu" and interface:
        chosen = {"NCCL_SOCKET_IFNAME": f"={interface}", **chosen}
    if not chosen and not library:
        return {"wanted": False}
    lines = "".join(f"{key}={value}\n" for key, value in sorted(chosen.items()))
    settings: dict[str, t.Any] = {
        "name": "nccl",
        "packages": [],
        "pins": [],
        "files": {NCCL_CONF: f"# Managed by onprem.torch.nccl; variables of a process win over this file.\n{lines}"} if chosen else {},
    }
    if library:
        version = str(variables.get("nccl_version") or manifest["lines"][name]["nccl_version"])
        settings["repository"] = dict(source)
        settings["packages"] = [{"name": package, "version": version} for package in ("libnccl2", "libnccl-dev")]
        settings["pins"] = [{"packages": ["libnccl2", "libnccl-dev"], "version": version}]
    return {"wanted": True, "settings": settings}


def decide(
    name: str, host: str, variables: Variables, node: Node, manifest: Manifest, interface: str = ""
) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return the decision for one node, and its problems.

    Args:
        name: the cluster's line.
        host: inventory name.
        variables: the host's variables.
        node: what node_info found.
        manifest: what fits together.
        interface: the training interface.
    """
    problems = line_problems(name, host, variables, node, manifest)
    needs_driver = bool(gpus_of(node)) and name != "cpu" and manages(variables)
    asks = bool(variables.get("cuda_toolkit") or variables.get("nccl_library")) and name != "cpu"
    source, missing = repository(host, variables, node, manifest) if needs_driver or asks else ({}, [])
    made, advice = ({"action": "none", "wanted": False}, []) if problems else driver(name, variables, node, source, manifest)
    if made["wanted"] or asks:
        problems += missing
    return {
        "line": name,
        "driver": made,
        "cuda": {"wanted": False} if problems else cuda(name, variables, source, manifest),
        "nccl": {"wanted": False} if problems else nccl(name, variables, node, interface, source, manifest),
        "advice": advice,
    }, problems


def decide_all(
    nodes: t.Sequence[tuple[str, Variables, Node]], manifest: Manifest, interfaces: t.Mapping[str, str]
) -> tuple[dict[str, t.Any], dict[str, dict[str, t.Any]], list[Problem]]:
    """Return the line, the decision by host and all problems.

    Args:
        nodes: host name, variables and findings; empty findings of a node that could not be read.
        manifest: what fits together; empty for no decision.
        interfaces: training interface by host.
    """
    readable = [entry for entry in nodes if entry[2]]
    if not manifest or not readable:
        return {}, {}, []
    name, problems = choose_line(readable, manifest)
    decisions = {}
    if not problems:
        for host, variables, node in readable:
            decisions[host], found = decide(name, host, variables, node, manifest, interfaces.get(host, ""))
            problems += found
    return {"name": name, **manifest["lines"][name]}, decisions, problems
