"""The solver against clusters that are made up: what is planted is named, and nobody else."""

import random

from ansible_collections.onprem.torch.plugins.module_utils.culprit import Sample, solve
from hypothesis import given, settings
from hypothesis import strategies as st


class Cluster:
    """Bandwidths of a cluster of n nodes with some rails; the noise only takes away, as measuring the best of some does."""

    def __init__(self, nodes, rails=1, seed=0, noise=0.15):
        self.random = random.Random(seed)
        self.names = [f"n{index}" for index in range(nodes)]
        self.rails = rails
        self.noise = noise
        self.send = {}
        self.receive = {}
        self.link = {}

    def slow(self, name, rail=None, share=0.3, ways=("send", "receive")):
        for one in range(self.rails) if rail is None else [rail]:
            for way in ways:
                getattr(self, way)[(name, one)] = share

    def samples(self, pairs=None):
        for source in self.names:
            for target in self.names:
                if source == target or (pairs is not None and frozenset((source, target)) not in pairs):
                    continue
                for rail in range(self.rails):
                    speed = min(
                        self.send.get((source, rail), 1.0),
                        self.receive.get((target, rail), 1.0),
                        self.link.get((source, target), 1.0),
                    )
                    yield Sample(source, target, rail, 100.0 * speed * self.random.uniform(1 - self.noise, 1.0))


def names(culprits):
    return [(culprit.kind, culprit.host, culprit.device, culprit.peer) for culprit in culprits]


sizes = st.integers(4, 24)
seeds = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(1, 4), seeds)
def test_a_healthy_cluster_accuses_nobody(nodes, rails, seed):
    assert solve(list(Cluster(nodes, rails, seed).samples())) == []


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 4), seeds, st.data())
def test_slow_nodes_are_named_and_nobody_else(nodes, rails, seed, data):
    cluster = Cluster(nodes, rails, seed)
    bad = data.draw(st.sets(st.sampled_from(cluster.names), min_size=1, max_size=max(1, (nodes - 1) // 3)))
    ways = data.draw(st.sampled_from([("send",), ("receive",), ("send", "receive")]))
    for name in bad:
        cluster.slow(name, share=data.draw(st.floats(0.01, 0.5)), ways=ways)
    found = solve(list(cluster.samples()))
    assert sorted(names(found)) == sorted(("node", name, None, None) for name in bad)
    for culprit in found:
        assert culprit.measured < culprit.expected and culprit.host in culprit.evidence


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(2, 8), seeds, st.data())
def test_a_slow_device_is_named_with_its_rail(nodes, rails, seed, data):
    cluster = Cluster(nodes, rails, seed)
    name, rail = data.draw(st.sampled_from(cluster.names)), data.draw(st.integers(0, rails - 1))
    cluster.slow(name, rail)
    assert names(solve(list(cluster.samples()))) == [("device", name, rail, None)]


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 24), seeds, st.booleans(), st.data())
def test_a_slow_link_is_named_and_neither_end(nodes, seed, both, data):
    cluster = Cluster(nodes, 1, seed)
    source, target = data.draw(st.permutations(cluster.names))[:2]
    cluster.link[(source, target)] = 0.2
    if both:
        cluster.link[(target, source)] = 0.2
    found = solve(list(cluster.samples()))
    assert [culprit.kind for culprit in found] == ["link"]
    assert {found[0].host, found[0].peer} == {source, target}
    if not both:
        assert (found[0].host, found[0].peer) == (source, target), "the direction that is slow is told"


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 24), seeds, st.data())
def test_a_slow_node_and_a_slow_link_at_once(nodes, seed, data):
    cluster = Cluster(nodes, 1, seed)
    node, source, target = data.draw(st.permutations(cluster.names))[:3]
    cluster.slow(node, share=0.1)
    cluster.link[(source, target)] = 0.2
    assert sorted(names(solve(list(cluster.samples())))) == sorted(
        [("node", node, None, None), ("link", source, 0, target)]
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 16), seeds, st.data())
def test_a_slow_uplink_is_a_block_and_no_node(nodes, seed, data):
    cluster = Cluster(nodes, 1, seed)
    cut = data.draw(st.integers(2, nodes - 2))
    for left in cluster.names[:cut]:
        for right in cluster.names[cut:]:
            cluster.link[(left, right)] = cluster.link[(right, left)] = 0.3
    found = solve(list(cluster.samples()))
    assert [culprit.kind for culprit in found] == ["block"]
    sides = {found[0].host, *found[0].peer.split(", ")}
    assert sides <= set(cluster.names) and "uplink" in found[0].evidence


def crosses(sample, nodes):
    return int(sample.source[1:]) // nodes != int(sample.target[1:]) // nodes


