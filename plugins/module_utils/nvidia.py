# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of NVIDIA's stack a node gets: from hardware, distribution and variables to packages, files and services.

Pure: the manifest (plugins/plugin_utils/versions.yml) and what node_info found go in; a decision and problems come out.
"""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import (
    apt_state,
    host_settings,
    nccl_settings,
    nvidia_driver,
    nvidia_sources,
    pytorch_plan,
    torch_fit,
)
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_driver_problems import driver_problems
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import (
    Manifest,
    Node,
    Variables,
    capability,
    cuda_lines,
    driver_of,
    gpus_of,
    manages,
    numbers,
    packages_of,
)
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

VARIABLE = "cuda_version"
GIB = 1024**3
# Where the toolkit is unpacked, and where its archives lie until then.
TOOLKIT_FOLDER, ARCHIVES_FOLDER = "/usr/local", "/var/cache/apt"
# The variable that decides a set's version.
VERSION_OF = {"nvidia_driver": "nvidia_driver_version", "cuda": "cuda_toolkit_version", "nccl": "nccl_version"}


def runs_on(line: t.Mapping[str, t.Any], level: int) -> bool:
    """Return whether torch's wheels of a line have code for a capability: same major, same or lower minor version."""
    built = [round(float(entry) * 10) for entry in line.get("architectures") or []]
    return level == 0 or any(entry // 10 == level // 10 and entry <= level for entry in built)


def has_torch(line: t.Mapping[str, t.Any], version: str) -> bool:
    """Return whether a line's index has a version of torch; an empty version means the newest."""
    if not line.get("torch_first"):
        return True
    if not version:
        return not line["torch_last"]
    return numbers(line["torch_first"]) <= numbers(version) and (
        not line["torch_last"] or numbers(version) <= numbers(line["torch_last"])
    )


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
    built = {built_for(variables, node) for _name, variables, node in nodes}
    if len(built) == 1 and built <= set(known):
        return built.pop(), []
    found = {name: [problem for entry in nodes for problem in line_problems(name, *entry, manifest)] for name in known}
    # Some problems remain whatever the line; then the newest one that GPUs and torch fit is spoken of.
    about_line = {name: [each for each in problems if each.variable in (VARIABLE, "pytorch_version")] for name, problems in found.items()}
    return min(known, key=lambda name: (bool(found[name]), bool(about_line[name]))), []


def built_for(variables: Variables, node: Node) -> str:
    """Return the CUDA version that an existing environment's torch is built for, empty where it does not tell."""
    if variables.get("pytorch_source") != "existing":
        return ""
    build = (node.get("torch_builds") or {}).get(str(variables.get("pytorch_environment") or "")) or {}
    return ".".join(str(build.get("cuda") or "").split(".")[:2])


def existing_problems(host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return why an existing environment's torch cannot work with the node's GPUs and driver."""
    folder = str(variables.get("pytorch_environment") or "")
    version = (node.get("torch") or {}).get(folder)
    if variables.get("pytorch_source") != "existing" or not version:
        return []
    build = (node.get("torch_builds") or {}).get(folder) or {}
    driver = str(driver_of(node).get("version") or "") if not manages(variables) else ""
    found = {"torch": version, "cuda": build.get("cuda")}
    text, _semicolon, cure = torch_fit.problem(found, pytorch_plan.gpus(node), driver, "", oldest_drivers(manifest)).partition("; ")
    return [Problem(host, "pytorch_environment", text, cure)] if text else []


def nccl_problems(nodes: t.Sequence[tuple[str, Variables, Node]]) -> list[Problem]:
    """Return the hosts whose existing environment has another NCCL than the first one's: they cannot talk to each other."""
    found = {}
    for host, variables, node in nodes:
        folder = str(variables.get("pytorch_environment") or "")
        build = (node.get("torch_builds") or {}).get(folder) or {}
        if variables.get("pytorch_source") == "existing" and gpus_of(node) and build.get("nccl"):
            found[host] = (folder, str(build["nccl"]))
    if not found:
        return []
    first, (_folder, usual) = next(iter(found.items()))
    return [
        Problem(
            host,
            "pytorch_environment",
            f"{folder} has NCCL {version}, but {first} has {usual}, and all nodes need the same",
            "install the same torch and NCCL in all environments",
        )
        for host, (folder, version) in found.items()
        if version != usual
    ]


def distance(wanted: str, name: str) -> float:
    """Return how far a wanted version is from a known one; what is no version is far from all.

    A number alone stands for the newest of its major version, and ``cu128``, as wheels say it, for 12.8.
    """
    wheel = re.fullmatch(r"cu(\d{2,})(\d)", wanted)
    asked = re.match(r"(\d+)(?:\.(\d+))?", ".".join(wheel.groups()) if wheel else wanted)
    major, minor = numbers(name)[:2]
    return abs((int(asked.group(1)) - major) * 10000 + int(asked.group(2) or 99) - minor) if asked else 1e9


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
        fits = [other for other in others if runs_on(manifest["lines"][other], level)]
        text = f"{product} (sm_{level}) is not supported by torch for {f'CUDA {name}' if fits else 'any CUDA line'}"
        problems.append(Problem(host, VARIABLE, text, f"set {VARIABLE}: {fits[0]!r}" if fits else "take the host out of the group"))
    torch = str(variables.get("pytorch_version") or "")
    if not own_index(variables) and not has_torch(line, torch):
        span = f"{line['torch_first']} to {line['torch_last']}" if line["torch_last"] else f"{line['torch_first']} and newer"
        fits = [other for other in others if has_torch(manifest["lines"][other], torch)]
        cure = f"set {VARIABLE}: {fits[0]!r} or another pytorch_version" if fits else "set another pytorch_version"
        text = f"pytorch_version is {torch or 'the newest'!s}, but {line['torch_index']} has {span}"
        problems.append(Problem(host, "pytorch_version", text, cure))
    return problems + driver_problems(name, host, variables, node, manifest)


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
            # The toolkit's parts have versions of their own, and it asks for at least those: they are held as they came.
            "pins": [
                {"packages": [line["toolkit"]], "version": version},
                {"packages": [pattern.format(line=name.replace(".", "-")) for pattern in manifest["toolkit_parts"]], "version": ""},
            ],
        },
    }


