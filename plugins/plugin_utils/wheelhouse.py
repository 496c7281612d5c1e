# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control node's wheelhouse: downloaded once for the nodes' Python and platform, used by all nodes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import secret_texts

# The oldest C library that today's wheels are built for (manylinux2014, PEP 599).
OLDEST_GLIBC_MINOR = 17
# The names of wheels (PEP 427, PEP 440). An index chooses them, and root of the nodes handles files by these names.
NAME = re.compile(r"[A-Za-z0-9_.+!-]+\.whl")


class WheelhouseError(Exception):
    """The wheels cannot be had; the message says why and what to do."""


class Wanted(t.NamedTuple):
    """What the wheels are for.

    Attributes:
        requirements: requirements in pip's syntax; none where the nodes fetch for themselves.
        platform: C(architecture), C(glibc) and C(python) of the nodes.
        index: package index; empty for PyPI.
        extra: further indexes.
        constraints: requirements that limit versions and ask for nothing.
        lock: text of a requirements file with a hash for every package, which replaces the requirements; empty for none.
        credentials: C(user:password) of indexes by URL. The URLs themselves have none.
    """

    requirements: tuple[str, ...]
    platform: t.Mapping[str, str]
    index: str = ""
    extra: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    lock: str = ""
    credentials: t.Mapping[str, str] = {}

    @property
    def secrets(self) -> set[str]:
        """Return all texts by which the credentials could show."""
        return set().union(*(secret_texts.of_userinfo(userinfo) for userinfo in self.credentials.values()))


def wanted_of(arguments: t.Mapping[str, t.Any], credentials: t.Mapping[str, str] | None = None) -> Wanted:
    """Return what the control node downloads for the arguments of pytorch_environment.

    With the source C(index) the nodes fetch for themselves and get uv alone, which comes from the same index: a cluster with
    a mirror asks nobody else.
    """
    index = str(arguments.get("index_url") or "")
    if arguments.get("source", "wheelhouse") != "wheelhouse":
        return Wanted((), arguments["platform"], index, credentials=credentials or {})
    return Wanted(
        tuple(arguments["requirements"]),
        arguments["platform"],
        index,
        tuple(arguments.get("extra_index_urls") or []),
        tuple(arguments.get("constraints") or []),
        str(arguments.get("lock") or ""),
        credentials or {},
    )


def platforms(architecture: str, glibc: str) -> list[str]:
    """Return the platform tags that fit a node, newest first (PEP 600: every older glibc's wheels fit too)."""
    minor = int(glibc.split(".")[1]) if glibc.startswith("2.") else OLDEST_GLIBC_MINOR
    tags = [f"manylinux_2_{number}_{architecture}" for number in range(minor, OLDEST_GLIBC_MINOR - 1, -1)]
    return [*tags, f"manylinux2014_{architecture}", *(["manylinux1_x86_64"] if architecture == "x86_64" else [])]


def key(wanted: Wanted) -> str:
    """Return the name of the folder for a set of wheels."""
    platform = wanted.platform
    minor = ".".join(str(platform["python"]).split(".")[:2])
    made_of: list[t.Any] = [list(wanted.requirements), platform["architecture"], platform["glibc"], minor, [wanted.index, *wanted.extra]]
    made_of += [wanted.constraints, wanted.lock] if wanted.constraints or wanted.lock else []
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def command(folder: str, wanted: Wanted) -> list[str]:
    """Return the pip command that downloads wheels for a node into a folder, without what to download."""
    minor = ".".join(str(wanted.platform["python"]).split(".")[:2])
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, "--only-binary=:all:"]
    # pip asks every index for every package, so one that cannot be reached must be given up quickly.
    words += ["--retries", "1", "--timeout", "10"]
    words += ["--implementation", "cp", "--python-version", minor]
    for tag in platforms(wanted.platform["architecture"], wanted.platform["glibc"]):
        words += ["--platform", tag]
    return words


def environment(wanted: Wanted) -> dict[str, str]:
    """Return what pip is told of indexes. Everybody can read a command line, but nobody else an environment."""
    urls = [secret_texts.with_credentials(url, wanted.credentials) for url in wanted.extra]
    index = secret_texts.with_credentials(wanted.index, wanted.credentials)
    return {
        **({"PIP_INDEX_URL": index} if index else {}),
        **({"PIP_EXTRA_INDEX_URL": " ".join(urls)} if urls else {}),
        "PIP_NO_INPUT": "1",  # a refused user is an error, no question
    }


