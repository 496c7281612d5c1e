# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which repositories a node's apt sources name, and by what they are signed (sources.list(5), both formats)."""

from __future__ import annotations

import glob
import os
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text


class Source(t.NamedTuple):
    """A repository that a file names.

    Attributes:
        path: the file.
        url: of the repository, with a slash at its end, as apt compares it.
        suite: of it, C(/) for a flat one.
        signed_by: its keyring, or whatever else the file says; empty where it says nothing.
    """

    path: str
    url: str
    suite: str
    signed_by: str


def slashed(url: str) -> str:
    """Return a URL with one slash at its end."""
    return url.rstrip("/") + "/"


def parse_list(path: str, text: str) -> list[Source]:
    """Return the sources of a file in one-line format: ``deb [option=value …] URL suite component…``."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)", line)
        if match:
            options = dict(word.partition("=")[::2] for word in (match.group(1) or "").split())
            found.append(Source(path, slashed(match.group(2)), match.group(3), options.get("signed-by", "")))
    return found


def parse_deb822(path: str, text: str) -> list[Source]:
    """Return the sources of a file in deb822 format, where a field may go on in lines that begin with a space."""
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        fields = {name.lower(): value.strip() for name, value in re.findall(r"^([\w-]+):((?:.*)(?:\n[ \t].*)*)", paragraph, re.MULTILINE)}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        for url in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                found.append(Source(path, slashed(url), suite, fields.get("signed-by", "")))
    return found


def collect(root: str = "/") -> list[Source]:
    """Return all sources of a node."""
    folder = os.path.join(root, "etc/apt")
    found = []
    for path in [os.path.join(folder, "sources.list"), *sorted(glob.glob(os.path.join(folder, "sources.list.d", "*.list")))]:
        found += parse_list(path, read_text(path))
    for path in sorted(glob.glob(os.path.join(folder, "sources.list.d", "*.sources"))):
        found += parse_deb822(path, read_text(path))
    return found


def flat(sources: t.Sequence[Source], url: str, own: str) -> list[Source]:
    """Return the sources of others that name a flat repository, for which apt wants one keyring in all of them.

    Args:
        sources: all of a node.
        url: of the repository.
        own: file of this collection.
    """
    return [entry for entry in sources if entry.url == slashed(url) and entry.suite == "/" and entry.path != own]
