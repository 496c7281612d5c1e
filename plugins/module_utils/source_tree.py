# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job's source as one immutable thing: its files, their hash and an archive of them.

The same functions run on the control node, which packs, and on the nodes, which verify what they unpacked.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import os
import re
import stat
import tarfile
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input

# What a project folder holds that no run needs.
EXCLUDED = (".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", ".mypy_cache", ".pytest_cache", ".ipynb_checkpoints", "lost+found")


# What may lie in a source, so that whoever writes it cannot keep its readers busy: files and folders, and how deep.
MOST_ENTRIES = 200_000
MOST_DEPTH = 64
# Bytes of a source that is sent; a file with holes may claim to have any size.
MOST_BYTES = 64 << 30
# How links are followed: wherever they lead, with the rights of a job's user on a node; or by whoever sends the source, within
# it alone, or out of it too.
ANYWHERE = "anywhere"
INSIDE = "inside"
OUTSIDE = "outside"
# No files that somebody made, but the state of the kernel and of processes, such as the environment of whoever looks.
NO_FILES = ("/proc", "/sys", "/dev")


class SourceError(Exception):
    """The source cannot be shipped, or not be read; the message says why."""


class LimitError(SourceError):
    """There is too much in the source."""


class MisnamedError(SourceError):
    """A file of the source has a name that is no text."""


class LinkError(SourceError):
    """A link of the source leads where it may not.

    Attributes:
        forbidden: whether nobody can allow it.
    """

    def __init__(self, message: str, forbidden: bool) -> None:
        super().__init__(message)
        self.forbidden = forbidden


def files(source: str, excluded: t.Sequence[str] = EXCLUDED, links: str = ANYWHERE) -> dict[str, str]:
    """Return relative name → path of every file of a source (a folder, or one file), sorted by name.

    Symbolic links are followed, so that what is shipped does not depend on what lies beside it; a link to a folder
    that holds the link is left out, since it would never end. Only regular files are taken.

    Args:
        source: its path.
        excluded: patterns of names that are left out.
        links: where links may lead. With INSIDE and OUTSIDE the paths are those that the links lead to, for opened_straight.

    Raises:
        SourceError: the source is missing, a file in it cannot be read, a link leads where it may not, or there is too much.
    """
    mode = mode_of(source)
    if mode is None:
        raise SourceError(f"{hostile_input.shown(source)} does not exist")
    if stat.S_ISREG(mode):
        walk = Walk(os.path.dirname(source), excluded, links)
        walk.entry(walk.read_from, walk.top, os.path.basename(source), ())
    elif stat.S_ISDIR(mode):
        walk = Walk(source, excluded, links)
        walk.folder(walk.read_from, walk.top, "", ())
    else:
        raise SourceError(f"{hostile_input.shown(source)} is neither a file nor a folder")
    return dict(sorted(walk.found.items()))


class Walk:
    """Finds the files of a source, within limits."""

    def __init__(self, source: str, excluded: t.Sequence[str], links: str) -> None:
        self.source, self.excluded, self.links = source, excluded, links
        self.top = os.path.realpath(source)
        # On a node the source may lie in a folder that was opened, whose name leads to it no more.
        self.read_from = source if links == ANYWHERE else self.top
        self.found: dict[str, str] = {}
        self.entries = self.bytes = 0
        self._real: dict[str, str] = {}
        if links != ANYWHERE and is_below(self.top, NO_FILES[:2]):
            raise SourceError(f"{hostile_input.shown(source)} leads to {hostile_input.shown(self.top)}, which holds no files to send")

    def folder(self, path: str, real: str, name: str, above: tuple[tuple[int, int], ...]) -> None:
        """Take what lies in a folder; nothing where links have led back into one that it lies in.

        Args:
            path: the path by which it is read.
            real: its path without links.
            name: its path in the source.
            above: device and number of the folders on the way to it.
        """
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                return
            if len(above) > MOST_DEPTH:
                raise LimitError(f"{self.shown(name)} lies more than {MOST_DEPTH} folders deep")
            with os.scandir(path) as entries:
                names = [entry.name for entry in entries if self.counts(entry.name)]
        except OSError as error:
            unreadable(error)
        for each in sorted(names):
            self.entry(path, real, os.path.join(name, each), (*above, (status.st_dev, status.st_ino)))

    def counts(self, name: str) -> bool:
        """Return whether an entry of a folder is part of the source."""
        if matches(name, self.excluded):
            return False
        self.entries += 1
        if self.entries > MOST_ENTRIES:
            raise LimitError(f"{hostile_input.shown(self.source)} has more than {MOST_ENTRIES} files and folders, also by links")
        return True

    def entry(self, folder: str, real: str, name: str, above: tuple[tuple[int, int], ...]) -> None:
        """Take a file or folder that lies in a folder; neither a link that leads nowhere nor what is no file is part of a source."""
        path = os.path.join(folder, os.path.basename(name))
        straight = os.path.join(real, os.path.basename(name))
        is_link = os.path.islink(path)
        if is_link:
            straight = self.followed(straight, name)
        if self.links != ANYWHERE:
            path = straight
        mode = mode_of(path)
        if mode is not None and stat.S_ISDIR(mode):
            if not (is_link and is_below(real, [straight])):
                self.folder(path, straight, name, above)
        elif mode is not None and stat.S_ISREG(mode):
            self.file(path, name)

    def file(self, path: str, name: str) -> None:
        """Take a file."""
        try:
            name.encode()
        except UnicodeEncodeError:
            raise MisnamedError(f"the name of {self.shown(name)} is no UTF-8") from None
        self.found[name] = readable(path)
        if self.links != ANYWHERE:
            try:
                self.bytes += os.stat(path).st_size
            except OSError as error:
                unreadable(error)
            if self.bytes > MOST_BYTES:
                source = hostile_input.shown(self.source)
                raise LimitError(f"{source} has more than {MOST_BYTES >> 30} GiB, which {self.shown(name)} exceeds")

    def followed(self, link: str, name: str) -> str:
        """Return the path that a link leads to, without links.

        Raises:
            LinkError: it leads where it may not.
        """
        if link not in self._real:
            self._real[link] = os.path.realpath(link)
        real = self._real[link]
        if self.links == ANYWHERE:
            return real
        forbidden = is_below(real, NO_FILES)
        if is_below(real, [self.top]) or (self.links == OUTSIDE and not forbidden) or mode_of(real) is None:
            return real
        text = f"the link {self.shown(name)} leads to {hostile_input.shown(real)}"
        raise LinkError(f"{text}, which is never sent" if forbidden else f"{text}, outside the source", forbidden)

    def shown(self, name: str) -> str:
        """Return the path of an entry for a sentence."""
        return hostile_input.shown(os.path.join(self.source, name))


