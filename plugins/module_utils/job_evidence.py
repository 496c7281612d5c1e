# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node itself can tell about the end of a job: its kernel's log, the reports of failed workers, its disks."""

from __future__ import annotations

import glob
import os
import re
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, journal

# A device as its driver names it at the beginning of a line: on PCI, on USB, or part of a chip.
DEVICE = r"[\w-]+ (?:[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]|\d+-[\d.]+:\d+\.\d+|[0-9a-f]+\.ethernet)"
FILE_SYSTEM = r"(?:EXT[234]-fs|XFS|BTRFS|F2FS-fs|FAT-fs|JBD2)(?: \w+)?:? ?\((?:device )?[^\s()]+\)(?: in [\w.:]+)?: "
# Lines of the kernel's log that end training, and what kind of event they are.
# Each is matched from the line's beginning, and by more of the kernel's own words than the 15 characters that a process may have as
# its name: the kernel begins lines with such names (NAME invoked oom-killer), and any user chooses them.
KERNEL = (
    ("xid", re.compile(r"NVRM: Xid \((?:PCI:)?[0-9a-f]{4,8}:[0-9a-f]{2}[^)]{0,40}\): \d+", re.I | re.A)),
    ("memory limit", re.compile(r"Memory cgroup out of memory: Killed process \d+")),
    ("out of memory", re.compile(r"Out of memory(?: \(oom_kill_allocating_task\))?: Killed process \d+")),
    (
        "disk",
        re.compile(
            r"(?:\w+: )?I/O error, dev \S+, sector \d+|Buffer I/O error on dev(?:ice)? \S+, logical block \d+"
            r"|lost (?:async )?page write due to I/O error on \S+|JBD2: I/O error (?:detected |when |reading )"
            r"|EXT[234]-fs error \(device [^\s()]+\)"
            rf"|{FILE_SYSTEM}.*(?:I/O error|[Cc]orruption|[Ss]hutdown|Shutting down|Remounting filesystem read-only)"
            r"|nvme (?:nvme\d+|[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]): .*(?:timeout|controller is down)",
            re.A,
        ),
    ),
    (
        "network",
        re.compile(
            rf"{DEVICE}:? .*\blink (?:is )?down|(?:{DEVICE}:? \S+ )?NETDEV WATCHDOG: .*transmit queue \d+ timed out"
            r"|\w+: \S*\s?NIC (?:Copper |Fibre |SerDes )?Link is Down|(?:mlx4_en|tg3|bnx2|be2net|cxgb4): \S+: Link (?:is )?down",
            re.I | re.A,
        ),
    ),
    ("machine check", re.compile(r"(?:\w+: |\{\d+\})?\[Hardware Error\]: |(?:mce: )?Machine check events logged", re.A)),
)
# What the kernel says about a process, such as "NAME[PID]: segfault at 0 … in FILE": name and file are any user's to choose.
OF_A_PROCESS = re.compile(r".{0,15}\[\d+\]:? ", re.DOTALL | re.A)
AT_MOST = 40  # events of the kernel, newest
MOST_REPORTS = 200  # of a run, newest
REPORT_BYTES = 256 << 10  # torch's are a few KiB
# For all reports together: the job may have written many, each of which takes long to read.
REPORT_SECONDS = 10.0
STAMPED = re.compile(r"(\d+\.\d+) \S+ kernel: (.*)")


def stamped(output: str) -> list[tuple[float, str]]:
    """Return (time, text) of the kernel's lines of ``journalctl --output=short-unix``.

    Lines without a time belong to the one before.
    """
    found = map(STAMPED.match, output.split("\n"))  # splitlines knows more ends of lines than journalctl does
    return [(float(line.group(1)), line.group(2)) for line in found if line]


def kernel_events(output: str) -> list[dict[str, t.Any]]:
    """Return what in the kernel's log ends training: kind, time and text."""
    found = []
    for moment, text in stamped(output):
        kind = next((name for name, pattern in KERNEL if pattern.match(text)), "")
        if kind and not OF_A_PROCESS.match(text):
            found.append({"kind": kind, "time": moment, "text": hostile_input.printable(text, 300)})
    return found[-AT_MOST:]


def last_step(lines: t.Sequence[journal.Line], pattern: str) -> tuple[str, float | None]:
    """Return the last line of a training step and its time."""
    found = hostile_input.search(pattern, [line.text for line in lines])
    return next(((line.text.strip(), line.time) for line, is_step in zip(reversed(lines), reversed(found)) if is_step), ("", None))


def error_files(log_dir: str, runs: int = 4) -> list[dict[str, t.Any]]:
    """Return the error.json files of the newest runs below torchrun's log folder, oldest first.

    torchrun writes them to LOG_DIR/RUN/attempt_N/LOCAL_RANK/error.json. The folder is the job's own, so what lies there
    need not be torchrun's, and need not be few.
    """
    deadline = time.monotonic() + REPORT_SECONDS
    folders = [entry for entry in hostile_input.find(log_dir, "*") if entry.folder]
    found = []
    for folder in sorted(folders, key=lambda entry: -entry.modified)[:runs]:
        reports = hostile_input.find(log_dir, f"{glob.escape(folder.path)}/**/error.json", seconds=REPORT_SECONDS / runs)
        for entry in sorted(reports, key=lambda entry: -entry.modified)[:MOST_REPORTS]:
            if time.monotonic() > deadline:
                break
            report = error_report(log_dir, entry)
            if report:
                local_rank = os.path.basename(os.path.dirname(entry.path))
                number = int(local_rank) if re.fullmatch(r"[0-9]{1,6}", local_rank) else None
                path = hostile_input.shown(os.path.join(log_dir, entry.path))
                found.append({**report, "path": path, "local_rank": number})
    return sorted(found, key=lambda report: report["time"])


def error_report(log_dir: str, entry: hostile_input.Found) -> dict[str, t.Any]:
    """Return time and message of one error.json, empty where it holds none."""
    try:
        content = hostile_input.parse_json(hostile_input.read_text(log_dir, entry.path, REPORT_BYTES))
    except hostile_input.Odd:
        return {}
    message = content.get("message") if isinstance(content, dict) else None
    text = message.get("message") if isinstance(message, dict) else message
    if not isinstance(text, str) or not text or text.startswith("SignalException"):
        return {}  # torchrun's word for having been told to end
    # torch rounds its own timestamp to whole seconds, the file's time does not.
    return {"time": entry.modified, "text": hostile_input.printable(" ".join(text[:5000].split()), 500)}


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
        # A process chooses its name; it may hold commas.
        found_row = re.fullmatch(r"\s*([^,]*),\s*([0-9]{1,10}),\s*(.*),\s*([^,]*)", row)
        if not found_row:
            continue
        fields = found_row.groups()
        used = re.match(r"(\d{1,9}) MiB", fields[3])
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
