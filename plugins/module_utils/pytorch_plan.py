# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which environment with torch a node gets."""

from __future__ import annotations

import hashlib
import json
import typing as t


def environment(
    variables: t.Mapping[str, t.Any], node: t.Mapping[str, t.Any], line: t.Mapping[str, t.Any]
) -> dict[str, t.Any]:
    """Return the arguments of pytorch_environment for a node, and the Python to run with.

    Args:
        variables: the host's variables.
        node: what node_info found.
        line: the line of the version manifest: C(torch_index) is the wheel index for this CUDA line.
    """
    source = variables.get("pytorch_source") or "wheelhouse"
    python = str(variables.get("pytorch_python") or "/usr/bin/python3")
    root = str(variables.get("pytorch_root") or "/opt/onprem.torch")
    version = str(variables.get("pytorch_version") or "")
    packages = list(variables.get("pytorch_packages") or [])
    index = str(variables.get("pytorch_index_url") or "")
    extra = list(variables.get("pytorch_extra_index_urls") or [])
    if not index and line.get("torch_index"):
        extra = [line["torch_index"], *extra]
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
        "platform": platform,
    }
    if source == "existing":
        folder = str(variables.get("pytorch_environment") or "")
        return {**result, "environment": folder, "python": python, "executable": f"{folder}/bin/python3", "requirements": []}
    if source == "distribution":
        requirements = ["python3-torch", *packages]
        # The distribution decides the version.
        return {**result, "version": "", "environment": "/usr", "python": python, "executable": python, "requirements": requirements}
    requirements = [f"torch=={version}" if version else "torch", *packages]
    name = hashlib.sha256(
        json.dumps([requirements, platform["architecture"], platform["python"].split(".")[:2], index, extra]).encode()
    ).hexdigest()[:12]
    folder = f"{root}/environments/{name}"
    return {**result, "environment": folder, "python": python, "executable": f"{folder}/bin/python3", "requirements": requirements}
