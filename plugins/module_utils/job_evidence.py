# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node itself can tell about the end of a job: its kernel's log, the reports of failed workers, its disks."""

from __future__ import annotations

import glob
import json
import os
import re
import typing as t

# Lines of the kernel's log that end training, and what kind of event they are.
KERNEL = (
    ("xid", re.compile(r"NVRM: Xid")),
    ("memory limit", re.compile(r"Memory cgroup out of memory: Killed process")),
    ("out of memory", re.compile(r"Out of memory: Killed process")),
    ("disk", re.compile(r"I/O error|EXT4-fs error|XFS .*(Corruption|shutdown)|Remounting filesystem read-only|nvme\S* .*(timeout|controller is down)")),
    ("network", re.compile(r"(link is down|link down|Link Down|NETDEV WATCHDOG)", re.I)),
    ("machine check", re.compile(r"Machine check events logged|Hardware Error")),
)
AT_MOST = 40  # events of the kernel, newest
STAMPED = re.compile(r"^(\d+\.\d+) \S+ ([^:]+): (.*)$")


def stamped(output: str) -> list[tuple[float, str]]:
    """Return (time, text) of the lines of ``journalctl --output=short-unix``; lines without a time belong to the one before."""
    lines: list[tuple[float, str]] = []
    for line in output.splitlines():
        found = STAMPED.match(line)
        if found:
            lines.append((float(found.group(1)), found.group(3)))
    return lines


def kernel_events(output: str) -> list[dict[str, t.Any]]:
    """Return what in the kernel's log ends training: kind, time and text."""
    found = []
    for moment, text in stamped(output):
        kind = next((name for name, pattern in KERNEL if pattern.search(text)), "")
        if kind:
            found.append({"kind": kind, "time": moment, "text": text[:300]})
    return found[-AT_MOST:]


def last_step(output: str, pattern: str) -> tuple[str, float | None]:
    """Return the last line of a training step and its time, from ``journalctl --output=short-unix``."""
    steps = [(moment, text) for moment, text in stamped(output) if re.search(pattern, text)] if pattern else []
    return (steps[-1][1].strip(), steps[-1][0]) if steps else ("", None)


def error_files(log_dir: str, runs: int = 4) -> list[dict[str, t.Any]]:
    """Return the error.json files of the newest runs below torchrun's log folder, oldest first.

    torchrun writes them to LOG_DIR/RUN/attempt_N/LOCAL_RANK/error.json.
    """
    folders = sorted(glob.glob(os.path.join(glob.escape(log_dir), "*/")), key=modified)[-runs:]
    found = []
    for folder in folders:
        for path in glob.glob(os.path.join(glob.escape(folder), "**", "error.json"), recursive=True):
            report = error_report(path)
            if report:
                local_rank = os.path.basename(os.path.dirname(path))
                found.append({**report, "path": path, "local_rank": int(local_rank) if local_rank.isdigit() else None})
    return sorted(found, key=lambda report: report["time"])


def error_report(path: str) -> dict[str, t.Any]:
    """Return time and message of one error.json, empty where it holds none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            content = json.load(stream)
        message = content["message"]
        text = message["message"] if isinstance(message, dict) else str(message)
        stamp = (message.get("extraInfo") or {}).get("timestamp") if isinstance(message, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if not text or text.startswith("SignalException"):
        return {}  # torchrun's word for having been told to end
    # torch rounds the timestamp to whole seconds, the file's time does not.
    moment = modified(path) or float(stamp or 0)
    return {"time": moment, "text": " ".join(text.split())[:500]}


def modified(path: str) -> float:
    """Return when a path was changed, 0 where it is gone."""
    try:
        return os.path.getmtime(path)
    except OSError:
        return 0.0


def room(paths: t.Iterable[str]) -> list[dict[str, t.Any]]:
    """Return the free and total bytes and inodes of the file system of each path that exists."""
    found = []
    for path in paths:
        try:
            status = os.statvfs(path)
        except OSError:
            continue
        size = status.f_frsize
        found.append(
            {
                "path": path,
                "free_bytes": status.f_bavail * size,
                "total_bytes": status.f_blocks * size,
                "free_inodes": status.f_favail if status.f_files else None,
                "read_only": bool(status.f_flag & os.ST_RDONLY),
            }
        )
    return found


def gpu_processes(output: str, unit_of: t.Callable[[int], str]) -> list[dict[str, t.Any]]:
    """Return who holds GPU memory, from nvidia-smi's CSV of compute processes.

    Args:
        output: rows of ``gpu_uuid, pid, process_name, used_memory`` with units.
        unit_of: tells the systemd unit of a process.
    """
    found = []
    for row in output.splitlines():
        fields = [field.strip() for field in row.split(",")]
        if len(fields) != 4 or not fields[1].isdigit():
            continue
        used = re.match(r"(\d+) MiB", fields[3])
        found.append(
            {
                "gpu": fields[0],
                "pid": int(fields[1]),
                "name": os.path.basename(fields[2]),
                "unit": unit_of(int(fields[1])),
                "used_mib": int(used.group(1)) if used else None,
            }
        )
    return found
