# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journals of a job's units: one look at a node's, and the merged lines of all."""

from __future__ import annotations

import json
import re
import shlex
import time
import typing as t
from dataclasses import dataclass

MARK = "--onprem-torch--"
# Lines of one look; the next one goes on after them.
AT_MOST = 5000
RANK = re.compile(r"\[rank (\d+)\]")


@dataclass(frozen=True)
class Line:
    """One line of a journal.

    Attributes:
        time: seconds since 1970, by the node's clock.
        host: inventory name of the node.
        text: the line, with the rank that torchrun puts in front where a process of the job wrote it.
    """

    time: float
    host: str
    text: str

    @property
    def rank(self) -> int | None:
        """The global rank that wrote it; None for the supervisor and torchrun itself."""
        found = RANK.match(self.text)
        return int(found.group(1)) if found else None


def ranks(nodes: t.Mapping[str, t.Mapping[str, t.Any]]) -> dict[int, str]:
    """Return which host each global rank runs on, from the plan's nodes."""
    hosts = [node["host"] for node in sorted(nodes.values(), key=lambda node: node["rank"]) for _process in range(node["nproc"])]
    return dict(enumerate(hosts))


def command(unit: str, state_file: str, cursor: str, since: str) -> str:
    """Return a shell command that prints the unit's state, the supervisor's, and the next lines of the journal as JSON.

    Args:
        unit: name of the unit.
        state_file: path of the supervisor's state.json.
        cursor: where the last look ended, empty for the first.
        since: where the first look begins, as journalctl understands it; empty for the unit's last start.
    """
    name = shlex.quote(unit)
    journal = f"journalctl --quiet --no-pager --output=json --output-fields=MESSAGE --unit={name}"
    if cursor:
        journal += f" --after-cursor={shlex.quote(cursor)}"
    elif since:
        journal += f" --since={shlex.quote(since)}"
    else:
        journal += f" _SYSTEMD_INVOCATION_ID=$(systemctl show --no-pager --property=InvocationID --value {name})"
    journal += f" | head -n {AT_MOST}"
    parts = [f"systemctl show --no-pager --property=ActiveState --property=Result {name}", f"cat {shlex.quote(state_file)} 2>/dev/null", journal]
    return f"; echo {MARK}; ".join(parts)


@dataclass(frozen=True)
class Look:
    """What one look at a node saw.

    Attributes:
        active: ActiveState of the unit.
        result: Result of the unit.
        state: the supervisor's state.
        lines: new lines.
        cursor: where the next look goes on; empty where there was no line.
    """

    active: str
    result: str
    state: dict[str, t.Any]
    lines: list[Line]
    cursor: str


def parse(host: str, output: str) -> Look | None:
    """Return what the command's output says, None where it is not whole."""
    parts = output.split(MARK, 2)
    if len(parts) < 3:
        return None
    show = dict(line.strip().split("=", 1) for line in parts[0].splitlines() if "=" in line)
    try:
        state = json.loads(parts[1])
    except ValueError:
        state = {}
    lines, cursor = [], ""
    for text in parts[2].splitlines():
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        cursor = entry["__CURSOR"]
        lines.append(Line(int(entry["__REALTIME_TIMESTAMP"]) / 1e6, host, message(entry.get("MESSAGE"))))
    return Look(show.get("ActiveState", ""), show.get("Result", ""), state, lines, cursor)


def message(value: t.Any) -> str:
    """Return the text of a journal's MESSAGE, which is a list of bytes where it is not plain text."""
    if isinstance(value, list):
        return bytes(value).decode("utf-8", "replace")
    return str(value or "")


def merged(looks: t.Iterable[Look], rank: int | None = None) -> list[Line]:
    """Return the lines of several looks by time; with a rank, only the lines of this one."""
    lines = [line for look in looks for line in look.lines if rank is None or line.rank == rank]
    return sorted(lines, key=lambda line: line.time)


def shown(line: Line, width: int) -> str:
    """Return a line for a person: time, host, and the text that begins with the rank."""
    clock = time.strftime("%H:%M:%S", time.localtime(line.time))
    return f"{clock} {line.host:{width}} {line.text}"
