# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a command costs: wall and CPU seconds of this machine, bytes from outside, and where a play's time goes."""
from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# ansible.posix.profile_tasks prints one such line per task.
TASK = re.compile(r"^(\S.*?) -{3,} +([\d.]+)s$", re.MULTILINE)
PROFILE = {"ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks", "PROFILE_TASKS_TASK_OUTPUT_LIMIT": "all", "ANSIBLE_NOCOLOR": "1"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """A command's output, its wall seconds, CPU seconds of it and the children that it waited for, and bytes from outside."""

    output: str
    wall: float
    cpu: float
    outside: int

    @property
    def tasks(self) -> list[tuple[str, float]]:
        """Tasks and their seconds, longest first."""
        found = [(name, float(seconds)) for name, seconds in TASK.findall(self.output)]
        return sorted(found, key=lambda pair: -pair[1])


def received() -> int:
    """Bytes that this machine has received through the interfaces with a default route."""
    lines = pathlib.Path("/proc/net/route").read_text(encoding="utf-8").splitlines()[1:]
    links = {words[0] for words in map(str.split, lines) if words[1] == "00000000"}
    return sum(int(pathlib.Path(f"/sys/class/net/{link}/statistics/rx_bytes").read_text(encoding="utf-8")) for link in links)


def cost(*words: object, **environment: str) -> Cost:
    """Run a command; RuntimeError with its last lines if it fails."""
    before, began = received(), time.monotonic()
    with subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, **environment}) as process:
        output = process.stdout.read()
        _pid, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit code {process.returncode}\n{output[-4000:]}")
    return Cost(output, time.monotonic() - began, usage.ru_utime + usage.ru_stime, received() - before)


def verdict(value: float, aim: float) -> str:
    """Whether an upper limit was kept."""
    return f"aim {aim:g}: {'kept' if value <= aim else 'MISSED'}"
