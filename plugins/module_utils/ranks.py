# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""NODE_RANK of every host: the inventory's order, or explicit ranks on all hosts."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

RANK = "torchrun_node_rank"


def assign(explicit: t.Mapping[str, t.Optional[int]]) -> tuple[dict[str, int], list[Problem]]:
    """Return the rank of each host and the problems.

    Args:
        explicit: host → ``torchrun_node_rank`` (None where it is not set), in inventory order.

    Returns:
        Ranks 0 … n-1 in inventory order where no host has one, else the explicit ones. Where there are problems the
        ranks are the inventory's order, so that the other checks can go on.
    """
    count = len(explicit)
    by_order = {host: rank for rank, host in enumerate(explicit)}
    given = {host: rank for host, rank in explicit.items() if rank is not None}
    if not given:
        return by_order, []
    last = count - 1
    problems = [
        Problem(
            host,
            RANK,
            f"{RANK} is not set here but on {', '.join(sorted(given))}",
            f"set it on all {count} hosts (0 to {last}) or on none",
        )
        for host in explicit
        if host not in given
    ]
    holders: dict[int, list[str]] = {}
    for host, rank in given.items():
        holders.setdefault(rank, []).append(host)
    for rank, hosts in sorted(holders.items()):
        for host in hosts[1:]:
            text = f"{RANK} is {rank}, which {hosts[0]} has already"
            problems.append(Problem(host, RANK, text, f"give each host a rank of its own from 0 to {last}"))
        if rank < 0 or rank > last:
            text = f"{RANK} is {rank}, but {count} hosts have the ranks 0 to {last}"
            problems.append(Problem(hosts[0], RANK, text, "number the hosts without a gap from 0"))
    if not problems:
        return dict(given), []
    return by_order, problems
