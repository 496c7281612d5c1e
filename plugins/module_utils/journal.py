# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The journals of a job's units: one look at a node's, and the merged lines of all."""

from __future__ import annotations

import base64
import re
import shlex
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.onprem.torch.plugins.module_utils import checkpoint_files, hostile_input, supervisor_state
from ansible_collections.onprem.torch.plugins.module_utils.hostile_input import Fields, Shape, Text

MARK = "--onprem-torch--"
# A field of more than 4096 bytes is null in JSON, but an entry may have a thousand of them: shortened() cuts those.
AS_JSON = ("--quiet", "--no-pager", "--output=json", "--output-fields=MESSAGE")
# Lines and bytes of one look; the next one goes on after them.
AT_MOST, MOST_BYTES = 5000, 8 << 20
# Bytes of one entry; whatever a job writes, many entries fit into one look, so that each look comes further.
MOST_ENTRY = 1 << 16
# Seconds for the journal in one look; entries of 16 MB take journalctl some tenths of a second each.
JOURNAL_SECONDS = 30
# What is read in place of entries that were not reached in that time. It is no entry.
CUT = "cut"
# For mawk and gawk. A quote within a string has a backslash before it, and only journald writes fields that begin with "_", so
# no text of a job's can be taken for these two. An entry that was cut before them is dropped.
SHORTEN = r"""
function part(name) { return match($0, "\"" name "\" ?: ?\"[^\"]*\"") ? substr($0, RSTART, RLENGTH) : "" }
length($0) <= MOST { print; next }
{ c = part("__CURSOR"); t = part("__REALTIME_TIMESTAMP"); if (c != "" && t != "") print "{" c "," t ",\"MESSAGE\":null}" }
""".strip()
# Characters of a line that a person is shown.
MOST_WIDTH = 4096
# How state.json is read: bytes at a time, and how long a file system may take.
BLOCK, SECONDS = 1 << 16, 10
RANK = re.compile(r"\[rank (\d+)\]")


@dataclass(frozen=True)
class Line:
    """One line of a journal.

    Attributes:
        time: seconds since 1970, by the node's clock.
        host: inventory name of the node.
        text: the line, with the rank that torchrun puts in front where a process of the job wrote it.
    """

    time: float
    host: str
    text: str

    @property
    def rank(self) -> int | None:
        """The global rank that wrote it; None for the supervisor and torchrun itself."""
        found = RANK.match(self.text)
        return int(found.group(1)) if found else None


class Message(Shape):
    """What a journal's MESSAGE may be; message() tells."""

    def clean(self, value: t.Any, name: str) -> t.Any:
        return value


class Digits(Text):
    """A number of microseconds, as text."""

    def clean(self, value: t.Any, name: str) -> str:
        if not re.fullmatch(r"[0-9]{1,16}", super().clean(value, name)):
            raise self.odd(value, name)
        return str(value)


ENTRY = Fields({"__CURSOR": Text(1000), "__REALTIME_TIMESTAMP": Digits(), "MESSAGE": Message()}, required=("__CURSOR", "__REALTIME_TIMESTAMP"))


def ranks(nodes: t.Mapping[str, t.Mapping[str, t.Any]]) -> dict[int, str]:
    """Return which host each global rank runs on, from the plan's nodes."""
    hosts = [node["host"] for node in sorted(nodes.values(), key=lambda node: node["rank"]) for _process in range(node["nproc"])]
    return dict(enumerate(hosts))


