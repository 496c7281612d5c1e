# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The folders of a job on a node, and its releases: staged whole, switched by one rename.

    ROOT/releases/ID/source/…, programs of ours, release.json         root's, for root and the job's user to read
    ROOT/releases/ID/unit, environment     the unit and its EnvironmentFile as this release ran the last time (0600)
    ROOT/releases/history.json             which release was started when, oldest first
    ROOT/current      link to the release that the unit runs
    ROOT/work         working directory; holds a link to each entry of the current source
    ROOT/state, ROOT/cache, CHECKPOINTS, LOGS                         the job user's

ROOT may lie in a folder of a user's, who can give its name to another folder. So root works in ``ROOT`` as it was opened
(safe_files.pinned), and believes what lies in ``releases`` only where nobody else can have written it. What happens in the job
user's folders happens as that user (safe_files.as_user).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import (
    checkpoint_files,
    environment,
    folder_acl,
    hostile_input,
    launch,
    safe_files,
    source_tree,
)

RECORD = "release.json"
HISTORY = "history.json"
# What the folder of a release is called until it is whole, and while it is removed; a killed run leaves either.
PARTIAL = ".partial"
GONE = ".gone"
# The name of a release (plan.digest), and what else has a name in its folder: files that are written (environment.write_atomically),
# and files that a network file system keeps while somebody reads them.
RELEASE = re.compile(r"[0-9a-f]+")
FILES = re.compile(re.escape(HISTORY) + r"|\.[a-z0-9_]{8}|\.nfs[0-9a-f]+")
# Starts that are remembered.
STARTS = 50
# Seconds for what happens in the folders of the job's user, which may lie on a slow network file system.
SECONDS = 120.0
# Seconds for removing what is in one of them, such as a cache.
REMOVAL_SECONDS = 1800.0


@contextlib.contextmanager
def opened_releases(root: str) -> t.Iterator[str]:
    """Yield a path that leads to a job's releases, in which nobody but root can have written, and nothing but releases lies.

    Whoever owns ROOT can give the name to another folder of root's, with what is others' in it.

    Raises:
        safe_files.Unsafe: others than root can write there, or something else lies there.
        OSError: there is no such folder.
    """
    with safe_files.pinned(root, "releases") as folder:
        if not safe_files.roots(os.stat(folder)):
            raise safe_files.Unsafe(f"{root}/releases can be written by others than root")
        for name in sorted(os.listdir(folder)):
            if not ours(folder, name):
                cure = f"move {root}/releases away if it is no folder of a job's, else move {name!r} out of it"
                raise safe_files.Unsafe(f"{root}/releases holds {name!r}, which is none of the product's", cure=cure)
        yield folder


def refuse_strangers(root: str, who: safe_files.Account | None) -> None:
    """Refuse a job's folder that somebody has made first, who could give the job other code then.

    Args:
        root: the job's folder; it need not be there.
        who: the job's user, None where it is yet to be made.

    Raises:
        safe_files.Unsafe: somebody else than root and the job's user can change it, or everybody can rename it.
        OSError: it cannot be looked at.
    """
    with contextlib.suppress(FileNotFoundError), safe_files.pinned(root) as job:
        whose = safe_files.strangers(job, os.stat(job), who)
        if whose:
            text = f"torchrun_root leads to {root}, which {whose}: whoever that is can give the job other code"
            mending = "" if whose.startswith("belongs") else f"take that right away (chmod go-w {root}), "
            raise safe_files.Unsafe(text, cure=f"{mending}remove it or name another folder")
    shared = safe_files.open_to_all(root)
    if shared:
        text = f"torchrun_root leads to {root}, but all users can rename what lies in {shared}, and so give the job other code"
        raise safe_files.Unsafe(text, cure=f"set its sticky bit (chmod +t {shared}) or name another folder")


def refuse_open(path: str, who: safe_files.Account | None) -> None:
    """Refuse a folder of the job's in which everybody can replace the job's files: a checkpoint is code to who loads it.

    Raises:
        safe_files.Unsafe: everybody can, there or in a folder above.
        OSError: it cannot be looked at.
    """
    try:
        shared = safe_files.open_to_all(path)
    except PermissionError:  # a user's private folder on a network file system
        shared = safe_files.as_user(who, lambda: safe_files.open_to_all(path))
    if shared:
        text = f"{path} is the job's to write, but all users can replace what lies in {shared}"
        raise safe_files.Unsafe(text, cure=f"take their right away (chmod o-w {shared}), set its sticky bit (chmod +t {shared}), or name another folder")


