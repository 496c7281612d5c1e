# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a node has room for all that is to be installed: what lies on one file system is added up."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

GIB = 1024**3


class Need(t.NamedTuple):
    """Room that something takes.

    Attributes:
        path: where.
        gib: how much, in GiB.
        what: for what, as part of a sentence.
        variable: the variable that asks for it.
        cure: what helps beside free space, in the imperative.
    """

    path: str
    gib: int
    what: str
    variable: str
    cure: str


def problems(host: str, needs: t.Sequence[Need], free: t.Mapping[str, int], file_systems: t.Mapping[str, int]) -> list[Problem]:
    """Return the file systems that are too small.

    Args:
        host: inventory name.
        needs: what takes room.
        free: bytes that are free by path; a path without a figure is not judged.
        file_systems: which file system a path lies on.
    """
    groups: dict[t.Any, list[Need]] = {}
    for need in needs:
        if need.path in free:
            groups.setdefault(file_systems.get(need.path, need.path), []).append(need)
    found = []
    for group in groups.values():
        there, total = min(free[need.path] for need in group), sum(need.gib for need in group)
        if there >= total * GIB:
            continue
        cures = " or ".join(dict.fromkeys(need.cure for need in group))
        cure = f"free some space or {cures}"
        if len(group) == 1:
            text = f"{group[0].path} has {there / GIB:.1f} GiB free, but {total} GiB are needed for {group[0].what}"
        else:
            parts = ", ".join(f"{need.gib} for {need.what} in {need.path}" for need in group)
            text = f"one file system has {there / GIB:.1f} GiB free, but {total} GiB are needed: {parts}"
        found.append(Problem(host, group[0].variable, text, cure))
    return found
