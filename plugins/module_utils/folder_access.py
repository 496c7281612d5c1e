# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the job's user can use the folders that the variables name: looked at on the node, judged in the plan.

What can be tried is tried with that user's rights. Where the user is yet to be made, owner and mode decide.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import pwd
import stat
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import job_folders, launch, safe_files
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

# Folders of the system: none of them, and for the second list nothing below them, is a job's to write to.
SYSTEM = ("/", "/home", "/root", "/tmp", "/var", "/var/tmp", "/var/lib", "/var/log", "/var/cache", "/var/spool", "/opt")
SYSTEM_TREES = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys", "/usr", "/var/run")
# In a root of ours each job gets a folder of its own, so these are fine as such.
ROOTS = {"torchrun_root": ("/var/lib", "/opt"), "torchrun_log_root": ("/var/log",)}
NOT_SYSTEM = ("/usr/local/", "/dev/shm/")
# The unit has a /tmp of its own (PrivateTmp).
TEMPORARY = ("/tmp", "/var/tmp")

Finding = t.Tuple[str, str]  # what is the case, what to do


def below(path: str, folder: str) -> bool:
    """Return whether a path lies in a folder, or is it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def forbidden(variable: str, path: str) -> Finding | None:
    """Return why a folder cannot be a job's, judged by its name alone; None where nothing speaks against it.

    Args:
        variable: the variable that names it.
        path: an absolute path.
    """
    clean = "/" + posixpath.normpath(path).lstrip("/")
    shown = path if clean == path.rstrip("/") or clean == path else f"{path} ({clean})"
    cure = "name a folder of the job's own, such as one below /srv or /data"
    exact = [name for name in SYSTEM if name not in ROOTS.get(variable, ())]
    inside = any(below(clean, tree) for tree in SYSTEM_TREES) and not clean.startswith(NOT_SYSTEM)
    if clean in exact or inside:
        return f"{variable} names {shown}, a folder of the system, but one of the job's own was expected", cure
    if posixpath.dirname(clean) == "/home":
        return f"{variable} names {shown}, a whole home, but a folder of the job's own was expected", "name a folder below it"
    if variable != "pytorch_root" and any(below(clean, folder) for folder in TEMPORARY):
        text = f"{variable} names {shown}, but the job's unit has a /tmp and a /var/tmp of its own (PrivateTmp), which go with it"
        return text, cure
    return None


# --- on the node ---


def look(variable: str, path: str, use: str, user: str) -> dict[str, t.Any]:
    """Return what a node knows of a folder that a variable names. Makes at most a file, and removes it.

    Args:
        variable: the variable.
        path: an absolute path.
        use: C(write), C(own) (the same, in a folder of the product's that it puts right), C(read), C(run) (an environment's
            Python), C(source) (read, a job's program) or C(trust) (root runs what lies there).
        user: name of the job's user.

    Returns:
        C(variable), C(path), C(use), C(real) (the path without links), C(home) (whose home it is), C(changer) (who else than root
        can change it), C(owner), C(mode), C(error) (why it cannot be used), C(rootless) (where root cannot make what it has to, and
        why), C(refused) (why root does not use it, and what to do) and C(exists) (whether the user exists).
    """
    who = safe_files.account(user)
    entry: dict[str, t.Any] = {
        "variable": variable, "path": path, "use": use, "user": user, "exists": who is not None,
        "real": path, "home": "", "changer": "", "owner": "", "mode": "", "error": "", "rootless": "", "missing": False, "refused": [],
    }  # fmt: skip
    try:
        entry.update(safe_files.as_user(None, lambda: _facts(path, use, who)))
        if not entry["error"]:
            entry["error"] = _tried(path, use, who, entry)
    except TimeoutError:
        entry["error"] = f"its file system does not answer within {safe_files.SECONDS:.0f} s"
    except (OSError, RuntimeError) as error:
        entry["error"] = getattr(error, "strerror", "") or str(error)
    return entry


def _facts(path: str, use: str, who: safe_files.Account | None) -> dict[str, t.Any]:
    """Return what root sees of a path; in a child, since looking may hang."""
    facts: dict[str, t.Any] = {"real": os.path.realpath(path)}
    if use == "trust":
        facts["changer"] = changer(path)
        return facts
    if use == "run":
        facts["missing"] = not os.path.exists(path)
        if who is None:
            facts.update(_modes(os.path.dirname(path), 0o001))
            facts.update({} if facts.get("error") else _modes(path, 0o001))
        return facts
    reading = use in ("read", "source")
    try:
        found = safe_files.reach(path, who)
        if use == "own":
            facts["rootless"] = _rootless(os.path.dirname(path))
    except safe_files.Unsafe as error:
        # Of the user's own links the user's own rights are tried; root never follows them.
        return {**facts, "missing": not os.path.exists(path), "error": "" if reading else str(error)}
    except NotADirectoryError as error:
        return facts if reading else {**facts, "error": error.strerror}
    except PermissionError as error:
        # Root of a node is nobody on a network file system, where a user's private folders are for that user alone.
        if who is None:
            raise
        if use == "own":
            facts["rootless"] = f"{error.filename or os.path.dirname(path)} (root_squash of a network file system?)"
        facts["refused"] = [] if reading else _refused(path, "write", who)
        return {**facts, "real": safe_files.as_user(who, lambda: os.path.realpath(path))}
    os.close(found.handle)
    facts["refused"] = [] if reading else _refused(path, use, who)
    status = os.stat(found.path)
    facts.update(missing=bool(found.missing), owner=safe_files.name_of(status.st_uid), mode=f"{stat.S_IMODE(status.st_mode):04o}")
    if found.missing:
        facts["rootless"] = facts.get("rootless") or (_unwritable(found.path) if found.systems and not reading else "")
        facts["byroot"] = found.systems and not reading and not facts["rootless"]
    else:
        facts["home"] = _home(found.path, status.st_uid)
        facts["byroot"] = use == "own" and _mended(found.path, status, who)
    if who is None and not facts["byroot"] and not (found.missing and reading):
        facts.update(_modes(found.path, {"read": 0o005, "source": 0o005, "write": 0o003, "own": 0o003}[use]))
    return facts


def _refused(path: str, use: str, who: safe_files.Account | None) -> list[str]:
    """Return why a folder is none of the job's own, since others can change what lies there, and what to do; else nothing."""
    root = os.path.dirname(path)
    try:
        if use == "own":
            # What root cannot look at, and so cannot use, is told by itself.
            with contextlib.suppress(OSError):
                job_folders.refuse_strangers(root, who)
            with contextlib.suppress(OSError), job_folders.opened_releases(root):
                pass
        job_folders.refuse_open(path, who)
    except safe_files.Unsafe as error:
        return [str(error), error.cure]
    return []


def _rootless(path: str) -> str:
    """Return where and why root cannot write in a folder, or in the one in which it would be made; empty where it can."""
    found = safe_files.reach(path)
    os.close(found.handle)
    return _unwritable(found.path)


def _unwritable(folder: str) -> str:
    """Return a folder and why root cannot write there, an empty string where it can."""
    if os.geteuid() != 0 or os.access(folder, os.W_OK):
        return ""  # that modules need root is told by itself
    read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    return f"{folder} ({'its file system is read-only' if read_only else 'root_squash of a network file system?'})"


def _mended(path: str, found: os.stat_result, who: safe_files.Account | None) -> bool:
    """Return whether root will put a folder of the product's, or one above it, right before the job needs it."""
    job = os.path.dirname(path)
    root = os.path.dirname(job)
    own = [job, *([root] if root in launch.OWN_ROOTS else [])]
    if not safe_files.systems(root, os.stat(root), who) or os.stat(job).st_uid != 0:
        return False
    return found.st_uid == 0 or any(os.stat(folder).st_uid == 0 and not os.stat(folder).st_mode & 0o001 for folder in own)


def _modes(path: str, need: int) -> dict[str, t.Any]:
    """Return owner and mode of a path, and C(error) where others than owner and group lack the rights for it or on the way."""
    real = os.path.realpath(path)
    folders = [real]
    while folders[-1] != "/":
        folders.append(os.path.dirname(folders[-1]))
    for folder in reversed(folders):
        if not os.path.lexists(folder):
            break
        found = os.stat(folder)
        wanted = need if folder == real else 0o001
        owner, mode = safe_files.name_of(found.st_uid), f"{stat.S_IMODE(found.st_mode):04o}"
        if found.st_mode & wanted != wanted:
            return {"owner": owner, "mode": mode, "error": f"{folder} belongs to {owner} with the mode {mode}"}
    return {"owner": owner, "mode": mode}


def _home(path: str, uid: int) -> str:
    """Return whose home a folder is, as far as its owner tells; the product's own users live in their job's folder."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return ""
    return entry.pw_name if entry.pw_dir.rstrip("/") == path and (uid >= safe_files.FIRST_PERSON or uid == 0) else ""


def _tried(path: str, use: str, who: safe_files.Account | None, entry: t.Mapping[str, t.Any]) -> str:
    """Return why the user cannot use a folder, an empty string where it can; tried with the user's rights."""
    if use == "trust" or (entry["home"] and use != "source") or entry.get("byroot") or who is None:
        return ""
    if use == "run":
        status, _output, errors = safe_files.run_as(who, [path, "-I", "-S", "-B", "-c", "pass"], 2 * safe_files.SECONDS)
        words = errors.strip().splitlines()
        return "" if status == 0 else words[-1] if words else f"exit status {status}"
    reading = use in ("read", "source")
    if entry["missing"] and reading:
        return ""  # told by the check of paths that must exist
    try:
        safe_files.as_user(who, lambda: _read(path) if reading else _write(path))
    except TimeoutError:
        raise
    except OSError as error:
        if reading and isinstance(error, FileNotFoundError):
            return ""  # as root could not tell
        where = f"{error.filename}: " if error.filename and use == "write" and os.path.dirname(str(error.filename)) != path else ""
        return f"{where}{error.strerror}"
    return ""


def _read(path: str) -> None:
    """List a folder, or open a file."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            next(entries, None)
    else:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _write(path: str) -> None:
    """Make and remove a file in a folder, or in the one in which it would be made."""
    folder = path
    while True:
        try:
            os.stat(folder)
            break
        except FileNotFoundError:
            folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise OSError(errno.ENOTDIR, "it is no folder", folder)
    safe_files.probe_writing(folder)


def changer(path: str) -> str:
    """Return who else than root can change what lies at a path, or what it leads to; an empty string for nobody.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        found = safe_files.reach(path, file=True)
    except safe_files.Unsafe as error:
        return error.changer or str(error)
    os.close(found.handle)
    return found.changer


# --- in the plan ---


def questions(variables: t.Mapping[str, t.Any], name: str) -> list[dict[str, str]]:
    """Return which folders a node is asked about: C(variable), C(path) and C(use), for ``look``.

    Args:
        variables: typed variables of the host.
        name: name of the job.
    """
    root = str(variables.get("torchrun_root") or "")
    log_root = str(variables.get("torchrun_log_root") or "")
    checkpoints = str(variables.get("torchrun_checkpoint_dir") or f"{root}/{name}/checkpoints")
    wanted = [("torchrun_root", f"{root}/{name}/{folder}", "own") for folder in ("work", "state", "cache")] if root else []
    wanted += [("torchrun_log_root", f"{log_root}/{name}", "write")] if log_root else []
    own = posixpath.dirname(checkpoints.rstrip("/")) == f"{root}/{name}"
    wanted += [("torchrun_checkpoint_dir", checkpoints, "own" if own else "write")]
    wanted += [("torchrun_data_paths", str(path), "read") for path in variables.get("torchrun_data_paths") or []]
    source = str(variables.get("torchrun_source") or "")
    wanted += [("torchrun_source", source[len("remote:") :], "source")] if source.startswith("remote:") else []
    if variables.get("pytorch_source") == "existing" and variables.get("pytorch_environment"):
        wanted.append(("pytorch_environment", posixpath.join(str(variables["pytorch_environment"]), "bin/python3"), "run"))
    # What root runs, or believes, for each source of torch.
    trusted = {"existing": ("pytorch_root",), "distribution": ("pytorch_python",)}
    for key in trusted.get(str(variables.get("pytorch_source")), ("pytorch_root", "pytorch_python")):
        wanted += [(key, str(variables[key]), "trust")] if variables.get(key) else []
    return [
        {"variable": variable, "path": path, "use": use}
        for variable, path, use in wanted
        if path.startswith("/") and path.isprintable()
    ]


def problems(host: str, entries: t.Sequence[t.Mapping[str, t.Any]]) -> list[Problem]:
    """Return what is wrong with the folders of a host, from what ``look`` has found."""
    found: dict[tuple[str, str], Problem] = {}
    for entry in entries:
        problem = _judged(host, entry)
        if problem:
            # The folders of one root share their trouble, which is told once.
            found.setdefault((problem.variable, "" if entry["use"] == "own" else problem.text), problem)
    return list(found.values())


def _judged(host: str, entry: t.Mapping[str, t.Any]) -> Problem | None:
    """Return what is wrong with one folder. What its name alone forbids is told with the variables' values."""
    variable, path, real = entry["variable"], entry["path"], entry["real"]
    if entry["use"] in ("write", "own", "read"):
        if forbidden(variable, path):
            return None
        if real != path and forbidden(variable, real):
            text = f"{variable} names {path}, which leads to {real}, but a folder of the job's own was expected"
            return Problem(host, variable, text, "name a folder of the job's own")
        if entry["home"]:
            text = f"{variable} names {path}, the home of {entry['home']}, but a folder of the job's own was expected"
            return Problem(host, variable, text, "name a folder below it")
    if entry["changer"]:
        text = f"{variable} is {path}, but {entry['changer']} can be changed by others than root, who runs programs from there"
        return Problem(host, variable, text, "name a path that only root can write")
    if entry.get("refused"):
        return Problem(host, "torchrun_root" if entry["use"] == "own" else variable, *entry["refused"])
    # What the user can make itself needs no root; a job's folder does, for its releases.
    if entry.get("rootless") and (entry["use"] == "own" or entry["error"]):
        return _unmakeable(host, entry, variable, path)
    if entry["error"]:
        return _unusable(host, entry, variable, path, entry["user"])
    return None


def _unmakeable(host: str, entry: t.Mapping[str, t.Any], variable: str, path: str) -> Problem:
    """Return the problem of a folder in which root of the node cannot make what it has to."""
    if entry["use"] == "own":
        text = f"torchrun_root leads to {path}, but root of the node cannot write in {entry['rootless']}, where it keeps the job's releases"
        return Problem(host, "torchrun_root", text, "set torchrun_root to a folder on a local disk")
    text = f"{variable} names {path}, but neither root of the node nor the job's user {entry['user']} can write in {entry['rootless']}"
    return Problem(host, variable, text, f"make the folder where its file system can be written, and give it to {entry['user']}, or name another folder")


def _unusable(host: str, entry: t.Mapping[str, t.Any], variable: str, path: str, user: str) -> Problem:
    """Return the problem of a folder that the job's user cannot use."""
    if entry["use"] == "trust":
        text = f"{variable} names {path}, but root of the node cannot look at it ({entry['error']})"
        return Problem(host, variable, text, "name a path on a local disk")
    can = "cannot" if entry["exists"] else "(yet to be made) will not be able to"
    doing = {"write": "make files in it", "own": "make files in it", "run": "run it"}.get(entry["use"], "open and list it")
    text = f"{variable} names {path}, but the job's user {user} {can} {doing} ({entry['error']})"
    cures = {
        "write": f"let {user} write there (chown it, or setfacl -m u:{user}:rwx), or name another folder",
        "read": f"let {user} enter and read it (chmod, or setfacl -m u:{user}:rx), or name another path",
        "run": f"let {user} enter it (chmod o+x, or setfacl -m u:{user}:x, on each folder above), or move the environment out of the home",
    }
    cure = cures[{"own": "write", "source": "read"}.get(entry["use"], entry["use"])]
    return Problem(host, variable, text, cure)
