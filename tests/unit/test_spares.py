"""Who takes part when nodes are out."""

from __future__ import annotations

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import spares
from hypothesis import given
from hypothesis import strategies as st


def members(hosts, reserve):
    found, problems = spares.take_over(hosts, reserve)
    return [(member.host, member.replaces) for member in found], [problem.sentence() for problem in problems]


@pytest.mark.parametrize(
    ("hosts", "reserve", "expected"),
    [
        ({"n1": False, "n2": False}, {}, ["n1", "n2"]),
        ({"n1": False, "n2": True}, {"s1": False}, ["n1", "s1"]),
        ({"n1": True, "n2": True}, {"s1": False, "s2": False}, ["s1", "s2"]),
        ({"n1": True, "n2": False}, {"s1": True, "s2": False}, ["s2", "n2"]),
        ({"n1": True, "n2": "s1"}, {"s1": False, "s2": False}, ["s2", "s1"]),
    ],
)
def test_spares_take_the_very_places(hosts, reserve, expected):
    found, problems = members(hosts, reserve)
    assert [host for host, _replaces in found] == expected
    assert not problems
    assert [replaces for _host, replaces in found] == [host if out else "" for host, out in hosts.items()]


def test_a_lack_of_spares_is_told_with_host_and_cure():
    found, problems = members({"n1": False, "n2": True, "n3": True}, {"s1": False})
    assert found == [("n1", ""), ("s1", "n2")]
    assert problems == [
        "n3: torchrun_node_out is set, but no host of the spares is free to take its rank (s1); "
        "add a host to the group spares, or remove n3 from the group to train with fewer nodes (the plan then tells which checkpoint "
        "that would begin from, and what to copy from where to keep the progress)."
    ]


def test_an_unknown_spare_is_told():
    _found, problems = members({"n1": "s9"}, {"s1": False})
    assert problems == ["n1: torchrun_node_out is 's9', but true, false or the name of a free host of the spares (s1) was expected; correct torchrun_node_out."]


@given(
    st.lists(st.booleans(), min_size=1, max_size=8),
    st.lists(st.booleans(), max_size=8),
)
def test_nobody_changes_place_and_nobody_takes_two(outs, reserve):
    found, problems = spares.take_over({f"n{i}": out for i, out in enumerate(outs)}, {f"s{i}": out for i, out in enumerate(reserve)})
    names = [member.host for member in found]
    assert len(set(names)) == len(names)
    assert len(found) + len(problems) == len(outs)
    if not problems:
        for index, out in enumerate(outs):
            assert (found[index].host == f"n{index}") == (not out)
    assert not any(reserve[int(name[1:])] for name in names if name.startswith("s"))
