"""NODE_RANK: the inventory's order, or explicit and complete."""

from __future__ import annotations

from ansible_collections.onprem.torch.plugins.module_utils import ranks
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.lists(st.text("abcdefgh0123", min_size=1, max_size=6), min_size=1, max_size=20, unique=True)


@given(NAMES)
def test_without_explicit_ranks_the_inventory_order_counts(names):
    found, problems = ranks.assign({name: None for name in names})
    assert problems == []
    assert [found[name] for name in names] == list(range(len(names)))


@given(NAMES, st.randoms(use_true_random=False))
def test_explicit_ranks_that_are_a_permutation_are_taken(names, random):
    wanted = list(range(len(names)))
    random.shuffle(wanted)
    found, problems = ranks.assign(dict(zip(names, wanted)))
    assert problems == []
    assert found == dict(zip(names, wanted))


@given(NAMES, st.data())
def test_everything_else_is_a_problem_and_the_order_stays_usable(names, data):
    wanted = data.draw(st.lists(st.none() | st.integers(-3, 25), min_size=len(names), max_size=len(names)))
    found, problems = ranks.assign(dict(zip(names, wanted)))
    assert sorted(found.values()) == list(range(len(names)))
    complete = sorted(rank for rank in wanted if rank is not None) == list(range(len(names)))
    none = all(rank is None for rank in wanted)
    assert bool(problems) != (complete or none)
    assert all(problem.variable == "torchrun_node_rank" and problem.host in names for problem in problems)


def test_one_missing_rank_is_named_with_the_hosts_that_have_one():
    _found, problems = ranks.assign({"a": 0, "b": None, "c": 1})
    assert [problem.host for problem in problems] == ["b"]
