# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether whoever started this module still waits for its answer.

Ansible does not end a module that it has given up: not at the task's timeout, not at Ctrl-C, not where ansible-playbook
was killed. sshd closes its side of the module's output then, and ends where the whole connection is gone. The module
inherits that output, or, where sudo relays it (use_pty), an ancestor does.
"""

from __future__ import annotations

import ctypes
import os
import select
import typing as t

# The system call that copies a descriptor of another process; the same number on all architectures, Linux 5.6 and newer.
PIDFD_GETFD = 438
OUTPUTS = (1, 2)
CLOSED = select.POLLERR | select.POLLHUP | select.POLLNVAL


def stat(pid: int) -> tuple[str, int, int] | None:
    """Return name, parent and start (in clock ticks since the boot) of a process; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            head, _brace, tail = stream.read().rpartition(")")
    except OSError:
        return None
    fields = tail.split()
    if fields[0] in "ZX":  # ended, and not yet asked for by its parent
        return None
    return head.partition("(")[2], int(fields[1]), int(fields[19])


def hidden(pid: int) -> bool:
    """Return whether a process is there of which /proc shows nothing: another user's, where /proc is mounted with hidepid."""
    if pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8"):
            return False
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def ancestors() -> dict[int, int]:
    """Return id and start of the processes between this one and its sshd, that one too; of the parent alone without sshd.

    What lies above a shell that is no sshd's, such as the terminal of a control node, may end without any harm.
    """
    found: dict[int, int] = {}
    pid = os.getppid()
    while pid > 1 and (known := stat(pid)):
        name, parent, start = known
        found[pid] = start
        if name.startswith("sshd"):
            return found
        pid = parent
    return dict(list(found.items())[:1])


def copied(pid: int, descriptor: int) -> int | None:
    """Return a copy of another process's descriptor, which no child inherits; None where the kernel does not give it."""
    try:
        handle = os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, handle, descriptor, 0)
    finally:
        os.close(handle)
    return copy if copy >= 0 else None


class Invoker:
    """Whoever started this module, watched from now on. To be used as a context, since it holds descriptors."""

    def __init__(self) -> None:
        self._ancestors = ancestors()
        self._copies = [copy for pid in self._ancestors for number in OUTPUTS if (copy := copied(pid, number)) is not None]
        # What is closed from the beginning tells nothing.
        self._outputs = [handle for handle in (*OUTPUTS, *self._copies) if not closed([handle])]

    def __enter__(self) -> Invoker:
        return self

    def __exit__(self, *_reason: t.Any) -> None:
        for handle in self._copies:
            os.close(handle)
        self._copies, self._outputs = [], []

    def gone(self) -> str:
        """Return why nobody waits for this module any more; an empty string while somebody does."""
        for pid, start in self._ancestors.items():
            known = stat(pid)
            if known is None or known[2] != start:
                return "the process that started it has ended"
        return "its output is read by nobody any more" if closed(self._outputs) else ""


def closed(handles: t.Iterable[int]) -> bool:
    """Return whether the other end of any of these is closed."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, 0)
    return any(events & CLOSED for _handle, events in poll.poll(0))
