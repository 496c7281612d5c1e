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


def start(release, back=False, kept=True):
    return {"release": release, "time": 1.0, "back": back, "kept": kept}


def ran(*starts, release="", unit="active"):
    return {"releases": list(starts), "release": release or starts[-1]["release"], "unit": unit}


A, B, C = start("a"), start("b"), start("c")


@pytest.mark.parametrize(
    ("nodes", "wanted", "decision", "release"),
    [
        ([ran(A, B), ran(A, B)], "", "rollback", "a"),
        ([ran(A, B, start("a", back=True)), ran(A, B, start("a", back=True))], "", "follow", "a"),
        ([ran(A, B, start("a", back=True), unit="inactive")], "", "rollback", "a"),
        ([ran(A, B, start("a", back=True), C)], "", "rollback", "a"),
        ([ran(A, B, C), ran(A, B, C)], "a", "rollback", "a"),
        ([ran(A, B), ran(B)], "", "refuse", ""),
        ([ran(A, C), ran(B, C)], "", "refuse", ""),
        ([ran(start("a", kept=False), B)], "", "refuse", "a"),
        ([ran(A, B)], "x", "refuse", "x"),
        ([{"releases": [], "release": "", "unit": "absent"}], "", "refuse", ""),
    ],
)
def test_going_back(nodes, wanted, decision, release):
    found = job_state.decide_rollback({f"n{number}": node for number, node in enumerate(nodes)}, wanted)
    assert (found[0], found[2]) == (decision, release)
    assert found[1]


def test_gpu_memory_is_told_by_unit_and_by_stray_process():
    gpus = [
        {"gpu": "0", "pid": 7, "name": "python3", "unit": "torchrun-train.service", "used_mib": 2048},
        {"gpu": "1", "pid": 8, "name": "python3", "unit": "torchrun-train.service", "used_mib": 1024},
        {"gpu": "1", "pid": 9, "name": "jupyter", "unit": "", "used_mib": 512},
    ]
    assert job_state.gpu_holders({"gpus": gpus}) == "torchrun-train 3.0 GiB, jupyter (pid 9) 0.5 GiB"
    assert job_state.gpu_holders({}) == "-"


def test_the_firewall_column():
    assert job_state.firewall_word(None) == "-"
    assert job_state.firewall_word({"intact": True}) == "intact"
    assert job_state.firewall_word({"intact": False, "text": "the table is gone"}) == "the table is gone"


def test_every_row_has_a_cell_for_each_column():
    info = {"unit": "active", "since": 1.0, "state": {"state": "running", "generation": 3}, "step": "[rank 0] step 5", "step_time": 5.0}
    rows = job_state.status_rows({"n1": info, "n2": {"error": "no answer"}}, ["n1", "n2"], 10.0)
    assert {len(row) for row in rows} == {len(job_state.STATUS_HEADER)}
    assert rows[0][6:8] == ("step 5", "5 s")


def test_the_firewall_modules_answer_in_the_status():
    assert job_state.firewall({}) is None
    assert job_state.firewall({"failed": True, "msg": "unreachable"}) is None
    good = job_state.firewall({"backend": "ufw", "in_sync": True, "differences": []})
    assert good == {"intact": True, "text": "", "backend": "ufw", "differences": []}
    bad = job_state.firewall({"backend": "ufw", "in_sync": False, "differences": ["The ipset a is missing."]})
    refused = job_state.firewall({"failed": True, "problems": ["firewalld and ufw are both active; disable one of them."]})
    infos = {"n1": {"firewall": good}, "n2": {"firewall": bad}, "n3": {"firewall": refused}, "n4": {"firewall": None}, "n5": {}}
    assert job_state.firewall_lines(infos, list(infos)) == [
        "n2: its firewall does not hold what it should (The ipset a is missing.); run train.yml or provision.yml",
        "n3: its firewall does not hold what it should (firewalld and ufw are both active; disable one of them.); run train.yml or provision.yml",
    ]
