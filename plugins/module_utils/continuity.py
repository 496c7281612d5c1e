# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a job would go on from its newest checkpoint: what was, compared with what would be, whoever moved, left or came back.

What was is root's record of the last start on each node (job_past); what each host had is what lies there, and what the
supervisors saw on it. Every rank that wrote checkpoints must find its newest one, in the folder that the job would use now,
on the host that would have the rank. Another host has it by its name and content, or holds newer ones where all nodes are
seen to write the same files. A job that began anew with playbooks/restart.yml was nothing before.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, listed

if t.TYPE_CHECKING:
    from ansible_collections.onprem.torch.plugins.module_utils.plan import Host

ACCEPT = "torchrun_accept_lost_progress"
FOLDER = "torchrun_checkpoint_dir"
RANK = "torchrun_node_rank"
# Seconds by which times of different nodes may differ; also the most progress that is not looked at.
TOLERANCE = 60.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is, or was, on a node.

    Attributes:
        name: below the checkpoint folder; empty where only its being there is known.
        time: seconds since the epoch, by its node's clock.
        digest: tells its content from others; empty where nobody has read it.
    """

    name: str
    time: float
    digest: str = ""

    def told(self) -> str:
        """Return it as a sentence names it."""
        return self.name or "whose name is not known"


@dataclass
class Seat:
    """A host that is to take part, and what it knows.

    Attributes:
        name: its inventory name.
        rank: the rank that it would have.
        was: the name under which it took part last; empty where it knows of no earlier start.
        replaces: the host whose place it takes as a spare.
        now: its newest checkpoints in the folder that would be used, newest first.
        before: the same in the folder that was used, where that is another one.
        folder: that folder; empty where it is the same.
        pattern: what checkpoints were called there.
        hosts: who took part in the last start that it knows of, in the order of the ranks; None where it has no such record.
        started: when that was.
        accepted: until when a person has accepted losses.
        unit_rank: rank of its unit, -1 without one; for jobs that were started before there were records.
        unit_nodes: number of nodes of that job.
        known: host → rank (-1: not known) and newest checkpoint, as the supervisors saw them.
        seen: hosts on which the supervisors saw any.
        state: whether what the supervisors wrote could be read: ``read``, ``missing`` or ``odd``.
        done: the release that has finished.
        active: whether the job runs there.
        ran: whether its unit has been started since.
        unread: why it is not known which checkpoints lie on it; empty where that is known.
    """

    name: str
    rank: int
    was: str = ""
    replaces: str = ""
    now: list[Checkpoint] = field(default_factory=list)
    before: list[Checkpoint] = field(default_factory=list)
    folder: str = ""
    pattern: str = ""
    hosts: t.Optional[list[str]] = None
    started: float = 0.0
    accepted: float = 0.0
    unit_rank: int = -1
    unit_nodes: int = 0
    known: list[tuple[str, int, Checkpoint]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    state: str = "missing"
    done: str = ""
    active: bool = False
    ran: bool = True
    unread: str = ""

    @property
    def newest(self) -> t.Optional[Checkpoint]:
        """The newest checkpoint in the folder that would be used."""
        return self.now[0] if self.now else None

    @property
    def files(self) -> list[Checkpoint]:
        """The newest checkpoints that lie on the node, in either folder, newest first."""
        return sorted([*self.now, *self.before], key=lambda found: -found.time)


def seat(host: Host, rank: int, unit: str) -> Seat:
    """Return what a host knows, from what node_info found.

    Args:
        host: the host.
        rank: the rank that it would have.
        unit: name of the job's unit.
    """
    past = host.node.get("past") or {}
    record, its_unit = past.get("record") or {}, past.get("unit") or {}
    told = [Checkpoint(entry["name"], float(entry["time"]), entry["digest"]) for entry in past.get("now") or []]
    return Seat(
        host.name,
        rank,
        was=str(record.get("host") or its_unit.get("host") or ""),
        replaces=host.replaces,
        now=told,
        before=[Checkpoint(entry["name"], float(entry["time"]), entry["digest"]) for entry in past.get("before") or []],
        folder=str(past.get("folder") or ""),
        pattern=str(past.get("pattern") or ""),
        hosts=list(record["hosts"]) if record else None,
        started=float(record.get("time") or its_unit.get("time") or 0),
        accepted=float(record.get("accepted") or 0),
        unit_rank=int(its_unit.get("rank", -1)),
        unit_nodes=int(its_unit.get("nnodes", 0)),
        known=[
            (entry["host"], int(entry["rank"]), Checkpoint(entry["name"], float(entry["time"]))) for entry in past.get("known") or []
        ],
        seen=list(past.get("seen") or []),
        state=str(past.get("state") or "missing"),
        done=str(past.get("done") or ""),
        ran=bool(record.get("ran", True)),
        unread=str(past.get("unread") or ""),
        active=any(job["unit"] == unit and job["active"] for job in host.node.get("jobs") or []),
    )


# -- comparing


def scheme(name: str) -> tuple[str, tuple[int, ...]]:
    """Return a name without its numbers, and the numbers."""
    return re.sub(r"\d+", "#", name), tuple(int(digits[:18]) for digits in re.findall(r"\d+", name))


def fewer_steps(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether the numbers in the names show that one is older: none is larger, one at least is smaller."""
    (pattern, mine), (pattern_of_other, others) = scheme(one.name), scheme(other.name)
    return pattern == pattern_of_other and mine != others and all(left <= right for left, right in zip(mine, others))


