# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which CUDA line a cluster gets, and why a host cannot work with one."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.nvidia_driver_problems import driver_problems
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import (
    Manifest,
    Node,
    Variables,
    capability,
    chosen_gpus,
    cuda_lines,
    gpus_of,
    numbers,
)
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

VARIABLE = "cuda_version"


def runs_on(line: t.Mapping[str, t.Any], level: int, torch: str) -> bool:
    """Return whether torch's wheels of a line have code for a capability: same major, same or lower minor version.

    Args:
        line: the line of the manifest.
        level: the capability times ten; 0 where unknown, which is never refused.
        torch: the version of torch; empty for the newest.
    """
    last = line.get("architectures_last_torch") or {}
    for entry in line.get("architectures") or []:
        until = str(last.get(str(entry)) or "")
        built = round(float(entry) * 10)
        if until and (not torch or numbers(torch) > numbers(until)):
            continue
        if built // 10 == level // 10 and built <= level:
            return True
    return level == 0


def wheel_version(variables: Variables, line: t.Mapping[str, t.Any]) -> str:
    """Return the version of torch that counts for a line's wheels; the line's first one where wheels come from elsewhere.

    What an index of the user's own or an existing environment is built for shows only once its torch is asked.
    """
    return str(line.get("torch_first") or "") if own_index(variables) else str(variables.get("pytorch_version") or "")


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


def supports(line: t.Mapping[str, t.Any], level: int, variables: Variables) -> bool:
    """Return whether a line has the wanted torch, and that torch code for a capability."""
    has = own_index(variables) or has_torch(line, str(variables.get("pytorch_version") or ""))
    return has and runs_on(line, level, wheel_version(variables, line))


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


def distance(wanted: str, name: str) -> float:
    """Return how far a wanted version is from a known one; what is no version is far from all.

    A number alone stands for the newest of its major version, and ``cu128``, as wheels say it, for 12.8.
    """
    wheel = re.fullmatch(r"cu(\d{2,})(\d)", wanted)
    asked = re.match(r"(\d+)(?:\.(\d+))?", ".".join(wheel.groups()) if wheel else wanted)
    major, minor = numbers(name)[:2]
    return abs((int(asked.group(1)) - major) * 10000 + int(asked.group(2) or 99) - minor) if asked else 1e9


def torch_said(variables: Variables) -> str:
    """Return who decides the version of torch, and which one."""
    version = str(variables.get("pytorch_version") or "the newest")
    return f"pytorch_lock has torch {version}" if variables.get("pytorch_lock") else f"pytorch_version is {version}"


def build_of(variables: Variables) -> str:
    """Return the line that the wanted version of torch names: ``2.13.0+cu126`` → 12.6; empty where it names none."""
    match = re.fullmatch(r"cu(\d{2,})(\d)|cpu", str(variables.get("pytorch_version") or "").partition("+")[2])
    if not match:
        return ""
    return ".".join(match.groups()) if match.group(1) else "cpu"


def rebuilt(name: str, variables: Variables, manifest: Manifest) -> str:
    """Return what a person does to have the torch of a line where its version names another build; empty where it does not."""
    if build_of(variables) in ("", name) or own_index(variables):
        return ""
    if variables.get("pytorch_lock"):
        return f"make the lock anew from {manifest['lines'][name]['torch_index']}"
    return f"leave +{str(variables['pytorch_version']).partition('+')[2]} out"


def build_problems(name: str, host: str, variables: Variables, manifest: Manifest) -> list[Problem]:
    """Return the problem of a version of torch that names another build than the line's, such as 2.13.0+cu126 for 13.0."""
    other = rebuilt(name, variables, manifest)
    if not other:
        return []
    built = build_of(variables)
    builds = manifest["lines"][name]["torch_index"].rsplit("/", 1)[-1]
    text = f"{torch_said(variables)}, but the line is {name}, whose builds are {builds}"
    cure = f"set {VARIABLE}: {built!r}, or {other}" if built in manifest["lines"] else other
    return [Problem(host, "pytorch_version", text, cure)]


def shared_lines(nodes: t.Sequence[tuple[str, Variables, Node]], manifest: Manifest) -> list[str]:
    """Return the lines whose torch has code for all GPUs of a cluster, newest first."""
    wanted = [(capability(gpu), variables) for _name, variables, node in nodes for gpu in chosen_gpus(variables, node)]
    return [name for name in cuda_lines(manifest) if all(supports(manifest["lines"][name], *each) for each in wanted)]


def line_problems(
    name: str, host: str, variables: Variables, node: Node, manifest: Manifest, shared: t.Sequence[str] | None = None
) -> list[Problem]:
    """Return why a host cannot work with a line: GPU, driver of somebody else, or version of torch.

    Args:
        name: the line.
        host: inventory name.
        variables: the host's variables.
        node: what node_info found.
        manifest: what fits together.
        shared: the lines that fit all GPUs of the cluster, so that no cure for one host harms another; None for any.
    """
    line = manifest["lines"][name]
    cards = chosen_gpus(variables, node)
    if name == "cpu" or not cards:
        return []
    problems = []
    torch = str(variables.get("pytorch_version") or "")
    others = [other for other in cuda_lines(manifest) if other != name]
    for level in sorted({capability(gpu) for gpu in cards}):
        if runs_on(line, level, wheel_version(variables, line)):
            continue
        product = next(str(gpu.get("name") or gpu["generation"]) for gpu in cards if capability(gpu) == level)
        fits = [other for other in others if supports(manifest["lines"][other], level, variables)]
        what = "torch" if own_index(variables) or not torch else f"torch {torch}"
        text = f"{product} (sm_{level}) is not supported by {what} for {f'CUDA {name}' if fits else 'any CUDA line'}"
        # Another torch may have code for it where this one has none.
        lines = {other: str(manifest["lines"][other].get("torch_first")) for other in [name, *others]}
        older = [other for other, first in lines.items() if runs_on(manifest["lines"][other], level, first)]
        common = [other for other in fits if shared is None or other in shared]
        if common:
            other = rebuilt(common[0], variables, manifest)
            cure = f"set {VARIABLE}: {common[0]!r}{f', and {other}' if other else ''}"
        elif fits:
            cure = f"take the host out of the group, since no line of this torch has code for all its GPUs (for this one {fits[0]} has)"
        elif older:
            cure = f"set {VARIABLE}: {older[0]!r} and a pytorch_version from {lines[older[0]]} on that it has"
        elif any(capability(gpu) != level for gpu in cards):
            cure = "name the host's other GPUs in torchrun_devices"
        else:
            cure = "take the host out of the group"
        problems.append(Problem(host, VARIABLE, text, cure))
    problems += build_problems(name, host, variables, manifest)
    if not own_index(variables) and not has_torch(line, torch):
        span = f"{line['torch_first']} to {line['torch_last']}" if line["torch_last"] else f"{line['torch_first']} and newer"
        fits = [other for other in others if has_torch(manifest["lines"][other], torch)]
        other = "make the lock anew with another torch" if variables.get("pytorch_lock") else "set another pytorch_version"
        cure = f"set {VARIABLE}: {fits[0]!r}, or {other}" if fits else other
        text = f"{torch_said(variables)}, but {line['torch_index']} has {span}"
        problems.append(Problem(host, "pytorch_version", text, cure))
    return problems + driver_problems(name, host, variables, node, manifest)
