"""No accepted start begins from less than the job has or had; a start that loses nothing is accepted."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import continuity
from ansible_collections.onprem.torch.plugins.module_utils.continuity import Checkpoint, Seat
from hypothesis import event, given, settings
from hypothesis import strategies as st

FOLDER = "/ckpt"
KEPT = 3
KINDS = ("rank 0", "full", "shards", "shared")


@dataclasses.dataclass
class Machine:
    """A node: its checkpoints, what root has written down on it, and what the supervisors have."""

    skew: int = 0
    files: list[Checkpoint] = dataclasses.field(default_factory=list)
    hosts: list[str] | None = None
    started: float = 0.0
    accepted: float = 0.0
    known: dict[int, tuple[str, Checkpoint]] = dataclasses.field(default_factory=dict)
    seen: set[str] = dataclasses.field(default_factory=set)
    state: str = "missing"


class Cluster:
    """A job on machines, as its script would fare, without any check."""

    def __init__(self, kind: str, skews: list[int], kept: int = KEPT) -> None:
        self.kind, self.kept = kind, kept
        self.machines = {f"n{number}": Machine(skew) for number, skew in enumerate(skews)}
        self.shared: list[Checkpoint] = []
        self.now, self.group, self.step = 10_000.0, [], 0

    def files(self, name: str) -> list[Checkpoint]:
        return self.shared if self.kind == "shared" else self.machines[name].files

    def seats(self, group: list[str]) -> list[Seat]:
        found = []
        for rank, name in enumerate(group):
            machine = self.machines[name]
            found.append(
                Seat(
                    name,
                    rank,
                    was=name if machine.hosts is not None else "",
                    now=self.told(name),
                    hosts=copy.copy(machine.hosts),
                    started=machine.started,
                    accepted=machine.accepted,
                    known=[(host, rank, Checkpoint(entry.name, entry.time)) for rank, (host, entry) in machine.known.items()],
                    seen=sorted(machine.seen),
                    state=machine.state,
                )
            )
        return found

    def told(self, name: str) -> list[Checkpoint]:
        """What node_info tells: the newest, and the newest one from before the start."""
        found = sorted(self.files(name), key=lambda entry: -entry.time)
        return found[:4] + [entry for entry in found[4:] if entry.time < self.machines[name].started][:1]

    def begin(self, group: list[str]) -> int:
        """Return the step from which the script would go on."""

        def steps(name: str, rank: int | None = None) -> set[int]:
            words = [entry.name.split(".")[0].split("-") for entry in self.files(name)]
            return {int(word[1]) for word in words if len(word) == 2 or int(word[2]) == rank}

        if self.kind in ("rank 0", "shared"):
            return max(steps(group[0]), default=0)
        if self.kind == "full":
            return min(max(steps(name), default=0) for name in group)
        # A shard of each rank that there was: on the host that has the rank now, on any where the rank is no more.
        complete = {0}
        for name in group:
            for entry in self.files(name):
                step, ranks = int(entry.name.split("-")[1]), int(entry.digest.split("/")[1])
                holders = [[group[rank]] if rank < len(group) else group for rank in range(ranks)]
                if all(any(step in steps(holder, rank) for holder in hosts) for rank, hosts in enumerate(holders)):
                    complete.add(step)
        return max(complete)

    def start(self, group: list[str], accepted: bool = False) -> None:
        self.now += 1000
        self.step = self.begin(group)
        for name in group:
            machine = self.machines[name]
            machine.hosts, machine.started = list(group), self.now + machine.skew
            machine.accepted = machine.started if accepted else machine.accepted
        self.group = list(group)
        self.tell()

    def tell(self, speakers: list[str] | None = None) -> None:
        """The supervisors exchange what they see, all or some of them; rank 0's remembers what it was told before."""
        first = self.machines[self.group[0]]
        known, seen = dict(first.known), set(first.seen)
        for rank, name in enumerate(self.group):
            files = self.files(name)
            if files and (speakers is None or name in speakers):
                seen.add(name)
                known[rank] = (name, max(files, key=lambda entry: entry.time))
        for name in self.group:
            machine = self.machines[name]
            machine.known, machine.seen, machine.state = dict(known), set(seen), "read"

    def run(self, checkpoints: int, last: set[str] | None = None) -> None:
        """Train for some rounds. Of the last one, only these hosts come to write their part, and then nobody runs any more."""
        for checkpoint in range(checkpoints):
            self.now += 600
            self.step += 10
            for rank, name in enumerate(self.group):
                if rank and self.kind in ("rank 0", "shared"):
                    continue
                if last is not None and checkpoint == checkpoints - 1 and name not in last:
                    continue
                # Its digest tells of how many ranks it is one.
                part = f"-{rank}" if self.kind == "shards" else ""
                made = Checkpoint(f"step-{self.step}{part}.pt", self.now + self.machines[name].skew, f"{self.step}{part}/{len(self.group)}")
                files = self.files(name)
                files[:] = [*(entry for entry in files if entry.name != made.name), made]
                del files[: -self.kept]
            if last is None or checkpoint < checkpoints - 1:
                self.tell()
        if last is not None:
            # The parts of the others are missing: from what was before, or from this one where each part is enough for itself.
            self.step = self.begin(self.group)
            for name in last & set(self.group):
                self.tell([name])

    def reinstall(self, name: str) -> None:
        self.machines[name] = Machine(self.machines[name].skew)

    def copy(self, source: str, target: str) -> None:
        """A person copies the newest file; it gets a new time."""
        files = self.machines[source].files
        if files and self.kind != "shared":
            newest = max(files, key=lambda entry: entry.time)
            mine = self.machines[target].files
            mine[:] = [*(entry for entry in mine if entry.name != newest.name), dataclasses.replace(newest, time=self.now)]

    def restart(self, group: list[str]) -> None:
        """What restart.yml does before the start."""
        self.now += 1000
        for name in group:
            machine = self.machines[name]
            skew = machine.skew
            self.machines[name] = Machine(skew, hosts=[], started=self.now + skew, accepted=self.now + skew, state="missing")
        self.shared.clear()
        self.step = 0

    def lost(self, group: list[str]) -> list[str]:
        return [problem.sentence() for problem in continuity.lost(self.seats(group), FOLDER)]


