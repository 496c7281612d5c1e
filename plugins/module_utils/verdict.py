# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Three separate answers — inside the node, on the wire, the application's all-reduce — that cannot hide each other.

An answer is ``pass``, ``fail``, ``warn`` (below a figure that only warns), ``unknown`` (nothing to judge by) or
``none`` (nothing to measure).
"""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.bandwidth import Expected
from ansible_collections.onprem.torch.plugins.module_utils.baseline import Baseline

TITLES = {"inside": "inside the node", "wire": "on the wire", "application": "the application's all-reduce"}


def answer(
    name: str, measured: float | None, expected: Expected, baseline: Baseline, minimum: float | None = None
) -> dict[str, t.Any]:
    """Judge one figure.

    Args:
        name: inside, wire or application.
        measured: GB/s; None where nothing was measured.
        expected: what the hardware should reach.
        baseline: what the cluster reached before.
        minimum: GB/s that the user demands; it takes the place of the derived one.

    Returns:
        status, measured, expected, minimum, arithmetic, baseline and one sentence.
    """
    result = {
        "name": name,
        "title": TITLES[name],
        "measured": measured,
        "expected": expected.value,
        "minimum": minimum if minimum is not None else expected.minimum,
        "arithmetic": expected.arithmetic if minimum is None else f"nccl_verify_minimum_gbytes_per_second demands {minimum:g} GB/s",
        "baseline": baseline.sentence(),
        "baseline_minimum": baseline.minimum,
    }
    if measured is None:
        return {**result, "status": "none", "sentence": f"{TITLES[name]}: nothing to measure ({expected.arithmetic})"}
    figure = f"{TITLES[name]}: {measured:.3g} GB/s"
    needed = result["minimum"]
    if needed is not None and measured < needed:
        blocks = expected.blocks or minimum is not None
        return {**result, "status": "fail" if blocks else "warn", "sentence": f"{figure}, below {needed:.3g} GB/s ({result['arithmetic']})"}
    if baseline.minimum is not None and measured < baseline.minimum:
        # Where nothing tells what the hardware should reach, its past alone warns: unknown hardware never blocks.
        blocks = needed is not None and (expected.blocks or minimum is not None)
        sentence = f"{figure}, below what this cluster reached before ({baseline.sentence()})"
        return {**result, "status": "fail" if blocks else "warn", "sentence": sentence}
    if needed is not None:
        return {**result, "status": "pass", "sentence": f"{figure}, at least {needed:.3g} GB/s were expected"}
    if baseline.minimum is not None:
        return {**result, "status": "pass", "sentence": f"{figure}, as before ({baseline.sentence()})"}
    return {**result, "status": "unknown", "sentence": f"{figure}; what the hardware should reach is {expected.arithmetic}"}


def overall(answers: t.Iterable[t.Mapping[str, t.Any]], failures: t.Sequence[str], culprits: t.Sequence[t.Any]) -> str:
    """Return the verdict: fail if anything failed, else the most worrying answer.

    Unknown hardware, where nothing could be judged, is a warning: neither a pass nor a block. A node or link that is only
    slower than the others, while every figure is reached or unknown, is a warning too.
    """
    if failures:
        return "fail"
    found = {entry["status"] for entry in answers} | ({"warn"} if culprits else set())
    worst = next((status for status in ("fail", "warn", "pass") if status in found), "")
    return worst or ("warn" if "unknown" in found else "pass")
