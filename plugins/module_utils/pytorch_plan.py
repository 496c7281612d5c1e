# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which environment with torch a node gets."""

from __future__ import annotations

import hashlib
import json
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils import nvidia_sources, secret_texts
from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import chosen_gpus
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem


@dataclass(frozen=True)
class Lock:
    """The lock file as it lies on the control node.

    Attributes:
        path: its absolute path; empty for none.
        text: its content.
        problems: why it could not be read.
    """

    path: str = ""
    text: str = ""
    problems: tuple[Problem, ...] = ()

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the content, empty for no lock."""
        return hashlib.sha256(self.text.encode()).hexdigest() if self.path else ""


def logical_lines(text: str) -> list[str]:
    """Return the lines of a requirements file without comments, each with what continues it after a backslash."""
    plain = re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)
    return [line.strip() for line in re.sub(r"\\\n", " ", plain).splitlines() if line.strip()]


def locked_version(text: str) -> str:
    """Return the version of torch that a lock has, with the build where it names one (2.13.0+cu130); empty where it has none."""
    for line in logical_lines(text):
        match = re.match(r"torch==([^\s;]+)", line)
        if match:
            return match.group(1)
    return ""


def same_version(wanted: str, found: str) -> bool:
    """Return whether two versions of torch are the same; a build counts where both name one."""
    (wanted_release, _plus, wanted_build), (release, _plus, build) = wanted.partition("+"), found.partition("+")
    return wanted_release == release and (not wanted_build or not build or wanted_build == build)


def with_locked(variables: t.Mapping[str, t.Any], lock: Lock) -> t.Mapping[str, t.Any]:
    """Return the variables with the version of torch that is really installed, where a lock decides it."""
    found = locked_version(lock.text)
    return variables if not found or lock_problems(variables, lock) else {**variables, "pytorch_version": found}


def lock_problems(variables: t.Mapping[str, t.Any], lock: Lock) -> list[Problem]:
    """Return what is wrong with the lock file, and with what cannot stand beside one."""
    variable = "pytorch_lock"
    if not variables.get(variable) or lock.problems:
        return list(lock.problems)
    problems = []
    source = str(variables.get("pytorch_source") or "wheelhouse")
    if source not in ("wheelhouse", "index"):
        text = f"{variable} is set, but pytorch_source is {source}, which installs no wheels"
        return [Problem("", variable, text, f"remove {variable}, or set pytorch_source: wheelhouse")]
    bare = [line.split()[0] for line in logical_lines(lock.text) if not line.startswith("-") and "--hash=" not in line]
    if bare:
        text = f"{variable} names {lock.path}, in which {bare[0]} has no hash"
        problems.append(Problem("", variable, text, "make it with: uv pip compile --generate-hashes"))
    if secret_texts.has_credentials(lock.text):
        text = f"{variable} names {lock.path}, which holds a URL with a user, a password or a token"
        problems.append(Problem("", variable, text, "remove it there and put it into pytorch_index_url or pytorch_extra_index_urls"))
    found, wanted = locked_version(lock.text), str(variables.get("pytorch_version") or "")
    if not found:
        text = f"{variable} names {lock.path}, which has no line torch==VERSION"
        problems.append(Problem("", variable, text, "make it from requirements that name torch"))
    elif wanted and not same_version(wanted, found):
        text = f"{variable} has torch {found}, but pytorch_version is {wanted}"
        problems.append(Problem("", "pytorch_version", text, f"set pytorch_version: {found}, or make the lock anew"))
    for other in ("pytorch_packages", "pytorch_constraints"):
        if variables.get(other):
            text = f"{other} is set, but {variable} decides every package"
            problems.append(Problem("", other, text, f"put them into the requirements that {variable} is made from"))
    return problems


def environment(
    variables: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any], line: t.Mapping[str, t.Any], lock: Lock = Lock()
) -> dict[str, t.Any]:
    """Return the arguments of pytorch_environment for a node, and the Python to run with.

    Args:
        variables: the host's variables.
        node: what node_info found.
        line: the line of the version manifest: C(torch_index) is the wheel index for this CUDA line.
        lock: the lock file.
    """
    source = variables.get("pytorch_source") or "wheelhouse"
    python = str(variables.get("pytorch_python") or "/usr/bin/python3")
    root = str(variables.get("pytorch_root") or "/opt/onprem.torch")
    version = str(variables.get("pytorch_version") or "")
    packages = list(variables.get("pytorch_packages") or [])
    index, extra = nvidia_sources.wheel_indexes(variables, line)
    platform = {
        "architecture": node.get("architecture", ""),
        "glibc": node.get("glibc", ""),
        "python": (node.get("python") or {}).get("version", ""),
    }
    result: dict[str, t.Any] = {
        "source": source,
        "version": version,
        "root": root,
        "index_url": index,
        "extra_index_urls": extra,
        "constraints": list(variables.get("pytorch_constraints") or []),
        "lock": lock.path,
        "lock_sha256": lock.digest,
        "platform": platform,
        "gpus": gpus(variables, node),
        "devices": ",".join(entry.strip() for entry in str(variables.get("torchrun_devices") or "").split(",") if entry.strip()),
        "oldest_drivers": dict(line.get("oldest_drivers") or {}),
        # Only wheels that were chosen by the line must be the line's.
        "cuda": str(line.get("name") or "") if source in ("wheelhouse", "index") and not variables.get("pytorch_index_url") else "",
    }
    if source == "existing":
        folder = str(variables.get("pytorch_environment") or "")
        return {**result, "environment": folder, "python": python, "executable": f"{folder}/bin/python3", "requirements": []}
    if source == "distribution":
        requirements = ["python3-torch", *packages]
        # The distribution decides the version.
        return {**result, "version": "", "environment": "/usr", "python": python, "executable": python, "requirements": requirements}
    requirements = [f"torch=={version}" if version else "torch", *packages]
    made_of = [requirements, platform["architecture"], platform["python"].split(".")[:2], index, extra]
    made_of += [result["constraints"], lock.digest] if result["constraints"] or lock.path else []
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    folder = f"{root}/environments/{name}"
    return {**result, "environment": folder, "python": python, "executable": f"{folder}/bin/python3", "requirements": requirements}


def gpus(variables: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any]) -> list[dict[str, str]]:
    """Return name and architecture of each kind of GPU that the job uses on a node."""
    kinds = {}
    for gpu in chosen_gpus(variables, node):
        kinds[str(gpu.get("architecture") or "")] = str(gpu.get("name") or gpu.get("generation") or "GPU")
    return [{"name": name, "architecture": architecture} for architecture, name in sorted(kinds.items())]
