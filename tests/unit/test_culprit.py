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


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), seeds)
def test_racks_behind_a_slow_spine_are_blocks_and_no_links(racks, nodes, seed):
    cluster = Cluster(racks * nodes, 1, seed)
    for left in range(racks * nodes):
        for right in range(racks * nodes):
            if left // nodes != right // nodes:
                cluster.link[(cluster.names[left], cluster.names[right])] = 0.3
    assert [culprit.kind for culprit in solve(list(cluster.samples()))] == ["block"] * (racks - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(2, 5), st.integers(2, 4), seeds)
def test_a_rail_with_a_slow_spine_is_a_block_of_that_rail(racks, nodes, rails, seed):
    cluster = Cluster(racks * nodes, rails, seed)
    found = solve([
        Sample(one.source, one.target, one.rail, one.gbytes_per_second * (0.3 if crosses(one, nodes) and one.rail == 1 else 1.0))
        for one in cluster.samples()
    ])
    assert [(culprit.kind, culprit.device) for culprit in found] == [("block", 1)] * (racks - 1)


def crosses(sample, nodes):
    return int(sample.source[1:]) // nodes != int(sample.target[1:]) // nodes


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 32), seeds)
def test_pairs_without_a_pattern_accuse_the_network_and_no_node(nodes, seed):
    found = solve(list(Cluster(nodes, 1, seed, noise=0.9).samples()))
    assert names(found) == [("network", "", None, None)]
    assert "without a pattern" in found[0].evidence


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
