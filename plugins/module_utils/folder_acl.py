# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A folder of root's that one user may enter, or a file that it may read, and nobody else.

The user's primary group is no help: at many sites all people share one. An access control list names the user itself.
"""

from __future__ import annotations

import errno
import os
import struct

# The extended attribute and its layout: linux/posix_acl_xattr.h, with the tags of linux/posix_acl.h.
ATTRIBUTE = "system.posix_acl_access"
VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
READ, WRITE, READ_ENTER, ALL = 0o4, 0o2, 0o5, 0o7
NO_ID = 0xFFFFFFFF
# File systems without access control lists.
LACKING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def entries(uid: int, may: int = READ_ENTER) -> bytes:
    """Return the list: root may do all, the user may look, and nobody else is let in."""
    roots = ALL if may == READ_ENTER else ALL & ~1  # a file is no program
    wanted = ((USER_OBJ, roots, NO_ID), (USER, may, uid), (GROUP_OBJ, 0, NO_ID), (MASK, may, NO_ID), (OTHER, 0, NO_ID))
    return struct.pack("<I", VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in wanted)


def writers(path: str, gid: int) -> tuple[set[int], set[int]]:
    """Return which users and groups beside the owner may write something whose mode lets its group write.

    Args:
        path: what it is.
        gid: its group.

    Raises:
        OSError: that cannot be told.
    """
    try:
        there = os.getxattr(path, ATTRIBUTE)
    except OSError as error:
        if error.errno not in (errno.ENODATA, *LACKING):
            raise
        return set(), {gid}
    listed = [(tag, who) for tag, may, who in struct.iter_unpack("<HHI", there[4:]) if may & WRITE]
    groups = {who for tag, who in listed if tag == GROUP} | {gid for tag, _who in listed if tag == GROUP_OBJ}
    return {who for tag, who in listed if tag == USER}, groups


def only_lets_in(folder: str, uid: int, gid: int) -> bool:
    """Return whether root and this user alone can enter a folder of root's.

    Args:
        folder: the folder.
        uid: the user.
        gid: its primary group, which is let in where the file system has no access control lists.
    """
    found = os.stat(folder)
    try:
        there = os.getxattr(folder, ATTRIBUTE)
    except OSError:
        there = b""
    if there:
        return found.st_uid == 0 and there == entries(uid)
    return (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, gid, 0o750)


def let_in(folder: str, uid: int, gid: int) -> None:
    """Let only root and this user into a folder; see only_lets_in."""
    os.chmod(folder, 0o700)
    os.chown(folder, 0, 0)
    try:
        os.setxattr(folder, ATTRIBUTE, entries(uid))
    except OSError as error:
        if error.errno not in LACKING:
            raise
        os.chown(folder, 0, gid)
        os.chmod(folder, 0o750)


def let_read(path: str, uid: int) -> None:
    """Let one user read a file of root's that nobody else can read, in a folder in which only root can put anything.

    Where the file system has no access control lists, the file becomes the user's own.
    """
    try:
        os.setxattr(path, ATTRIBUTE, entries(uid, READ))
    except OSError as error:
        if error.errno not in LACKING:
            raise
        os.chown(path, uid, 0)
        os.chmod(path, 0o400)