def command(unit: str, root: str, cursor: str, since: str = "", checkpoints: tuple[str, str] | None = None) -> str:
    """Return a shell command that looks at a unit once; cheap enough to be run every second.

    It prints the unit's state, the supervisor's, the newest checkpoint and the next lines of the journal, with marks
    between them. What the job can shape is Base64 or JSON, so that nothing in it can be taken for a mark or a cursor.
    Without a pager: Ansible's connection has a terminal where it may have to answer sudo, and the pager's codes would be read.

    Args:
        unit: name of the unit.
        root: the job's folder.
        cursor: where the last look ended, empty for the first.
        since: where the first look begins, as journalctl understands it; empty for the unit's last start.
        checkpoints: folder and pattern of the checkpoints; None where they are not asked for.
    """
    name = shlex.quote(unit)
    journal, before = f"journalctl {' '.join(AS_JSON)} --unit={name}", ""
    if cursor:
        journal += f" --after-cursor={shlex.quote(cursor)}"
    elif since:
        journal += f" --since={shlex.quote(since)}"
    else:
        # The lines since the last start of the unit, not those of earlier runs.
        before, journal = f"i=$({invocation_command(name)}); ", f"{journal} _SYSTEMD_INVOCATION_ID=$i"
    parts = [
        f"echo now=$(date +%s); systemctl show --no-pager --property=ActiveState --property=Result {name}",
        state_command(root),
        f"{newest_command(*checkpoints)} | base64 -w 0" if checkpoints else "true",
        f"{before}{shortened(journal)} | head -n {AT_MOST} | head -c {MOST_BYTES}",
    ]
    return f"; echo; echo {MARK}; ".join(parts)


def shortened(journal: str, seconds: int = JOURNAL_SECONDS) -> str:
    """Return a shell command that prints what journalctl does, with entries that are too long replaced by time and cursor.

    One entry may have a thousand fields of the same name, 16 MB as JSON. It is passed over like a line that is too long, so
    that it does not hide what comes after it.

    Args:
        journal: command of journalctl with AS_JSON.
        seconds: after which it ends with CUT where there is more.
    """
    # 124 and 137 are timeout's own; journalctl was then ended within an entry.
    told = f"{{ timeout -k 1 {seconds} {journal} 2>/dev/null || [ $? -lt 124 ] || {{ echo; echo {CUT}; }}; }}"
    return f"{told} | LC_ALL=C awk -v MOST={MOST_ENTRY} {shlex.quote(SHORTEN)}"


def invocation_command(name: str) -> str:
    """Return a shell command that prints the id of a unit's last start.

    systemd forgets that of a unit that has ended, so it is then taken from the last line of one of the unit's processes: from
    a field that only the journal itself writes (systemd.journal-fields(7)).
    """
    last = f"journalctl --quiet --no-pager --lines=1 --output=json --output-fields=_SYSTEMD_INVOCATION_ID _SYSTEMD_UNIT={name}"
    field = "sed -n 's/.*\"_SYSTEMD_INVOCATION_ID\" *: *\"\\([0-9a-f]*\\)\".*/\\1/p'"
    return f"i=$(systemctl show --no-pager --property=InvocationID --value {name}); echo ${{i:-$({last} 2>/dev/null | {field})}}"


def newest_command(folder: str, glob: str) -> str:
    """Return a shell command that prints the path of the newest checkpoint; a folder that is one by its own name.

    It passes over what checkpoint_files passes over too: what was set aside, and what is still being written.
    """
    look = shlex.quote(f"ls -1td -- {pattern(folder, glob)}")
    aside = shlex.quote(f"{folder}/{checkpoint_files.SET_ASIDE}")
    others = f"grep -avF -e {aside} | grep -av {shlex.quote(re.escape(checkpoint_files.UNFINISHED) + '$')}"
    return f"timeout -k 1 {SECONDS} sh -c {look} 2>/dev/null | {others} | head -n 1 | head -c 4096"


def state_command(root: str) -> str:
    """Return a shell command that prints a node's state.json as Base64, and ``-`` where it cannot be read.

    The file is the job's user's. Without following a link and without waiting for who may write into a FIFO, dd reads at
    most so much of it. Its folder lies in one of root's.
    """
    path = shlex.quote(f"{root}/{supervisor_state.FILE}")
    blocks = supervisor_state.MOST_BYTES // BLOCK + 1
    read = f"timeout -k 1 {SECONDS} dd if={path} iflag=nofollow,nonblock bs={BLOCK} count={blocks} status=none 2>/dev/null | base64 -w 0"
    there = f"timeout -k 1 {SECONDS} test -e {path} || test -L {path}"
    return f's=$({read}); if [ -z "$s" ] && {{ {there}; }}; then s=-; fi; echo "$s"'


def parse_state(text: str) -> tuple[dict[str, t.Any], str]:
    """Return the state from what the command printed, and a sentence where the file is not what a supervisor writes."""
    text = text.strip()
    if not text:
        return {}, ""  # a job that was never started has none
    try:
        content = base64.b64decode(text, validate=True).decode("utf-8", "replace")
    except ValueError:
        return {}, supervisor_state.sentence("state.json is no file that can be read")
    return supervisor_state.parse(content)


