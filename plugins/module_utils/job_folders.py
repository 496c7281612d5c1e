# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The folders of a job on a node, and its releases: staged whole, switched by one rename.

    ROOT/releases/ID/source/…, programs of ours, release.json         read-only, root's
    ROOT/releases/ID/unit, environment     the unit and its EnvironmentFile as this release ran the last time
    ROOT/releases/history.json             which release was started when, oldest first
    ROOT/current      link to the release that the unit runs
    ROOT/work         working directory; holds a link to each entry of the current source
    ROOT/state, ROOT/cache, CHECKPOINTS, LOGS                         the job user's
"""

from __future__ import annotations

import json
import os
import shutil
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import environment, launch, source_tree

RECORD = "release.json"
HISTORY = "history.json"
# Starts that are remembered.
STARTS = 50
SET_ASIDE = "set-aside-"


def release_folder(root: str, release: str) -> str:
    """Return the folder of a release."""
    return os.path.join(root, "releases", release)


def staged(root: str, release: str) -> dict[str, t.Any]:
    """Return the record of a release that is whole: its source has the hash that the record tells. Else empty."""
    folder = release_folder(root, release)
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as stream:
            record = json.load(stream)
    except (OSError, ValueError):
        return {}
    return record if record.get("source_hash") == source_hash(folder) else {}


def source_hash(folder: str) -> str:
    """Return the hash of a release's source; empty where there is none."""
    try:
        return source_tree.tree_hash(source_tree.files(os.path.join(folder, "source")))
    except (OSError, source_tree.SourceError):
        return ""


def stage(root: str, release: str, archive: str, remote: str, programs: t.Mapping[str, str], expected: str) -> None:
    """Put a release into its folder, whole or not at all.

    Args:
        root: the job's folder.
        release: id of the release.
        archive: archive of the source on the node; empty where the source lies on the nodes already.
        remote: path of such a source.
        programs: name and text of each file that lies beside the source.
        expected: hash that the source must have; empty for a source that lies on the nodes.

    Raises:
        source_tree.SourceError: what was unpacked is not what was packed.
    """
    folder = release_folder(root, release)
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    source = os.path.join(partial, "source")
    if archive:
        os.makedirs(source)
        source_tree.unpack(archive, source)
    else:
        os.symlink(remote, source)
    for name, text in programs.items():
        environment.write_atomically(os.path.join(partial, name), text)
    found = source_hash(partial)
    if not found or (expected and found != expected):
        raise source_tree.SourceError(f"the source has the hash {found[:12] or 'none'}, but {expected[:12] or 'one'} was expected")
    environment.write_atomically(os.path.join(partial, RECORD), json.dumps({"release": release, "source_hash": found}) + "\n")
    os.sync()
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


def current(root: str) -> str:
    """Return the id of the release that the unit runs, or an empty string."""
    try:
        return os.path.basename(os.readlink(os.path.join(root, "current")))
    except OSError:
        return ""


def switch(root: str, release: str) -> None:
    """Make a staged release the current one and link its entries into the working directory."""
    link = os.path.join(root, "current")
    partial = f"{link}.partial"
    if os.path.lexists(partial):
        os.unlink(partial)
    os.symlink(os.path.join("releases", release), partial)
    os.rename(partial, link)
    link_entries(root)


def link_entries(root: str) -> None:
    """Give the working directory a link to each entry of the current source, so that relative paths find them.

    Files that the job itself wrote there are left alone.
    """
    work = os.path.join(root, "work")
    source = os.path.join(root, "current", "source")
    for name in os.listdir(work):
        path = os.path.join(work, name)
        if os.path.islink(path) and os.readlink(path).startswith(source + os.sep):
            os.unlink(path)
    for name in sorted(os.listdir(source)):
        path = os.path.join(work, name)
        if not os.path.lexists(path):
            os.symlink(os.path.join(source, name), path)


def prune(root: str, keep: t.Collection[str], count: int) -> None:
    """Remove the oldest releases beyond ``count``, never one of ``keep``."""
    folder = os.path.join(root, "releases")
    releases = [name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))]
    releases.sort(key=lambda name: os.path.getmtime(os.path.join(folder, name)), reverse=True)
    for name in releases[count:]:
        if name not in keep:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def keep_run(root: str, release: str, unit: str, environment_text: str) -> None:
    """Keep beside a release the unit and environment that it runs with, for a roll-back."""
    folder = release_folder(root, release)
    environment.write_atomically(os.path.join(folder, "unit"), unit)
    environment.write_atomically(os.path.join(folder, "environment"), environment_text, 0o600)


def kept_run(root: str, release: str) -> tuple[str, str] | None:
    """Return unit and environment of a release that ran before, None where they are gone."""
    try:
        texts = []
        for name in ("unit", "environment"):
            with open(os.path.join(release_folder(root, release), name), encoding="utf-8") as stream:
                texts.append(stream.read())
    except OSError:
        return None
    return texts[0], texts[1]


def history(root: str) -> list[dict[str, t.Any]]:
    """Return the starts, oldest first: C(release), C(time), C(back) (whether by a roll-back), and kept_place."""
    try:
        with open(os.path.join(root, "releases", HISTORY), encoding="utf-8") as stream:
            starts = json.load(stream)
    except (OSError, ValueError):
        return []
    return [{**start, **kept_place(root, start["release"])} for start in starts]


def kept_place(root: str, release: str) -> dict[str, t.Any]:
    """Return whether a release can be gone back to (C(kept)), and where its checkpoints lay (C(checkpoints))."""
    kept = kept_run(root, release)
    options = launch.supervisor_options(kept[0]) if kept else {}
    checkpoints = [options["checkpoint-dir"], options.get("checkpoint-glob", "")] if options.get("checkpoint-dir") else []
    return {"kept": kept is not None, "checkpoints": checkpoints}


def remember_start(root: str, release: str, back: bool) -> None:
    """Add a start to the history; one of the same release again is no news."""
    starts = [{key: start[key] for key in ("release", "time", "back")} for start in history(root)]
    if starts and starts[-1]["release"] == release:
        return
    starts.append({"release": release, "time": time.time(), "back": back})
    environment.write_atomically(os.path.join(root, "releases", HISTORY), json.dumps(starts[-STARTS:]) + "\n")


def previous(starts: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    """Return the release to go back to: the one that ran before the newest. Going back twice leads to the same one."""
    forward = [index for index, start in enumerate(starts) if not start["back"]]
    if not forward:
        return ""
    newest = starts[forward[-1]]["release"]
    return next((start["release"] for start in reversed(starts[: forward[-1]]) if start["release"] != newest), "")


def checkpoints(folder: str) -> list[str]:
    """Return the names in the checkpoint folder that belong to the run, not to earlier ones."""
    if not folder or not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith(SET_ASIDE))


def set_aside(folder: str, names: t.Sequence[str]) -> None:
    """Move names of the checkpoint folder into a folder of their own inside it, so that a mount point works too.

    The folder may be shared: a name that another node has moved already is no error.
    """
    if not names:
        return
    target = os.path.join(folder, SET_ASIDE + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    os.makedirs(target, exist_ok=True)
    for name in names:
        try:
            os.rename(os.path.join(folder, name), os.path.join(target, name))
        except FileNotFoundError:
            continue


def finished(root: str, release: str) -> bool:
    """Return whether the supervisor has marked this release as done."""
    try:
        with open(os.path.join(root, "state", "done"), encoding="utf-8") as stream:
            return bool(json.load(stream).get("release") == release)
    except (OSError, ValueError):
        return False
