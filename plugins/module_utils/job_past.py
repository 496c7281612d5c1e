# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node knows of a job's past: its place at the last start, its checkpoints, and those that others had.

    /etc/torchrun/JOB.past.json   who took part in the last start, in the order of their ranks; root's, outlives the folders
    the unit                      the same of this node alone, for jobs that were started before there was such a file; root's
    STATE/state.json              which checkpoints the supervisors have seen on which host; the job can write it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import (
    checkpoint_files,
    environment,
    hostile_input,
    launch,
    looks,
    safe_files,
    supervisor_state,
)

# Newest checkpoints that are told, and bytes of each end of a file that tell it from others.
RECENT = 4
END = 1 << 16
# For the names and the ends of the checkpoints of one folder.
SECONDS = checkpoint_files.SECONDS + 5.0
# What is known where the supervisors have left nothing.
NOTHING: dict[str, t.Any] = {"known": [], "seen": [], "done": ""}


def record_path(job: str, root: str = "/") -> str:
    """Return the path of the record of the last start."""
    return os.path.join(root, launch.SETTINGS.lstrip("/"), f"{job}.past.json")


def read_record(job: str, root: str = "/") -> dict[str, t.Any]:
    """Return the record of the last start: C(host), C(hosts), C(checkpoint_dir), C(checkpoint_glob), C(time), C(accepted), C(ran)."""
    try:
        with open(record_path(job, root), encoding="utf-8") as stream:
            return dict(json.load(stream))
    except (OSError, ValueError):
        return {}


def remember_start(job: str, unit: str, hosts: t.Sequence[str], accepted: bool, ran: bool) -> None:
    """Write down who takes part from now on.

    Args:
        job: its name.
        unit: text of the unit that starts, which tells the node's name and the folder and names of its checkpoints.
        hosts: all that take part, in the order of their ranks.
        accepted: whether a person accepts that checkpoints of before are lost.
        ran: whether the unit has been started, or is about to be.
    """
    options = launch.supervisor_options(unit)
    now, last = time.time(), read_record(job)
    record = {
        "host": options.get("host", ""),
        "hosts": list(hosts),
        "checkpoint_dir": options.get("checkpoint-dir", ""),
        "checkpoint_glob": options.get("checkpoint-glob", ""),
        "time": now,
        "accepted": now if accepted else float(last.get("accepted") or 0),
        "ran": ran or bool(last.get("hosts") and last.get("ran")),
    }
    environment.write_atomically(record_path(job), json.dumps(record) + "\n")


def forget(job: str) -> None:
    """Write down that the job begins anew: what was before binds nobody, on this node or another."""
    now = time.time()
    record = {"host": "", "hosts": [], "checkpoint_dir": "", "checkpoint_glob": "", "time": now, "accepted": now}
    os.makedirs(launch.SETTINGS, exist_ok=True)
    environment.write_atomically(record_path(job), json.dumps(record) + "\n")


def look(job: str, folder: str, pattern: str, who: safe_files.Account | None, root: str = "/") -> dict[str, t.Any]:
    """Return what the node knows. What is root's is told whatever becomes of the looks into the job's folders.

    Args:
        job: its name.
        folder: where the checkpoints are to lie from now on.
        pattern: what they are to be called.
        who: whose rights are used in the job's folders; None for root's.
        root: stands for ``/``.

    Returns:
        ``record`` (see read_record); ``unit`` (``host``, ``rank``, ``nnodes``, ``time``; empty where there is none); ``now``, the
        newest checkpoints in the folder, newest first, each with ``name`` (below the folder), ``time`` and ``digest``;
        ``folder``, ``pattern`` and ``before``: where they lay before and the newest there, where that differs; ``known``: the
        newest one of each host as the supervisors saw it, with ``host``, ``rank`` (-1: not known), ``name`` and ``time``;
        ``seen``: hosts on which they saw any; ``state``: read, missing or odd; ``done``: the release that is finished;
        ``unread``: why some of it is not known, empty where all is.
    """
    unit, text = {}, ""
    path = os.path.join(root, "etc/systemd/system", f"torchrun-{job}.service")
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    options = launch.supervisor_options(text)
    if options.get("node-rank", "").isdigit() and options.get("nnodes", "").isdigit():
        unit = {
            "host": options.get("host", ""),
            "rank": int(options["node-rank"]),
            "nnodes": int(options["nnodes"]),
            "time": os.stat(path).st_mtime,
        }
    record = read_record(job, root)
    before = str((record.get("checkpoint_dir") if record else options.get("checkpoint-dir")) or "")
    before_pattern = str((record.get("checkpoint_glob") if record else options.get("checkpoint-glob")) or "")
    moved = bool(before) and (before, before_pattern) != (folder, pattern)
    started = float(record.get("time") or unit.get("time") or 0)
    state_dir = options.get("state-dir", "")
    looking = looks.Looks(who)
    found = {
        "record": record,
        "unit": unit,
        "now": looking.at(folder, lambda: newest(folder, pattern, started), [], SECONDS),
        "folder": before if moved else "",
        "pattern": before_pattern if moved else "",
        "before": looking.at(before, lambda: newest(before, before_pattern, started), [], SECONDS) if moved else [],
        **looking.at(state_dir, lambda: supervisors(state_dir, before or folder), {**NOTHING, "state": "odd"}),
    }
    return {**found, "unread": "; ".join(looking.failed)}