def ours(folder: str, name: str) -> bool:
    """Return whether an entry of an opened folder of releases was put there by the product, or is gone meanwhile."""
    path = os.path.join(folder, name)
    try:
        found = os.lstat(path)
        if not safe_files.roots(found):
            return False
        if stat.S_ISREG(found.st_mode):
            return bool(FILES.fullmatch(name))
        release, ending = os.path.splitext(name)
        if not stat.S_ISDIR(found.st_mode) or not RELEASE.fullmatch(release):
            return False
        return ending in (PARTIAL, GONE) or (not ending and recorded(path) == name)
    except FileNotFoundError:
        return not os.path.lexists(path)


def recorded(folder: str) -> str:
    """Return of which release a folder is, as root has written there; empty where nothing says it.

    Raises:
        FileNotFoundError: there is no record.
    """
    try:
        record = json.loads(safe_files.read_text(os.path.join(folder, RECORD), only_roots=True))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError):
        return ""
    return str(record.get("release", "")) if isinstance(record, dict) else ""


def discard(folder: str, name: str) -> None:
    """Remove a release, or what is left of one, from an opened folder; what cannot be removed stays.

    It is renamed first: of a killed removal there may be left what no longer says that it is a release.
    """
    gone = os.path.join(folder, os.path.splitext(name)[0] + GONE)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(os.path.join(folder, name), gone)
    shutil.rmtree(gone, ignore_errors=True)


def staged(root: str, release: str, who: safe_files.Account | None) -> dict[str, t.Any]:
    """Return the record of a release that is whole: its source has the hash that the record tells. Else empty.

    Raises:
        TimeoutError: a source that lies on the nodes was not read in time.
    """
    try:
        with opened_releases(root) as releases:
            folder = os.path.join(releases, release)
            record = environment.read_json(os.path.join(folder, RECORD))
            return record if record and record.get("source_hash") == source_hash(folder, who) else {}
    except TimeoutError:
        raise
    except (OSError, source_tree.SourceError, safe_files.Unsafe):
        return {}


def source_hash(folder: str, who: safe_files.Account | None) -> str:
    """Return the hash of a release's source.

    A source that lies on the nodes is anybody's, so it is read with the rights of the job's user.

    Raises:
        source_tree.SourceError: it is missing or cannot be read.
        TimeoutError: a source that lies on the nodes was not read in time.
        OSError: a source that was copied cannot be read.
    """
    source = os.path.join(folder, "source")
    if not os.path.islink(source):
        return source_tree.tree_hash(source_tree.files(source))
    remote = os.readlink(source)
    try:
        found, reason = safe_files.as_user(who, lambda: hash_or_reason(remote), SECONDS)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"it was not read within {SECONDS:.0f} s", remote) from None
    except RuntimeError as error:
        reason = f"{remote} cannot be read ({error})"
    if reason:
        raise source_tree.SourceError(f"{reason}, as {who.name if who else 'root'} reads it")
    return str(found)


def hash_or_reason(source: str) -> tuple[str, str]:
    """Return the hash of a source, or why it has none."""
    try:
        return source_tree.tree_hash(source_tree.files(source)), ""
    except source_tree.SourceError as error:
        return "", str(error)
    except OSError as error:
        return "", f"{error.filename or source} cannot be read ({error.strerror})"


def stage(
    root: str,
    release: str,
    archive: str,
    remote: str,
    programs: t.Mapping[str, str],
    expected: str,
    who: safe_files.Account,
) -> None:
    """Put a release into its folder, whole or not at all, for root and the job's user to read.

    Args:
        root: the job's folder.
        release: id of the release.
        archive: archive of the source on the node; empty where the source lies on the nodes already.
        remote: path of such a source.
        programs: name and text of each file that lies beside the source.
        expected: hash that the source must have; empty for a source that lies on the nodes.
        who: the job's user.

    Raises:
        source_tree.SourceError: what was unpacked is not what was packed, or the user cannot read a source on the node.
        TimeoutError: it was not read in time.
    """
    with opened_releases(root) as releases:
        folder = os.path.join(releases, release)
        partial = f"{folder}{PARTIAL}"
        discard(releases, release + PARTIAL)
        os.mkdir(partial, 0o700)
        source = os.path.join(partial, "source")
        if archive:
            os.mkdir(source)
            source_tree.unpack(archive, source)
        else:
            os.symlink(remote, source)
        for name, text in programs.items():
            environment.write_atomically(os.path.join(partial, name), text)
        found = source_hash(partial, who)
        if expected and found != expected:
            raise source_tree.SourceError(f"the source has the hash {found[:12]}, but {expected[:12]} was expected")
        environment.write_atomically(os.path.join(partial, RECORD), json.dumps({"release": release, "source_hash": found}) + "\n")
        folder_acl.let_in(partial, who.uid, who.gid)
        os.sync()
        discard(releases, release)
        os.rename(partial, folder)


