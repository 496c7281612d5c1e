# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A verification on one screen of a terminal."""

from __future__ import annotations

import textwrap
import typing as t

WIDTH = 110
# A terminal has 24 lines at least: what does not fit is in the report.
MOST_FAILURES = 6
MOST_CULPRITS = 5
MOST_WARNINGS = 3
WORDS = {"pass": "PASS", "warn": "WARNING", "fail": "FAIL"}
MARKS = {"pass": "ok", "fail": "FAIL", "warn": "low", "unknown": "?", "none": "-"}


def size_text(size: int) -> str:
    """Return bytes as nccl-tests' options write them."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size} B"


def wrapped(mark: str, text: str) -> list[str]:
    """Return a paragraph with a mark before its first line."""
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {mark:<5} ", subsequent_indent=" " * 8)


def capped(mark: str, texts: t.Sequence[str], most: int) -> list[str]:
    """Return paragraphs, at most some of them and the number of the others."""
    lines = [line for text in texts[:most] for line in wrapped(mark, text)]
    return lines + ([f"  {mark:<5} … and {len(texts) - most} more in the report"] if len(texts) > most else [])


def screen(report: t.Mapping[str, t.Any], files: t.Mapping[str, str]) -> list[str]:
    """Return the lines that a person sees after a verification."""
    lines = textwrap.wrap(f"VERIFIED: {WORDS[report['verdict']]}. {report['headline']}", WIDTH)
    # The headline says the first of them already.
    failures = [text for text in report["failures"] if not report["headline"].endswith(text)]
    lines += capped("FAIL", failures, MOST_FAILURES)
    evidence = [entry["evidence"] for entry in report["culprits"] if not report["headline"].endswith(entry["evidence"])]
    lines += capped("slow", evidence, MOST_CULPRITS)
    for entry in report["answers"]:
        if entry["status"] != "none":
            lines += wrapped(MARKS[entry["status"]], entry["sentence"])
    lines += capped("note", report["warnings"], MOST_WARNINGS)
    if report.get("latency"):
        lines += wrapped("", details(report))
    seconds = report["seconds"]
    spent = [f"{name} {value:.1f} s" for name, value in seconds.items() if value and name != "all"]
    lines.append(f"  {'':<5} {seconds['all']:.0f} s ({', '.join(spent)}); report: {files.get('html') or files.get('json', '')}")
    return lines


def details(report: t.Mapping[str, t.Any]) -> str:
    """Return latency, correctness, transport and versions in one sentence."""
    latency, check = report["latency"], report["correctness"]
    words = [f"{size_text(latency['size'])} in {latency['seconds'] * 1e6:.1f} us"]
    if latency.get("graph_seconds"):
        words.append(f"{latency['graph_seconds'] * 1e6:.1f} us from a CUDA graph")
    exact = "every element exact" if not check["nwrong"] else f"{check['nwrong']} wrong elements"
    words.append(f"{exact} in {check['repeats']} × {size_text(check['size'])}")
    kinds = (report.get("transport") or {}).get("kinds") or {}
    if kinds:
        words.append("transport " + ", ".join(f"{kind} ({count} pairs)" for kind, count in sorted(kinds.items())))
    version = next(iter(report["versions"].values()), {})
    names = [f"{name} {version[key]}" for key, name in (("torch", "torch"), ("nccl", "NCCL"), ("driver", "driver")) if version.get(key)]
    return "; ".join([*words, ", ".join(names)])
