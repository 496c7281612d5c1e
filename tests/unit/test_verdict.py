"""Three answers that cannot hide each other, and the baseline."""

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import baseline, verdict
from ansible_collections.onprem.torch.plugins.module_utils.bandwidth import Expected

KNOWN = Expected(100.0, 90.0, "2 x 50")
UNKNOWN = Expected(None, None, "unknown: host0 reports no speed")
NEW = baseline.of([])


def test_at_and_below_the_minimum():
    assert verdict.answer("wire", 90.0, KNOWN, NEW)["status"] == "pass"
    low = verdict.answer("wire", 89.9, KNOWN, NEW)
    assert low["status"] == "fail" and "2 x 50" in low["sentence"]
    assert verdict.answer("wire", 89.9, Expected(100.0, 90.0, "PCIe", blocks=False), NEW)["status"] == "warn"


def test_unknown_hardware_neither_passes_nor_blocks():
    found = verdict.answer("wire", 5.0, UNKNOWN, NEW)
    assert found["status"] == "unknown" and "host0 reports no speed" in found["sentence"]
    assert verdict.overall([found], [], []) == "warn"


def test_a_demanded_minimum_wins_over_unknown_hardware():
    assert verdict.answer("application", 5.0, UNKNOWN, NEW, minimum=6.0)["status"] == "fail"
    assert verdict.answer("application", 6.0, UNKNOWN, NEW, minimum=6.0)["status"] == "pass"


def test_nothing_measured_is_no_failure():
    assert verdict.answer("inside", None, UNKNOWN, NEW)["status"] == "none"


def test_one_failed_answer_is_not_hidden_by_the_others():
    good = verdict.answer("application", 100.0, KNOWN, NEW)
    bad = verdict.answer("wire", 50.0, KNOWN, NEW)
    assert verdict.overall([good, bad], [], []) == "fail"
    assert verdict.overall([good], ["fell back to sockets"], []) == "fail"
    assert verdict.overall([good], [], []) == "pass"


def test_a_slow_link_warns_where_every_figure_is_reached_and_fails_with_a_figure_that_is_not():
    good = verdict.answer("application", 100.0, KNOWN, NEW)
    assert verdict.overall([good], [], ["a link"]) == "warn"
    assert verdict.overall([verdict.answer("application", 5.0, UNKNOWN, NEW)], [], ["a link"]) == "warn"
    assert verdict.overall([verdict.answer("application", 50.0, KNOWN, NEW)], [], ["a link"]) == "fail"


@pytest.mark.parametrize(
    ("values", "minimum"),
    [
        ([100, 100, 100, 100], None),  # four runs are too few
        ([100, 100, 100, 100, 100], 95.0),  # no spread: 5 %
        ([90, 95, 100, 105, 110], 80.0),  # deviation 5, so 4 x 5
    ],
)
def test_the_baseline(values, minimum):
    assert baseline.of(values).minimum == (None if minimum is None else pytest.approx(minimum))


def test_a_drop_below_the_baseline_fails_though_the_hardware_figure_passes():
    before = baseline.of([100.0] * 5)
    assert verdict.answer("wire", 94.9, KNOWN, before)["status"] == "fail"
    assert verdict.answer("wire", 95.1, KNOWN, before)["status"] == "pass"


def test_a_drop_below_the_baseline_only_warns_where_the_hardware_is_unknown():
    before = baseline.of([100.0] * 5)
    assert verdict.answer("wire", 94.9, UNKNOWN, before)["status"] == "warn"
    assert verdict.answer("wire", 95.1, UNKNOWN, before)["status"] == "pass"


def test_a_figure_that_was_judged_counts_more_than_one_that_could_not_be():
    demanded = verdict.answer("application", 6.0, UNKNOWN, NEW, minimum=5.0)
    assert verdict.overall([demanded, verdict.answer("wire", 5.0, UNKNOWN, NEW)], [], []) == "pass"
