# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one reader for what a job, or anyone who is not trusted, can have written.

    read_text     a regular file below a folder, without following links, without waiting, up to a size
    parse_json    text with limits of depth and numbers
    check         the shape of a value, to the leaf
    load          the three of them, with a sentence in place of an exception
    printable     text that cannot do anything to a terminal or a page
    search        a pattern in a line, within a length and a time

Stands alone: a copy of this very file lies beside the supervisor in each release.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
import re
import signal
import stat
import threading
import time
import typing as t

MOST_BYTES = 1 << 20
MOST_DEPTH = 32
MOST_DIGITS = 20  # of an integer: 64 bits with a sign
MOST_TEXT = 2000
LAST_MOMENT = 32_503_680_000  # the year 3000, in seconds since 1970
# Characters of a line in which a pattern is looked for, and seconds of CPU that it may take.
MOST_LINE = 1000
SEARCH_SECONDS = 2.0


class Odd(ValueError):
    """What was read is not what was expected; the text tells why, without control characters."""


class Absent(Odd):
    """There is no such file."""


# -- files

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_folder(trusted: str, below: str = "") -> int:
    """Return a descriptor of a folder, to be closed by the caller.

    Args:
        trusted: a folder whose path only root can change; links in it are followed.
        below: path from there to the folder; no part of it may be a link, or "..".

    Raises:
        Odd: a part is missing, is a link or no folder.
    """
    try:
        folder = os.open(trusted or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise refusal(trusted, error) from None
    for part in below.split("/"):
        if part in ("", "."):
            continue
        try:
            if part == "..":
                raise Odd(f"{shown(below)} leads outside {shown(trusted)}")
            inner = os.open(part, FOLDER_FLAGS, dir_fd=folder)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, Odd) else refusal(os.path.join(trusted, below), error) from None
        finally:
            os.close(folder)
        folder = inner
    return folder


def read_bytes(trusted: str, below: str, limit: int = MOST_BYTES) -> bytes:
    """Return what a regular file holds. Never waits, whatever lies there.

    Args:
        trusted: a folder whose path only root can change; links in it are followed.
        below: path of the file from there; no part of it may be a link, or "..".
        limit: bytes that it may hold.

    Raises:
        Absent: nothing lies there.
        Odd: something else, or something larger does.
    """
    path = os.path.join(trusted, below)
    folder = open_folder(trusted, os.path.dirname(below))
    try:
        return read_entry(folder, os.path.basename(below), path, limit)
    finally:
        os.close(folder)


def read_entry(folder: int, name: str, path: str, limit: int = MOST_BYTES) -> bytes:
    """Return what a regular file of an opened folder holds; ``path`` is for the sentences. Raises as read_bytes does."""
    try:
        # To open a device can do something already, so it is looked at before, and again through the descriptor.
        expect_regular(os.stat(name, dir_fd=folder, follow_symlinks=False), path, limit)
        descriptor = os.open(name, FILE_FLAGS, dir_fd=folder)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, Odd) else refusal(path, error) from None
    try:
        expect_regular(os.fstat(descriptor), path, limit)
        pieces, size = [], 0
        while size <= limit:  # the size that a file system tells need not be what is read
            piece = os.read(descriptor, min(1 << 16, limit + 1 - size))
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
        raise Odd(f"{shown(path)} has more than {limit} bytes")
    except OSError as error:
        raise refusal(path, error) from None
    finally:
        os.close(descriptor)


class Found(t.NamedTuple):
    """What find has found.

    Attributes:
        path: path from the folder.
        folder: whether it is a folder.
        modified: seconds since 1970; what no calendar has counts as 0.
        size: bytes.
    """

    path: str
    folder: bool
    modified: float
    size: int


