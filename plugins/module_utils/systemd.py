# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Words as systemd reads them (systemd.service(5), "Command lines"; systemd.exec(5), "EnvironmentFile")."""

from __future__ import annotations

import re
import typing as t

PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


def quote(word: str) -> str:
    """Return one word of a command line so that systemd passes exactly it."""
    if PLAIN.fullmatch(word):
        return word
    return f'"{escape(word).replace("$", "$$")}"'


def escape(text: str) -> str:
    """Return a text as it stands between double quotes: specifiers doubled, nothing that ends the quotes or the line."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return text


def command(words: t.Iterable[t.Any]) -> str:
    """Return a command line of words."""
    return " ".join(quote(str(word)) for word in words)


def assignment(name: str, value: str) -> str:
    """Return a line of Environment= for a unit: percent signs are specifiers there."""
    return f'"{name}={escape(value)}"'


def environment_file(values: t.Mapping[str, str]) -> str:
    """Return the text of an environment file; values may hold anything but line breaks are kept inside the quotes."""
    lines = []
    for name, value in sorted(values.items()):
        escaped = re.sub(r'(["\\`$])', r"\\\1", value)
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)
