# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One module at a time: a play that was killed leaves its module, or what that had started, running on the node."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import typing as t

FOLDER = "/run/lock"


class Busy(Exception):
    """Another process holds the lock for longer than one is ready to wait."""


@contextlib.contextmanager
def held(name: str, seconds: float, folder: str = FOLDER) -> t.Iterator[int]:
    """Hold a lock of this node while the block runs; the kernel gives it back however the process ends.

    Args:
        name: name of the lock.
        seconds: how long to wait for it.
        folder: where its file lies; on a file system that does not outlive a reboot.

    Yields:
        A file descriptor. A child process that inherits it holds the lock too, so that nothing is begun again before
        the orphans of a killed module have ended.

    Raises:
        Busy: it could not be had.
    """
    handle = os.open(os.path.join(folder, f"onprem.torch-{name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Busy(f"an earlier run still works on this node after {seconds:.0f} s") from None
                time.sleep(0.1)
        yield handle
    finally:
        os.close(handle)
