# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One look at rank 0's unit with a plain shell command, and what it means."""

from __future__ import annotations

import json
import re
import shlex
import typing as t
from dataclasses import dataclass, field

MARK = "--onprem-torch--"


@dataclass(frozen=True)
class Look:
    """What one look saw.

    Attributes:
        active: ActiveState of the unit.
        result: Result of the unit.
        state: the supervisor's state.
        lines: new lines of the journal.
        cursor: where the next look goes on.
        checkpoint: path of the newest checkpoint, or an empty string.
    """

    active: str
    result: str
    state: dict[str, t.Any]
    lines: list[str] = field(default_factory=list)
    cursor: str = ""
    checkpoint: str = ""


def command(job: t.Mapping[str, t.Any], cursor: str) -> str:
    """Return a shell command that looks once; cheap enough to be run every second.

    Without a pager: Ansible's connection has a terminal where it may have to answer sudo, and the pager's codes would be read.
    """
    unit = shlex.quote(job["unit"])
    journal = f"SYSTEMD_COLORS=0 journalctl --quiet --no-pager --output=cat --show-cursor --unit={unit}"
    if cursor:
        journal += f" --after-cursor={shlex.quote(cursor)}"
    else:
        # The lines since this start of the unit, not those of earlier runs.
        journal += f" _SYSTEMD_INVOCATION_ID=$(systemctl show --no-pager --property=InvocationID --value {unit})"
    checkpoints = f"{shlex.quote(job['checkpoint_dir'])}/{job['checkpoint_glob']}"
    return "; ".join(
        [
            f"systemctl show --no-pager --property=ActiveState --property=Result {unit}",
            f"echo {MARK}",
            f"{state_command(job)} 2>/dev/null",  # a job that was never started has none
            f"echo {MARK}",
            f"ls -1t {checkpoints} 2>/dev/null | head -n 1",
            f"echo {MARK}",
            journal,
        ]
    )


def parse(output: str) -> Look:
    """Return what the command's output says."""
    show, state_text, checkpoint, journal = (part.strip("\r\n") for part in output.split(MARK, 3))
    fields = dict(line.strip().split("=", 1) for line in show.splitlines() if "=" in line)
    try:
        state = json.loads(state_text) if state_text.strip() else {}
    except ValueError:
        state = {}
    lines = journal.splitlines()
    cursor = ""
    if lines and lines[-1].startswith("-- cursor: "):
        cursor = lines.pop()[len("-- cursor: ") :].strip()
    return Look(fields.get("ActiveState", ""), fields.get("Result", ""), state, lines, cursor, checkpoint.strip())


def state_command(job: t.Mapping[str, t.Any]) -> str:
    """Return a shell command that prints what a node's supervisor knows."""
    return f"cat {shlex.quote(job['root'] + '/state/state.json')}"


def obstacles(states: t.Mapping[str, str | None]) -> list[str]:
    """Return what keeps nodes from taking part, a sentence each: what a supervisor cannot tell rank 0 it cannot reach.

    Args:
        states: host to the text of its state.json; None or anything else where it has none.
    """
    found = []
    for host, text in states.items():
        try:
            state = json.loads(text or "")
            node = state["node"]
        except (ValueError, KeyError, TypeError):
            continue
        if not node.get("connected") and state.get("state") == "waiting":
            found.append(f"{host}: {state.get('text')}")
        found += [f"{host}: {sentence}" for sentence in node.get("blocked") or []]
    return found


def outcome(look: Look) -> str:
    """Return ``finished``, ``failed``, ``stopped`` or ``running``."""
    state = str(look.state.get("state") or "")
    if look.active in ("active", "activating", "reloading", "deactivating"):
        return "running"
    if look.active == "failed" or state == "failed":
        return "failed"
    if state == "done":
        return "finished"
    return "stopped"


def cause_sentence(job: t.Mapping[str, t.Any], look: Look) -> str:
    """Return why the job failed: node, rank and first error, as the supervisors agree on them."""
    cause = " ".join(str((look.state.get("first_cause") or {}).get("text") or "").split())
    if cause:
        return f"the job {job['name']} failed first on {cause[:600]}"
    reason = str(look.state.get("text") or "") or f"its unit ended with {look.result or 'an unknown result'}"
    return f"the job {job['name']} failed: {reason[:600]}"


def ending(job: t.Mapping[str, t.Any], outcome_: str, look: Look) -> str:
    """Return how the job has ended, as a sentence."""
    if outcome_ == "failed":
        return f"{cause_sentence(job, look)}; logs are in {job['log_dir']} of each node"
    if outcome_ == "stopped":
        return f"the job {job['name']} was stopped before it finished; start it again"
    if outcome_ == "finished":
        return f"the job {job['name']} has finished"
    return f"the job {job['name']} may run on, but its node with rank 0 does not answer"


def is_step(line: str, pattern: str) -> bool:
    """Return whether a line tells of a training step."""
    return bool(pattern and re.search(pattern, line))


def summary(job: t.Mapping[str, t.Any], host: str, found: t.Mapping[str, t.Any]) -> list[str]:
    """Return what a person wants to know when the following ends."""
    lines = [str(found["msg"])]
    last = str(found.get("last_line") or found.get("last_step") or "")
    if last:
        lines.append(f"  last words   {last.partition('] ')[2] if last.startswith('[rank ') else last}")
    lines.append(f"  checkpoint   {host}:{found.get('checkpoint') or job['checkpoint_dir'] + ' (none yet)'}")
    lines.append(f"  logs         {job['log_dir']} on each node, and journalctl --unit {job['unit']}")
    return lines
