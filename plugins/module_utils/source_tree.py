# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job's source as one immutable thing: its files, their hash and an archive of them.

The same functions run on the control node, which packs, and on the nodes, which verify what they unpacked.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import os
import stat
import tarfile
import typing as t

# What a project folder holds that no run needs.
EXCLUDED = (".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", ".mypy_cache", ".pytest_cache", ".ipynb_checkpoints", "lost+found")


class SourceError(Exception):
    """The source cannot be shipped, or not be read; the message says why."""


def files(source: str, excluded: t.Sequence[str] = EXCLUDED) -> dict[str, str]:
    """Return relative name → path of every file of a source (a folder, or one file), sorted by name.

    Symbolic links are followed, so that what is shipped does not depend on what lies beside it; a link to a folder
    that holds the link is left out, since it would never end.

    Raises:
        SourceError: the source is missing or a file in it cannot be read.
    """
    mode = mode_of(source)
    if mode is None:
        raise SourceError(f"{source} does not exist")
    if stat.S_ISREG(mode):
        return {os.path.basename(source): readable(source)}
    if not stat.S_ISDIR(mode):
        raise SourceError(f"{source} is neither a file nor a folder")
    found: dict[str, str] = {}
    for folder, folders, names in os.walk(source, followlinks=True, onerror=unreadable):
        kept = [name for name in folders if not matches(name, excluded) and not leads_up(folder, name)]
        folders[:] = sorted(kept)
        for name in names:
            path = os.path.join(folder, name)
            if not matches(name, excluded) and stat.S_ISREG(mode_of(path) or 0):
                found[os.path.relpath(path, source)] = readable(path)
    return dict(sorted(found.items()))


def mode_of(path: str) -> int | None:
    """Return the mode of what a path leads to, None where nothing is there, as with a link that leads nowhere.

    Raises:
        SourceError: that cannot be told.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        unreadable(error)


def readable(path: str) -> str:
    """Return the path of a file that can be read.

    Raises:
        SourceError: it cannot.
    """
    if not os.access(path, os.R_OK):
        unreadable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), path))
    return path


def unreadable(error: OSError) -> t.NoReturn:
    """Raise the SourceError for a file or folder that cannot be read: a source without it would be another one."""
    raise SourceError(f"{error.filename} cannot be read ({error.strerror})") from None


def leads_up(folder: str, name: str) -> bool:
    """Return whether an entry of a folder is a link to that folder or to one above it."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([target, here]) == target


def matches(name: str, patterns: t.Sequence[str]) -> bool:
    """Return whether a name matches one of the shell patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def executable(path: str) -> bool:
    """Return whether the owner may execute a file."""
    return bool(os.stat(path).st_mode & stat.S_IXUSR)


def tree_hash(members: t.Mapping[str, str]) -> str:
    """Return the SHA-256 over names, executable bits and contents of files, as hexadecimal digits."""
    total = hashlib.sha256()
    for name, path in sorted(members.items()):
        content = hashlib.sha256()
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                content.update(block)
        total.update(f"{name}\0{int(executable(path))}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def pack(members: t.Mapping[str, str], archive: str) -> None:
    """Write the files to a compressed tar archive without times and owners."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, path in sorted(members.items()):
            with open(path, "rb") as stream:
                content = stream.read()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755 if executable(path) else 0o644
            tar.addfile(entry, io.BytesIO(content))


def unpack(archive: str, folder: str) -> None:
    """Unpack an archive of ours into a folder; names that leave the folder are refused.

    Raises:
        SourceError: the archive holds something else than files below the folder.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            target = os.path.normpath(os.path.join(folder, entry.name))
            if not entry.isfile() or not target.startswith(folder + os.sep):
                raise SourceError(f"the archive holds {entry.name!r}, which is no file below its folder")
            stream = tar.extractfile(entry)
            if stream is None:
                raise SourceError(f"the archive holds {entry.name!r} without a content")
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as output:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    output.write(block)
            os.chmod(target, entry.mode & 0o755)
