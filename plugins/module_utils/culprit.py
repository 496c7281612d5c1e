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

# A pair, or the best of a device, below this share of its reference is slow.
TOLERANCE = 0.7
# The same where nothing tells what the hardware should reach, as with virtual adapters, whose speed comes and goes with the CPU.
UNKNOWN_TOLERANCE = 0.5
# Of the links of a device, from this share on the device is named and not each link.
MANY_LINKS = 0.5
# Slow links without a pattern: so many, or this share of the hosts, may be bad cables; more are not.
FEW_LINKS = 4
SCATTERED_LINKS = 0.5


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
        kind: node, device, link, block, or network where so many links are slow that no node and no link explains it.
        host: the host at fault; of a link or block, one end; empty for the network.
        device: local rank, None where all of a node's devices, or all rails of a block, are meant.
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


Unit = t.Tuple[str, int]
Way = t.Tuple[Unit, Unit]


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
    hosts = {unit[0] for way in values for unit in way}
    sends: dict[Unit, float] = {}
    receives: dict[Unit, float] = {}
    for (source, target), value in values.items():
        sends[source] = max(sends.get(source, 0.0), value)
        receives[target] = max(receives.get(target, 0.0), value)
    reference = statistics.median([*sends.values(), *receives.values()])
    reference = max(reference, expected or 0.0)
    if len(hosts) < 3:
        return two_hosts(values, reference, tolerance)
    culprits, guilty = slow_units(values, sends, receives, reference, tolerance)
    # Not more than the reference is expected of a link: one pair measured too high would make the other links of its ends look slow.
    slow = {
        (source, target): value
        for (source, target), value in values.items()
        if source not in guilty and target not in guilty and value < tolerance * min(sends[source], receives[target], reference)
    }
    culprits += slow_links(values, slow, sends, receives)
    chaos = scattered(culprits, values, reference, len(hosts))
    if chaos:
        return [chaos]
    return sorted(culprits, key=lambda culprit: culprit.measured / (culprit.expected or 1.0))


def scattered(culprits: t.Sequence[Culprit], values: t.Mapping[Way, float], reference: float, hosts: int) -> Culprit | None:
    """Return the network in place of its links where far more are slow than bad cables explain.

    Other traffic and busy CPUs slow pairs down at random, and whoever is accused then is healthy.
    """
    links = sum(1 for culprit in culprits if culprit.kind == "link")
    if links <= max(FEW_LINKS, hosts * SCATTERED_LINKS):
        return None
    text = (
        f"pairs of nodes reach between {figure(min(values.values()))} and {figure(max(values.values()))} without a pattern: {links} "
        f"links of {hosts} nodes are slow, more than a node, a cable or a switch explains; look for other traffic on the network "
        "and for busy CPUs, and verify again when it is quiet"
    )
    return Culprit("network", "", None, None, min(values.values()), reference, text)


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
    culprits = []
    for host in sorted({unit[0] for unit in found}):
        devices = [unit for unit in units if unit[0] == host]
        guilty = [unit for unit in devices if unit in found]
        whole = len(guilty) == len(devices)
        for unit in [min(guilty, key=lambda entry: found[entry][0])] if whole else guilty:
            measured, text = found[unit]
            who = host if whole else f"device {unit[1]} of {host}"
            others = f"; healthy devices reach {figure(reference)}"
            kind = "node" if whole else "device"
            culprits.append(Culprit(kind, host, None if whole else unit[1], None, measured, reference, f"{who} {text}{others}"))
    return culprits, set(found)


def count(values: t.Mapping[Way, float], unit: Unit, end: int) -> int:
    """Return the pairs in which a device is the sender (end 0) or the receiver (end 1)."""
    return sum(1 for way in values if way[end] == unit)


def slow_links(
    values: t.Mapping[Way, float],
    slow: t.Mapping[Way, float],
    sends: t.Mapping[Unit, float],
    receives: t.Mapping[Unit, float],
) -> list[Culprit]:
    """Return slow links; one block where two sets of nodes reach each other slowly; the node where most of its links are slow."""
    found, left = slow_blocks(values, slow, None)
    for rail in sorted({way[0][1] for way in left}) if not found else []:
        more, left = slow_blocks(values, left, rail)
        found += more
    return found + single_links(values, left, sends, receives)


