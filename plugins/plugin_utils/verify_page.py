# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a verification as one HTML page that loads nothing: verdict first, then evidence, then everything else."""

from __future__ import annotations

import html
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.verify_text import details, size_text
from ansible_collections.onprem.torch.plugins.plugin_utils import verify_plots

TITLES = {"pass": "Pass", "warn": "Warning", "fail": "Fail"}
WORDS = {"pass": "reached", "fail": "too low", "warn": "low", "unknown": "not judged", "none": "nothing to measure"}
STYLE = """
:root { color: #24292f; background: #fff; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.verdict { border-left: .5rem solid; border-radius: .3rem; padding: .9rem 1.1rem; background: #f6f8fa; }
.verdict p { margin: .3rem 0 0; font-size: 1.05rem; }
.pass { border-color: #1a7f37; } .warn { border-color: #bf8700; } .fail { border-color: #cf222e; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin-top: 1rem; }
.card { border: 1px solid #d0d7de; border-top: .25rem solid #8c959f; border-radius: .3rem; padding: .7rem .9rem; }
.card.pass { border-top-color: #1a7f37; } .card.warn, .card.unknown { border-top-color: #bf8700; } .card.fail { border-top-color: #cf222e; }
.card b { display: block; font-size: 1.5rem; } .card small, .quiet { color: #57606a; }
ul.evidence { padding-left: 1.2rem; } ul.evidence li { margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #d8dee4; vertical-align: top; }
td.number, th.number { text-align: right; } .bad { color: #cf222e; font-weight: 600; } .odd { color: #9a6700; font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } .plots svg { max-width: 100%; height: auto; } details summary { cursor: pointer; }
"""


def text(value: t.Any) -> str:
    """Return a value as text that cannot be taken for HTML."""
    return html.escape(str(value))


