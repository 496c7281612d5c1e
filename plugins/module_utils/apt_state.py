# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What dpkg and apt say, parsed: installed packages, versions on offer, simulations, errors."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import secret_texts
from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text

# dpkg(1): every other state of a package is one that an interruption leaves behind.
WHOLE = frozenset({"installed", "config-files", "not-installed", "triggers-pending", "triggers-awaited"})
STATUS = "/var/lib/dpkg/status"
# apt takes the first pin that fits a version, in the order of the files' names: NVIDIA's own nvidia-driver-pinning-580 lays
# down a file that prefers the newest release of a branch.
PREFERENCES = "etc/apt/preferences.d/00-onprem-torch-{name}.pref"
# Archives that package NVIDIA's driver themselves (the Origin in their Release).
DISTRIBUTIONS = "o=/^(Debian|Ubuntu|LP-PPA-)/"
Installed = t.Dict[str, t.Dict[str, str]]


def parse_status(text: str) -> Installed:
    """Return ``want``, ``flag``, ``state`` and ``version`` by package from /var/lib/dpkg/status.

    A package of several architectures is listed once for each; the first one that is installed counts.
    """
    found: Installed = {}
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE))
        words = fields.get("Status", "").split()
        if len(words) != 3 or "Package" not in fields:
            continue
        entry = {"want": words[0], "flag": words[1], "state": words[2], "version": fields.get("Version", "")}
        if fields["Package"] not in found or entry["state"] == "installed":
            found[fields["Package"]] = entry
    return found


def broken(packages: Installed) -> list[str]:
    """Return the packages that an interrupted dpkg left half done."""
    return sorted(name for name, entry in packages.items() if entry["state"] not in WHOLE or entry["flag"] != "ok")


def interrupted(root: str = "/") -> bool:
    """Return whether dpkg's journal holds work that was not finished."""
    folder = os.path.join(root, "var/lib/dpkg/updates")
    return os.path.isdir(folder) and any(name.isdigit() for name in os.listdir(folder))


def fits(version: str, wanted: str) -> bool:
    """Return whether a version is the wanted one, which may end in ``*``; an empty one fits all."""
    return not wanted or fnmatch.fnmatchcase(version, wanted)


def installed(packages: Installed, name: str) -> str:
    """Return the version of a package that is wholly installed, else an empty text."""
    entry = packages.get(name)
    return entry["version"] if entry and entry["state"] in WHOLE - {"config-files", "not-installed"} else ""