def rack(sample, nodes):
    return int(sample.source[1:]) // nodes, int(sample.target[1:]) // nodes


def changed(cluster, *rules):
    """The samples of a cluster, each multiplied by the share of every rule (condition, share) that holds for it."""
    for one in cluster.samples():
        share = min([part for condition, part in rules if condition(one)], default=1.0)
        yield Sample(one.source, one.target, one.rail, one.gbytes_per_second * share)


racks_of_nodes = [st.integers(2, 5), st.integers(2, 6), seeds]


@settings(max_examples=40, deadline=None)
@given(*racks_of_nodes)
def test_racks_behind_a_slow_spine_are_one_block_and_no_links(racks, nodes, seed):
    found = solve(list(changed(Cluster(racks * nodes, 1, seed), (lambda one: crosses(one, nodes), 0.3))))
    assert [culprit.kind for culprit in found] == ["block"]
    assert found[0].evidence.count("[") == racks


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(2, 5), st.integers(2, 4), seeds)
def test_a_rail_with_a_slow_spine_is_a_block_of_that_rail(racks, nodes, rails, seed):
    cluster = Cluster(racks * nodes, rails, seed)
    found = solve(list(changed(cluster, (lambda one: crosses(one, nodes) and one.rail == 1, 0.3))))
    assert [(culprit.kind, culprit.device) for culprit in found] == [("block", 1)]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(4, 6), st.integers(1, 3), seeds, st.data())
def test_a_slow_node_and_a_slow_spine_at_once(racks, nodes, rails, seed, data):
    cluster = Cluster(racks * nodes, rails, seed)
    bad = data.draw(st.sampled_from(cluster.names))
    cluster.slow(bad, share=0.1)
    found = solve(list(changed(cluster, (lambda one: crosses(one, nodes) and one.source != bad != one.target, 0.3))))
    assert names(found)[0] == ("node", bad, None, None)
    assert [culprit.kind for culprit in found] == ["node", "block"]


@settings(max_examples=40, deadline=None)
@given(*racks_of_nodes)
def test_an_uplink_that_is_slow_one_way_is_a_block_one_way(racks, nodes, seed):
    found = solve(list(changed(Cluster(racks * nodes, 1, seed), (lambda one: rack(one, nodes)[0] == 0 and crosses(one, nodes), 0.3))))
    assert [culprit.kind for culprit in found] == ["block"]
    assert "directions from [n0, " in found[0].evidence


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 5), st.integers(2, 6), seeds)
def test_one_slow_trunk_of_several_is_a_block_between_two_racks(racks, nodes, seed):
    found = solve(list(changed(Cluster(racks * nodes, 1, seed), (lambda one: set(rack(one, nodes)) == {0, 1}, 0.3))))
    assert [culprit.kind for culprit in found] == ["block"]
    assert found[0].evidence.count("[") == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 16), st.integers(2, 8), seeds, st.booleans())
def test_a_link_that_is_slow_on_all_rails_is_one_link(nodes, rails, seed, both):
    cluster = Cluster(nodes, rails, seed)
    found = solve(list(changed(cluster, (lambda one: (one.source, one.target) in [("n1", "n2"), ("n2", "n1")][: 1 + both], 0.2))))
    assert len(found) == 1 and (found[0].kind, found[0].device) == ("link", None)
    assert {found[0].host, found[0].peer} == {"n1", "n2"}


def test_a_slow_rail_is_its_switch_and_no_device():
    found = solve(list(changed(Cluster(8, 4, 2), (lambda one: one.rail == 1, 0.3))))
    assert names(found) == [("network", "", 1, None)]
    assert "switch of that rail" in found[0].evidence


def test_of_two_nodes_the_better_way_is_what_is_expected():
    found = solve([Sample("a", "b", 0, 60.0), Sample("b", "a", 0, 100.0)])
    assert [(culprit.host, culprit.expected) for culprit in found] == [("a", 100.0)]


def test_a_rail_that_only_two_nodes_have_is_judged_as_two_nodes_are():
    extra = [Sample("n0", "n1", 1, 20.0), Sample("n1", "n0", 1, 20.0)]
    found = solve([*Cluster(8, 1, 2).samples(), *extra])
    assert [(culprit.kind, culprit.host, culprit.peer) for culprit in found] == [("link", "n0", "n1"), ("link", "n1", "n0")]


def test_a_small_rack_behind_a_slow_uplink_and_a_bad_link_elsewhere():
    def slow(one):
        return ({one.source, one.target} == {"n12", "n13"}) or ((one.source in ("n18", "n19")) != (one.target in ("n18", "n19")))

    found = solve(list(changed(Cluster(20, 1, 2), (slow, 0.3))))
    assert sorted(culprit.kind for culprit in found) == ["block", "link"]
    assert next({culprit.host, culprit.peer} for culprit in found if culprit.kind == "link") == {"n12", "n13"}


