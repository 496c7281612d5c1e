# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which node, device or link is slow, from the bandwidths of pairs.

A pair is as fast as the slowest of sender, link and receiver. So the best that a sender reaches with anybody is a lower
bound of what it can, and a sender that is slow with everybody is slow itself. A pair that is far below what both ends
reach with others is a slow link. One slow node therefore never makes its partners look guilty.
"""

from __future__ import annotations

import statistics
import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils import culprit_blocks

# A pair, or the best of a device, below this share of its reference is slow.
TOLERANCE = 0.7
# The same where nothing tells what the hardware should reach, as with virtual adapters, whose speed comes and goes with the CPU.
UNKNOWN_TOLERANCE = 0.5
# Of the links of a device, from this share on the device is named and not each link.
MANY_LINKS = 0.5
# Slow links without a pattern: so many, or this share of the hosts, may be bad cables; more are not. The same of nodes.
FEW_LINKS = 4
SCATTERED_LINKS = 0.5
SCATTERED_NODES = 0.25


@dataclass(frozen=True)
class Sample:
    """Bandwidth of one direction of one pair.

    Attributes:
        source: host that sends.
        target: host that receives.
        rail: local rank of both devices.
        gbytes_per_second: the best of the repetitions.
    """

    source: str
    target: str
    rail: int
    gbytes_per_second: float


@dataclass(frozen=True)
class Culprit:
    """What is slow.

    Attributes:
        kind: node, device, link, block, or network where more is slow than nodes and links explain: a whole rail, or no pattern.
        host: the host at fault; of a link or block, one end; empty for the network.
        device: local rank, None where all devices of the node or of the pair, or all rails of a block, are meant.
        peer: the other end of a link; hosts of the other side of a block, with commas.
        measured: GB/s.
        expected: GB/s, the reference that the others give.
        evidence: one sentence with the numbers.
    """

    kind: str
    host: str
    device: int | None
    peer: str | None
    measured: float
    expected: float
    evidence: str

    def as_dict(self) -> dict[str, t.Any]:
        """Return the fields as plain data."""
        return dict(self.__dict__)


Unit = culprit_blocks.Unit
Way = culprit_blocks.Way


def figure(value: float) -> str:
    """Return GB/s with three significant digits."""
    return f"{value:.3g} GB/s"


def solve(samples: t.Sequence[Sample], expected: float | None = None, tolerance: float = TOLERANCE) -> list[Culprit]:
    """Return the culprits, worst first; empty where the samples accuse nobody.

    Args:
        samples: both directions of the pairs that were measured, of all rails.
        expected: GB/s of a healthy pair where the hardware tells it, else None: the cluster's own median counts.
        tolerance: share of the reference below which something is slow.
    """
    values: dict[Way, float] = {}
    for sample in samples:
        way = ((sample.source, sample.rail), (sample.target, sample.rail))
        values[way] = max(values.get(way, 0.0), sample.gbytes_per_second)
    if not values:
        return []
    sends: dict[Unit, float] = {}
    receives: dict[Unit, float] = {}
    for (source, target), value in values.items():
        sends[source] = max(sends.get(source, 0.0), value)
        receives[target] = max(receives.get(target, 0.0), value)
    # Of an even number the upper one: the mean of a good and a bad one is neither.
    reference = statistics.median_high([*sends.values(), *receives.values()])
    reference = max(reference, expected or 0.0)
    alone, values = rails_of_two(values)
    pairs = two_hosts(alone, reference, tolerance)
    if not values:
        return pairs
    hosts = {unit[0] for way in values for unit in way}
    units, guilty = slow_units(values, sends, receives, reference, tolerance)
    # A slow end explains its links; without it they would join, or part, sets of nodes that have nothing to do with it.
    inner = {way: value for way, value in values.items() if not guilty.intersection(way)}
    needed = healthy_links(inner, reference)
    slow = {way: value for way, value in inner.items() if value < tolerance * needed[way]}
    blocks, left = slow_blocks(inner, slow)
    nodes, links = single_links(inner, left, needed)
    chaos = scattered(values, units, nodes, links, None if expected else reference)
    if chaos:
        # A few that are slow with everybody may be named beside it; many are part of it.
        few = len({entry.host for entry in units}) <= max(1.0, len(hosts) * SCATTERED_NODES)
        return [*(units if few else []), *(blocks if len(left) < len(slow) / 4 else []), *pairs, chaos]
    return sorted([*units, *blocks, *nodes, *links, *pairs], key=lambda culprit: culprit.measured / (culprit.expected or 1.0))


def rails_of_two(values: t.Mapping[Way, float]) -> tuple[dict[Way, float], dict[Way, float]]:
    """Return the ways on rails on which only two nodes have a device, and the others."""
    units = {unit for way in values for unit in way}
    small = {rail for _host, rail in units if sum(1 for unit in units if unit[1] == rail) < 3}
    alone = {way: value for way, value in values.items() if way[0][1] in small}
    return alone, {way: value for way, value in values.items() if way not in alone}


def healthy_links(values: t.Mapping[Way, float], reference: float) -> dict[Way, float]:
    """Return what each way should reach: what both its ends reach with others.

    Above everybody's reference a figure counts only where the same end reaches it a second time, with another or the other way:
    one way measured too high would make the other links of its ends look slow.
    """
    found: dict[tuple[Unit, int], list[tuple[float, float]]] = {}
    for way, value in values.items():
        for end, unit in enumerate(way):
            found.setdefault((unit, end), []).append((value, values.get((way[1], way[0]), 0.0)))
    reached: dict[tuple[Unit, int], float] = {}
    for key, both in found.items():
        best = sorted((value for value, _back in both), reverse=True)
        again = max([reference, *best[1:2], *(min(value, back) for value, back in both)])
        reached[key] = min(best[0], again)
    return {way: min(reached[(way[0], 0)], reached[(way[1], 1)]) for way in values}


def scattered(
    values: t.Mapping[Way, float],
    units: t.Sequence[Culprit],
    nodes: t.Sequence[Culprit],
    links: t.Sequence[Culprit],
    reference: float | None,
) -> Culprit | None:
    """Return the network where more is slow, and without a pattern, than bad nodes and cables explain; None where it is not so.

    Other traffic and busy CPUs slow pairs down at random, and whoever is accused then is healthy.
    """
    hosts = {unit[0] for way in values for unit in way}
    bad_links = len({frozenset((entry.host, entry.peer)) for entry in links})
    bad_nodes = len({entry.host for entry in nodes})
    low, high = min(values.values()), max(values.values())
    spread = f"pairs of nodes reach between {figure(low)} and {figure(high)} without a pattern"
    if bad_links > max(FEW_LINKS, len(hosts) * SCATTERED_LINKS) or bad_nodes > max(2.0, len(hosts) * SCATTERED_NODES):
        text = (
            f"{spread}: {bad_links} links and most links of {bad_nodes} among {len(hosts)} nodes are slow, more than bad nodes, cables "
            "or switches explain; look for other traffic on the network and for busy CPUs, and verify again when it is quiet"
        )
        return Culprit("network", "", None, None, low, reference or high, text)
    met = len({frozenset((way[0][0], way[1][0])) for way in values})
    alone = len({entry.host for entry in units})
    if reference and met < len(hosts) * (len(hosts) - 1) / 4 and alone > max(3.0, len(hosts) * SCATTERED_NODES / 2):
        text = (
            f"{spread}: {alone} of {len(hosts)} nodes are slow with the few peers that they met, as where racks reach each other "
            "slowly; verify rack by rack to tell"
        )
        return Culprit("network", "", None, None, low, reference, text)
    return None


def two_hosts(values: t.Mapping[Way, float], reference: float, tolerance: float) -> list[Culprit]:
    """Return the culprits among two hosts, where nothing can tell a slow end from a slow link."""
    culprits = []
    for (source, target), value in sorted(values.items()):
        if value < tolerance * reference:
            text = (
                f"{source[0]} sends {figure(value)} to {target[0]} on device {source[1]}, expected {figure(reference)}; "
                "with two nodes nothing tells which end it is"
            )
            culprits.append(Culprit("link", source[0], source[1], target[0], value, reference, text))
    return culprits


def slow_units(
    values: t.Mapping[Way, float],
    sends: t.Mapping[Unit, float],
    receives: t.Mapping[Unit, float],
    reference: float,
    tolerance: float,
) -> tuple[list[Culprit], set[Unit]]:
    """Return the nodes and devices that are slow with everybody, and all their devices."""
    units = sorted({unit for way in values for unit in way})
    found: dict[Unit, tuple[float, str]] = {}
    for unit in units:
        # Judged by the better peers: a unit that had only slow partners has not had its chance.
        sending = sends.get(unit, reference)
        receiving = receives.get(unit, reference)
        low = []
        if sending < tolerance * reference:
            low.append(f"sends at most {figure(sending)} to any of {count(values, unit, 0)} peers")
        if receiving < tolerance * reference:
            low.append(f"receives at most {figure(receiving)} from any of {count(values, unit, 1)} peers")
        if low:
            found[unit] = (min(sending, receiving), " and ".join(low))
    culprits, explained = slow_rails(units, {unit: low for unit, (low, _text) in found.items()}, sends, receives)
    for host in sorted({unit[0] for unit in found if unit not in explained}):
        devices = [unit for unit in units if unit[0] == host]
        guilty = [unit for unit in devices if unit in found and unit not in explained]
        whole = len(guilty) == len(devices)
        for unit in [min(guilty, key=lambda entry: found[entry][0])] if whole else guilty:
            measured, text = found[unit]
            who = host if whole else f"device {unit[1]} of {host}"
            others = f"; healthy devices reach {figure(reference)}"
            kind = "node" if whole else "device"
            culprits.append(Culprit(kind, host, None if whole else unit[1], None, measured, reference, f"{who} {text}{others}"))
    return culprits, set(found)


def slow_rails(
    units: t.Sequence[Unit], found: t.Mapping[Unit, float], sends: t.Mapping[Unit, float], receives: t.Mapping[Unit, float]
) -> tuple[list[Culprit], set[Unit]]:
    """Return the rails of several on which nearly all devices are slow, which is their switch's doing, and those devices."""
    culprits: list[Culprit] = []
    explained: set[Unit] = set()
    healthy = [max(sends.get(unit, 0.0), receives.get(unit, 0.0)) for unit in units if unit not in found]
    for rail in sorted({unit[1] for unit in found}):
        devices = [unit for unit in units if unit[1] == rail]
        bad = [unit for unit in devices if unit in found]
        if not healthy or len(devices) == len(units) or len(bad) < culprit_blocks.NEARLY_ALL * len(devices):
            continue
        explained.update(bad)
        measured, reference = statistics.median(found[unit] for unit in bad), statistics.median(healthy)
        text = (
            f"device {rail} of {len(bad)} of {len(devices)} nodes is slow with everybody, {figure(measured)} in the median, while "
            f"other devices reach {figure(reference)}: look at the switch of that rail"
        )
        culprits.append(Culprit("network", "", rail, None, measured, reference, text))
    return culprits, explained


