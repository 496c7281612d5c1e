# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One module at a time: a play that was killed leaves its module, or what that had started, running on the node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import invoker

# Nobody but root can make anything in /run, so nobody else can be there first, and a reboot leaves nothing of it.
FOLDER = "/run/onprem.torch"


class Busy(Exception):
    """The lock cannot be had: another process holds it for longer than one is ready to wait."""


class Gone(Busy):
    """Nobody waits for the answer any more, so nothing may be done."""


class Unsafe(Busy):
    """Somebody else than root could interfere with the lock."""


def opened_folder(path: str = FOLDER) -> int:
    """Return a descriptor of the folder of locks, made where it is not there; nobody but its owner can make files in it.

    Raises:
        Unsafe: it is no folder, or somebody else's.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o755)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Unsafe(f"{path} is no folder, but one of root's was expected; remove it") from None
        raise
    found = os.fstat(handle)
    if found.st_uid != os.geteuid():
        os.close(handle)
        raise Unsafe(f"{path} belongs to the user {found.st_uid}, but a folder of root's was expected; remove it")
    if stat.S_IMODE(found.st_mode) != 0o755:
        os.fchmod(handle, 0o755)  # a umask of its own, such as 002 or 077
    return handle


def opened(name: str, folder: str = FOLDER) -> int:
    """Return a descriptor of a lock's file, which only its owner can open, and so lock.

    Raises:
        Unsafe: see ``opened_folder``, or the file is none of ours.
    """
    parent = opened_folder(folder)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(f"{name}.lock", flags, 0o600, dir_fd=parent)
    except OSError as error:
        raise Unsafe(f"{folder}/{name}.lock cannot be opened ({error.strerror}); remove it") from None
    finally:
        os.close(parent)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(handle)
        raise Unsafe(f"{folder}/{name}.lock is no file of root's; remove it")
    os.fchmod(handle, 0o600)
    return handle


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
        Gone: whoever started this module has given it up. What was asked for long ago may be wrong by now.
        Unsafe: somebody else than root could hold it.
    """
    handle = opened(name, folder)
    try:
        with invoker.Invoker() as asker:
            deadline = time.monotonic() + seconds
            while True:
                reason = asker.gone()
                if reason:
                    raise Gone(f"this run was given up ({reason})")
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Busy(f"an earlier run still works on this node after {seconds:.0f} s") from None
                    time.sleep(0.1)
            reason = asker.gone()
            if reason:
                raise Gone(f"this run was given up ({reason})")
        yield handle
    finally:
        os.close(handle)
