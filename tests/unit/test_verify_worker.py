"""The worker's own arithmetic, without torch."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import bandwidth
from hypothesis import given
from hypothesis import strategies as st

PATH = pathlib.Path(__file__).resolve().parents[2] / "roles" / "nccl_verify" / "files" / "nccl_verify_worker.py"
spec = importlib.util.spec_from_file_location("nccl_verify_worker", PATH)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def test_help_needs_no_torch():
    answer = subprocess.run([sys.executable, str(PATH), "--help"], capture_output=True, text=True, check=True)
    assert "--size-max" in answer.stdout and "nccl-tests" in answer.stdout


@given(st.integers(2, 40))
def test_everyone_meets_everyone_once_and_nobody_twice_in_a_round(count):
    rounds = worker.circle(list(range(count)))
    assert len(rounds) == (count - 1 if count % 2 == 0 else count)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    for pairs in rounds:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))


@given(st.integers(65, 300))
def test_beyond_64_the_cost_does_not_grow(count):
    rounds = worker.rounds_of(list(range(count)))
    assert len(rounds) == worker.MATCHINGS
    assert all(len(pairs) == count // 2 for pairs in rounds)


@given(st.integers(1, 64), st.sampled_from(sorted(worker.EXACT)), st.sampled_from(["sum", "min", "max"]), st.integers(0, 5))
def test_the_pattern_is_exact_in_the_type(ranks, dtype, operation, repeat):
    values, positions = worker.weights(ranks, dtype, operation, repeat)
    assert len(values) == ranks and positions >= 3
    assert worker.combined(values, operation) * positions <= worker.EXACT[dtype]
    if operation == "sum":
        assert sum(values) > 0, "a sum of nothing would find nothing"


def test_with_repeats_every_rank_takes_part():
    seen = set()
    for repeat in range(40):
        values, _positions = worker.weights(64, "bfloat16", "sum", repeat)
        seen |= {rank for rank, value in enumerate(values) if value}
    assert seen == set(range(64))


def test_only_pairs_that_decide_something_are_measured_again():
    values = {(a, b): 10.0 for a in range(6) for b in range(6) if a != b}
    assert worker.suspects(values, [list(range(6))]) == []
    values[(1, 4)] = 2.0
    assert worker.suspects(values, [list(range(6))]) == [(1, 4)]
    for other in (0, 1, 2, 4, 5):
        values[(3, other)] = values[(other, 3)] = 1.0
    again = worker.suspects(values, [list(range(6))])
    assert all(3 in pair or pair == (1, 4) for pair in again) and (1, 4) in again


def test_what_is_measured_again_fits_into_its_time():
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3)]
    assert worker.affordable(pairs, dict.fromkeys(pairs, 1.0), 1.0) == [(0, 1), (2, 3)]
    assert worker.affordable(pairs, dict.fromkeys(pairs, 5.0), 1.0) == [(0, 1)], "at least one"


@given(st.lists(st.tuples(st.integers(1, 2**31), st.floats(0.1, 500.0)), min_size=1, max_size=30))
def test_plateau_and_factor_are_those_of_the_report(rows):
    found = worker.plateau([{"size": size, "busbw": value} for size, value in rows])
    assert found == pytest.approx(bandwidth.plateau(rows)[1])
    assert worker.bus_factor(len(rows)) == pytest.approx(bandwidth.bus_factor("all_reduce", len(rows)))


@pytest.mark.parametrize(("capability", "links"), [(90, 18), (80, 12), (100, 18), (86, 4), (130, 18), (90, 0), (90, None)])
def test_the_floor_inside_a_node_is_the_verdict_s(capability, links):
    nvlink = {"speeds": bandwidth.NVLINK_GBYTES_PER_SECOND, "floor": bandwidth.FLOORS["nvlink"]}
    ranks = [{"gpu": {"capability": capability, "nvlinks": links}}] * 2
    expected = bandwidth.inside_node([bandwidth.Gpu("x", capability, links)] * 2)
    assert worker.nvlink_minimum(ranks, nvlink) == (pytest.approx(expected.minimum) if links and expected.minimum else None)


def test_types_and_their_widths_are_the_module_s():
    assert worker.SIZES == bandwidth.DTYPES
