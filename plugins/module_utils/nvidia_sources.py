# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where NVIDIA's packages and torch's wheels come from: their own places, a mirror, or what a variable says."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.nvidia_facts import Manifest, Node, Variables
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

# Folders of a mirror, beside each other below cluster_mirror (docs/nvidia.md, "Without the internet").
NVIDIA, TORCH, PYPI = "nvidia", "pytorch", "pypi/simple"


def mirror(variables: Variables) -> str:
    """Return cluster_mirror as a URL without a slash at its end; an absolute path becomes a file URL."""
    place = str(variables.get("cluster_mirror") or "").rstrip("/")
    return f"file://{place}" if place.startswith("/") else place


def known_repository(node: Node, manifest: Manifest) -> dict[str, t.Any]:
    """Return what is known of NVIDIA's repository for a node's distribution; empty where there is none."""
    release = node.get("distribution") or {}
    return dict(manifest["repository"]["distributions"].get(f"{release.get('id')}-{release.get('version')}") or {})


def known_drivers(node: Node, manifest: Manifest) -> dict[str, t.Any]:
    """Return the first branch of the driver and the release to take, as far as NVIDIA's repository for a node is known to differ."""
    platform = manifest["repository"]["architectures"].get(str(node.get("architecture") or ""))
    return dict((known_repository(node, manifest).get("drivers") or {}).get(platform) or {})


def default_driver(node: Node, manifest: Manifest) -> str:
    """Return the version of the driver that a node gets where nobody asks for one."""
    return str(known_drivers(node, manifest).get("version") or manifest["driver"]["version"])


def is_nvidias(variables: Variables) -> bool:
    """Return whether packages come from NVIDIA's own place; a repository or a mirror of the user's may hold anything."""
    return not variables.get("cuda_repository_url") and not mirror(variables)


def mirror_problems(host: str, variables: Variables) -> list[Problem]:
    """Return what is wrong with cluster_mirror."""
    place = mirror(variables)
    if not place or re.match(r"(https?|file)://.", place):
        return []
    text = f"cluster_mirror is {variables.get('cluster_mirror')!r}, but an http or https URL or an absolute path was expected"
    return [Problem(host, "cluster_mirror", text, "correct it, or remove it to use the sources' own places")]


def wheel_indexes(variables: Variables, line: t.Mapping[str, t.Any]) -> tuple[str, list[str]]:
    """Return the package index (empty for PyPI) and the further ones.

    An index of the user's own is taken alone. Otherwise the index of torch's wheels for the CUDA line goes with PyPI, or
    with their copies on the mirror.
    """
    index = str(variables.get("pytorch_index_url") or "")
    extra = [str(url) for url in variables.get("pytorch_extra_index_urls") or []]
    if index:
        return index, extra
    copy = mirror(variables)
    torch = str(line.get("torch_index") or "")
    if copy:
        torch = f"{copy}/{TORCH}/{torch.rsplit('/', 1)[-1]}" if torch else ""
    return f"{copy}/{PYPI}" if copy else "", [*([torch] if torch else []), *extra]


def repository(host: str, variables: Variables, node: Node, manifest: Manifest) -> tuple[dict[str, t.Any], list[Problem]]:
    """Return where NVIDIA's packages come from for a node's distribution."""
    source = manifest["repository"]
    release = node.get("distribution") or {}
    known = known_repository(node, manifest)
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
    copy = mirror(variables)
    place = f"{copy}/{NVIDIA}" if copy else source["url"]
    default = f"{place}/{known['path']}/{platform}" if known and platform else ""
    url = (url or default).rstrip("/")
    key = str(variables.get("cuda_repository_key_url") or "")
    return {
        "url": f"{url}/",
        "key_url": key or f"{url}/{known['key'] if known else 'key.pub'}",
        "key_fingerprint": fingerprint or known.get("fingerprint", ""),
    }, problems
