# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks nvidia-smi, and says why where it does not answer: a broken GPU makes it hang or fail."""

from __future__ import annotations

import shutil
import subprocess
import typing as t

# Without the persistence daemon each call starts up all GPUs, which takes eight of them some ten seconds.
SECONDS = 60.0


class NvidiaSmi:
    """Calls nvidia-smi with arguments; an empty text where it is missing, fails or hangs.

    Attributes:
        problem: why it did not answer, as the rest of a sentence about it; empty where it did. The first reason is kept.
        hangs: whether it does not come back.
    """

    def __init__(self, program: t.Optional[str] = None, seconds: float = SECONDS) -> None:
        self._program = shutil.which("nvidia-smi") if program is None else program
        self._seconds = seconds
        self.problem = ""
        self.hangs = False

    def __call__(self, words: t.Sequence[str]) -> str:
        """Return what it prints."""
        # One that hangs would hang again.
        if not self._program or self.hangs:
            return ""
        try:
            process = subprocess.Popen(
                [self._program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            self.problem = self.problem or f"cannot be started ({error.strerror})"
            return ""
        try:
            out, err = process.communicate(timeout=self._seconds)
        except subprocess.TimeoutExpired:
            self.hangs = True
            self.problem = f"does not answer within {self._seconds:g} s"
            # A process that waits for a dead GPU in the kernel ends only with a reboot, so its end is not waited for.
            process.kill()
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
            return ""
        if process.returncode == 0:
            return out
        lines = [" ".join(line.split()) for line in f"{out}\n{err}".splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else f"exit status {process.returncode}"
        self.problem = self.problem or f"fails ({reason})"
        return ""