def shield_all(root: str, who: safe_files.Account, look: bool) -> bool:
    """Let only root and the job's user into releases of earlier versions, or of another user; return whether there were some."""
    try:
        with opened_releases(root) as releases:
            folders = [entry.path for entry in os.scandir(releases) if entry.is_dir(follow_symlinks=False)]
            open_ones = [path for path in folders if not folder_acl.only_lets_in(path, who.uid, who.gid)]
            if not look:
                for path in open_ones:
                    folder_acl.let_in(path, who.uid, who.gid)
            return bool(open_ones)
    except FileNotFoundError:
        return False


def current(root: str) -> str:
    """Return the id of the release that the unit runs, or an empty string."""
    try:
        with safe_files.pinned(root) as job:
            return os.path.basename(os.readlink(os.path.join(job, "current")))
    except (OSError, safe_files.Unsafe):
        return ""


def unsafe(root: str) -> str:
    """Return why root does not believe what lies in the folder of a job's releases, as a sentence; empty where it does."""
    try:
        with opened_releases(root):
            return ""
    except safe_files.Unsafe as error:
        return f"{error}; {error.cure}"
    except OSError as error:
        if error.errno == errno.ENOENT:
            return ""  # a job that was never provisioned
        return f"{root}/releases cannot be read: {(error.strerror or str(error)).lower()}"


def switch(root: str, release: str, who: safe_files.Account) -> None:
    """Make a staged release the current one and link its entries into the working directory."""
    with safe_files.pinned(root) as job:
        link = os.path.join(job, "current")
        partial = f"{link}.partial"
        if os.path.lexists(partial):
            os.unlink(partial)
        os.symlink(os.path.join("releases", release), partial)
        os.rename(partial, link)
    safe_files.as_user(who, lambda: link_entries(root), SECONDS)


def link_entries(root: str) -> None:
    """Give the working directory a link to each entry of the current source, so that relative paths find them.

    Files that the job itself wrote there are left alone. Runs as the job's user.
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
    """Remove the oldest releases beyond ``count``, never one of ``keep``, and what a run that was killed has staged in part."""
    with opened_releases(root) as folder:
        there = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        releases = [name for name in there if not name.endswith((PARTIAL, GONE))]
        for name in set(there) - set(releases):
            discard(folder, name)
        releases.sort(key=lambda name: os.path.getmtime(os.path.join(folder, name)), reverse=True)
        for name in releases[count:]:
            if name not in keep:
                discard(folder, name)


def keep_run(root: str, release: str, unit: str, environment_text: str) -> None:
    """Keep beside a release the unit and environment that it runs with, for a roll-back."""
    with opened_releases(root) as releases:
        folder = os.path.join(releases, release)
        environment.write_atomically(os.path.join(folder, "unit"), unit, 0o600)
        environment.write_atomically(os.path.join(folder, "environment"), environment_text, 0o600)


def kept_run(root: str, release: str) -> tuple[str, str] | None:
    """Return unit and environment of a release that ran before, None where they are gone."""
    try:
        with opened_releases(root) as releases:
            folder = os.path.join(releases, release)
            # Root runs this unit, so it has to be one that root wrote.
            unit, variables = (safe_files.read_text(os.path.join(folder, name), only_roots=True) for name in ("unit", "environment"))
    except OSError:
        return None
    return unit, variables


def history(root: str) -> list[dict[str, t.Any]]:
    """Return the starts, oldest first: C(release), C(time), C(back) (whether by a roll-back), and kept_place."""
    try:
        with opened_releases(root) as releases:
            starts = json.loads(safe_files.read_text(os.path.join(releases, HISTORY), only_roots=True))
    except (OSError, ValueError, safe_files.Unsafe):
        return []
    return [{**start, **kept_place(root, start["release"])} for start in starts]


def kept_place(root: str, release: str) -> dict[str, t.Any]:
    """Return whether a release can be gone back to (C(kept)), where its checkpoints lay (C(checkpoints)), and its C(place)."""
    try:
        kept = kept_run(root, release)
    except safe_files.Unsafe:
        kept = None
    options = launch.supervisor_options(kept[0]) if kept else {}
    checkpoints = [options["checkpoint-dir"], options.get("checkpoint-glob", "")] if options.get("checkpoint-dir") else []
    return {"kept": kept is not None, "checkpoints": checkpoints, "place": place(kept[0] if kept else "")}


def place(unit: str) -> dict[str, str]:
    """Return a unit's place in the cluster, with the host that it is for; empty without a unit."""
    host = launch.supervisor_options(unit).get("host", "")
    return {**({"host": host} if host else {}), **launch.place(unit)}


