# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the same cluster reached before: the median of earlier runs and how far a run may fall below it."""

from __future__ import annotations

import statistics
import typing as t
from dataclasses import dataclass

NEEDED_RUNS = 5
LEAST_DROP = 0.05
DEVIATIONS = 4.0
KEPT_RUNS = 50


@dataclass(frozen=True)
class Baseline:
    """The earlier runs of one figure.

    Attributes:
        runs: how many there are.
        median: GB/s; None without runs.
        deviation: median absolute deviation from the median, in GB/s.
        minimum: GB/s below which a run fails; None before there are enough runs.
    """

    runs: int
    median: float | None
    deviation: float
    minimum: float | None

    def sentence(self) -> str:
        """Return the arithmetic as one sentence."""
        if self.median is None:
            return "no earlier run"
        if self.minimum is None:
            return f"median of {self.runs} earlier run{'s' if self.runs > 1 else ''}: {self.median:.3g} GB/s; judged from {NEEDED_RUNS} on"
        return (
            f"median of {self.runs} earlier runs {self.median:.3g} GB/s less the larger of {LEAST_DROP:.0%} and "
            f"{DEVIATIONS:g} x {self.deviation:.3g} GB/s (median absolute deviation) = {self.minimum:.3g} GB/s"
        )


def of(values: t.Sequence[float]) -> Baseline:
    """Return the baseline of the figures of earlier runs (GB/s)."""
    values = list(values)[-KEPT_RUNS:]
    if not values:
        return Baseline(0, None, 0.0, None)
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    if len(values) < NEEDED_RUNS:
        return Baseline(len(values), median, deviation, None)
    return Baseline(len(values), median, deviation, median - max(LEAST_DROP * median, DEVIATIONS * deviation))