def is_below(path: str, folders: t.Sequence[str]) -> bool:
    """Return whether a path is one of the folders or lies below one."""
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


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
    raise SourceError(f"{hostile_input.shown(str(error.filename))} cannot be read ({error.strerror})") from None


def matches(name: str, patterns: t.Sequence[str]) -> bool:
    """Return whether a name matches one of the shell patterns."""
    return bool(expression(tuple(patterns)).match(os.path.normcase(name)))


@functools.lru_cache(maxsize=8)
def expression(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return what matches one of the shell patterns."""
    return re.compile("|".join(fnmatch.translate(os.path.normcase(pattern)) for pattern in patterns) or r"(?!)")


def executable(status: os.stat_result) -> bool:
    """Return whether the owner may execute a file."""
    return bool(status.st_mode & stat.S_IXUSR)


def opened(path: str) -> t.BinaryIO:
    """Open a regular file without waiting, whatever has taken its name since it was found.

    Raises:
        SourceError: it is no regular file any more.
    """
    return regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK), path)


def opened_straight(path: str) -> t.BinaryIO:
    """Open a regular file as opened() does, where no folder on the way is a link: one that is has come after the look.

    Raises:
        SourceError: that cannot be.
    """
    way = os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_PATH", os.O_RDONLY)
    *folders, name = path.strip("/").split("/")
    handle = os.open("/", way)
    try:
        for folder in folders:
            below = os.open(folder, way, dir_fd=handle)
            os.close(handle)
            handle = below
        return regular(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=handle), path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
            changed(path)
        unreadable(OSError(error.errno, error.strerror, path))
    finally:
        os.close(handle)


def regular(handle: int, path: str) -> t.BinaryIO:
    """Return the stream of a descriptor that is a regular file's; else close it."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        changed(path)
    return open(handle, "rb")


def changed(path: str) -> t.NoReturn:
    """Raise the SourceError for a file that is another one than the look found."""
    raise SourceError(f"{hostile_input.shown(path)} changed while the source was read")


Opener = t.Callable[[str], t.BinaryIO]


class Measured:
    """Reads of a stream as many bytes as the file had when it was opened, and hashes them."""

    def __init__(self, stream: t.BinaryIO) -> None:
        self.status = os.fstat(stream.fileno())
        self.hash = hashlib.sha256()
        self._stream, self._left = stream, self.status.st_size

    def read(self, size: int) -> bytes:
        """Return the next bytes, none at the end."""
        block = self._stream.read(min(size, self._left))
        self._left -= len(block)
        self.hash.update(block)
        return block

    def line(self, name: str) -> bytes:
        """Return what the file adds to the hash of its source."""
        return f"{name}\0{int(executable(self.status))}\0{self.hash.hexdigest()}\n".encode()


def tree_hash(members: t.Mapping[str, str], opener: Opener = opened) -> str:
    """Return the SHA-256 over names, executable bits and contents of files, as hexadecimal digits."""
    total = hashlib.sha256()
    for name, path in sorted(members.items()):
        with opener(path) as stream:
            measured = Measured(stream)
            while measured.read(1 << 20):
                pass
        total.update(measured.line(name))
    return total.hexdigest()


def pack(members: t.Mapping[str, str], archive: str, opener: Opener = opened) -> str:
    """Write the files to a compressed tar archive without times and owners; return the hash of what is in it.

    Raises:
        SourceError: a file changed meanwhile.
    """
    total = hashlib.sha256()
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, path in sorted(members.items()):
            with opener(path) as stream:
                measured = Measured(stream)
                entry = tarfile.TarInfo(name)
                entry.size = measured.status.st_size
                entry.mode = 0o755 if executable(measured.status) else 0o644
                try:
                    tar.addfile(entry, t.cast(t.IO[bytes], measured))
                except OSError as error:
                    if error.errno:
                        raise
                    changed(path)  # it has become shorter
            total.update(measured.line(name))
    return total.hexdigest()


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
