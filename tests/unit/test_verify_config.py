"""Settings of a verification, whether one is needed, and where verdicts are kept."""

from __future__ import annotations

import json
import pathlib

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import baseline, verify_config, verify_decision
from ansible_collections.onprem.torch.plugins.plugin_utils import verify_store
from builders import host, node
from hypothesis import given
from hypothesis import strategies as st

NO_GPUS, GPUS = {"n1": 0, "n2": 0}, {"n1": 8, "n2": 8}


def sentences(gpus=None, **values):
    return [problem.sentence() for problem in verify_config.read(values, NO_GPUS if gpus is None else gpus)[1]]


def test_the_defaults_are_fine_and_auto_follows_the_gpus():
    settings, problems = verify_config.read({}, NO_GPUS)
    assert problems == [] and settings.backend == "gloo" and settings.size_min == 8 and settings.minimum is None
    assert verify_config.read({}, GPUS)[0].backend == "nccl"
    assert verify_config.read({}, {"n1": 8, "n2": 0})[0].backend == "gloo"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"dtype": "float33"},
            "nccl_verify_dtype is 'float33', but one of float64, float32, float16, bfloat16, int64, int32, int8, uint8 was expected; "
            "set one of them, such as float32.",
        ),
        ({"size_min": "many"}, "nccl_verify_size_min is 'many', which is no size; write bytes such as 8, or 64K, 128M, 4G."),
        (
            {"size_min": "1M", "size_max": "64K"},
            "nccl_verify_size_min is 1048576 bytes, which is above nccl_verify_size_max, 65536 bytes; swap or correct them.",
        ),
        (
            {"size_max": "65537"},
            "nccl_verify_size_max is 65537 bytes, which is no multiple of 4, the bytes of one float32; set it to 65536.",
        ),
        (
            {"size_min": "4", "dtype": "float64"},
            "nccl_verify_size_min is 4 bytes, but one float64 already takes 8; set nccl_verify_size_min to 8 or more.",
        ),
        ({"size_factor": 1}, "nccl_verify_size_factor is 1, but a whole number of times from 2 was expected; set it to 2 or so."),
        ({"iterations": "x"}, "nccl_verify_iterations is 'x', but a whole number of calls from 1 was expected; set it to 20 or so."),
        ({"pair_size": "6"}, "nccl_verify_pair_size is 6 bytes, but a multiple of 4 was expected; set it to 4."),
        (
            {"minimum_gbytes_per_second": "-1"},
            "nccl_verify_minimum_gbytes_per_second is '-1', but auto or a positive number of GB/s was expected; "
            "set auto to derive it from the hardware.",
        ),
        (
            {"pairwise": "maybe"},
            "nccl_verify_pairwise is 'maybe', but one of auto, always, never was expected; set one of them, such as auto.",
        ),
    ],
)
def test_each_bad_value_is_one_sentence(values, sentence):
    assert sentences(**values) == [sentence]


def test_nccl_without_a_gpu_names_the_host():
    assert sentences({"n1": 8, "n2": 0}, backend="nccl") == [
        "n2: nccl_verify_backend is nccl, but the node has no usable GPU; set it to auto or gloo, or see nvidia-smi there."
    ]


def test_the_plan_names_the_settings_problems_of_all_hosts():
    hosts = [host("n1", 1, node(1), nccl_verify_interface="eth0"), host("n2", 2, node(2), nccl_verify_interface="eth0")]
    assert verify_config.problems_of(hosts) == []
    hosts[1].node["interfaces"].pop()
    assert [problem.sentence() for problem in verify_config.problems_of(hosts)] == [
        "n2: nccl_verify_interface is 'eth0', but the node's interfaces are none; set nccl_verify_interface for this host to one of them."
    ]


VALUES = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4) | st.lists(st.integers(), max_size=2)


@given(st.dictionaries(st.sampled_from(sorted(verify_config.Settings.__dataclass_fields__)), VALUES))
def test_no_value_raises_and_every_sentence_says_what_to_do(values):
    settings, problems = verify_config.read(values, NO_GPUS)
    assert settings.backend in ("nccl", "gloo")
    for problem in problems:
        assert problem.variable.startswith("nccl_verify_") and problem.cure and "\n" not in problem.sentence()


