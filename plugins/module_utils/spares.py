# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Spares: hosts that take over the rank of a node that is out, and what they need for it."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

if t.TYPE_CHECKING:
    from ansible_collections.onprem.torch.plugins.module_utils.plan import Host

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
            cure = f"add a host to the group spares, or remove {host} from the group to train with fewer nodes"
            problems.append(Problem(host, OUT, text, cure))
    members = []
    for host, out in hosts.items():
        if out is False:
            members.append(Member(host))
        elif chosen.get(host):
            members.append(Member(chosen[host], host))
    return members, problems


def newest(host: Host) -> dict[str, t.Any]:
    """Return name and time of the newest checkpoint that a host sees, empty where there is none."""
    return dict(host.node.get("checkpoint") or {})


def lost_checkpoints(hosts: t.Sequence[Host], folder: str) -> list[Problem]:
    """Return a problem for each spare that would begin without the checkpoints that lie on the lost node.

    A shared folder needs nothing, since the spare sees it. Nor does a rank that writes no checkpoints. Else somebody has to
    copy them: whether those of another node are the same ones, or that node's own part, only the script knows.
    """
    problems = []
    survivors = [host for host in hosts if not host.replaces]
    wrote = {name for host in survivors for name in host.node.get("checkpoint_hosts") or []}
    others = max((newest(host) for host in survivors), key=lambda found: float(found.get("time") or 0), default={})
    for spare in hosts:
        if not spare.replaces or spare.replaces not in wrote:
            continue
        mine = newest(spare)
        if mine and (not others or mine["name"] == others["name"] or mine["time"] >= others["time"]):
            continue
        has = f"has only the older {mine['name']}" if mine else "has none"
        text = f"it takes over the rank of {spare.replaces}, whose checkpoints in {folder} lie on that node, and {has}"
        if others:
            text += f" (the newest of the other nodes is {others['name']})"
        cure = f"copy them to {folder} of {spare.name}"
        if others:
            cure += ", from another node where each holds all of the state,"
        cure += " or use a shared torchrun_checkpoint_dir, or train anew with playbooks/restart.yml"
        problems.append(Problem(spare.name, "torchrun_checkpoint_dir", text, cure))
    return problems