def table(header: t.Sequence[str], rows: t.Iterable[t.Sequence[t.Any]], numbers: t.Collection[int] = ()) -> str:
    """Return a table; cells are escaped, and columns in ``numbers`` stand to the right."""

    def line(tag: str, cells: t.Sequence[t.Any]) -> str:
        parts = []
        for index, cell in enumerate(cells):
            kind = ' class="number"' if index in numbers else ""
            parts.append(f"<{tag}{kind}>{text(cell)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def render(report: t.Mapping[str, t.Any]) -> str:
    """Return the page."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report["time"]))
    parts = [
        f'<section class="verdict {report["verdict"]}"><h1>{TITLES[report["verdict"]]}</h1><p>{text(report["headline"])}</p></section>',
        cards(report),
        evidence("What failed", [entry for entry in report["failures"] if not report["headline"].endswith(entry)]),
        evidence("What is slow", [entry["evidence"] for entry in report["culprits"]]),
        evidence("Worth a look", report["warnings"]),
        plots(report),
        checks(report),
        sizes(report),
        nodes(report),
        f'<p class="quiet">Verified {when}; fingerprint {text(report["fingerprint"])}. '
        "What each figure means, and where it comes from: docs/verify.md.</p>",
    ]
    title = f"{TITLES[report['verdict']]}: {len(report['order'])} nodes, {when}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n{''.join(part for part in parts if part)}\n</body></html>\n"
    )


def cards(report: t.Mapping[str, t.Any]) -> str:
    """Return the three answers side by side."""
    found = []
    for entry in report["answers"]:
        figure = "–" if entry["measured"] is None else f"{entry['measured']:.3g} GB/s"
        needed = f"needed {entry['minimum']:.3g} GB/s: " if entry["minimum"] is not None else ""
        found.append(
            f'<div class="card {entry["status"]}"><small>{text(entry["title"])}</small><b>{figure}</b>{WORDS[entry["status"]]}'
            f"<br><small>{text(needed + entry['arithmetic'])}<br>{text(entry['baseline'])}</small></div>"
        )
    return f'<div class="cards">{"".join(found)}</div>' if found else ""


def evidence(title: str, sentences: t.Sequence[str]) -> str:
    """Return a list of sentences under a title."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f'<h2>{title}</h2><ul class="evidence">{items}</ul>' if items else ""


def plots(report: t.Mapping[str, t.Any]) -> str:
    """Return the plots for which there is something to draw."""
    parts = []
    try:
        if report.get("nccl_tests"):
            parts.append(f"<div><h2>All-reduce</h2>{verify_plots.curve(report)}<p class=quiet>{text(details(report))}</p></div>")
        if report["pairs"]:
            pairs = [(entry["source"], entry["target"], entry["gbytes_per_second"]) for entry in report["pairs"]]
            parts.append(f"<div><h2>Node by node</h2>{verify_plots.heat_map(report['order'], pairs)}</div>")
        if report["inside_pairs"]:
            parts.append(f"<div><h2>Inside the nodes</h2>{verify_plots.heat_map(*devices(report))}</div>")
        if report.get("nccl_tests") and report["history"]:
            parts.append(f"<div><h2>Runs of this cluster</h2>{verify_plots.history(report)}</div>")
    except verify_plots.NoPlots as error:
        return f"<p class=quiet>{text(error)}</p>"
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def devices(report: t.Mapping[str, t.Any]) -> tuple[list[str], list[tuple[str, str, float]]]:
    """Return names and bandwidths of the devices inside the nodes."""
    pairs = [
        (f"{entry['source']}:{entry['source_device']}", f"{entry['target']}:{entry['target_device']}", entry["gbytes_per_second"])
        for entry in report["inside_pairs"]
    ]
    return sorted({name for pair in pairs for name in pair[:2]}), pairs


def checks(report: t.Mapping[str, t.Any]) -> str:
    """Return the table of checks: what was looked at, and what was found."""
    rows = []
    for entry in report["checked"]:
        mark = {"fail": '<span class="bad">failed</span>', "warn": '<span class="odd">odd</span>'}.get(entry["status"], text(entry["status"]))
        found = "<br>".join(text(sentence) for sentence in entry["sentences"])
        rows.append(f"<tr><td>{text(entry['title'])}</td><td>{mark}</td><td>{found}</td></tr>")
    return f"<h2>Checks before the measurement</h2><table><tr><th>Check</th><th></th><th></th></tr>{''.join(rows)}</table>"


def sizes(report: t.Mapping[str, t.Any]) -> str:
    """Return the rows of all sizes, folded."""
    if not report.get("nccl_tests"):
        return ""
    rows = []
    for row in report["nccl_tests"]["results"]:
        found = row["in_place"]
        wrong = "not checked" if found["nwrong"] is None else f"{found['nwrong']:.0f}"
        rows.append((size_text(row["size"]), f"{found['time']:.1f}", f"{found['alg_bw']:.3f}", f"{found['bus_bw']:.3f}", wrong))
    header = ("Size", "Time (us)", "Algorithm bandwidth (GB/s)", "Bus bandwidth (GB/s)", "Wrong elements")
    return f"<details><summary><h2 style='display:inline'>All sizes</h2></summary>{table(header, rows, range(1, 5))}</details>"


def nodes(report: t.Mapping[str, t.Any]) -> str:
    """Return the table of nodes with their versions and own figures, folded."""
    rows = []
    for host in report["order"]:
        node, versions = report["nodes"][host], report["versions"].get(host, {})
        own = [report.get(name, {}).get(host) for name in ("inside", "wire")]
        figures = ["–" if value is None else f"{value:.3g}" for value in own]
        rows.append(
            (node["rank"], host, node["address"], node["interface"], node["nproc"], *figures)
            + tuple(versions.get(key) or "–" for key in ("torch", "nccl", "driver", "python"))
        )
    header = ("Rank", "Node", "Address", "Interface", "Processes", "Inside (GB/s)", "Wire (GB/s)", "torch", "NCCL", "Driver", "Python")
    return f"<details><summary><h2 style='display:inline'>Nodes</h2></summary>{table(header, rows, (0, 4, 5, 6))}</details>"
