# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The control node's wheelhouse: downloaded once for the nodes' Python and platform, used by all nodes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import typing as t

# The oldest C library that today's wheels are built for (manylinux2014, PEP 599).
OLDEST_GLIBC_MINOR = 17


class WheelhouseError(Exception):
    """The wheels cannot be had; the message says why and what to do."""


def platforms(architecture: str, glibc: str) -> list[str]:
    """Return the platform tags that fit a node, newest first (PEP 600: every older glibc's wheels fit too)."""
    minor = int(glibc.split(".")[1]) if glibc.startswith("2.") else OLDEST_GLIBC_MINOR
    tags = [f"manylinux_2_{number}_{architecture}" for number in range(minor, OLDEST_GLIBC_MINOR - 1, -1)]
    return [*tags, f"manylinux2014_{architecture}", *(["manylinux1_x86_64"] if architecture == "x86_64" else [])]


def key(requirements: t.Sequence[str], platform: t.Mapping[str, str], indexes: t.Sequence[str]) -> str:
    """Return the name of the folder for a set of requirements on a platform."""
    minor = ".".join(str(platform["python"]).split(".")[:2])
    text = json.dumps([list(requirements), platform["architecture"], platform["glibc"], minor, list(indexes)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def command(
    folder: str, requirements: t.Sequence[str], platform: t.Mapping[str, str], index: str, extra: t.Sequence[str]
) -> list[str]:
    """Return the pip command that downloads wheels for a node into a folder."""
    minor = ".".join(str(platform["python"]).split(".")[:2])
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, "--only-binary=:all:"]
    # pip asks every index for every package, so one that cannot be reached must be given up quickly.
    words += ["--retries", "1", "--timeout", "10"]
    words += ["--implementation", "cp", "--python-version", minor]
    for tag in platforms(platform["architecture"], platform["glibc"]):
        words += ["--platform", tag]
    if index:
        words += ["--index-url", index]
    for url in extra:
        words += ["--extra-index-url", url]
    return [*words, *requirements, "uv"]


def provide(
    root: str, requirements: t.Sequence[str], platform: t.Mapping[str, str], index: str, extra: t.Sequence[str]
) -> tuple[str, dict[str, int]]:
    """Return the folder with all wheels and each wheel's size in bytes; download them where they are not there.

    Plays run a process per host; the first one downloads, the others wait for it.

    Raises:
        WheelhouseError: pip is missing or does not find a requirement.
    """
    root = os.path.expanduser(root)
    folder = os.path.join(root, key(requirements, platform, [index, *extra]))
    os.makedirs(root, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(folder):
            partial = f"{folder}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
            try:
                words = command(partial, requirements, platform, index, extra)
                answer = subprocess.run(words, capture_output=True, text=True, check=False)
            except OSError as error:
                raise WheelhouseError(f"pip cannot be started on the control node ({error})") from error
            if answer.returncode != 0:
                lines = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")] or ["no reason was given"]
                raise WheelhouseError(
                    f"the wheels for {' '.join(requirements)} cannot be downloaded on the control node "
                    f"({lines[-1].removeprefix('ERROR: ').rstrip('.')}); correct pytorch_version, pytorch_packages or pytorch_index_url"
                )
            os.rename(partial, folder)
    return folder, {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
