"""The report: every fault that nodes can bring back is named once, with the right host; healthy hosts are not accused."""

from __future__ import annotations

import html.parser
import re

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import verify_result, verify_text
from ansible_collections.onprem.torch.plugins.plugin_utils import verify_page, verify_plots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verify_results import H100, IB, Run


def assess(run, measured=True, runs=()):
    return verify_result.assess(run.verification(), run.collected(measured), list(runs), 1000.0)


def earlier(value, count=5, **changes):
    return [{"time": 1.0 + number, "verdict": "pass", "figures": {"application": value, "wire": value}, **changes} for number in range(count)]


def named(report):
    return sorted((entry["kind"], entry["host"], entry["peer"]) for entry in report["culprits"])


def broken(run, outcome, **changes):
    for host in run.order:
        run.results[host].update(outcome=outcome, **changes)


def test_unknown_hardware_is_a_warning_and_accuses_nobody():
    report = assess(Run())
    assert report["verdict"] == "warn" and not report["culprits"] and not report["failures"]
    assert {entry["status"] for entry in report["answers"]} == {"none", "unknown"}


@pytest.mark.parametrize("gpu", [None, H100])
def test_one_process_has_nothing_to_measure(gpu):
    run = Run(1, 1, gpu, minimum=5.0)
    run.bus = 58707.0
    report = assess(run)
    assert {entry["status"] for entry in report["answers"]} == {"none"} and report["figures"]["application"] is None
    assert report["verdict"] == "pass" and "nobody to exchange with" in report["headline"]


def inside(run, speed):
    """The report of one node whose devices reach each other with speed(one, other) GB/s."""
    pairs = [
        {"source": one, "target": two, "gbytes_per_second": speed(one, two), "median_gbytes_per_second": speed(one, two)}
        for one in range(run.nproc)
        for two in range(run.nproc)
        if one != two
    ]
    collected = run.collected()
    collected["n0"]["result"]["measured"]["inside_pairs"] = {"size": 1 << 20, "rounds": 7, "confirmed": 0, "seconds": 1.0, "pairs": pairs}
    return verify_result.assess(run.verification(), collected, [], 1000.0)


# Every device of eight has fast links to four others.
MESH = {frozenset((base + one, base + two)) for base in (0, 4) for one in range(4) for two in range(one)}
MESH |= {frozenset((one, one + 4)) for one in range(4)}


@pytest.mark.parametrize("fast", [MESH, {frozenset((0, 1)), frozenset((2, 3)), frozenset((4, 5)), frozenset((6, 7))}])
def test_devices_that_are_wired_unevenly_are_told_of_their_node_unless_it_passed(fast):
    run = Run(1, 8)
    report = inside(run, lambda one, two: 22.0 if frozenset((one, two)) in fast else 8.0)
    assert named(report) == [("network", "n0", None)]
    assert "nvidia-smi topo -m" in report["culprits"][0]["evidence"]
    passed = Run(1, 8, H100)
    passed.bus = 800.0
    report = inside(passed, lambda one, two: 22.0 if frozenset((one, two)) in fast else 8.0)
    assert report["verdict"] == "pass" and not report["culprits"]


@pytest.mark.parametrize("nproc", [2, 8])
def test_a_slow_link_inside_a_node_is_named_by_its_devices(nproc):
    report = inside(Run(1, nproc), lambda one, two: 20.0 if (one, two) == (0, 1) else 100.0)
    assert [entry["evidence"] for entry in report["culprits"]] == [
        "device 0 of n0 sends 20 GB/s to device 1 of n0, while 100 GB/s is reached between devices of that node"
    ]


def test_known_hardware_passes_with_its_arithmetic():
    run = Run(2, 8, H100, IB)
    run.speed, run.bus = 45.0, 44.0
    report = assess(run)
    assert report["verdict"] == "pass", report["headline"]
    assert "18 NVLinks x 20.6 GB/s" in report["answers"][0]["arithmetic"]
    assert "400000 Mb/s / 8000" in report["answers"][1]["arithmetic"]


def test_a_number_judges_where_the_hardware_is_unknown():
    run = Run(minimum=2.0)
    assert assess(run)["verdict"] == "fail"
    run.bus = 3.0
    assert assess(run)["verdict"] == "pass"


def test_a_slow_node_fails_with_a_minimum_and_only_warns_without():
    run = Run(minimum=0.9)
    run.bus, run.slow = 0.05, {"n3": 0.05}
    report = assess(run)
    assert report["verdict"] == "fail" and named(report) == [("node", "n3", None)]
    assert "n3" in report["headline"]
    unknown = Run()
    unknown.bus, unknown.slow = 0.05, {"n3": 0.05}
    assert assess(unknown)["verdict"] == "warn" and named(assess(unknown)) == [("node", "n3", None)]