def find(trusted: str, pattern: str, most: int = 100_000, seconds: float = 10.0, whole: bool = False) -> list[Found]:
    """Return what matches a pattern of paths as glob.glob knows it, without following a link and without end.

    Args:
        trusted: a folder whose path only root can change; links in it are followed.
        pattern: with ``*``, ``?``, ``[…]`` and ``**`` (any folders); hidden names only where the pattern begins with a dot.
        most: names that are looked at; where there are more, some are not found.
        seconds: for how long is looked.
        whole: whether an answer that lacks something is none. What lies more than 32 folders deep, or in a folder below
            that cannot be opened, is not looked for in any case.

    Raises:
        Odd: the answer would not be whole.
    """
    found: list[Found] = []
    names, limit = most, seconds
    # Folders to look into, and what has to match there. A folder can come twice where the pattern has several "**".
    parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
    waiting, seen = [("", parts)] if parts else [], set()
    end = time.monotonic() + seconds
    while waiting and most > 0 and time.monotonic() < end:
        below, rest = waiting.pop()
        if (below, rest) in seen:
            continue
        seen.add((below, rest))
        first, after = rest[0], rest[1:]
        if first == "**" and after:
            waiting.append((below, after))
        for entry in folder_entries(trusted, below, most, whole):
            most -= 1
            name = os.path.basename(entry.path)
            if name.startswith(".") and not first.startswith("."):
                continue
            if entry.folder and first == "**" and entry.path.count("/") < MOST_DEPTH:
                waiting.append((entry.path, rest))
            if fnmatch.fnmatchcase(name, "*" if first == "**" else first):
                if not after:
                    found.append(entry)
                elif entry.folder and first != "**":
                    waiting.append((entry.path, after))
    if whole and most <= 0:
        raise Odd(f"{shown(trusted)} holds more than {names} names")
    if whole and waiting:
        raise Odd(f"to look through {shown(trusted)} takes longer than {limit:.0f} s")
    return found


def folder_entries(trusted: str, below: str, most: int, whole: bool = False) -> t.Iterator[Found]:
    """Yield what lies in a folder, at most so many; nothing where there is no such folder.

    With ``whole``, a folder that is there and does not tell all that it holds raises Odd; one below ``trusted`` need not open.
    """
    try:
        folder = open_folder(trusted, below)
    except Odd as odd:
        if whole and not below and not isinstance(odd, Absent):
            raise
        return
    try:
        with os.scandir(folder) as entries:
            for entry, _count in zip(entries, range(most)):
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone while we looked
                moment = status.st_mtime if 0 <= status.st_mtime <= LAST_MOMENT else 0.0
                yield Found(os.path.join(below, entry.name), stat.S_ISDIR(status.st_mode), moment, status.st_size)
    except OSError as error:
        if whole:
            raise refusal(os.path.join(trusted, below), error) from None
        return
    finally:
        os.close(folder)


def expect_regular(status: os.stat_result, path: str, limit: int) -> None:
    """Raise Odd unless this is a regular file with one name and a size within the limit."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for test, word in KINDS if test(status.st_mode)), "something else")
        raise Odd(f"{shown(path)} is {kind}, but a file was expected")
    if status.st_nlink > 1:  # a hard link may lead to a file that the job's user may not read
        raise Odd(f"{shown(path)} has other names (hard links), so it may be somebody else's file")
    if status.st_size > limit:
        raise Odd(f"{shown(path)} has {status.st_size} bytes, but at most {limit} were expected")


def refusal(path: str, error: Exception) -> Odd:
    """Return what an error of the system means for a reader."""
    if isinstance(error, FileNotFoundError):
        return Absent(f"{shown(path)} does not exist")
    if isinstance(error, OSError):
        return Odd(f"{shown(path)} cannot be read: {os.strerror(error.errno or 0).lower()}")
    return Odd(f"{shown(path)} is no path")


def read_text(trusted: str, below: str, limit: int = MOST_BYTES) -> str:
    """Return the text of a regular file; what is not UTF-8 is replaced. Raises as read_bytes does."""
    return read_bytes(trusted, below, limit).decode("utf-8", "replace")


# -- JSON

# A string, also one that does not end, or a bracket. It matches wherever it begins, so a hostile text costs one pass.
BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(text: str, depth: int = MOST_DEPTH) -> t.Any:
    """Return the value of a JSON text.

    Its integers have at most 20 digits, all its numbers are finite, no object names a key twice, and no string holds
    half a surrogate pair.

    Args:
        text: the text; the caller has limited its length.
        depth: how deep lists and objects may lie within each other.

    Raises:
        Odd: it is none.
    """
    level = 0
    for found in BRACKET.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if level > depth:
            raise Odd(f"it is nested more than {depth} deep")
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_fraction, parse_constant=_constant, object_pairs_hook=_object)
    except Odd:
        raise
    except (ValueError, RecursionError):
        raise Odd("it is no JSON") from None
    return _mended(value) if "\\ud" in text.lower() else value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise Odd(f"it holds a number of {len(text)} digits")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text) if len(text) <= 400 else math.inf
    if not math.isfinite(value):
        raise Odd("it holds a number that is too large")
    return value


def _constant(text: str) -> t.Any:
    raise Odd(f"it holds {text}")


def _object(pairs: list[tuple[str, t.Any]]) -> dict[str, t.Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Odd("it names a key twice")
    return found


def _mended(value: t.Any) -> t.Any:
    """Return a value whose strings can be encoded."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return value


