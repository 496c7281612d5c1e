# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ends the ssh of a task that Ansible gives up, so that the module on the node learns of it (see module_utils/invoker.py).

At a task's timeout Ansible leaves its ssh running, which reads on; the node cannot tell that from a patient user.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import typing as t


def children(parent: int) -> list[int]:
    """Return the ids of the processes of ssh, and of what types a password for it, that a process has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], stdout=subprocess.PIPE, text=True, check=False).stdout
    lines = [line.split(None, 2) for line in listed.splitlines()]
    return [int(words[0]) for words in lines if len(words) == 3 and words[1] == str(parent) and os.path.basename(words[2]) in ("ssh", "sshpass")]


@contextlib.contextmanager
def ends_with_task() -> t.Iterator[None]:
    """Whatever ends the block early, a task's timeout or Ctrl-C, ends the ssh that this worker of Ansible's has started."""
    try:
        yield
    except BaseException:  # a task's timeout is no Exception
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        raise
