# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slow links that have a pattern: sets of hosts that reach each other slowly, such as racks behind a slow uplink.

Hosts of a rack are slow to the same targets, and healthy with the same. So hosts are put together by both, and where nearly all ways
from one set to another are slow, the cause is what joins the sets. Where few pairs were measured, as beyond 64 nodes, no two
hosts have met the same targets, and no block is found.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

Unit = t.Tuple[str, int]
Way = t.Tuple[Unit, Unit]
# Sets of hosts that agree so far (intersection by union) are nearly the same.
ALIKE = 0.6
# Share of the ways between two sets that are slow where the cause joins the sets.
NEARLY_ALL = 0.8


@dataclass(frozen=True)
class Block:
    """Sets of hosts between which nearly all ways are slow.

    Attributes:
        sides: the sets; with C(one_way) the first sends to the second.
        one_way: whether only the first set's sending is slow.
        slow: the slow ways between them.
        measured: number of ways between them that were measured.
    """

    sides: tuple[tuple[str, ...], ...]
    one_way: bool
    slow: tuple[Way, ...]
    measured: int


def find(values: t.Mapping[Way, float], slow: t.Collection[Way]) -> list[Block]:
    """Return the blocks.

    Args:
        values: GB/s of the ways that were measured and whose ends are not slow themselves.
        slow: those of them that are slow.
    """
    tried: dict[str, dict[str, bool]] = {}
    for way in values:
        source, target = way[0][0], way[1][0]
        met = tried.setdefault(source, {})
        met[target] = met.get(target, True) and way in slow
    groups = alike(tried)
    reached = [common_targets(tried, group) for group in groups]
    both = {
        (one, other)
        for one in range(len(groups))
        for other in range(len(groups))
        if one != other and mostly(groups[other], reached[one]) and mostly(groups[one], reached[other])
    }
    found = []
    left = set(both)
    while left:
        one, other = min(left)
        # Racks that are all slow to each other share what joins them.
        clique = [one, other]
        for more in range(len(groups)):
            if more not in clique and all((more, member) in both for member in clique):
                clique.append(more)
        left -= {(first, second) for first in clique for second in clique}
        found.append(block(values, slow, [groups[number] for number in sorted(clique)], False))
    for number, group in enumerate(groups):
        rest = reached[number].difference(*(groups[other] for one, other in both if one == number))
        if len(rest) >= 2:
            found.append(block(values, slow, [group, rest], True))
    return found


def alike(tried: t.Mapping[str, t.Mapping[str, bool]]) -> list[set[str]]:
    """Return the sets of two or more hosts that are slow to nearly the same two or more targets."""
    slow = {source: {target for target, bad in met.items() if bad} for source, met in tried.items()}
    # Racks behind one spine are slow to nearly the same targets too, but each is healthy with itself only.
    healthy = {source: {source, *met} - slow[source] for source, met in tried.items()}
    groups: list[list[str]] = []
    for source in sorted(slow, key=lambda host: (-len(slow[host]), host)):
        if len(slow[source]) < 2:
            continue
        for group in groups:
            # A bad link between the two makes each a slow target of the other, and of nobody else.
            themselves = {source, group[0]}
            same = agree(slow[source] - themselves, slow[group[0]] - themselves)
            if same and agree(healthy[source], healthy[group[0]]):
                group.append(source)
                break
        else:
            groups.append([source])
    return sorted((set(group) for group in groups if len(group) > 1), key=min)


def agree(one: t.Collection[str], other: t.Collection[str]) -> bool:
    """Return whether two sets are nearly the same."""
    return len(set(one) & set(other)) >= ALIKE * len(set(one) | set(other))


def common_targets(tried: t.Mapping[str, t.Mapping[str, bool]], group: t.Collection[str]) -> set[str]:
    """Return the targets that most of a set have tried and nearly all of those reach slowly."""
    verdicts: dict[str, list[bool]] = {}
    for source in group:
        for target, bad in tried[source].items():
            if target not in group:
                verdicts.setdefault(target, []).append(bad)
    found = {
        target
        for target, bad in verdicts.items()
        if len(bad) >= max(2, len(group) / 2) and sum(bad) >= NEARLY_ALL * len(bad)
    }
    return found if len(found) >= 2 else set()


def mostly(group: t.Collection[str], targets: t.Collection[str]) -> bool:
    """Return whether nearly all of a set are among the targets."""
    return sum(1 for host in group if host in targets) >= NEARLY_ALL * len(group)


def block(values: t.Mapping[Way, float], slow: t.Collection[Way], sides: t.Sequence[t.Collection[str]], one_way: bool) -> Block:
    """Return the block of some sets, with the ways between them."""
    side_of = {host: number for number, side in enumerate(sides) for host in side}
    between = []
    for way in values:
        source, target = side_of.get(way[0][0]), side_of.get(way[1][0])
        if source is not None and target is not None and source != target and (source == 0 or not one_way):
            between.append(way)
    return Block(tuple(tuple(sorted(side)) for side in sides), one_way, tuple(way for way in between if way in slow), len(between))
