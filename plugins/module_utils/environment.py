# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Python environment with torch on a node: complete, or not used at all.

An environment is built in a folder that is named after what it was asked to hold. A record is written last; without it
the folder is what an interrupted installation left, and is removed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import typing as t
import zipfile

from ansible_collections.onprem.torch.plugins.module_utils import secret_texts

RECORD = ".onprem-torch.json"


def record_of(environment: str) -> dict[str, t.Any]:
    """Return the record of a complete environment; empty where there is none."""
    return read_json(os.path.join(environment, RECORD))


def read_json(path: str) -> dict[str, t.Any]:
    """Return the mapping that a file holds; empty where there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def existing_record(root: str, environment: str) -> str:
    """Return the file that keeps what was found in an environment of somebody else, outside of it."""
    name = hashlib.sha256(os.path.abspath(environment).encode()).hexdigest()[:12]
    return os.path.join(root, "existing", f"{name}.json")


def existing_stamp(environment: str, driver: str) -> list[t.Any]:
    """Return what changes whenever an environment's torch, Python or NCCL does, or the driver."""
    folder = os.path.join(environment, "lib/python3*/*-packages")
    paths = [os.path.join(environment, "bin/python3"), *glob.glob(os.path.join(folder, "torch/version.py"))]
    paths += glob.glob(os.path.join(folder, "nvidia_nccl_cu*.dist-info"))
    return [driver, *([path, os.stat(path).st_mtime_ns] for path in sorted(paths) if os.path.exists(path))]


def distributions(environment: str) -> list[str]:
    """Return NAME-VERSION of every distribution that is installed in an environment."""
    found = glob.glob(os.path.join(environment, "lib/python3*/site-packages/*.dist-info"))
    return sorted(os.path.basename(path)[: -len(".dist-info")] for path in found)


def differences(environment: str, requirements: t.Sequence[str], python: str) -> list[str]:
    """Return why an environment is not what is wanted, empty where it is.

    Args:
        environment: its folder.
        requirements: what was asked for, as pip requirements.
        python: version of the Python that it has to hold.
    """
    record = record_of(environment)
    if not record:
        there = "is incomplete" if os.path.isdir(environment) else "does not exist"
        return [f"{environment} {there}"]
    found = []
    if record.get("requirements") != list(requirements):
        found.append(f"it holds {' '.join(record.get('requirements', []))}")
    if os.stat(environment).st_mode & 0o005 != 0o005:
        found.append(f"{environment} was built so that only root can read it (umask)")
    if record.get("python") != python:
        found.append(f"it was made with Python {record.get('python')}, and {python} is there now")
    lost = set(record.get("distributions", [])) - set(distributions(environment))
    if lost:
        found.append(f"packages were changed or removed by hand: {', '.join(sorted(lost))}")
    return found


def write_record(environment: str, requirements: t.Sequence[str], python: str, versions: t.Mapping[str, t.Any]) -> None:
    """Declare an environment complete. The record appears whole or not at all, and survives a power loss."""
    content = {
        "requirements": list(requirements),
        "python": python,
        "distributions": distributions(environment),
        "versions": versions,
    }
    write_atomically(os.path.join(environment, RECORD), json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_atomically(path: str, text: str, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one."""
    folder = os.path.dirname(path)
    handle, partial = tempfile.mkstemp(prefix=".", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), mode)
        os.rename(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def missing_wheels(wheels: t.Mapping[str, int], folder: str) -> list[str]:
    """Return the wheels (name → bytes) that are not in a folder of the node, or not whole."""
    return [
        name
        for name, size in wheels.items()
        if not os.path.isfile(os.path.join(folder, name)) or os.path.getsize(os.path.join(folder, name)) != size
    ]


def refused(text: str, credentials: t.Mapping[str, str]) -> tuple[str, str]:
    """Return the index that has refused its user and the status (401, 403), from what uv says in one line; empty for none.

    Some indexes, torch's own among them, answer 403 for what they do not have, so that it counts only where there is a user.
    """
    for url, words in re.findall(r"\((https?://[^)\s]+)\)([^()]*\(401|[^.()]*403 Forbidden)", text):
        plain = secret_texts.split_url(url)[0]
        if words.endswith("401"):
            return plain, "401"
        if secret_texts.with_credentials(plain, credentials) != plain:
            return plain, "403"
    return "", ""


def unpack_uv(folder: str, target: str) -> str:
    """Take the program uv out of its wheel in ``folder`` and put it at ``target``; return the target.

    Raises:
        FileNotFoundError: there is no such wheel.
    """
    wheels = sorted(glob.glob(os.path.join(folder, "uv-*.whl")))
    if not wheels:
        raise FileNotFoundError(f"no wheel of uv in {folder}")
    version = re.match(r"uv-([^-]+)-", os.path.basename(wheels[-1]))
    stamp = f"{target}-{version.group(1) if version else 'unknown'}"
    if not os.path.exists(stamp):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with zipfile.ZipFile(wheels[-1]) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/scripts/uv"))
            with archive.open(member) as source, open(f"{stamp}.partial", "wb") as output:
                shutil.copyfileobj(source, output)
        os.chmod(f"{stamp}.partial", 0o755)
        os.rename(f"{stamp}.partial", stamp)
    return stamp