def test_two_slow_nodes_and_a_slow_pair_are_all_named():
    run = Run(minimum=0.9)
    run.bus, run.slow = 0.05, {"n1": 0.05, "n6": 0.1}
    run.slow_links = {("n2", "n4"): 0.1, ("n4", "n2"): 0.1}
    assert named(assess(run)) == [("link", "n2", "n4"), ("node", "n1", None), ("node", "n6", None)]


def test_a_drop_below_the_cluster_s_own_past_fails():
    run = Run(minimum=0.5)
    run.bus = 0.8
    assert assess(run, runs=earlier(1.0))["verdict"] == "fail"
    assert assess(run, runs=earlier(1.0, count=4))["verdict"] == "pass"
    assert assess(run, runs=earlier(1.0, verdict="fail"))["verdict"] == "pass", "runs that failed are no baseline"


def test_a_node_that_lost_power_is_named_and_not_who_noticed():
    run = Run()
    broken(run, "lost", lost="n5", lost_reason="silent")
    run.results["n2"]["lost"] = "n3"  # n3 had noticed, ended and said goodbye before n2 noticed for itself
    run.results["n2"]["lost_reason"] = "lost"
    run.results["n5"] = {}
    run.answers["n5"] = {"error": "it cannot be reached by SSH any more", "unreachable_node": True}
    report = assess(run, measured=False)
    assert report["verdict"] == "fail" and len(report["failures"]) == 1
    assert report["failures"][0].startswith("n5 went away during the measurement")


def test_a_node_without_a_result_is_named_with_its_journal():
    run = Run(2)
    broken(run, "checks", absent=["n1"])
    run.results["n1"] = {}
    run.answers["n1"] = {"journal": "starting\nFailed at step EXEC: No such file\n"}
    report = assess(run, measured=False)
    assert report["failures"] == ["n1 left no result: Failed at step EXEC: No such file; see journalctl -u nccl-verify there"]


def test_a_dropped_port_is_named_once():
    run = Run(4)
    broken(run, "checks")
    for host in ("n0", "n1", "n3"):
        for entry in run.results[host]["preflight"]["connections"]:
            if entry["peer"] == "n2" and entry["port_kind"] == "ephemeral":
                entry.update(result="dropped", port=45678)
    report = assess(run, measured=False)
    assert report["failures"] == [
        "n2 drops TCP from all other nodes to port 45678 (an ephemeral port); look for a firewall's drop rule on n2 or between them"
    ]


def test_another_torch_is_named():
    run = Run(4)
    broken(run, "checks")
    run.results["n1"]["preflight"]["versions"]["torch"] = "2.12.0"
    report = assess(run, measured=False)
    assert report["failures"] == ["n1 has torch 2.12.0, the others have 2.13.0; install the same version on n1"]


def test_the_first_cause_is_named_and_not_its_consequences():
    run = Run(3)
    broken(run, "failed", log="")
    gone = {"rank": 0, "stage": "all-reduce", "type": "RuntimeError", "text": "Connection closed by peer [198.18.0.12]", "time": 1.0}
    run.results["n0"]["errors"] = [gone]
    run.results["n1"]["errors"] = [{"rank": 1, "stage": "all-reduce", "type": "X", "text": "CUDA out of memory. Tried", "time": 2.0}]
    run.results["n2"]["errors"] = [{**gone, "rank": 2}]
    report = assess(run, measured=False)
    assert len(report["failures"]) == 1
    assert report["failures"][0].startswith("n1, rank 1, all-reduce: a GPU has too little free memory")


def test_a_measurement_that_hangs_says_where():
    run = Run(2)
    broken(run, "timeout", stages={"0": "all-reduce of 64 bytes, warm-up"})
    assert "did not end in time on n0, n1 (last stage: all-reduce of 64 bytes, warm-up)" in assess(run, measured=False)["failures"][0]


def test_a_wrong_sum_names_rank_and_chunk():
    run = Run(2, 1, H100, IB)
    measured = run.measured()
    wrong = {"rank": 1, "nwrong": 1, "index": 12345, "got": 3.0, "expected": 2.0, "chunk": 0, "repeat": 0}
    measured["correctness"] = {"size": 1 << 22, "repeats": 3, "nwrong": 2, "wrong": [wrong, {**wrong, "repeat": 1}]}
    run.measured = lambda: measured
    report = assess(run)
    assert report["verdict"] == "fail"
    assert report["failures"][0].startswith("n1 (device 0, rank 1) got a wrong sum in 2 of 3 repetitions: 1 elements, the first at index 12345 (chunk 0)")