def not_older(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether it is sure that one is not older than the other."""
    if one.digest and one.digest == other.digest:
        return True
    return not fewer_steps(one, other) and one.time >= other.time - TOLERANCE


def copy_of(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether one is the other, as far as is known of both."""
    if one.digest and other.digest:
        return one.digest == other.digest
    return one.name == other.name and not_older(one, other)


def newest_of(found: t.Iterable[Checkpoint]) -> t.Optional[Checkpoint]:
    """Return the newest of several, None of none."""
    best = None
    for entry in found:
        if best is None or fewer_steps(best, entry) or (entry.time > best.time and not fewer_steps(entry, best)):
            best = entry
    return best


def same_kind(one: Seat, other: Seat) -> bool:
    """Return whether two nodes write the same files: they share one, or were caught between two of the same, one after another."""
    if any(copy_of(mine, others) for mine in one.files for others in other.files):
        return True
    if not (one.active and other.active):
        return False
    mine, others = one.files[0], other.files[0]
    pattern, numbers = scheme(mine.name)
    return pattern == scheme(others.name)[0] and len(numbers) == 1 and abs(mine.time - others.time) <= TOLERANCE


# -- what was


@dataclass
class Had:
    """A host of the last start.

    Attributes:
        host: its name then.
        rank: its rank then.
        seat: where it takes part now; None where it does not.
        newest: its newest checkpoint as far as anybody knows; None where it had none.
        certain: whether that checkpoint is known; else only that there was one, or that nobody can tell.
    """

    host: str
    rank: int
    seat: t.Optional[Seat]
    newest: t.Optional[Checkpoint] = None
    certain: bool = True


@dataclass
class Past:
    """The last start: who took part, and what each had that counts."""

    had: list[Had]
    nodes: int
    started: float

    def of_rank(self, rank: int) -> t.Optional[Had]:
        """Return who had a rank."""
        return next((had for had in self.had if had.rank == rank), None)


def what_was(seats: t.Sequence[Seat]) -> t.Optional[Past]:
    """Return the last start that any of the hosts knows of; None where there was none, or where the job began anew since."""
    started = max((seat.started for seat in seats if seat.hosts is not None), default=0.0)
    witnesses = [seat for seat in seats if seat.hosts is not None and seat.started >= started - TOLERANCE]
    ranks: dict[str, int] = {}
    if witnesses:
        latest = max(witnesses, key=lambda seat: seat.started)
        witnesses = [seat for seat in witnesses if seat.hosts == latest.hosts]
        ranks = {host: rank for rank, host in enumerate(latest.hosts or [])}
        nodes = len(ranks)
    else:
        witnesses = [seat for seat in seats if seat.unit_rank >= 0]
        started = max((seat.started for seat in witnesses), default=0.0)
        nodes = max((seat.unit_nodes for seat in witnesses), default=0)
        ranks = {seat.was or seat.name: seat.unit_rank for seat in witnesses}
        fill_in(ranks, witnesses, nodes)
    if not ranks:
        return None
    accepted = max(seat.accepted for seat in witnesses)
    places = places_of(seats, ranks)
    seen = {host for witness in witnesses for host in witness.seen}
    told = any(witness.state == "read" for witness in witnesses) or not any(witness.ran for witness in witnesses)
    had = []
    candidates: dict[str, list[Checkpoint]] = {}
    for host, rank in ranks.items():
        place = places.get(host)
        heard = [entry for witness in witnesses for name, _rank, entry in witness.known if name == host]
        # What was accepted as lost is not asked about again; but the files of a host that has left were what the job went on from.
        known = [entry for entry in heard if entry.time > accepted or place is None]
        files = place.files if place else []
        if host in seen and not heard and place and not place.was:
            files = []  # installed anew: what lies there may be anything
        candidates[host] = [*files, *known]
        # Without what the supervisors wrote, anything may have been.
        doubt = not candidates[host] and ((host in seen and not heard) or not told)
        had.append(Had(host, rank, place, certain=not doubt))
    written = any(found and found.time >= started for found in map(newest_of, candidates.values()))
    for entry in had:
        if accepted and accepted >= started - TOLERANCE:
            # A person has accepted the loss at this start: what is from before does not count once anything was written since.
            counting = [found for found in candidates[entry.host] if not written or found.time >= started - TOLERANCE]
            entry.certain = entry.certain or not written
        else:
            counting = since_resumed(entry.host, candidates, started)
        entry.newest = newest_of(counting)
    return Past(had, nodes, started)


def since_resumed(host: str, candidates: t.Mapping[str, t.Sequence[Checkpoint]], started: float) -> list[Checkpoint]:
    """Return those of a host's checkpoints that are not left over from before what the job resumed from.

    Where others have written since the start and the host has not, it either writes none any more, or it was lost in the middle of
    the first round. So what each of the others had newest at the start still counts, and what is as new. Where none of them has
    that any more and one round may be all that they wrote since, only other kinds of files are surely left over.

    Args:
        host: its name in the last start.
        candidates: host → what it has.
        started: when the job was started.
    """
    mine = candidates[host]
    since = {name: [found for found in files if found.time >= started] for name, files in candidates.items()}
    fresh = [found for found in mine if found.time >= started - TOLERANCE]
    if since[host]:
        return fresh
    writers = [name for name, files in since.items() if files]
    if not writers:
        return list(mine)
    resumed = [max(old, key=lambda found: found.time) for old in ([found for found in candidates[name] if found.time < started] for name in writers) if old]
    if resumed:
        return fresh + [found for found in mine if any(not_older(found, old) for old in resumed)]
    if any(max(found.time for found in since[name]) - min(found.time for found in since[name]) > TOLERANCE for name in writers):
        return fresh
    kinds = {scheme(found.name)[0] for name in writers for found in since[name]}
    return fresh + [found for found in mine if scheme(found.name)[0] in kinds]


def fill_in(ranks: dict[str, int], witnesses: t.Sequence[Seat], nodes: int) -> None:
    """Add hosts of which only the supervisors tell: with the rank that they tell, else with the lowest that is free."""
    for witness in witnesses:
        for host, rank, _entry in witness.known:
            if host not in ranks and 0 <= rank < nodes and rank not in ranks.values():
                ranks[host] = rank
    for host in sorted({host for witness in witnesses for host in witness.seen} - set(ranks)):
        free = [rank for rank in range(nodes) if rank not in ranks.values()]
        if free:
            ranks[host] = free[0]


def places_of(seats: t.Sequence[Seat], ranks: t.Iterable[str]) -> dict[str, Seat]:
    """Return the seat of each host of the last start: the node that says that it was that host, else the one of its name.

    So a node that has only been renamed is the same, and two that have changed addresses have changed places.
    """
    places = {}
    for host in ranks:
        own = [seat for seat in seats if seat.was == host]
        found = next((seat for seat in own if seat.name == host), own[0] if own else None)
        found = found or next((seat for seat in seats if seat.name == host and not seat.was), None)
        if found:
            places[host] = found
    return places


# -- what would be


def lost(seats: t.Sequence[Seat], folder: str, release: str = "") -> list[Problem]:
    """Return a problem for each rank that would go on from less than it has, or had.

    Args:
        seats: the hosts that are to take part.
        folder: where the checkpoints are to lie.
        release: id of the release that is to run.
    """
    if release and all(seat.done == release for seat in seats):
        return []  # finished: it does not train again
    past = what_was(seats)
    if past is None:
        return []
    unread = [unknown(seat) for seat in seats if seat.unread]
    # What would be said of the others is not sure while a node may hold anything.
    return unread or Check(seats, past, folder).problems()


def unknown(seat: Seat) -> Problem:
    """Return the problem of a host of which nobody can tell what it has."""
    cure = "see that its file system answers and that the pattern torchrun_checkpoint_glob matches little else, or go on without that knowledge"
    return Problem(seat.name, FOLDER, f"its checkpoints cannot be looked at ({seat.unread})", f"{cure} with -e {ACCEPT}=true")


class Check:
    """The comparison of a past with what would be."""

    def __init__(self, seats: t.Sequence[Seat], past: Past, folder: str) -> None:
        self.seats = sorted(seats, key=lambda seat: seat.rank)
        self.past, self.folder = past, folder
        self.writers = [had for had in past.had if had.newest or not had.certain]
        self.best = newest_of(had.newest for had in self.writers if had.newest)
        living = [had.seat for had in self.writers if had.seat and had.seat.files]
        # All nodes write the same: None where fewer than two can be compared.
        self.alike = all(same_kind(living[0], other) for other in living[1:]) if len(living) > 1 else None

    def problems(self) -> list[Problem]:
        """Return what is wrong, a sentence for each host that lacks something."""
        found = []
        by_rank = {seat.rank: seat for seat in self.seats}
        for had in sorted(self.writers, key=lambda had: had.rank):
            heir = by_rank.get(had.rank)
            if heir and not self.covers(heir, had):
                found.append(self.problem(heir, had))
            elif heir is None and not self.remains(had):
                found.append(self.left_behind(had))
        everyone = len(self.writers) == self.past.nodes
        for seat in self.seats:
            if everyone and self.past.of_rank(seat.rank) is None and not self.has_all(seat):
                found.append(self.newcomer(seat))
        return found

    def covers(self, heir: Seat, had: Had) -> bool:
        """Return whether a host holds what a rank needs to go on."""
        newest, need = heir.newest, had.newest
        if newest is None:
            return False
        if need is None:
            return self.covers_unknown(heir, had)
        if heir is had.seat:
            # Of a round of several files, the last one to be written may have the lowest number.
            return any(not_older(entry, need) for entry in heir.now) or near(heir, newest, need)
        if any(copy_of(entry, need) for entry in heir.now):
            return True
        if had.seat and had.seat.active and any(copy_of(newest, entry) for entry in had.seat.files[:2]):
            return True  # caught between two: the stop writes another one
        wrote_itself = any(writer.seat is heir for writer in self.writers)
        if self.alike or not wrote_itself:
            return not_older(newest, need) or (wrote_itself and near(heir, newest, need))
        return False

    def covers_unknown(self, heir: Seat, had: Had) -> bool:
        """Return the same where nobody knows which checkpoint the rank had last."""
        newest = heir.newest
        if newest is None:
            return False
        if self.best and not not_older(newest, self.best):
            return False
        return bool(self.alike) or heir is had.seat or newest.time >= self.past.started - TOLERANCE

    def remains(self, had: Had) -> bool:
        """Return whether what a rank had that is no more is somewhere else too."""
        if had.newest is None:
            return bool(self.alike)
        need = had.newest
        if any(copy_of(entry, need) for seat in self.seats for entry in seat.now):
            return True
        first = self.seats[0].newest
        return bool(self.alike and first and (not_older(first, need) or near(self.seats[0], first, need)))

    def has_all(self, seat: Seat) -> bool:
        """Return whether a host with a rank that was not there before has what all others have."""
        if seat.newest is None or self.best is None or self.alike is False:
            return False
        return not_older(seat.newest, self.best) or near(seat, seat.newest, self.best)

    # -- sentences

    def problem(self, heir: Seat, had: Had) -> Problem:
        """Return the problem of a host that does not have what its rank needs."""
        need = had.newest
        named, was, lie = (f"newest checkpoint {need.told()}", "was", "lies") if need and need.name else ("checkpoints", "were", "lie")
        if heir is not had.seat:
            folder = (had.seat.folder if had.seat else "") or heir.folder or self.folder
            if had.host == heir.name or (had.seat is None and had.host in {seat.name for seat in self.seats}):
                text = f"it would have rank {had.rank}, whose {named} {was} on the node that was {had.host} before"
            else:
                mine = f" and had rank {self.rank_of(heir)}" if self.rank_of(heir) is not None else ""
                text = f"it would take rank {had.rank} from {had.host}{mine}, but the {named} of rank {had.rank} in {folder} {lie} on {had.host}"
            return Problem(heir.name, RANK, f"{text}, and it {self.holds(heir)}", self.cure(heir, had))
        if heir.folder and heir.before:
            place = "torchrun_checkpoint_glob" if heir.folder == self.folder else FOLDER
            text = f"rank {had.rank} has its {named} in {heir.folder} ({heir.pattern}), but with the present {place} it {self.holds(heir)}"
            return Problem(heir.name, place, text, self.cure(heir, had))
        if not need and not had.certain and had.host not in {host for seat in self.seats for host in seat.seen}:
            text = f"rank {had.rank} was started here before, it is not known with which checkpoints (nothing is left of its state), and it {self.holds(heir)}"
        else:
            text = f"rank {had.rank} had its {named} in {heir.folder or self.folder} here, and now it {self.holds(heir)}"
        return Problem(heir.name, FOLDER, text, self.cure(heir, had))

    def left_behind(self, had: Had) -> Problem:
        """Return the problem of a rank that is to be no more, whose checkpoints nobody else has."""
        first = self.seats[0]
        named = f"newest checkpoint {had.newest.told()}" if had.newest and had.newest.name else "checkpoints"
        text = f"{had.host} would take part no more, or without its rank {had.rank}, whose {named} no host has in its place"
        return Problem(first.name, FOLDER, text, self.cure(first, had))

    def newcomer(self, seat: Seat) -> Problem:
        """Return the problem of a host that would join a job whose nodes all hold checkpoints."""
        names = listed([had.host for had in self.writers])
        text = f"it would join the job with rank {seat.rank}, but {names}, all that took part, hold checkpoints, and it {self.holds(seat)}"
        return Problem(seat.name, FOLDER, text, self.cure(seat, None))

    def rank_of(self, seat: Seat) -> t.Optional[int]:
        """Return the rank that a host had."""
        return next((had.rank for had in self.past.had if had.seat is seat), None)

    def holds(self, seat: Seat) -> str:
        """Return which checkpoint a host would begin from."""
        newest = seat.newest
        if newest is None:
            return "has none"
        if self.best and not not_older(newest, self.best):
            return f"has only the older {newest.name}"
        return f"has {newest.name}, which cannot be told to be the same"

    def cure(self, heir: Seat, had: t.Optional[Had]) -> str:
        """Return the ways out."""
        ways = []
        stop = " after playbooks/stop.yml" if any(seat.active for seat in self.seats) else ""
        source = self.source(heir, had)
        if source:
            ways.append(f"copy {source} to {heir.name}:{self.folder}{stop}")
        if heir.folder and had and had.seat is heir:
            ways.append(f"set {FOLDER} and torchrun_checkpoint_glob back to {heir.folder} and {heir.pattern}")
        if had and had.seat and had.seat is not heir:
            ways.append(self.ranks())
        if had is None or had.seat is not heir:
            ways.append(f"put them into a shared {FOLDER}")
        begin = heir.newest if heir.rank == 0 or not self.seats[0].now else self.seats[0].newest
        result = f"it may begin from {begin.name}" if begin and heir.now else "it may begin from nothing"
        ways.append("train anew with playbooks/restart.yml")
        return f"{', or '.join(ways)}, or accept the loss for this run with -e {ACCEPT}=true ({result})"

    def source(self, heir: Seat, had: t.Optional[Had]) -> str:
        """Return HOST:PATH of the files that a host lacks; empty where nobody is known to have them."""
        if had and had.seat and had.newest:
            place = had.seat
            files = place.now if place is not heir else []
            folder = self.folder
            if not any(copy_of(entry, had.newest) for entry in files):
                files, folder = place.before, place.folder
            if any(copy_of(entry, had.newest) for entry in files):
                return f"{place.name}:{folder}/{had.newest.name}"
        if had and had.newest and had.seat is None and had.host not in {seat.name for seat in self.seats}:
            return f"{had.host}:{heir.folder or self.folder}/{had.newest.name}"
        need = had.newest if had else self.best
        for seat in self.seats:
            for files, folder in ((seat.now, self.folder), (seat.before, seat.folder)):
                if seat is not heir and files and (need is None or not_older(files[0], need)):
                    return f"{seat.name}:{folder}/{files[0].name} (if each node writes all of the state)"
        if had and had.seat is None:
            return f"the checkpoints of {had.host}:{heir.folder or self.folder}"
        return "a backup"

    def ranks(self) -> str:
        """Return the ranks that keep everybody in place, those who join last."""
        stay = sorted(((had.rank, had.seat.name) for had in self.past.had if had.seat), key=lambda pair: pair[0])
        names = [name for _rank, name in stay]
        names += [seat.name for seat in self.seats if seat.name not in names]
        return f"put the hosts back into this order, or write their ranks down ({RANK}): " + ", ".join(
            f"{name} {rank}" for rank, name in enumerate(names)
        )


def near(seat: Seat, newest: Checkpoint, need: Checkpoint) -> bool:
    """Return whether a running job has only gone on between two looks."""
    return seat.active and newest.time >= need.time - TOLERANCE
