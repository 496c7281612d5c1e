# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of NVIDIA's stack a node gets: from hardware, distribution and variables to packages, files and services.

Pure: the manifest (plugins/plugin_utils/versions.yml) and what node_info found go in; a decision and problems come out.
"""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import (
    apt_state,
    host_settings,
    nccl_settings,
    nvidia_driver,
    nvidia_gpu_problems,
    nvidia_sources,
    pytorch_plan,
    torch_fit,
)
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_driver_problems import driver_problems
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import (
    Manifest,
    Node,
    Variables,
    chosen_gpus,
    cuda_lines,
    driver_of,
    gpus_of,
    manages,
    numbers,
    packages_of,
)
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_lines import VARIABLE, choose_line, line_problems, shared_lines
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem
from ansible_collections.onprem.torch.plugins.module_utils.room import Need

# Where the toolkit is unpacked, and where its archives lie until then.
TOOLKIT_FOLDER, ARCHIVES_FOLDER = "/usr/local", "/var/cache/apt"
# The variable that decides a set's version.
VERSION_OF = {"nvidia_driver": "nvidia_driver_version", "cuda": "cuda_toolkit_version", "nccl": "nccl_version"}


def existing_problems(host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return why an existing environment's torch cannot work with the node's GPUs and driver."""
    folder = str(variables.get("pytorch_environment") or "")
    version = (node.get("torch") or {}).get(folder)
    if variables.get("pytorch_source") != "existing" or not version:
        return []
    build = (node.get("torch_builds") or {}).get(folder) or {}
    driver = str(driver_of(node).get("version") or "") if not manages(variables) else ""
    found = {"torch": version, "cuda": build.get("cuda")}
    wanted, built = numbers(str(variables.get(VARIABLE) or "")), numbers(str(build.get("cuda") or ""))
    if manages(variables) and wanted and built[:1] > wanted[:1] and chosen_gpus(variables, node):
        # The line's driver runs every torch of its major version, and none of a newer one.
        text = f"{VARIABLE} is {variables[VARIABLE]}, whose driver may be too old for torch {version} in {folder}, built for CUDA {build['cuda']}"
        return [Problem(host, VARIABLE, text, f"remove {VARIABLE}, or name an environment for CUDA {variables[VARIABLE]}")]
    text, _semicolon, cure = torch_fit.problem(found, pytorch_plan.gpus(variables, node), driver, "", oldest_drivers(manifest)).partition("; ")
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


def toolkit_needs(name: str, variables: Variables, node: Node, manifest: Manifest) -> list[Need]:
    """Return the room that the toolkit takes where it is still to be installed."""
    if not name or name == "cpu" or not variables.get("cuda_toolkit") or manifest["lines"][name]["toolkit"] in packages_of(node):
        return []
    cure = "set cuda_toolkit: false (training needs no toolkit)"
    return [
        Need(TOOLKIT_FOLDER, manifest["toolkit_room"]["unpacked_gib"], "the CUDA toolkit", "cuda_toolkit", cure),
        Need(ARCHIVES_FOLDER, manifest["toolkit_room"]["archives_gib"], "the CUDA toolkit's archives", "cuda_toolkit", cure),
    ]


