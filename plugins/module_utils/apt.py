# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""apt in pure functions: the files that describe a repository and its pins, and what dpkg's and apt's answers mean."""

from __future__ import annotations

import fnmatch
import re
import typing as t

# Above 1000 a pin also wins over an installed newer version (apt_preferences(5)), so that a downgrade is an edit.
PRIORITY = 1001


class Installed(t.NamedTuple):
    """A package as dpkg knows it.

    Attributes:
        version: its version.
        held: whether it is on hold.
        whole: whether it is completely installed (and not half-configured, say).
    """

    version: str
    held: bool
    whole: bool


def sources(repository: t.Mapping[str, str], keyring: str) -> str:
    """Return the deb822 source of a repository (sources.list(5)). A suite that ends in / has no components."""
    suite = repository.get("suite") or "/"
    components = "" if suite.endswith("/") else f"Components: {repository.get('components') or 'main'}\n"
    return f"Types: deb\nURIs: {repository['url']}\nSuites: {suite}\n{components}Signed-By: {keyring}\n"


def preferences(pins: t.Sequence[tuple[str, str]]) -> str:
    """Return the preferences that pin packages (patterns) to versions (patterns)."""
    return "\n".join(f"Package: {package}\nPin: version {version}\nPin-Priority: {PRIORITY}\n" for package, version in pins)


def matches(version: str, wanted: str) -> bool:
    """Return whether a version is the wanted one, a pattern such as ``580.159.03-*``; an empty one allows any."""
    return not wanted or fnmatch.fnmatchcase(version, wanted)


def parse_installed(text: str) -> dict[str, Installed]:
    """Return the installed packages from ``dpkg-query --show`` in FORMAT."""
    found = {}
    for line in text.splitlines():
        parts = line.split("\t")
        if len(parts) != 4 or parts[3] in ("not-installed", "config-files"):
            continue
        found[parts[0]] = Installed(parts[1], parts[2] == "hold", parts[3] == "installed")
    return found


FORMAT = "${Package}\\t${Version}\\t${db:Status-Want}\\t${db:Status-Status}\\n"


def parse_madison(text: str) -> dict[str, list[str]]:
    """Return the versions on offer by package from ``apt-cache madison``, newest first."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 3 and parts[1] not in found.setdefault(parts[0], []):
            found[parts[0]].append(parts[1])
    return found


def covered(installed: t.Mapping[str, Installed], patterns: t.Sequence[t.Mapping[str, t.Any]]) -> list[str]:
    """Return the installed packages that patterns of names and versions cover: what belongs together and is held."""
    return sorted(
        name
        for name, package in installed.items()
        if any(matches(package.version, rule["version"]) and any(fnmatch.fnmatchcase(name, entry) for entry in rule["packages"]) for rule in patterns)
    )


def update_error(text: str, url: str) -> str:
    """Return what is wrong with a repository, in words for a sentence, from what ``apt-get update`` printed."""
    if re.search(r"NO_PUBKEY|BADSIG|EXPKEYSIG|invalid signature|not signed|Missing key|Sub-process /usr/bin/sqv|couldn't be verified", text):
        return f"what {url} offers is not signed with the key in its keyring"
    found = re.search(r"(?:Err|E|W):.*?(Could not resolve|Could not connect|Connection refused|Connection timed out|Unable to connect|connection failed|404 +Not Found|Failed to fetch[^\n]*)", text, re.S)
    words = re.sub(r"\s+", " ", found.group(1)) if found else " ".join(text.split())[-200:]
    return f"{url} cannot be read ({words.strip().rstrip('.')})"


def install_error(text: str) -> str:
    """Return why ``apt-get install`` failed, in words for a sentence."""
    space = re.search(r"You don't have enough free space in ([^\n]*?)\.?\n", text + "\n")
    if space:
        return f"there is not enough free space in {space.group(1)}"
    unmet = re.search(r"following packages have unmet dependencies:\s*\n(.*?)(?:\nE:|\Z)", text, re.S)
    if unmet:
        return "packages do not fit together: " + "; ".join(" ".join(line.split()) for line in unmet.group(1).splitlines() if line.strip())[:400]
    lock = re.search(r"Could not get lock ([^\s.]+)[^\n]*", text)
    if lock:
        return f"another package manager holds {lock.group(1)}"
    errors = [line.strip() for line in text.splitlines() if line.startswith(("E:", "dpkg: error"))]
    return "; ".join(errors[-2:])[:400] or " ".join(text.split())[-300:]
