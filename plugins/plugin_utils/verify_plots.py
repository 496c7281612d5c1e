# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plots of a verification's report, drawn by matplotlib as SVG that stands inside a page."""

from __future__ import annotations

import io
import math
import re
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.verify_text import size_text

COLOURS = {"pass": "#1a7f37", "warn": "#9a6700", "fail": "#cf222e"}
INK, LINE = "#24292f", "#0b5cad"
# Beyond so many nodes the numbers in the heat map's cells could not be read.
MOST_NUMBERED = 16


class NoPlots(Exception):
    """matplotlib is not there; the text is the sentence for the user."""


def figure(width: float, height: float, salt: str) -> tuple[t.Any, t.Any]:
    """Return a figure and its axes, without any window or display.

    Args:
        width, height: size in inches.
        salt: makes the identifiers of one plot differ from those of the others on the page.

    Raises:
        NoPlots: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots("the plots are left out, since matplotlib is not installed on the control node; pip install matplotlib") from error
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 10}
    matplotlib.rcParams.update({**settings, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#8c959f"})
    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def svg(made: t.Any, title: str) -> str:
    """Return a figure as an SVG element that a screen reader can name."""
    stream = io.StringIO()
    made.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def curve(report: t.Mapping[str, t.Any]) -> str:
    """Return bus bandwidth over message size, with the plateau and what was expected."""
    rows = [(row["size"], row["in_place"]["bus_bw"]) for row in report["nccl_tests"]["results"]]
    needed = next((entry["minimum"] for entry in report["answers"] if entry["name"] == "application"), None)
    made, axes = figure(9.4, 3.4, "curve")
    axes.plot([size for size, _value in rows], [value for _size, value in rows], color=LINE, marker="o", markersize=4, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0, top=max(needed or 0.0, *(value for _size, value in rows)) * 1.15 or 1.0)
    ticks = [size for size, _value in rows][:: max(1, len(rows) // 8)]
    axes.set_xticks(ticks, [size_text(size) for size in ticks])
    axes.minorticks_off()
    plateau = report["plateau"]
    axes.axhline(plateau["gbytes_per_second"], color=LINE, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"plateau {plateau['gbytes_per_second']:.3g} GB/s",
        (rows[0][0], plateau["gbytes_per_second"]),
        xytext=(0, 4),
        textcoords="offset points",
        color=LINE,
    )
    if needed:
        axes.axhline(needed, color=COLOURS["fail"], linewidth=1, linestyle="--")
        axes.annotate(f"needed {needed:.3g} GB/s", (rows[-1][0], needed), xytext=(0, 4), textcoords="offset points", ha="right", color=COLOURS["fail"])
    axes.set_xlabel("message size")
    axes.set_ylabel("bus bandwidth (GB/s)")
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    return svg(made, "bus bandwidth over message size")


def heat_map(names: t.Sequence[str], pairs: t.Sequence[tuple[str, str, float]]) -> str:
    """Return the bandwidth of each direction of each pair: senders down, receivers across.

    Args:
        names: rows and columns, in order.
        pairs: source, target and GB/s; the least counts where a pair comes more than once.
    """
    values: dict[tuple[str, str], float] = {}
    for source, target, value in pairs:
        values[(source, target)] = min(value, values.get((source, target), value))
    grid = [[values.get((source, target), float("nan")) for target in names] for source in names]
    side = min(9.0, max(3.2, 0.62 * len(names) + 1.6))
    made, axes = figure(side + 1.2, side, "heat")
    best = max(values.values())
    image = axes.imshow(grid, cmap="RdYlBu", vmin=0, vmax=best, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("receives")
    axes.set_ylabel("sends")
    axes.spines[:].set_visible(False)
    if len(names) <= MOST_NUMBERED:
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    dark = value < 0.2 * best or value > 0.85 * best
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=9, color="white" if dark else INK)
    made.colorbar(image, ax=axes, label="GB/s", shrink=0.8)
    return svg(made, "bandwidth of each pair")


def history(report: t.Mapping[str, t.Any]) -> str:
    """Return the all-reduce's bus bandwidth of all runs of this cluster, this one last."""
    runs = [*report["history"], {key: report[key] for key in ("time", "verdict", "figures")}]
    runs = [run for run in runs if (run.get("figures") or {}).get("application")]
    made, axes = figure(9.4, 2.6, "history")
    values = [run["figures"]["application"] for run in runs]
    axes.plot(range(len(runs)), values, color="#8c959f", linewidth=1)
    for index, run in enumerate(runs):
        axes.plot(index, values[index], marker="o", markersize=7, color=COLOURS[run["verdict"]], linestyle="none")
    least = next((entry["baseline_minimum"] for entry in report["answers"] if entry["name"] == "application"), None)
    if least:
        axes.axhline(least, color=COLOURS["fail"], linewidth=1, linestyle="--")
        axes.annotate(f"baseline needs {least:.3g} GB/s", (0, least), xytext=(0, -12), textcoords="offset points", color=COLOURS["fail"])
    axes.set_ylim(bottom=0, top=max(values) * 1.2)
    ticks = list(range(0, len(runs), max(1, len(runs) // 6)))
    axes.set_xticks(ticks, [time.strftime("%d %b\n%H:%M", time.gmtime(runs[index]["time"])) for index in ticks])
    axes.set_ylabel("GB/s")
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    return svg(made, "bus bandwidth of all runs")