# -- shapes


class Shape:
    """What a value has to be."""

    what = "something"

    def clean(self, value: t.Any, name: str) -> t.Any:
        """Return the value as it may be used; raises Odd with its name."""
        raise NotImplementedError

    def odd(self, value: t.Any, name: str) -> Odd:
        """Return that a value is something else."""
        return Odd(f"{name} is {kind_of(value)}, but {self.what} was expected")


class Text(Shape):
    """A text as one line; control characters are shown as such, and what is too long is cut. With ``choices``, one of them."""

    what = "text"

    def __init__(self, most: int = MOST_TEXT, choices: t.Collection[str] = ()) -> None:
        self.most, self.choices = most, choices

    def clean(self, value: t.Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.odd(value, name)
        if self.choices and value not in self.choices:
            raise Odd(f"{name} is {printable(value, 40)!r}, but one of {', '.join(self.choices)} was expected")
        return printable(value[: self.most + 1].replace("\r\n", " ").replace("\n", " "), self.most)


class Number(Shape):
    """A finite number within a range; a whole one unless ``whole`` is false."""

    def __init__(self, least: float = 0, most: float = 2**53, whole: bool = True) -> None:
        self.least, self.most, self.whole = least, most, whole
        self.what = "a whole number" if whole else "a number"

    def clean(self, value: t.Any, name: str) -> t.Any:
        # True is an int to Python.
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise self.odd(value, name)
        if not self.least <= value <= self.most:  # NaN is within no range
            raise Odd(f"{name} is not within {self.least:g} and {self.most:g}")
        return value


class Flag(Shape):
    """True or false."""

    what = "true or false"

    def clean(self, value: t.Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise self.odd(value, name)
        return value


class Maybe(Shape):
    """Null, or another shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def clean(self, value: t.Any, name: str) -> t.Any:
        return None if value is None else self.shape.clean(value, name)


class ListOf(Shape):
    """A list of one shape, of limited length."""

    what = "a list"

    def __init__(self, item: Shape, most: int = 100) -> None:
        self.item, self.most = item, most

    def clean(self, value: t.Any, name: str) -> list[t.Any]:
        if not isinstance(value, list):
            raise self.odd(value, name)
        if len(value) > self.most:
            raise Odd(f"{name} has {len(value)} entries, but at most {self.most} were expected")
        return [self.item.clean(item, f"{name}[{index}]") for index, item in enumerate(value)]


class MapOf(Shape):
    """An object of one shape under any keys, of limited length."""

    what = "an object"

    def __init__(self, item: Shape, most: int = 100, key: int = 255) -> None:
        self.item, self.most, self.key = item, most, key

    def clean(self, value: t.Any, name: str) -> dict[str, t.Any]:
        if not isinstance(value, dict):
            raise self.odd(value, name)
        if len(value) > self.most:
            raise Odd(f"{name} has {len(value)} entries, but at most {self.most} were expected")
        cleaned = {printable(key, self.key): item for key, item in value.items()}
        return {key: self.item.clean(item, f"{name}.{printable(key, 40)}") for key, item in cleaned.items()}


class Fields(Shape):
    """An object with known keys. Those that are not known are dropped; those that are not there stay away."""

    what = "an object"

    def __init__(self, fields: t.Mapping[str, Shape], required: t.Collection[str] = ()) -> None:
        self.fields, self.required = fields, required

    def clean(self, value: t.Any, name: str) -> dict[str, t.Any]:
        if not isinstance(value, dict):
            raise self.odd(value, name)
        prefix = f"{name}." if name != WHOLE else ""
        lacking = [key for key in self.required if key not in value]
        if lacking:
            raise Odd(f"{prefix}{lacking[0]} is missing")
        return {key: shape.clean(value[key], f"{prefix}{key}") for key, shape in self.fields.items() if key in value}


WHOLE = "the whole"


def check(value: t.Any, shape: Shape, name: str = WHOLE) -> t.Any:
    """Return a value in a known shape: texts printable and cut, unknown keys dropped.

    Raises:
        Odd: it is not in that shape, and where.
    """
    return shape.clean(value, name)


def kind_of(value: t.Any) -> str:
    """Return what a value of JSON is, in a word."""
    kinds: tuple[tuple[t.Any, str], ...] = (
        (bool, "true or false"),
        (str, "text"),
        (int, "a whole number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    return "null" if value is None else next((word for kind, word in kinds if isinstance(value, kind)), "something else")


def load(trusted: str, below: str, shape: Shape, limit: int = MOST_BYTES) -> tuple[t.Any, str]:
    """Return the value of a JSON file, and a reason where there is none. Never raises, never waits.

    Returns:
        ``(value, "")``, ``(None, "")`` where the file does not exist, or ``(None, REASON)``.
    """
    try:
        text = read_text(trusted, below, limit)
    except Absent:
        return None, ""
    except Odd as odd:
        return None, str(odd)
    return loads(text, shape, shown(os.path.join(trusted, below)))


def loads(text: str, shape: Shape, name: str, limit: int = MOST_BYTES) -> tuple[t.Any, str]:
    """Return the value of a JSON text, and a reason that begins with ``name`` where it has none. Never raises."""
    if len(text) > limit:
        return None, f"{name} has more than {limit} characters"
    try:
        return check(parse_json(text), shape), ""
    except Odd as odd:
        return None, f"{name}: {odd}"


# -- text

# C0, DEL and C1; soft hyphen; marks, embeddings, overrides and isolates of direction; separators of lines and
# paragraphs; what has no width or is invisible, except the joiners that scripts need; halves of surrogate pairs; the byte
# order mark, annotations, musical and shorthand formats, and tags.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable(text: str, limit: int = MOST_TEXT, lines: bool = False) -> str:
    """Return a text that a terminal or a page only shows: what would act on them stands there as an escape (``\\x1b``).

    Tabs become spaces. Ordinary Unicode stays.

    Args:
        text: any text.
        limit: characters of the result; more are cut, and an ellipsis tells that.
        lines: whether the ends of lines are kept.
    """
    # Each character becomes one or more.
    shortened = text[: limit + 1]
    found = UNPRINTABLE.sub((lambda match: "\n" if match.group() == "\n" else _visible(match)) if lines else _visible, shortened)
    return found if len(found) <= limit else found[: limit - 1] + "…"


def _visible(match: re.Match[str]) -> str:
    character = match.group()
    if character == "\t":
        return " "
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(path: str) -> str:
    """Return a path or name for a sentence."""
    return printable(path, 300)


def tidy(value: t.Any, limit: int = MOST_TEXT, lines: bool = False, depth: int = MOST_DEPTH) -> t.Any:
    """Return a value of JSON's kinds with all its texts printable; what is nested too deep becomes an ellipsis."""
    if isinstance(value, str):
        return printable(value, limit, lines)
    if isinstance(value, (list, tuple, dict)) and depth <= 0:
        return "…"
    if isinstance(value, (list, tuple)):
        return [tidy(item, limit, lines, depth - 1) for item in value]
    if isinstance(value, dict):
        return {printable(str(key), limit): tidy(item, limit, lines, depth - 1) for key, item in value.items()}
    return value


def search(pattern: str, lines: t.Iterable[str]) -> list[bool]:
    """Return for each line whether a user's pattern is found in its beginning.

    Somebody else writes the lines, and a pattern such as ``(a+)+b`` takes for ever in the wrong one. Once the lines have
    taken two seconds of CPU, the rest counts as not found. An empty or wrong pattern is found nowhere.
    """
    shortened = [line[:MOST_LINE] for line in lines]
    found: list[bool] = []
    with contextlib.suppress(re.error, _Late, RecursionError):
        if pattern:
            compiled = re.compile(pattern)
            with _time_limit(SEARCH_SECONDS):
                for line in shortened:
                    found.append(bool(compiled.search(line)))
    return found + [False] * (len(shortened) - len(found))


class _Late(Exception):
    """The time is up."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> t.Iterator[None]:
    """Raise _Late in the block after so many seconds of CPU. Python's matcher looks for signals as it goes.

    The timer of CPU time, since Ansible's own limits use the other. Only a main thread can have one.
    """

    def late(_number: int, _frame: t.Any) -> None:
        raise _Late

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