def remember_start(root: str, release: str, back: bool) -> None:
    """Add a start to the history; one of the same release again is no news."""
    starts = [{key: start[key] for key in ("release", "time", "back")} for start in history(root)]
    if starts and starts[-1]["release"] == release:
        return
    starts.append({"release": release, "time": time.time(), "back": back})
    with opened_releases(root) as releases:
        environment.write_atomically(os.path.join(releases, HISTORY), json.dumps(starts[-STARTS:]) + "\n")


def previous(starts: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    """Return the release to go back to: the one that ran before the newest. Going back twice leads to the same one."""
    forward = [index for index, start in enumerate(starts) if not start["back"]]
    if not forward:
        return ""
    newest = starts[forward[-1]]["release"]
    return next((start["release"] for start in reversed(starts[: forward[-1]]) if start["release"] != newest), "")


def checkpoints(folder: str, pattern: str) -> list[str]:
    """Return the names of the checkpoints in a folder, relative to it. Runs as the job's user.

    Raises:
        OSError: not all of them can be found.
    """
    try:
        return sorted({entry.path for entry in checkpoint_files.find(folder, pattern)})
    except hostile_input.Odd as odd:
        raise OSError(errno.EIO, str(odd), folder) from None


def set_aside(folder: str, pattern: str) -> int:
    """Move the checkpoints into a new folder inside theirs, so that a mount point works too; return how many were moved.

    The folder may be shared: a name that another node has moved already is no error. Nothing is ever overwritten, since the
    folder for them is made anew, whoever took its name before. Runs as the job's user.
    """
    names = checkpoints(folder, pattern)
    if not names:
        return 0
    target = new_folder(os.path.join(folder, checkpoint_files.SET_ASIDE + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())))
    moved = 0
    failure = None
    for name in names:
        try:
            os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
            os.rename(os.path.join(folder, name), os.path.join(target, name))
            moved += 1
        except OSError as error:
            # Gone with a folder above it, or moved by another node.
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                failure = failure or error  # the others go all the same
    if not moved:
        shutil.rmtree(target, ignore_errors=True)
    if failure:
        raise failure
    return moved


def new_folder(path: str) -> str:
    """Make a folder that was not there, under this name or the next free one, and return it."""
    for number in range(1000):
        name = f"{path}-{number}" if number else path
        try:
            os.mkdir(name, 0o755)
            return name
        except FileExistsError:  # another node's, or something that a job has put there
            continue
    raise FileExistsError(errno.EEXIST, "every name for the set-aside checkpoints is taken", path)


def end_marks(root: str) -> list[str]:
    """Return the files with which the job's supervisor tells that it has run."""
    return [path for path in (os.path.join(root, "state", name) for name in ("done", "state.json")) if os.path.lexists(path)]


def forget(root: str) -> None:
    """Remove them, or move away what is no file. Runs as the job's user."""
    for path in end_marks(root):
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError:
            os.rename(path, f"{path}.{os.urandom(4).hex()}")


def finished(root: str, release: str) -> bool:
    """Return whether the supervisor has marked this release as done."""
    done, _odd = hostile_input.load(root, "state/done", hostile_input.Fields({"release": hostile_input.Text(255)}, required=("release",)))
    return bool(done and done["release"] == release)


def remove(root: str, name: str) -> None:
    """Remove an entry of the job's folder with all that is in it; links are removed, never followed.

    In a folder of a user's it goes with that user's rights, who can give its name to a folder that only root could remove. The
    releases are root's everywhere, and go where they are the product's.

    Raises:
        safe_files.Unsafe: the releases are none of the product's, or the way to the job's folder is not safe.
        OSError: it cannot be removed.
    """
    with safe_files.pinned(root) as job:
        owner = os.stat(job)
        whose = safe_files.name_of(owner.st_uid)
        if name == "releases" and _roots_folder(os.path.join(job, name)):
            done = _remove_releases(root, job)
        elif owner.st_uid == 0:
            done = safe_files.remove_tree(job, name)
        else:
            who = safe_files.account(whose) or safe_files.Account(whose, owner.st_uid, owner.st_gid, ())
            done = safe_files.as_user(who, lambda: safe_files.remove_tree(job, name), REMOVAL_SECONDS)
        if not done:
            reason = f"it cannot be removed with the rights of {whose}, whose folder it is in, or while something writes there"
            raise OSError(errno.ENOTEMPTY, reason, os.path.join(root, name))


def _roots_folder(path: str) -> bool:
    """Return whether a path is a folder of root's, and no link."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return found.st_uid == 0 and stat.S_ISDIR(found.st_mode)


def _remove_releases(root: str, job: str) -> bool:
    """Remove the releases by the folder that was opened, since its name may lead elsewhere by now; return whether all is gone."""
    with opened_releases(root) as folder:
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                discard(folder, entry.name)
            else:
                os.unlink(entry.path)
        if os.listdir(folder):
            return False
    os.rmdir(os.path.join(job, "releases"))
    return True