def test_ports_lie_in_every_node_s_range_and_are_the_same_for_all():
    ports = verify_config.ephemeral([(32768, 60999), (50000, 50003)], {50001}, "token")
    assert sorted(ports) == [50000, 50002, 50003]
    assert ports == verify_config.ephemeral([(50000, 50003), (32768, 60999)], {50001}, "token")
    assert verify_config.ephemeral([(32768, 40000), (50000, 50003)], set(), "token") == []


def test_settings_that_move_the_figures_are_another_fingerprint_and_others_are_not():
    def fingerprint(**values):
        return verify_config.fingerprint("cluster", verify_config.read(values, NO_GPUS)[0])

    assert fingerprint() == fingerprint(iterations=5) == fingerprint(timeout=99) == fingerprint(minimum_gbytes_per_second=3)
    assert len({fingerprint(), fingerprint(size_max="1M"), fingerprint(dtype="int8"), fingerprint(environment={"NCCL_ALGO": "Ring"})}) == 4


# Whether a verification is needed

NOW = 1_000_000_000.0


def run(verdict="pass", days=1.0):
    return {"time": NOW - days * 86400, "verdict": verdict}


@pytest.mark.parametrize(
    ("arguments", "decision", "words"),
    [
        (("auto", [], {}), "verify", "has not been verified yet"),
        (("auto", [run()], {}), "skip", "verified 24 h ago with the same nodes, hardware and versions: pass"),
        (("auto", [run("warn", 0.01)], {}), "skip", "14 min ago"),
        (("auto", [run("fail")], {}), "verify", "the last verification failed"),
        (("auto", [run("fail"), run()], {}), "skip", "pass"),
        (("auto", [run(days=31)], {}), "verify", "31 days old"),
        (("auto", [], {"n1": "llama"}), "skip", "the job llama runs on n1"),
        (("always", [run()], {}), "verify", ""),
        (("always", [run()], {"n1": "llama"}), "refuse", "stop it first (playbooks/stop.yml)"),
        (("never", [], {}), "skip", "nccl_verify_when"),
    ],
)
def test_decisions(arguments, decision, words):
    when, runs, active = arguments
    found, sentence = verify_decision.decide(when, runs, NOW, 30, active)
    assert found == decision and words in sentence


def test_a_finished_job_is_not_verified_again_by_itself():
    assert verify_decision.decide("auto", [], NOW, 30, {}, finished=True)[0] == "skip"
    assert verify_decision.decide("always", [], NOW, 30, {}, finished=True)[0] == "verify"


# Where verdicts are kept


def test_the_store_keeps_history_and_reports_and_drops_the_oldest(tmp_path: pathlib.Path):
    store = verify_store.Store(str(tmp_path), "abc")
    assert store.history() == []
    for number in range(baseline.KEPT_RUNS + 3):
        files = store.keep({"time": 1000.0 + number, "verdict": "pass"}, {"number": number}, f"<p>{number}")
    assert len(store.history()) == baseline.KEPT_RUNS
    assert len(list((tmp_path / "abc").glob("*.html"))) == baseline.KEPT_RUNS
    assert json.loads((tmp_path / "latest.json").read_text())["number"] == baseline.KEPT_RUNS + 2
    assert (tmp_path / "latest.html").resolve() == pathlib.Path(files["html"])


@pytest.mark.parametrize("text", ["", "{", "{}", "[1, 2]"])
def test_a_history_that_was_spoilt_counts_as_none(tmp_path, text):
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "history.json").write_text(text)
    assert verify_store.Store(str(tmp_path), "abc").history() == []


def test_the_folder_is_beside_the_inventory_unless_another_is_named(tmp_path):
    assert verify_store.folder_of("", {"inventory_dir": "/etc/cluster"}) == "/etc/cluster/.state/verify"
    assert verify_store.folder_of(str(tmp_path), {"inventory_dir": "/etc/cluster"}) == str(tmp_path)