def slow_blocks(values: t.Mapping[Way, float], slow: t.Mapping[Way, float], rail: int | None) -> tuple[list[Culprit], dict[Way, float]]:
    """Return the blocks on one rail, or on all together, and the slow directions that they do not explain."""
    here = {way: value for way, value in values.items() if rail is None or way[0][1] == rail}
    sides = blocks(here, slow)
    if not sides:
        return [], dict(slow)
    first, second = sides
    across = {way: slow[way] for way in here if way in slow and (way[0][0] in first) != (way[1][0] in first)}
    if len(across) < 4:
        # Where few pairs were measured, as beyond 64 nodes, two sets may just not have met.
        return [], dict(slow)
    measured = statistics.median(across.values())
    reference = statistics.median(value for way, value in here.items() if way not in slow)
    one, other = ", ".join(sorted(first)), ", ".join(sorted(second))
    text = (
        f"all {len(across)} directions between [{one}] and [{other}]{'' if rail is None else f' on device {rail}'} are slow, "
        f"{figure(measured)} in the median, while pairs on one side reach {figure(reference)}: look at what joins the two sides, "
        "such as a switch's uplink"
    )
    found = [Culprit("block", sorted(first)[0], rail, other, measured, reference, text)]
    left = {way: value for way, value in slow.items() if way not in across}
    # A side may fall into further blocks.
    for side in sides:
        more, left = slow_blocks({way: value for way, value in here.items() if {way[0][0], way[1][0]} <= side}, left, rail)
        found += more
    return found, left


def single_links(
    values: t.Mapping[Way, float], slow: t.Mapping[Way, float], sends: t.Mapping[Unit, float], receives: t.Mapping[Unit, float]
) -> list[Culprit]:
    """Return the nodes most of whose links are slow, and the links that are left."""
    culprits: list[Culprit] = []
    left_over = dict(slow)
    while left_over:
        tally: dict[Unit, int] = {}
        pairs = {frozenset(way) for way in left_over}
        for pair in pairs:
            for unit in pair:
                tally[unit] = tally.get(unit, 0) + 1
        unit = max(sorted(tally), key=lambda entry: tally[entry])
        peers = len({frozenset(way) for way in values if unit in way})
        if tally[unit] < 3 or tally[unit] <= MANY_LINKS * peers:
            break
        mine = [value for way, value in left_over.items() if unit in way]
        reference = max(sends.get(unit, 0.0), receives.get(unit, 0.0))
        text = (
            f"{tally[unit]} of {peers} links of {unit[0]} (device {unit[1]}) are slow, {figure(statistics.median(mine))} in the "
            f"median, while its best reaches {figure(reference)}"
        )
        culprits.append(Culprit("node", unit[0], None, None, statistics.median(mine), reference, text))
        left_over = {way: value for way, value in left_over.items() if unit not in way}
    for pair in sorted({tuple(sorted(way)) for way in left_over}):
        ways = sorted(way for way in left_over if tuple(sorted(way)) == pair)
        worst = min(ways, key=lambda way: left_over[way])
        (source, rail), (target, _rail) = worst
        reference = min(sends[worst[0]], receives[worst[1]])
        direction = "both directions are slow" if len(ways) > 1 else "the other direction is healthy"
        text = (
            f"{source} sends {figure(left_over[worst])} to {target} on device {rail}, while both reach {figure(reference)} "
            f"with others; {direction}"
        )
        culprits.append(Culprit("link", source, rail, target, left_over[worst], reference, text))
    return culprits


def blocks(values: t.Mapping[Way, float], slow: t.Mapping[Way, float]) -> tuple[set[str], set[str]] | None:
    """Return two sets of two or more hosts each between which every direction is slow; None where there are none."""
    hosts = {unit[0] for way in values for unit in way}
    healthy: dict[str, set[str]] = {host: set() for host in hosts}
    for source, target in values:
        if (source, target) not in slow:
            healthy[source[0]].add(target[0])
            healthy[target[0]].add(source[0])
    first: set[str] = set()
    waiting = [min(hosts)]
    while waiting:
        host = waiting.pop()
        if host not in first:
            first.add(host)
            waiting.extend(healthy[host] - first)
    second = hosts - first
    return (first, second) if len(first) >= 2 and len(second) >= 2 else None