NAMES = [f"n{number}" for number in range(4)]
GROUP = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
EVENT = st.one_of(
    st.tuples(st.just("move"), GROUP),
    st.tuples(st.just("run"), st.integers(1, 4)),
    st.tuples(st.just("torn"), st.tuples(st.integers(1, 3), st.sets(st.sampled_from(NAMES), min_size=1, max_size=3))),
    st.tuples(st.just("reinstall"), st.sampled_from(NAMES)),
    st.tuples(st.just("copy"), st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))),
    st.tuples(st.just("restart"), GROUP),
    st.tuples(st.just("accept"), GROUP),
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(-4, 4), min_size=4, max_size=4),
    st.integers(1, KEPT),
    GROUP,
    st.lists(EVENT, max_size=9),
)
def test_what_is_accepted_goes_on_from_the_newest_checkpoint(kind, skews, kept, first, events):
    cluster = Cluster(kind, skews, kept)
    cluster.start(first)
    cluster.run(2)
    for what, value in events:
        if what == "run":
            cluster.run(value)
        elif what == "torn":
            cluster.run(*value)
        elif what == "reinstall":
            cluster.reinstall(value)
        elif what == "copy":
            # Who writes one node's part over another's own has destroyed that one, and made both look like full copies.
            if kind != "shards" or value[1] not in cluster.group:
                cluster.copy(*value)
        elif what == "restart":
            cluster.restart(value)
            assert cluster.lost(value) == [], "restart is the way to begin anew"
            cluster.start(value)
        elif what == "accept":
            if kind == "shards":
                continue  # a limit: which of the parts that are left fit together afterwards, nobody can tell (docs/life.md)
            cluster.start(value, accepted=True)
            # Until the job writes again, what was there before the acceptance is not asked about (docs/life.md).
            cluster.run(1)
        elif any(cluster.machines[name].hosts == cluster.group for name in value):  # else nobody in it knows of the job
            problems = cluster.lost(value)
            event(f"{kind}: {'refused' if problems else 'accepted'}")
            if not problems:
                assert cluster.begin(value) >= cluster.step, f"{cluster.group} → {value}"
                cluster.start(value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(-4, 4), min_size=4, max_size=4), GROUP, st.data())
def test_what_loses_nothing_is_accepted(kind, skews, group, data):
    cluster = Cluster(kind, skews)
    cluster.start(group)
    assert cluster.lost(data.draw(GROUP)) == [], "a job without checkpoints has nothing to lose"
    cluster.run(data.draw(st.integers(1, 4)))
    assert cluster.lost(group) == [], "the same hosts in the same places"
    cluster.start(group)
    assert cluster.lost(group) == [], "started, and nothing written since"
    if kind == "shared":
        assert cluster.lost(data.draw(GROUP)) == []
    if kind == "full":
        assert cluster.lost(data.draw(st.permutations(group))) == []
        assert cluster.lost(group[1:] or group) == []
    if kind == "rank 0" and len(group) > 1:
        others = data.draw(st.lists(st.sampled_from([name for name in NAMES if name != group[0]]), max_size=3, unique=True))
        assert cluster.lost([group[0], *others]) == [], "whoever else moves, rank 0 stays with its checkpoints"