def toolkit_problems(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return the problem of a toolkit that NVIDIA's repository for the node's distribution is known to lack."""
    first = str(nvidia_sources.known_repository(node, manifest).get("first_toolkit") or "")
    if not first or name == "cpu" or numbers(name) >= numbers(first) or not nvidia_sources.is_nvidias(variables):
        return []
    if not variables.get("cuda_toolkit") or manifest["lines"][name]["toolkit"] in packages_of(node):
        return []
    text = f"cuda_toolkit is true for CUDA {name}, but NVIDIA's repository for {node['distribution'].get('name')} begins with the toolkit {first}"
    cure = "set cuda_toolkit: false (training needs no toolkit), or set cuda_repository_url to a repository that has it"
    return [Problem(host, "cuda_toolkit", text, cure)]


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


def unfit_problems(
    name: str, host: str, variables: Variables, node: Node, manifest: Manifest, shared: t.Sequence[str] | None = None
) -> list[Problem]:
    """Return why torch and driver cannot work on a host; for a line of an empty name what is wrong whatever the line."""
    if not chosen_gpus(variables, node) or name == "cpu":
        return []
    if variables.get("pytorch_source") == "distribution":
        product = pytorch_plan.gpus(variables, node)[0]["name"]
        text = f"pytorch_source is distribution, whose torch is built for CPUs, but the node has {product}"
        return [Problem(host, "pytorch_source", text, "set pytorch_source: wheelhouse, or cuda_version: cpu for a job on CPUs")]
    # A torch that cannot be changed here is spoken of first: another line would not help it.
    found = existing_problems(host, variables, node, manifest)
    if found or not name:
        return [*found, *driver_problems("", host, variables, node, manifest)]
    return line_problems(name, host, variables, node, manifest, shared)


def virtual_problems(host: str, made: t.Mapping[str, t.Any], node: Node) -> list[Problem]:
    """Return the problem of a virtual GPU whose driver would be replaced: only the one of its hypervisor works with it."""
    state = driver_of(node)
    if made["action"] != "install" or not state.get("vgpu"):
        return []
    text = f"the node has a virtual GPU with the driver {state.get('version')}, for which NVIDIA's repository has none"
    cure = "upgrade it to one that the hypervisor's vGPU manager knows, and set nvidia_driver_manage: false"
    return [Problem(host, "nvidia_driver_manage", text, cure)]


def asks_for_packages(name: str, variables: Variables) -> bool:
    """Return whether the toolkit or the library is asked for."""
    return bool(variables.get("cuda_toolkit") or variables.get("nccl_library")) and name != "cpu"


def source_of(name: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return where a host's packages come from, and what is wrong with that; nothing where it may need none."""
    needs_driver = bool(gpus_of(node)) and name != "cpu" and manages(variables)
    if not needs_driver and not asks_for_packages(name, variables):
        return {}, []
    return nvidia_sources.repository(host, variables, node, manifest)


def sure_problems(near: str, host: str, variables: Variables, node: Node, manifest: Manifest) -> list[Problem]:
    """Return what is wrong with a host whatever the line, for a cluster whose line is not known; ``near`` stands for it."""
    _source, missing = source_of(near, host, variables, node, manifest)
    return [
        *nvidia_sources.mirror_problems(host, variables),
        *unfit_problems("", host, variables, node, manifest),
        *(missing if asks_for_packages(near, variables) or not driver_of(node).get("loaded") else []),
    ]


def decide(
    name: str, host: str, variables: Variables, node: Node, manifest: Manifest, interface: str = "", shared: t.Sequence[str] | None = None
) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return the decision for one node, and its problems.

    Args:
        name: the cluster's line.
        host: inventory name.
        variables: the host's variables.
        node: what node_info found.
        manifest: what fits together.
        interface: the training interface.
        shared: the lines that fit all GPUs of the cluster; None for any.
    """
    unfit = unfit_problems(name, host, variables, node, manifest, shared)
    source, missing = source_of(name, host, variables, node, manifest)
    # What does not depend on the rest is named together with it, so that a person repairs all at once.
    problems = [*nvidia_sources.mirror_problems(host, variables), *unfit, *toolkit_problems(name, host, variables, node, manifest)]
    asks = asks_for_packages(name, variables)
    if unfit:
        problems += missing if asks or not driver_of(node).get("loaded") else []
        nothing: dict[str, t.Any] = {"wanted": False}
        return {"line": name, "driver": {"action": "none", **nothing}, "cuda": nothing, "nccl": nothing, "advice": []}, problems
    made, advice = nvidia_driver.decide(name, variables, node, source, manifest)
    if made["wanted"] or asks:
        problems += missing
    problems += virtual_problems(host, made, node)
    # A reboot into another driver may be the very cure of a GPU that does not answer.
    if name != "cpu" and not made.get("reboot_expected"):
        problems += nvidia_gpu_problems.problems(host, variables, node)
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
    # On a guess nothing is decided.
    guessed = bool(problems)
    shared = shared_lines(readable, manifest)
    for host, variables, node in readable:
        if guessed:
            problems += sure_problems(name, host, variables, node, manifest)
            continue
        decisions[host], found = decide(name, host, variables, node, manifest, interfaces.get(host, ""), shared)
        problems += found
    problems += nccl_problems(readable)
    return {"name": name, **manifest["lines"][name], "oldest_drivers": oldest_drivers(manifest)}, decisions, problems


def oldest_drivers(manifest: Manifest) -> dict[str, str]:
    """Return the oldest driver that runs anything of a major version of CUDA, by that version."""
    return {name.split(".", maxsplit=1)[0]: str(manifest["lines"][name]["compatible_driver"]) for name in cuda_lines(manifest)}