def test_a_fall_back_to_sockets_fails_without_any_threshold():
    run = Run(2, 1, H100, IB)
    run.speed = run.bus = 49.0
    run.results["n0"]["nccl_log"] = [" Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0"]
    report = assess(run)
    assert report["verdict"] == "fail" and "NCCL uses TCP sockets between n0 and n1" in report["failures"][0]


def test_the_rows_are_those_of_nccl_tests():
    found = assess(Run(2, 1, H100, IB))["nccl_tests"]
    assert found["version"] == 3 and found["out_of_bounds"] == {"count": 0, "okay": True}
    assert found["average_bus_bandwidth"]["okay"] == "unchecked"
    assert {row["out_of_place"] for row in found["results"]} == {None}


REPORTS = {
    "healthy": lambda: assess(Run(), runs=earlier(1.0, 12)),
    "one node": lambda: assess(Run(1, 2, H100)),
    "slow": lambda: assess(slow()),
    "failed": lambda: assess(failed(), measured=False),
    "32 nodes": lambda: assess(Run(32)),
    "no plots": lambda: assess(Run(3)),
}


def slow():
    run = Run(minimum=0.9)
    run.bus, run.slow = 0.05, {"n1": 0.05}
    return run


def failed():
    run = Run(4)
    broken(run, "checks")
    for host in run.order[1:]:
        run.results[host]["preflight"]["versions"]["torch"] = f"2.{host[1:]}.0<script>"
    return run


class Page(html.parser.HTMLParser):
    """Reads a page strictly enough to find elements that are not closed, and everything that it would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.words, self.images = [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [found[key] for key in ("src", "href", "xlink:href") if key in found and not found[key].startswith(("#", "data:"))]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        self.images += [found.get("aria-label")] if tag == "svg" else []
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br", "img", "link"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def read(text):
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_whole_and_loads_nothing(name, monkeypatch):
    report = REPORTS[name]()
    if name == "no plots":

        def missing(*_arguments):
            raise verify_plots.NoPlots("the plots are left out, since matplotlib is not installed")

        monkeypatch.setattr(verify_plots, "figure", missing)
    text = verify_page.render(report)
    page = read(text)
    assert page.loads == []
    assert not re.search(r"url\((?!#)", text)
    words = " ".join(page.words)
    assert report["headline"] in words
    assert len(text) < 600_000
    wanted = {
        "healthy": ["bus bandwidth over message size", "bandwidth of each pair", "bus bandwidth of all runs"],
        "one node": ["bus bandwidth over message size"],
        "slow": ["bus bandwidth over message size", "bandwidth of each pair"],
        "32 nodes": ["bus bandwidth over message size", "bandwidth of each pair"],
    }
    assert page.images == wanted.get(name, [])
    if name == "no plots":
        assert "matplotlib is not installed" in words


@pytest.mark.parametrize("name", REPORTS)
def test_the_terminal_is_one_screen_that_begins_with_the_verdict(name):
    lines = verify_text.screen(REPORTS[name](), {"html": "/somewhere/report.html"})
    assert lines[0].startswith("VERIFIED: ")
    assert len(lines) <= 24 and max(map(len, lines)) <= 160
    assert "/somewhere/report.html" in lines[-1]


def test_a_screen_that_does_not_fit_counts_the_rest():
    run = Run(40)
    broken(run, "checks")
    for number, host in enumerate(run.order[20:]):
        run.results[host]["preflight"]["versions"]["torch"] = f"2.{number}.1"
    lines = verify_text.screen(assess(run, measured=False), {"html": "x"})
    assert any("more in the report" in line for line in lines) and len(lines) <= 24


NONSENSE = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["preflight", "measured", "errors", "lost", "outcome", "log", "host"]), NONSENSE)
def test_a_result_of_any_shape_is_its_node_s_and_no_crash(key, value):
    """Results are written as the job's user, which may write anything."""
    run = Run(3)
    answers = run.collected()
    answers["n1"]["result"][key] = value

    def judged(given):
        report = verify_result.assess(run.verification(), given, [], 1.0)
        return report, verify_page.render(report), verify_text.screen(report, {})

    report, _page, _screen = verify_result.sound(run.order, answers, judged)
    assert report["verdict"] in ("pass", "warn", "fail")
    assert not any("not what a verifier writes" in sentence and not sentence.startswith("n1 ") for sentence in report["failures"])