def moved(kind, group, other, *before):
    cluster = Cluster(kind, [0, 0, 0, 0])
    cluster.start(group)
    cluster.run(3)
    for change in before:
        change(cluster)
    return cluster, cluster.lost(other)


def test_two_hosts_that_change_places_are_told_with_ranks_and_ways_out():
    _cluster, (sentence,) = moved("rank 0", ["n0", "n1"], ["n1", "n0"])
    assert sentence == (
        "n1: it would take rank 0 from n0 and had rank 1, but the newest checkpoint step-30.pt of rank 0 in /ckpt lies on n0, and it has none; "
        "copy n0:/ckpt/step-30.pt to n1:/ckpt, or put the hosts back into this order, or write their ranks down (torchrun_node_rank): "
        "n0 0, n1 1, or put them into a shared torchrun_checkpoint_dir, or train anew with playbooks/restart.yml, or accept the loss "
        "for this run with -e torchrun_accept_lost_progress=true (it may begin from nothing)."
    )


def test_a_copy_is_a_way_out():
    cluster, problems = moved("rank 0", ["n0", "n1"], ["n1", "n0"])
    assert problems
    cluster.copy("n0", "n1")
    assert cluster.lost(["n1", "n0"]) == []


def test_a_host_above_the_others_is_refused_and_below_is_not():
    cluster, problems = moved("rank 0", ["n0", "n1"], ["n2", "n0", "n1"])
    assert len(problems) == 1 and problems[0].startswith("n2: it would take rank 0 from n0")
    assert "n0 0, n1 1, n2 2" in problems[0]
    assert cluster.lost(["n0", "n1", "n2"]) == []


def test_a_node_that_was_installed_anew_is_refused():
    cluster, (sentence,) = moved("rank 0", ["n0", "n1"], ["n0", "n1"], lambda cluster: cluster.reinstall("n0"))
    assert sentence == (
        "n0: rank 0 had its newest checkpoint step-30.pt in /ckpt here, and now it has none; copy a backup to n0:/ckpt, or train anew with "
        "playbooks/restart.yml, or accept the loss for this run with -e torchrun_accept_lost_progress=true (it may begin from nothing)."
    )
    cluster.start(["n0", "n1"], accepted=True)
    assert cluster.lost(["n0", "n1"]) == [], "accepted once"


def test_leftovers_of_a_host_that_stays_do_not_replace_what_a_host_that_leaves_had():
    def leftovers(cluster):
        cluster.machines["n1"].files.append(Checkpoint("step-15.pt", 5000.0, "15"))

    # Of a host that is gone only its newest is known, so nobody can tell that n1 writes none: its own rank is asked about too.
    _cluster, (sentence, _of_n1s_rank) = moved("rank 0", ["n0", "n1", "n2"], ["n1", "n2"], leftovers)
    assert sentence.startswith("n1: it would take rank 0 from n0 and had rank 1, but the newest checkpoint step-30.pt of rank 0")
    assert "has only the older step-15.pt; copy n0:/ckpt/step-30.pt to n1:/ckpt" in sentence
    assert "it may begin from step-15.pt" in sentence


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("kind", ["full", "shards"])
def test_a_host_that_is_lost_in_the_middle_of_a_round_still_had_checkpoints(kind, kept):
    cluster = Cluster(kind, [0, 0, 0, 0], kept)
    cluster.start(["n0", "n1"])
    cluster.run(3)
    cluster.start(["n0", "n1"])
    cluster.run(1, {"n0"})
    (sentence,) = cluster.lost(["n0", "n2"])
    assert sentence.startswith("n2: it would take rank 1 from n1, but the newest checkpoint step-30")
    assert cluster.lost(["n0", "n1"]) == [] and cluster.begin(["n0", "n1"]) == (30 if kept > 1 or kind == "full" else 0)


@pytest.mark.parametrize("ranks", [1, 8], ids=["a file a round", "eight files a round"])
def test_leftovers_are_known_by_what_the_job_resumed_from(ranks):
    """n1 had rank 0 long ago. The newest ones alone need not reach back to the start; the newest one from before it is told too."""
    rounds = [Checkpoint(f"step-{step}-{part}.pt", moment, f"{step}/{part}") for step, moment in ((110, 10300.0), (100, 9400.0)) for part in range(ranks)]
    told = rounds[:4] + [entry for entry in rounds[4:] if entry.time < 10_000][:1]
    known = [("n0", 0, rounds[0])]
    seats = [Seat("n0", 0, was="n0", now=told, hosts=["n0", "n1"], started=10_000.0, state="read", seen=["n0", "n1"], known=known)]
    for leftover, refused in ((Checkpoint("step-50-0.pt", 5000.0, "50/0"), False), (Checkpoint("step-100-8.pt", 9400.0, "100/8"), True)):
        seats[0].known = [*known, ("n1", 1, leftover)]
        assert bool(continuity.lost([seats[0], Seat("n2", 1)], FOLDER)) == refused, leftover