def test_racks_share_a_spine_only_where_each_is_slow_to_each():
    trunks = {frozenset(pair) for pair in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 5)]}
    found = solve(list(changed(Cluster(12, 1, 2), (lambda one: frozenset(rack(one, 2)) in trunks, 0.3))))
    assert all("n4" not in culprit.evidence or "n6" not in culprit.evidence for culprit in found)
    assert {culprit.kind for culprit in found} == {"block"}


def test_a_slow_link_between_the_fast_nodes_of_a_mixed_cluster_is_named():
    def speed(source, target):
        return 80.0 if {source, target} == {0, 1} else 400.0 if max(source, target) < 3 else 100.0

    samples = [Sample(f"n{one}", f"n{two}", 0, speed(one, two)) for one in range(8) for two in range(8) if one != two]
    assert names(solve(samples)) == [("link", "n0", 0, "n1")]


def test_a_node_that_is_slow_with_everybody_is_named_in_a_network_without_a_pattern():
    cluster = Cluster(8, 1, 1)
    cluster.slow("n7", share=0.1)
    bad = {("n0", "n1"), ("n2", "n3"), ("n4", "n5"), ("n1", "n6"), ("n3", "n5")}
    found = solve(list(changed(cluster, (lambda one: (one.source, one.target) in bad, 0.3))))
    assert names(found) == [("node", "n7", None, None), ("network", "", None, None)]


@settings(max_examples=40, deadline=None)
@given(st.integers(12, 32), seeds)
def test_pairs_without_a_pattern_accuse_the_network_and_no_node(nodes, seed):
    found = solve(list(Cluster(nodes, 1, seed, noise=0.9).samples()))
    assert names(found)[-1] == ("network", "", None, None)
    assert "without a pattern" in found[-1].evidence
    assert len(found) <= 1 + nodes / 4 and all(culprit.kind == "node" for culprit in found[:-1])


def test_two_nodes_cannot_tell_which_end_it_is():
    found = solve([Sample("a", "b", 0, 1.0), Sample("b", "a", 0, 10.0)], expected=10.0)
    assert names(found) == [("link", "a", 0, "b")]
    assert "nothing tells which end" in found[0].evidence


def test_a_figure_from_the_hardware_accuses_where_all_are_slow():
    cluster = Cluster(4, 1, 1)
    for name in cluster.names:
        cluster.slow(name)
    assert solve(list(cluster.samples())) == [], "by themselves they look alike"
    assert {culprit.host for culprit in solve(list(cluster.samples()), expected=100.0)} == set(cluster.names)


def test_random_matchings_are_enough():
    cluster = Cluster(100, 1, 3)
    cluster.slow("n17")
    pairs = set()
    for number in range(4):
        order = cluster.names[:]
        random.Random(number).shuffle(order)
        pairs |= {frozenset(order[index : index + 2]) for index in range(0, 100, 2)}
    assert names(solve(list(cluster.samples(pairs)))) == [("node", "n17", None, None)]


def test_racks_of_which_few_pairs_were_measured_accuse_no_node():
    cluster = Cluster(128, 1, 3)
    pairs = set()
    for number in range(4):
        order = cluster.names[:]
        random.Random(number).shuffle(order)
        pairs |= {frozenset(order[index : index + 2]) for index in range(0, 128, 2)}
    samples = [one for one in changed(cluster, (lambda one: crosses(one, 32), 0.3)) if frozenset((one.source, one.target)) in pairs]
    found = solve(samples)
    assert names(found) == [("network", "", None, None)]
    assert "verify rack by rack" in found[0].evidence


def test_sets_that_hardly_met_are_no_block():
    samples = [Sample(one.source, one.target, 0, one.gbytes_per_second) for one in Cluster(8, 1, 5).samples() if not crosses(one, 4)]
    assert solve(samples) == []
    assert names(solve([*samples, Sample("n1", "n6", 0, 20.0)])) == [("link", "n1", 0, "n6")]


def test_nothing_measured_accuses_nobody():
    assert solve([]) == []


def test_a_pair_measured_too_high_does_not_make_the_other_links_of_its_ends_look_slow():
    # As a token bucket does that has filled while its node waited.
    burst = {("n5", "n3"): 240.0, ("n6", "n2"): 240.0, ("n6", "n3"): 60.0}
    samples = [
        Sample(sample.source, sample.target, sample.rail, burst.get((sample.source, sample.target), sample.gbytes_per_second))
        for sample in Cluster(8, noise=0.0).samples()
    ]
    assert solve(samples, tolerance=0.5) == []
    assert names(solve(samples, tolerance=0.7)) == [("link", "n6", 0, "n3")]