def download(folder: str, wanted: Wanted) -> None:
    """Download the wheels, and uv, which installs them on the nodes.

    Raises:
        WheelhouseError: pip is missing, does not find a requirement, or finds another hash than the lock's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        calls = [["uv"]]
        if wanted.lock:
            calls.insert(0, ["--require-hashes", "--requirement", write(scratch, "lock.txt", wanted.lock)])
        elif wanted.requirements:
            limits = ["--constraint", write(scratch, "constraints.txt", "\n".join(wanted.constraints) + "\n")] if wanted.constraints else []
            calls[0] = [*limits, *wanted.requirements, "uv"]
        for what in calls:
            # Only pip's log tells that an index has refused it.
            log = os.path.join(scratch, "pip.log")
            words = [*command(folder, wanted), "--log", log, *what]
            try:
                answer = subprocess.run(
                    words, capture_output=True, text=True, check=False, env={**os.environ, **environment(wanted)}, stdin=subprocess.DEVNULL
                )
            except OSError as error:
                raise WheelhouseError(f"pip cannot be started on the control node ({error})") from error
            if answer.returncode != 0:
                sentence = refused(read(log), wanted) or reason(answer.stderr, wanted)
                raise WheelhouseError(secret_texts.masked(secret_texts.redacted(sentence), wanted.secrets, secret_texts.HIDDEN))


def write(folder: str, name: str, text: str) -> str:
    """Write a file and return its path."""
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
    return path


def read(path: str) -> str:
    """Return the text of a file, empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def refused(log: str, wanted: Wanted) -> str:
    """Return the sentence for an index that has refused the user, empty where none has.

    Some indexes, torch's own among them, answer 403 for every package that they do not have; so without a user that says
    nothing.
    """
    for url, status in re.findall(r"Could not fetch URL (\S+?): (40[13]) ", log):
        plain = re.sub(r"//[^/]*@", "//", url)
        index = next((place for place in (wanted.index, *wanted.extra) if place and plain.startswith(place.rstrip("/") + "/")), "")
        known = secret_texts.with_credentials(index, wanted.credentials) != index
        if index and (known or status == "401"):
            return refusal(index, status, known, "pytorch_index_url" if index == wanted.index else "pytorch_extra_index_urls")
    return ""


def refusal(index: str, status: str, known: bool, variable: str) -> str:
    """Return the sentence for an index that refuses the user."""
    if status == "403":
        return f"the index {index} refuses access to the user of {variable} (403); let that user read it, or give another one"
    if known:
        return f"the index {index} refuses the user or password of {variable} (401); correct them"
    return f"the index {index} wants a user and password (401); put them into {variable}, as in https://USER:PASSWORD@HOST/simple"


def reason(text: str, wanted: Wanted) -> str:
    """Return the sentence for pip's complaint."""
    if "DO NOT MATCH THE HASHES" in text:
        names = [line.split()[0] for line in text.splitlines() if " from " in line and "(from" in line]
        return (
            f"{', '.join(names) or 'a wheel'} has another hash than pytorch_lock says, so nothing was installed; "
            "find out who changed it, and make the lock anew only if you trust it"
        )
    if "[Errno 28]" in text:
        return (
            f"the control node has no room for the wheels, in pytorch_wheelhouse or in its temporary folder {tempfile.gettempdir()}; "
            "free some space, set pytorch_wheelhouse to a larger file system, or set TMPDIR"
        )
    # pip warns of an index that it cannot reach, and then finds no version there.
    lost = re.findall(r"connection broken by '(.*?)'?\)?': /", text)
    if lost and "(from versions: none)" in text:
        places = ", ".join([wanted.index or "https://pypi.org/simple", *wanted.extra])
        why = lost[-1].rsplit(": ", 1)[-1].strip("')\" ")
        return (
            f"an index of wheels cannot be reached from the control node ({why}), of {places}; "
            "repair its network or proxy (HTTPS_PROXY), or set cluster_mirror or pytorch_index_url to one that it reaches"
        )
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or ["no reason was given"]
    what = "the lock" if wanted.lock else " ".join(wanted.requirements) or "uv"
    if "No matching distribution found for uv" in text:
        return f"{wanted.index or 'PyPI'} has no uv, with which the nodes install wheels; add it there, or set pytorch_index_url"
    variables = "pytorch_lock" if wanted.lock else "pytorch_version, pytorch_packages, pytorch_constraints"
    return (
        f"the wheels for {what} cannot be downloaded on the control node "
        f"({lines[-1].removeprefix('ERROR: ').rstrip('.')}); correct {variables} or pytorch_index_url"
    )


def batches(sizes: t.Mapping[str, int], limit: int = 512 * 1024**2) -> list[list[str]]:
    """Return the names in groups of at most so many bytes, so that a login user's temporary folder need not hold all at once.

    A file that is larger is a group of its own.
    """
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        room -= size
        if room < 0:
            groups.append([])
            room = limit - size
        groups[-1].append(name)
    return groups


def provide(root: str, wanted: Wanted) -> tuple[str, dict[str, int]]:
    """Return the folder with all wheels and each wheel's size in bytes; download them where they are not there.

    Plays run a process per host; the first one downloads, the others wait for it.

    Raises:
        WheelhouseError: the wheels cannot be had.
    """
    root = os.path.expanduser(root)
    folder = os.path.join(root, key(wanted))
    os.makedirs(root, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(folder):
            partial = f"{folder}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
            download(partial, wanted)
            wheels_in(partial)
            os.rename(partial, folder)
    return folder, wheels_in(folder)


def wheels_in(folder: str) -> dict[str, int]:
    """Return each wheel of a folder and its size in bytes.

    Raises:
        WheelhouseError: something else lies there.
    """
    names = sorted(os.listdir(folder))
    strange = [name for name in names if not NAME.fullmatch(name)]
    if strange:
        raise WheelhouseError(
            f"{folder} holds {strange[0]!r}, but names of wheels were expected, of letters, digits and _ . + ! -; "
            "find out which index gave it this name (pytorch_index_url, pytorch_extra_index_urls) and remove the folder"
        )
    return {name: os.path.getsize(os.path.join(folder, name)) for name in names}