def test_a_node_whose_checkpoints_cannot_be_looked_at_is_not_one_that_has_none():
    cluster, problems = moved("full", ["n0", "n1"], ["n0", "n1"])
    assert problems == []
    seats = cluster.seats(["n0", "n1"])
    seats[1].now, seats[1].unread = [], "/ckpt does not answer within 30 s"
    (sentence,) = [problem.sentence() for problem in continuity.lost(seats, FOLDER)]
    assert sentence.startswith("n1: its checkpoints cannot be looked at (/ckpt does not answer within 30 s); see that its file system answers")
    assert "-e torchrun_accept_lost_progress=true" in sentence
    never = [Seat("n0", 0, unread="/ckpt does not answer within 30 s")]
    assert continuity.lost(never, FOLDER) == [], "a job that was never started has lost nothing"


def test_shards_of_one_name_must_not_move():
    def shards(cluster):
        for number, name in enumerate(["n0", "n1"]):
            files = cluster.machines[name].files
            files[:] = [dataclasses.replace(entry, digest=f"{entry.digest} of {number}") for entry in files]

    cluster, problems = moved("full", ["n0", "n1"], ["n1", "n0"], shards)
    assert len(problems) == 2
    assert cluster.lost(["n0", "n1"]) == []


@pytest.mark.parametrize(("copied", "refused"), [(False, True), (True, False)])
def test_another_folder_needs_the_newest_checkpoint(copied, refused):
    newest = Checkpoint("step-30.pt", 900.0, "30")
    old = Seat("n0", 0, was="n0", before=[newest], folder="/old", pattern="*.pt", hosts=["n0"], started=100.0, state="read")
    if copied:
        old.now = [dataclasses.replace(newest, time=2000.0)]
    problems = [problem.sentence() for problem in continuity.lost([old], FOLDER)]
    assert bool(problems) == refused
    if problems:
        assert problems[0].startswith(
            "n0: rank 0 has its newest checkpoint step-30.pt in /old (*.pt), but with the present torchrun_checkpoint_dir it has none; "
            "copy n0:/old/step-30.pt to n0:/ckpt, or set torchrun_checkpoint_dir and torchrun_checkpoint_glob back to /old and *.pt"
        )


def test_without_the_supervisors_word_a_job_that_ran_is_not_believed_to_have_had_nothing():
    bare = [Seat(name, rank, was=name, hosts=["n0", "n1"], started=100.0) for rank, name in enumerate(["n0", "n1"])]
    assert len(continuity.lost(bare, FOLDER)) == 2
    for seat in bare:
        seat.accepted = 100.0
    assert continuity.lost(bare, FOLDER) == [], "accepted at that start"
    for seat in bare:
        seat.accepted, seat.ran = 0.0, False
    assert continuity.lost(bare, FOLDER) == [], "the unit could never be started"


def test_a_node_that_is_only_renamed_is_the_same():
    files = [Checkpoint("step-30.pt", 900.0, "30")]
    seat = Seat("node-a", 0, was="n0", now=files, hosts=["n0"], started=100.0, state="read", seen=["n0"], known=[("n0", 0, files[0])])
    assert continuity.lost([seat], FOLDER) == []


def test_a_job_that_was_started_before_there_were_records_is_known_by_its_units():
    survivor = Seat("n1", 0, was="n1", unit_rank=1, unit_nodes=2, started=100.0, state="read", seen=["n0"])
    (problem,) = continuity.lost([survivor], FOLDER)
    assert problem.text == "it would take rank 0 from n0 and had rank 1, but the checkpoints of rank 0 in /ckpt lie on n0, and it has none"


@pytest.mark.parametrize("was", ["", "x"])
def test_checkpoints_without_a_name_are_many(was):
    """What is not known by name is told in the plural."""
    witness = Seat("n1", 1, was="n1", unit_rank=1, unit_nodes=2, started=100.0, state="read", seen=["n0"])
    (problem,) = continuity.lost([Seat("n0", 0, was=was), witness], FOLDER)
    assert problem.text == (
        "it would have rank 0, whose checkpoints were on the node that was n0 before, and it has none"
        if was
        else "rank 0 had its checkpoints in /ckpt here, and now it has none"
    )


def test_a_finished_release_is_not_trained_again():
    seats = [Seat("n0", 0, was="n0", hosts=["n1"], started=1.0, state="read", seen=["n1"], done="abc")]
    assert continuity.lost(seats, FOLDER, "abc") == []
    assert continuity.lost(seats, FOLDER, "def")