def lacking(packages: Installed, wanted: t.Sequence[t.Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the wanted packages that are not installed, or not at their version."""
    return [
        {"name": entry["name"], "version": entry["version"]}
        for entry in wanted
        if not installed(packages, entry["name"]) or not fits(installed(packages, entry["name"]), entry["version"])
    ]


def family(packages: Installed, pins: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, str]:
    """Return the installed packages that a pin names, each with the version that the first such pin gives; empty for any."""
    found: dict[str, str] = {}
    for pin in pins:
        for name in sorted(packages):
            if installed(packages, name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in pin["packages"]):
                found.setdefault(name, str(pin["version"]))
    return found


def replaced(packages: Installed, pins: t.Sequence[t.Mapping[str, t.Any]]) -> list[str]:
    """Return the packages left half done that a pin gives another version: they are replaced, not repaired."""
    return [
        name
        for name in broken(packages)
        if any(
            not fits(packages[name]["version"], str(pin["version"])) and any(fnmatch.fnmatchcase(name, pattern) for pattern in pin["packages"])
            for pin in pins
        )
    ]


def chosen(packages: Installed, patterns: t.Sequence[str]) -> Installed:
    """Return the packages whose names fit patterns, and all that an interruption left half done; not what is gone."""
    expression = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)")
    left = set(broken(packages))
    return {
        name: entry
        for name, entry in packages.items()
        if name in left or (installed(packages, name) and expression.match(name))
    }


def own_pins(root: str = "/", name: str = "*") -> list[str]:
    """Return the names of packages, with ``*`` for any text, that this collection pins and therefore holds.

    Args:
        root: folder that stands for ``/``.
        name: set of packages; all of them without it.
    """
    found: list[str] = []
    for path in sorted(glob.glob(os.path.join(root, PREFERENCES.format(name=name)))):
        for line in re.findall(r"^Package: (.*)$", read_text(path), re.MULTILINE):
            found += line.split()
    return found


def foreign_holds(
    packages: Installed, wanted: t.Sequence[t.Mapping[str, str]], pins: t.Sequence[t.Mapping[str, t.Any]], own: t.Sequence[str]
) -> list[tuple[str, str, str]]:
    """Return name, version and wanted version of packages that somebody else holds at another version than is wanted.

    Args:
        packages: what is installed.
        wanted: packages that shall be there.
        pins: versions for packages that may come along.
        own: names of packages whose holds are this collection's.
    """
    versions = {**family(packages, pins), **{entry["name"]: entry["version"] for entry in wanted}}
    return [
        (name, packages[name]["version"], version)
        for name, version in sorted(versions.items())
        if installed(packages, name)
        and packages[name]["want"] == "hold"
        and not fits(packages[name]["version"], version)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in own)
    ]


def released(packages: Installed, pins: t.Sequence[t.Mapping[str, t.Any]], former: t.Sequence[str]) -> list[str]:
    """Return the packages on hold that a set has pinned formerly and does not any more, such as another line's toolkit."""
    mine = family(packages, pins)
    return [
        name
        for name, entry in sorted(packages.items())
        if entry["want"] == "hold" and name not in mine and any(fnmatch.fnmatchcase(name, pattern) for pattern in former)
    ]


def preferences(pins: t.Sequence[t.Mapping[str, t.Any]], refuse_distribution: bool = False) -> str:
    """Return the text of an apt_preferences(5) file: above 1000, so that downgrades are taken too.

    Packages that are held at whatever version they have get apt's usual priority: the file says whose holds they are.

    Args:
        pins: names and versions.
        refuse_distribution: keep the distribution's packages of these names away. They may have the same version, and what
            depends on exactly one revision cannot be installed where apt prefers another.
    """
    paragraphs = []
    for pin in pins:
        names = f"Package: {' '.join(pin['packages'])}\n"
        if refuse_distribution and pin["version"]:
            paragraphs.append(f"{names}Pin: release {DISTRIBUTIONS}\nPin-Priority: -1\n")
        paragraphs.append(f"{names}Pin: version {pin['version'] or '*'}\nPin-Priority: {1001 if pin['version'] else 500}\n")
    return "# Managed by onprem.torch.\n" + "\n".join(paragraphs)


def source(url: str, keyring: str) -> str:
    """Return the text of a deb822 source of a flat repository."""
    return f"# Managed by onprem.torch.\nTypes: deb\nURIs: {url}\nSuites: /\nSigned-By: {keyring}\n"


def place(url: str) -> str:
    """Return a repository's URL as apt prints it."""
    return re.sub(r"^file:/+", "file:/", url).rstrip("/")


def parse_madison(text: str, url: str = "") -> dict[str, list[str]]:
    """Return the versions on offer by package, newest first, from ``apt-cache madison``.

    Args:
        text: what it printed.
        url: of a repository. Of a package that it has, only its own versions count.
    """
    found: dict[str, list[str]] = {}
    own: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|")]
        if len(words) != 3:
            continue
        is_own = bool(url) and place(words[2].split()[0]) == place(url)
        for offer in (found, own) if is_own else (found,):
            if words[1] not in offer.setdefault(words[0], []):
                offer[words[0]].append(words[1])
    return {**found, **own}


def parse_simulation(text: str) -> tuple[dict[str, str], list[str]]:
    """Return what ``apt-get --simulate`` would install (package → version) and remove."""
    installs = {match.group(1): match.group(2) for match in re.finditer(r"^Inst (\S+) (?:\[[^]]*\] )?\((\S+)", text, re.MULTILINE)}
    removes = re.findall(r"^Remv (\S+)", text, re.MULTILINE)
    return {name.split(":")[0]: version for name, version in installs.items()}, [name.split(":")[0] for name in removes]


def parse_sizes(text: str) -> tuple[int, int]:
    """Return bytes to download and bytes on disk of what ``apt-cache show`` describes."""
    download = sum(int(size) for size in re.findall(r"^Size: (\d+)$", text, re.MULTILINE))
    on_disk = sum(int(size) * 1024 for size in re.findall(r"^Installed-Size: (\d+)$", text, re.MULTILINE))
    return download, on_disk


def complaint(text: str) -> str:
    """Return the reason in apt's output, shortened to one line: what could not be fetched or verified, and why."""
    lines = [line.strip() for line in text.splitlines()]
    failed = broken_scripts(text)
    if failed:
        return failed
    told = [line for line in lines if re.match(r"(E|W|Err):", line)]
    details = [
        line
        for line in lines
        if re.search(
            r"NO_PUBKEY|not signed|unauthenticated|Missing key|Could not (connect|resolve)|Connection (failed|refused|timed out)|"
            r"404|403|401|hash|Hash|Unable to connect|Signed-By|unmet|Depends:|held|No space",
            line,
        )
    ]
    chosen = (details or told or lines or ["no reason was given"])[:2]
    return secret_texts.redacted(" ".join(re.sub(r"^(E|W|Err):\d*\s*", "", line) for line in chosen))[:400].rstrip(".")


def broken_scripts(text: str) -> str:
    """Return which packages dpkg could not set up, and the log of the build where DKMS names one; empty where none failed."""
    names = sorted(set(re.findall(r"dpkg: error processing (?:package|archive) (\S+)", text)))
    if not names:
        return ""
    logs = re.findall(r"[Cc]onsult (/\S+\.log)", text)
    reason = f"a kernel module was not built, see {logs[0].rstrip('.')}" if logs else "their scripts or files fail"
    return f"dpkg cannot set up {', '.join(names)}: {reason}"


def lists_locked(text: str) -> bool:
    """Return whether C(apt-get update) gave up since another one was at work."""
    return bool(re.search(r"Could not get lock /var/lib/apt/lists|Unable to lock directory /var/lib/apt/lists", text))


def packages_locked(text: str) -> bool:
    """Return whether C(apt-get install) gave up, before it did anything, since another program was at work."""
    return bool(re.search(r"Could not get lock /var/(lib/dpkg|cache/apt)/|Unable to (acquire the dpkg|lock the administration)", text))


def refused(text: str) -> str:
    """Return the status with which a repository has refused its user (401, 403), empty where none has."""
    match = re.search(r"\b(401) +Unauthorized|\b(403) +Forbidden", text)
    return match.group(1) or match.group(2) if match else ""


def failed_update(text: str, url: str) -> bool:
    """Return whether ``apt-get update`` of one repository failed; it exits 0 and warns where it keeps older lists."""
    return bool(re.search(r"^(E:|Err:|W: (Failed to fetch|GPG error|An error occurred|The repository))", text, re.MULTILINE)) or (
        "NO_PUBKEY" in text and url in text
    )


def unreadable_sources(text: str) -> bool:
    """Return whether apt could not read a node's sources at all, and therefore knows no package."""
    return "The list of sources could not be read" in text
