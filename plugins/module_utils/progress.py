# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One look at rank 0's unit with a plain shell command, and what it means."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, journal
from ansible_collections.onprem.torch.plugins.module_utils.journal import Look


def command(job: t.Mapping[str, t.Any], cursor: str) -> str:
    """Return a shell command that looks at rank 0's unit once."""
    return journal.command(job["unit"], job["root"], cursor, checkpoints=(job["checkpoint_dir"], job["checkpoint_glob"]))


def obstacles(states: t.Mapping[str, str | None]) -> list[str]:
    """Return what keeps nodes from taking part, a sentence each: what a supervisor cannot tell rank 0 it cannot reach.

    Args:
        states: host to what ``journal.state_command`` printed there; None or anything else where it has no state.
    """
    found = []
    for host, text in states.items():
        state, odd = journal.parse_state(text or "")
        node = state.get("node") or {}
        if odd:
            found.append(f"{host}: {odd}")
        if node.get("connected") is False and state.get("state") == "waiting":
            found.append(f"{host}: {state.get('text')}")
        found += [f"{host}: {sentence}" for sentence in node.get("blocked") or []]
    return found


def outcome(look: Look) -> str:
    """Return ``finished``, ``failed``, ``stopped``, ``running`` or, for a unit that does not run, ``unknown``."""
    state = str(look.state.get("state") or "")
    if look.active in ("active", "activating", "reloading", "deactivating"):
        return "running"
    if look.active == "failed" or state == "failed":
        return "failed"
    if state == "done":
        return "finished"
    return "unknown" if look.odd else "stopped"


def cause_sentence(job: t.Mapping[str, t.Any], look: Look) -> str:
    """Return why the job failed: node, rank and first error, as the supervisors agree on them."""
    cause = " ".join(str((look.state.get("first_cause") or {}).get("text") or "").split())
    if cause:
        return f"the job {job['name']} failed first on {cause[:600]}"
    reason = look.odd or str(look.state.get("text") or "") or f"its unit ended with {look.result or 'an unknown result'}"
    return f"the job {job['name']} failed: {reason[:600]}"


def ending(job: t.Mapping[str, t.Any], outcome_: str, look: Look) -> str:
    """Return how the job has ended, as a sentence."""
    if outcome_ == "failed":
        return f"{cause_sentence(job, look)}; logs are in {job['log_dir']} of each node"
    if outcome_ == "stopped":
        return f"the job {job['name']} was stopped before it finished; start it again"
    if outcome_ == "finished":
        return f"the job {job['name']} has finished"
    if look.odd:
        return f"the job {job['name']} does not run, and how it has ended is not known: {look.odd}"
    return f"the job {job['name']} may run on, but its node with rank 0 does not answer"


def last_step(lines: t.Sequence[str], pattern: str) -> str:
    """Return the last line that tells of a training step, or an empty string."""
    return next((line.strip() for line, is_step in zip(reversed(lines), reversed(hostile_input.search(pattern, lines))) if is_step), "")


def summary(job: t.Mapping[str, t.Any], host: str, found: t.Mapping[str, t.Any]) -> list[str]:
    """Return what a person wants to know when the following ends."""
    lines = [str(found["msg"])]
    last = str(found.get("last_line") or found.get("last_step") or "")
    if last:
        lines.append(f"  last words   {last.partition('] ')[2] if last.startswith('[rank ') else last}")
    lines.append(f"  checkpoint   {host}:{found.get('checkpoint') or job['checkpoint_dir'] + ' (none yet)'}")
    lines.append(f"  logs         {job['log_dir']} on each node, and journalctl --unit {job['unit']}")
    return lines