def count(values: t.Mapping[Way, float], unit: Unit, end: int) -> int:
    """Return the pairs in which a device is the sender (end 0) or the receiver (end 1)."""
    return sum(1 for way in values if way[end] == unit)


def slow_blocks(values: t.Mapping[Way, float], slow: t.Mapping[Way, float]) -> tuple[list[Culprit], dict[Way, float]]:
    """Return what is slow between sets of nodes, on all rails or on one, and the slow ways that this does not explain."""
    found: list[Culprit] = []
    left = dict(slow)
    rails = sorted({way[0][1] for way in values})
    for rail in [None, *rails] if len(rails) > 1 else [None]:
        here = {way: value for way, value in values.items() if rail is None or way[0][1] == rail}
        healthy = [value for way, value in here.items() if way not in slow]
        for block in culprit_blocks.find(here, {way for way in left if way in here}):
            # Found before on all rails, or between sets that overlap with others'.
            mine = [left.pop(way) for way in block.slow if way in left]
            if mine:
                found.append(block_culprit(block, rail, statistics.median(mine), statistics.median(healthy)))
    return found, left


def block_culprit(block: culprit_blocks.Block, rail: int | None, measured: float, reference: float) -> Culprit:
    """Return the culprit that a block is."""
    sides = [f"[{', '.join(side)}]" for side in block.sides]
    between = f"from {sides[0]} to {sides[1]}" if block.one_way else f"between {', '.join(sides[:-1])} and {sides[-1]}"
    text = (
        f"{len(block.slow)} of {block.measured} directions {between}{'' if rail is None else f' on device {rail}'} are slow, "
        f"{figure(measured)} in the median, while pairs on one side reach {figure(reference)}: look at what joins the sides, such as "
        "a switch's uplink"
    )
    others = ", ".join(host for side in block.sides[1:] for host in side)
    return Culprit("block", block.sides[0][0], rail, others, measured, reference, text)