def pattern(folder: str, glob: str) -> str:
    """Return a pattern of file names for the shell, in which nothing but the wildcards has a meaning."""
    wild = "".join(character if character in "*?[]!^-" else shlex.quote(character) for character in glob)
    return f"{shlex.quote(folder)}/{wild}"


@dataclass(frozen=True)
class Look:
    """What one look at a node saw.

    Attributes:
        active: ActiveState of the unit.
        result: Result of the unit.
        state: the supervisor's state.
        odd: why there is no state although there is a file, as a sentence; else empty.
        lines: new lines.
        cursor: where the next look goes on; empty where there was no line.
        checkpoint: path of the newest checkpoint, or an empty string.
        more: whether there may be more lines already; without any lines, another look need not come further.
        now: the node's clock when the look began, whole seconds since 1970; 0 where it is not known.
    """

    active: str
    result: str
    state: dict[str, t.Any] = field(default_factory=dict)
    odd: str = ""
    lines: list[Line] = field(default_factory=list)
    cursor: str = ""
    checkpoint: str = ""
    more: bool = False
    now: int = 0


def parse(host: str, output: str) -> Look | None:
    """Return what the command's output says, None where it is not whole."""
    parts = output.split(MARK, 3)
    if len(parts) < 4:
        return None
    show = dict(line.strip().split("=", 1) for line in parts[0].splitlines() if "=" in line)
    state, odd = parse_state(parts[1])
    lines, cursor, whole = entries(host, parts[3])
    more = len(lines) >= AT_MOST or not whole
    now = int(show["now"]) if re.fullmatch(r"[0-9]{1,11}", show.get("now", "")) else 0
    return Look(show.get("ActiveState", ""), show.get("Result", ""), state, odd, lines, cursor, decoded(parts[2]), more, now)


def entries(host: str, output: str) -> tuple[list[Line], str, bool]:
    """Return the lines of ``journalctl --output=json``, the last one's cursor, and whether none was cut.

    Each entry is a line of its own, whatever a job has printed; only journald writes fields that begin with ``_``.
    """
    lines, cursor, whole = [], "", True
    for text in output.split("\n"):  # splitlines knows more ends of lines than JSON does
        if not text.strip():
            continue
        try:
            entry = hostile_input.check(hostile_input.parse_json(text), ENTRY)
        except hostile_input.Odd:
            whole = False
            continue
        cursor = entry["__CURSOR"]
        lines.append(Line(int(entry["__REALTIME_TIMESTAMP"]) / 1e6, host, message(entry.get("MESSAGE", ""))))
    return lines, cursor, whole


def decoded(text: str) -> str:
    """Return a printable line from Base64."""
    try:
        return hostile_input.printable(base64.b64decode(text).decode("utf-8", "replace").strip(), 4096)
    except ValueError:
        return ""


def is_byte(value: t.Any) -> bool:
    """Return whether a value is a number that a byte can have; true is a number to Python."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 256


def message(value: t.Any) -> str:
    """Return the text of a journal's MESSAGE, which anyone in the unit can have written.

    Text; a list of bytes where it is not plain text; a list of these where an entry has several; null where it is long.
    """
    if value is None:
        return "(a line of more than 4096 bytes; journalctl on the node shows it)"
    if isinstance(value, list) and value and all(is_byte(item) for item in value):
        value = bytes(value).decode("utf-8", "replace")
    elif isinstance(value, list):
        value = " ".join(message(item) for item in value[:10] if not isinstance(item, list) or all(is_byte(byte) for byte in item))
    return hostile_input.printable(value, MOST_WIDTH) if isinstance(value, str) else ""


def merged(looks: t.Iterable[Look], rank: int | None = None) -> list[Line]:
    """Return the lines of several looks by time; with a rank, only the lines of this one."""
    lines = [line for look in looks for line in look.lines if rank is None or line.rank == rank]
    return sorted(lines, key=lambda line: line.time)


def shown(line: Line, width: int) -> str:
    """Return a line for a person: time, host, and the text that begins with the rank."""
    clock = time.strftime("%H:%M:%S", time.localtime(line.time))
    return f"{clock} {line.host:{width}} {line.text}"