def toolkit_problems(host: str, decision: t.Mapping[str, t.Any], node: Node, manifest: Manifest) -> list[Problem]:
    """Return the problem of a disk without room for the toolkit."""
    if not decision["wanted"] or decision["settings"]["packages"][0]["name"] in packages_of(node):
        return []
    problems = []
    for folder, key in ((TOOLKIT_FOLDER, "unpacked_gib"), (ARCHIVES_FOLDER, "archives_gib")):
        free, needed = (node.get("disk") or {}).get(folder), manifest["toolkit_room"][key]
        if free is not None and free < needed * GIB:
            text = f"{folder} has {free / GIB:.1f} GiB free, but {needed} GiB are needed for the CUDA toolkit"
            problems.append(Problem(host, "cuda_toolkit", text, "free some space, or set cuda_toolkit: false (training needs no toolkit)"))
    return problems


def hold_problems(host: str, node: Node, decided: t.Sequence[t.Mapping[str, t.Any]]) -> list[Problem]:
    """Return the packages that somebody else holds at another version than a set wants."""
    problems = []
    for part in decided:
        settings = part.get("settings") or {}
        packages, pins = settings.get("packages") or [], settings.get("pins") or []
        for name, version, wanted in apt_state.foreign_holds(packages_of(node), packages, pins, node.get("own_pins") or []):
            variable = VERSION_OF[settings["name"]]
            text = f"{name} is held at {version} by somebody else, but {wanted} is wanted"
            cure = f"release it on the node (apt-mark unhold {name}), or set {variable} to the version that it is held at"
            problems.append(Problem(host, variable, text, cure))
    return problems


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
    # A torch that cannot be changed here is spoken of first: another line would not help it.
    unfit = existing_problems(host, variables, node, manifest) or line_problems(name, host, variables, node, manifest)
    problems = [*nvidia_sources.mirror_problems(host, variables), *unfit]
    needs_driver = bool(gpus_of(node)) and name != "cpu" and manages(variables)
    asks = bool(variables.get("cuda_toolkit") or variables.get("nccl_library")) and name != "cpu"
    source, missing = nvidia_sources.repository(host, variables, node, manifest) if needs_driver or asks else ({}, [])
    nothing: dict[str, t.Any] = {"wanted": False}
    if problems:
        return {"line": name, "driver": {"action": "none", **nothing}, "cuda": nothing, "nccl": nothing, "advice": []}, problems
    made, advice = nvidia_driver.decide(name, variables, node, source, manifest)
    if made["wanted"] or asks:
        problems += missing
    decision = {
        "line": name,
        "driver": made,
        "cuda": cuda(name, variables, source, manifest),
        "nccl": nccl_settings.decide(name, variables, node, interface, source, manifest),
        "advice": [*advice, *host_settings.advice(node.get("hardware") or {}, int(node.get("memory_bytes") or 0)), *interrupted(node)],
    }
    # A package that the repository lacks is named before the first set changes anything, and not after a reboot.
    toolkit, library = (list((decision[part].get("settings") or {}).get("packages") or []) for part in ("cuda", "nccl"))
    for part, further in (("driver", [*toolkit, *library]), ("cuda", library)):
        if decision[part]["wanted"]:
            decision[part]["settings"]["further"] = further
    problems += toolkit_problems(host, decision["cuda"], node, manifest)
    problems += hold_problems(host, node, [decision["driver"], decision["cuda"], decision["nccl"]])
    return decision, problems


def package_patterns(manifest: Manifest) -> list[str]:
    """Return the names of all packages that may be decided about, with ``*`` for any text."""
    toolkits = [manifest["lines"][name]["toolkit"] for name in cuda_lines(manifest)]
    return [*manifest["driver_family"], *toolkits, "libnccl2", "libnccl-dev", "linux-image-*", "libnvidia-tesla*"]


def interrupted(node: Node) -> list[str]:
    """Return the advice about packages that an interrupted installation has left."""
    broken = apt_state.broken(packages_of(node))
    return [f"an interrupted installation has left {', '.join(broken)} half done, which is completed first"] if broken else []


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
    problems += nccl_problems(readable)
    return {"name": name, **manifest["lines"][name], "oldest_drivers": oldest_drivers(manifest)}, decisions, problems


def oldest_drivers(manifest: Manifest) -> dict[str, str]:
    """Return the oldest driver that runs anything of a major version of CUDA, by that version."""
    return {name.split(".", maxsplit=1)[0]: str(manifest["lines"][name]["compatible_driver"]) for name in cuda_lines(manifest)}
