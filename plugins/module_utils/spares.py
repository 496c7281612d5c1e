# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Spares: hosts that take over the rank of a node that is out."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

OUT = "torchrun_node_out"


@dataclass(frozen=True)
class Member:
    """A host that takes part.

    Attributes:
        host: its inventory name.
        replaces: the host whose place it takes, empty where it has its own.
    """

    host: str
    replaces: str = ""


def take_over(hosts: t.Mapping[str, t.Any], spares: t.Mapping[str, t.Any]) -> tuple[list[Member], list[Problem]]:
    """Return who takes part, in the order of the group, and the problems.

    Args:
        hosts: host of the group → its ``torchrun_node_out``: false, true, or the name of the spare that takes over.
        spares: the same for the hosts of the group of spares, in the order in which they are used.

    Returns:
        Each host that is in, and for each that is out a spare at its very place, so that all ranks stay.
    """
    problems = []
    free = [name for name, out in spares.items() if out is False]
    chosen: dict[str, str] = {}
    for host, out in hosts.items():
        if isinstance(out, bool):
            continue
        if out in free:
            free.remove(out)
            chosen[host] = out
        else:
            expected = f"true, false or the name of a free host of the spares ({', '.join(spares) or 'there are none'}) was expected"
            problems.append(Problem(host, OUT, f"{OUT} is {out!r}, but {expected}", f"correct {OUT}"))
            chosen[host] = ""
    for host, out in hosts.items():
        if out is not True:
            continue
        if free:
            chosen[host] = free.pop(0)
        else:
            text = f"{OUT} is set, but no host of the spares is free to take its rank ({', '.join(spares) or 'there are none'})"
            cure = f"add a host to the group spares, or remove {host} from the group to train with fewer nodes (the plan then tells"
            cure += " which checkpoint that would begin from, and what to copy from where to keep the progress)"
            problems.append(Problem(host, OUT, text, cure))
    members = []
    for host, out in hosts.items():
        if out is False:
            members.append(Member(host))
        elif chosen.get(host):
            members.append(Member(chosen[host], host))
    return members, problems