def supervisors(state_dir: str, folder: str) -> dict[str, t.Any]:
    """Return what the supervisors have written down, as far as it has the right shape."""
    if not state_dir:
        return {**NOTHING, "state": "missing"}
    # The folder of the job is root's, its folder "state" is the job's.
    state, odd = supervisor_state.read(os.path.dirname(state_dir))
    if not state:
        return {**NOTHING, "state": "odd" if odd else "missing"}
    told = [(state.get("host"), state.get("rank"), state.get("checkpoint"))]
    for entries in (state.get("members") or {}, state.get("checkpoints") or {}):
        for key, entry in entries.items():
            rank = int(key) if re.fullmatch("[0-9]{1,5}", key) else None
            told.append((entry.get("host"), rank, entry.get("checkpoint") if "checkpoint" in entry else entry))
    known, seen = [], list(state.get("checkpoint_hosts") or [])
    for host, rank, entry in told:
        path, moment = (entry or {}).get("path"), (entry or {}).get("time")
        if not host or not path or checkpoint_files.was_set_aside(path, folder):
            continue
        if moment is None:
            seen.append(host)  # there was one, which is all that this tells
        else:
            known.append({"host": host, "rank": -1 if rank is None else rank, "name": relative(path, folder), "time": moment})
    return {
        "known": known,
        "seen": list(dict.fromkeys(seen)),
        "done": state.get("release", "") if state.get("result") == "done" else "",
        "state": "read",
    }


def relative(path: str, folder: str) -> str:
    """Return a checkpoint's name below its folder."""
    prefix = folder.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else os.path.basename(path)


def newest(folder: str, pattern: str, started: float = 0.0) -> list[dict[str, t.Any]]:
    """Return the newest checkpoints of a folder, newest first; empty where it has none.

    Args:
        folder: the folder.
        pattern: what they are called.
        started: when the job was started last; the newest one from before is told too, from which it may have gone on.

    Raises:
        hostile_input.Odd: not all of them can be found.
    """
    found = checkpoint_files.recent(folder, pattern, whole=True)
    best = found[:RECENT] + [entry for entry in found[RECENT:] if entry.modified < started][:1]
    return [{"name": hostile_input.printable(entry.path), "time": entry.modified, "digest": digest(folder, entry.path)} for entry in best]


def digest(folder: str, name: str) -> str:
    """Return what tells a file from others: of its size and both its ends, where torch's archives keep sums of their parts.

    Empty for what is no regular file, such as a checkpoint that is a folder.
    """
    try:
        below = hostile_input.open_folder(folder, os.path.dirname(name))
    except hostile_input.Odd:
        return ""
    try:
        last = os.path.basename(name)
        hostile_input.expect_regular(os.stat(last, dir_fd=below, follow_symlinks=False), name, sys.maxsize)
        descriptor = os.open(last, hostile_input.FILE_FLAGS, dir_fd=below)
        try:
            status = os.fstat(descriptor)
            hostile_input.expect_regular(status, name, sys.maxsize)
            ends = os.pread(descriptor, END, 0) + os.pread(descriptor, END, max(0, status.st_size - END))
            return hashlib.sha256(str(status.st_size).encode() + b" " + ends).hexdigest()[:16]
        finally:
            os.close(descriptor)
    except (OSError, hostile_input.Odd):
        return ""
    finally:
        os.close(below)