def single_links(
    values: t.Mapping[Way, float], slow: t.Mapping[Way, float], needed: t.Mapping[Way, float]
) -> tuple[list[Culprit], list[Culprit]]:
    """Return the nodes and devices most of whose links are slow, and the slow links that are left."""
    busy: list[tuple[Unit, float, float, str]] = []
    left = dict(slow)
    while left:
        tally: dict[Unit, int] = {}
        for pair in {frozenset(way) for way in left}:
            for unit in pair:
                tally[unit] = tally.get(unit, 0) + 1
        unit = max(sorted(tally), key=lambda entry: tally[entry])
        peers = len({frozenset(way) for way in values if unit in way})
        if tally[unit] < 3 or tally[unit] <= MANY_LINKS * peers:
            break
        mine = statistics.median(value for way, value in left.items() if unit in way)
        reference = max(value for way, value in needed.items() if unit in way)
        text = f"are slow, {figure(mine)} in the median, while its best reaches {figure(reference)}"
        busy.append((unit, mine, reference, f"{tally[unit]} of {peers} links of {{}} {text}"))
        left = {way: value for way, value in left.items() if unit not in way}
    return busy_nodes(values, busy), bad_links(values, left, needed)


def busy_nodes(values: t.Mapping[Way, float], busy: t.Sequence[tuple[Unit, float, float, str]]) -> list[Culprit]:
    """Return a node where all its devices have mostly slow links, else the devices."""
    culprits = []
    for host in sorted({unit[0] for unit, _mine, _reference, _text in busy}):
        devices = {unit for way in values for unit in way if unit[0] == host}
        mine = sorted((entry for entry in busy if entry[0][0] == host), key=lambda entry: entry[1])
        whole = len(mine) == len(devices)
        for unit, measured, reference, text in mine[:1] if whole else mine:
            who = host if whole else f"device {unit[1]} of {host}"
            culprits.append(
                Culprit("node" if whole else "device", host, None if whole else unit[1], None, measured, reference, text.format(who))
            )
    return culprits


def bad_links(values: t.Mapping[Way, float], slow: t.Mapping[Way, float], needed: t.Mapping[Way, float]) -> list[Culprit]:
    """Return the slow links, one for all devices of a pair of nodes where it is slow on each of them."""
    culprits = []
    for pair in sorted({tuple(sorted((way[0][0], way[1][0]))) for way in slow}):
        ways = sorted(way for way in slow if {way[0][0], way[1][0]} == set(pair))
        rails = sorted({way[0][1] for way in ways})
        every = {way[0][1] for way in values if {way[0][0], way[1][0]} == set(pair)}
        whole = len(every) > 1 and every == set(rails)
        for rail in [None] if whole else rails:
            mine = [way for way in ways if rail is None or way[0][1] == rail]
            worst = min(mine, key=lambda way: slow[way])
            source, target = worst[0][0], worst[1][0]
            back = any(way[0][0] == target for way in mine)
            text = (
                f"{source} sends {figure(slow[worst])} to {target} on {'all devices' if rail is None else f'device {rail}'}, while both "
                f"reach {figure(needed[worst])} with others; {'both directions are slow' if back else 'the other direction is healthy'}"
            )
            culprits.append(Culprit("link", source, rail, target, slow[worst], needed[worst], text))
    return culprits
