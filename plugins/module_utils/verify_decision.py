# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a cluster is to be verified: never beside a job, and not again while a verdict counts."""

from __future__ import annotations

import typing as t

DAY = 86400.0


def decide(
    when: str,
    runs: t.Sequence[t.Mapping[str, t.Any]],
    now: float,
    valid_days: float,
    active: t.Mapping[str, str],
    finished: bool = False,
) -> tuple[str, str]:
    """Return ``verify``, ``skip`` or ``refuse``, and a sentence.

    Args:
        when: auto, always or never.
        runs: the earlier runs of this fingerprint, oldest first, with C(time) and C(verdict).
        now: seconds since the epoch.
        valid_days: days for which a verdict counts.
        active: jobs that run, by host.
        finished: whether the release that would be started has finished already.
    """
    if when == "never":
        return "skip", "not verified, as nccl_verify_when says"
    if active:
        host, job = next(iter(active.items()))
        text = f"the job {job} runs on {host}"
        if when == "always":
            return "refuse", f"{text}, and a measurement would disturb it and be disturbed; stop it first (playbooks/stop.yml)"
        return "skip", f"not verified, since {text}"
    if when == "always":
        return "verify", "the cluster is verified"
    if finished:
        return "skip", "not verified, since the job has finished already"
    if not runs:
        return "verify", "this cluster has not been verified yet (nodes, hardware or versions are new)"
    last = runs[-1]
    days = (now - float(last["time"])) / DAY
    if last["verdict"] == "fail":
        return "verify", "the last verification failed, so the cluster is verified again"
    if days > valid_days:
        return "verify", f"the last verdict is {days:.0f} days old, so the cluster is verified again"
    return "skip", f"verified {age(days)} ago with the same nodes, hardware and versions: {last['verdict']}"


def age(days: float) -> str:
    """Return days as a person says it."""
    if days >= 2:
        return f"{days:.0f} days"
    hours = days * 24
    return f"{hours:.0f} h" if hours >= 2 else f"{max(0.0, hours * 60):.0f} min"
