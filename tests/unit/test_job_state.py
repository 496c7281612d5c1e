"""What has to be done, from what the nodes tell."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import job_state
from hypothesis import given
from hypothesis import strategies as st


def answer(source="a" * 64, active=False, switch=False, finished=False):
    return {"source_hash": source, "active": active, "switch": switch, "finished": finished}


RUNNING = answer(active=True)
OTHER = answer(active=True, switch=True)
IDLE = answer(switch=True)
DONE = answer(finished=True)


@pytest.mark.parametrize(
    ("answers", "decision"),
    [
        ([RUNNING, RUNNING], "follow"),
        ([IDLE, IDLE], "start"),
        ([RUNNING, IDLE], "start"),
        ([OTHER, RUNNING], "switch"),
        ([OTHER, IDLE], "switch"),
        ([DONE, DONE], "finished"),
        ([DONE, IDLE], "start"),
        ([answer(finished=True, active=True), DONE], "start"),
    ],
)
def test_decisions(answers, decision):
    for order in itertools.permutations(answers):
        assert job_state.decide({f"n{number}": each for number, each in enumerate(order)})[0] == decision


def test_a_node_with_another_source_is_named():
    decision, sentence = job_state.decide({"n1": RUNNING, "n2": RUNNING, "n3": answer("b" * 64)})
    assert decision == "refuse"
    assert sentence == "the nodes hold different sources: n3 has bbbbbbbbbbbb, the others aaaaaaaaaaaa; make them the same"


def test_a_node_without_a_source_is_no_reason_to_start():
    assert job_state.decide({"n1": answer(""), "n2": answer("")})[0] == "refuse"


@given(st.lists(st.builds(answer, st.sampled_from(["", "a" * 64]), st.booleans(), st.booleans(), st.booleans()), min_size=1))
def test_every_combination_has_a_decision_and_a_sentence(answers):
    decision, sentence = job_state.decide({f"n{number}": each for number, each in enumerate(answers)})
    assert decision in ("refuse", "finished", "follow", "switch", "start")
    assert sentence


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 d")]
)
def test_ages(seconds, text):
    assert job_state.age(1000.0, 1000.0 + seconds) == text


@given(st.lists(st.tuples(st.text("ab ", max_size=5), st.integers()), max_size=5))
def test_a_table_has_a_line_for_each_row(rows):
    lines = job_state.table(rows, ("A", "B"))
    assert len(lines) == len(rows) + 1
    assert all(line == line.rstrip() for line in lines)


def test_a_node_that_does_not_answer_is_a_row():
    rows = job_state.status_rows({"n1": {"error": "no answer"}}, ["n1", "n2"][:1], 0.0)
    assert rows[0][:3] == ("n1", 0, "unreachable")
