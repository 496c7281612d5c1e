# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What root does in folders that others can write: as the user whose folder it is, or relative to an opened descriptor.

The rule, and what it protects, is in docs/security.md. Two ways lead through such a folder:

- ``as_user`` and ``run_as`` do the work in a child that has dropped root's rights, so that a link leads no further than the
  user could go. A time limit holds even where a dead network file system never answers.
- ``pinned`` opens a folder one component after the other. A link is followed only where nobody but root can have made it, and
  the folder that was opened stays the same one, whatever becomes of its name.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import grp
import json
import os
import pwd
import re
import select
import signal
import stat
import subprocess
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import folder_acl

# Seconds for a question to a file system; a dead one never answers.
SECONDS = 10.0
# Bytes that a child may answer.
ANSWER = 4 << 20
# Ids of users and groups below are the distribution's own services (login.defs: UID_MIN, GID_MIN).
FIRST_PERSON = 1000
# Ids of groups below are given out once for all machines of a distribution (base-passwd); no directory of people has them.
FIRST_GROUP = 100
# Who can change what lies in a folder: nobody but root, also services of the distribution's, or others.
ROOT, SERVICES, OTHERS = range(3)
# A user without any rights, where the job's is yet to be made.
NOBODY = 65534
# Links on the way to a folder, as many as the kernel follows.
LINKS = 40
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# What to do where others than root can lead root astray, unless an error knows better.
CURE = "name a folder that only root, or only the job's user, can change, or remove the link"


class Unsafe(Exception):
    """Others than root can lead root astray here; the message is a sentence's first half.

    Attributes:
        changer: who they are, such as "/home/alice (alice)".
        cure: what to do, the sentence's second half.
    """

    def __init__(self, text: str, changer: str = "", cure: str = CURE) -> None:
        super().__init__(text)
        self.changer = changer
        self.cure = cure


class Account(t.NamedTuple):
    """A user with its rights, as systemd gives them to a unit with ``User=``."""

    name: str
    uid: int
    gid: int
    groups: t.Tuple[int, ...]


class Reached(t.NamedTuple):
    """How far a path leads.

    Attributes:
        handle: descriptor of the last folder that is there.
        path: its path without links.
        missing: names that would have to be made in it.
        roots: whether nobody but root can change any folder on the way, the last one included.
        systems: the same, but services of the distribution's may (Ubuntu's /var/log belongs to root:syslog, 0775).
        changer: who else can change a folder on the way, such as "/home/alice (alice)"; empty where nobody can.
    """

    handle: int
    path: str
    missing: t.List[str]
    roots: bool
    systems: bool
    changer: str


def account(name: str) -> Account | None:
    """Return a user of this node, None where there is none."""
    try:
        found = pwd.getpwnam(name)
    except (KeyError, ValueError):
        return None
    groups = tuple(sorted(set(os.getgrouplist(name, found.pw_gid))))
    return Account(name, found.pw_uid, found.pw_gid, groups)


def name_of(uid: int) -> str:
    """Return a user's name, its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_of(gid: int) -> str:
    """Return a group's name, its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# --- as the user ---


def drop(who: Account) -> None:
    """Give up root's rights for good; from here on the process is the user's.

    The kernel keeps the user from looking into the memory of a process that was root's (prctl(2), PR_SET_DUMPABLE).
    """
    os.chdir("/")
    os.umask(0o022)
    if os.geteuid() != 0 and who.uid == os.geteuid():
        return
    os.setgroups(who.groups)
    os.setresgid(who.gid, who.gid, who.gid)
    os.setresuid(who.uid, who.uid, who.uid)
    if 0 in os.getresuid() and who.uid != 0:
        raise PermissionError(errno.EPERM, "root's rights could not be dropped")


def as_user(who: Account | None, work: t.Callable[[], t.Any], seconds: float = SECONDS) -> t.Any:
    """Do something in a child process with a user's rights, and return its result.

    Args:
        who: the user; None for root, where only the time limit is wanted.
        work: what to do; its result has to be JSON.
        seconds: how long to wait for it.

    Raises:
        TimeoutError: no answer came in time. The child was killed, or hangs in the kernel until its file system answers.
        OSError: what the work raised.
        RuntimeError: the work raised something else, its result is too large, root's rights could not be given up, or the child
            was killed.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            os.setsid()
            # A child that hangs in the kernel must not keep the module's connection open.
            nothing = os.open(os.devnull, os.O_RDWR)
            for handle in (0, 1, 2):
                os.dup2(nothing, handle)
            data = _answer(who, work)
            while data:
                data = data[os.write(writing, data) :]
        finally:
            os._exit(0)
    os.close(writing)
    try:
        (data,), ended = _gather([reading], seconds)
    finally:
        os.close(reading)
        _end(pid)
    if not ended:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} s")
    try:
        answer = json.loads(data)
    except ValueError:
        raise RuntimeError("the child process was killed") from None
    if "errno" in answer:
        raise OSError(answer["errno"], answer["text"], answer["path"])
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def _answer(who: Account | None, work: t.Callable[[], t.Any]) -> bytes:
    """Become the user, do the work and return what a child hands back; it says why where any of that failed."""
    try:
        if who is not None:
            drop(who)
    except Exception as error:  # no trouble of the folder's, whatever it is
        return json.dumps({"error": f"root's rights cannot be given up for those of {who.name if who else 'root'} ({error})"}).encode()
    try:
        data = json.dumps(_attempt(work)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
    if len(data) > ANSWER:
        return json.dumps({"error": f"what was found there is larger than {ANSWER >> 20} MiB"}).encode()
    return data


def _attempt(work: t.Callable[[], t.Any]) -> dict[str, t.Any]:
    """Return the result of the work, or its error."""
    try:
        return {"value": work()}
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else None
        return {"errno": error.errno or errno.EIO, "text": error.strerror or str(error), "path": path}
    except Exception as error:  # handed back whatever it is
        return {"error": f"{type(error).__name__}: {error}"}


def _gather(handles: t.Sequence[int], seconds: float, limit: int = ANSWER) -> tuple[list[bytes], bool]:
    """Read pipes until all end; return what came (at most ``limit`` bytes of each) and whether all have ended in time."""
    deadline = time.monotonic() + seconds
    parts: dict[int, list[bytes]] = {handle: [] for handle in handles}
    sizes = dict.fromkeys(handles, 0)
    there = set(handles)
    while there:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for handle in select.select(sorted(there), [], [], left)[0]:
            block = os.read(handle, 1 << 16)
            if not block:
                there.discard(handle)
            elif sizes[handle] < limit:
                parts[handle].append(block)
                sizes[handle] += len(block)
    return [b"".join(parts[handle]) for handle in handles], not there


def _end(pid: int) -> None:
    """Kill a child with its session and reap it; one that hangs in the kernel is left to whoever reaps it later."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.005)
                continue
        return


def run_as(who: Account, command: t.Sequence[str], seconds: float, variables: t.Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a program with a user's rights, with an environment of its own, in /.

    Args:
        who: the user.
        command: the program and its arguments.
        seconds: after which it and its session are killed.
        variables: environment variables beside PATH, HOME and the locale.

    Returns:
        Exit status (124 where it was killed for its time, 127 where it cannot be started), its output and its errors.
    """
    rights: dict[str, t.Any] = {}
    if os.geteuid() == 0:
        rights = {"user": who.uid, "group": who.gid, "extra_groups": list(who.groups)}
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **(variables or {})}
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=environ,
            start_new_session=True,
            umask=0o022,
            **rights,
        )
    except OSError as error:
        return 127, "", error.strerror or str(error)
    streams = [stream for stream in (child.stdout, child.stderr) if stream]
    try:
        (output, errors), ended = _gather([stream.fileno() for stream in streams], seconds)
        if ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
        status = child.poll()
        if status is None:
            status = 124
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
        for stream in streams:
            stream.close()
    return status, output.decode(errors="replace"), errors.decode(errors="replace")


def printed(command: t.Sequence[str], limit: int = ANSWER, seconds: float = SECONDS) -> str:
    """Return the beginning of what a program prints whose output others decide about, as a job does about its journal.

    Args:
        command: the program and its arguments; it runs with the rights of this process.
        limit: bytes after which the program is killed; a last character or line may be cut.
        seconds: after which it is killed, too.

    Returns:
        What it printed until then; empty where it cannot be started.
    """
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, start_new_session=True
        )
    except OSError:
        return ""
    deadline = time.monotonic() + seconds
    parts, size = [], 0
    with t.cast(t.IO[bytes], child.stdout) as stream:
        while size < limit and select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            block = os.read(stream.fileno(), min(1 << 16, limit - size))
            if not block:
                break
            parts.append(block)
            size += len(block)
    _end(child.pid)
    child.poll()
    return b"".join(parts).decode("utf-8", "replace")


# --- relative to opened folders ---


def roots(found: os.stat_result) -> bool:
    """Return whether nobody but root can change what lies in a folder, or a file; a group that may write counts as others."""
    return found.st_uid == 0 and not found.st_mode & 0o022


def writers(path: str, found: os.stat_result) -> int:
    """Return who can change what lies in a folder, or a file: C(ROOT), C(SERVICES) or C(OTHERS).

    Args:
        path: a path that leads to it as it was looked at, such as one in /proc/self/fd.
        found: its status.
    """
    if found.st_uid != 0 or found.st_mode & 0o002:
        return OTHERS
    if not found.st_mode & 0o020:
        return ROOT
    # With an access control list, the group's bits are the most that anybody in that list may do (acl(5)).
    return OTHERS if _listed(path) else writers_of(found.st_gid)


def writers_of(gid: int) -> int:
    """Return who can change what a group may write, by who is in it.

    A group without anybody is root's where no directory of people can have members for it: /usr/local is root:staff, 2775, in
    Debian. A system user's own group is a service's, such as syslog's. Nothing is known of an empty group with another number:
    sssd does not list whom it knows.
    """
    try:
        members = grp.getgrgid(gid).gr_mem
    except KeyError:
        return OTHERS
    uids = {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == gid}
    services = bool(uids - {0})
    for name in members:
        try:
            uids.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            return OTHERS
    uids.discard(0)
    if any(uid >= FIRST_PERSON for uid in uids):
        return OTHERS
    # Users such as sync and halt have root's group at some distributions, and no password.
    if gid == 0 or (not uids and gid < FIRST_GROUP):
        return ROOT
    return SERVICES if services and gid < FIRST_PERSON else OTHERS


def _listed(path: str) -> bool:
    """Return whether something has an access control list, or may have one."""
    try:
        return bool(os.getxattr(path, folder_acl.ATTRIBUTE))
    except OSError as error:
        return error.errno not in (errno.ENODATA, *folder_acl.LACKING)


def systems(path: str, found: os.stat_result, who: Account | None = None) -> bool:
    """Return whether a folder is root's and besides at most services of the distribution's can change it.

    Args:
        path: a path that leads to it as it was looked at.
        found: its status.
        who: a user that is none of these services, though its id may be one of theirs: the job's.
    """
    if who is not None and who.uid != 0 and found.st_mode & 0o020 and found.st_gid in (who.gid, *who.groups):
        return False
    return writers(path, found) <= SERVICES


def strangers(path: str, found: os.stat_result, who: Account | None) -> str:
    """Return who besides root and the job's user can change the job's own folder, as "belongs to bob"; empty where nobody can.

    Args:
        path: a path that leads to it as it was looked at.
        found: its status.
        who: the job's user, None where it is yet to be made.
    """
    known = {0, who.uid} if who else {0}
    if found.st_uid not in known:
        return f"belongs to {name_of(found.st_uid)}"
    if found.st_mode & 0o002:
        return "can be written by all users"
    if not found.st_mode & 0o020:
        return ""
    uids, gids = folder_acl.writers(path, found.st_gid)
    others = sorted(name_of(uid) for uid in uids - known)
    others += [f"the group {group_of(gid)}" for gid in sorted(gids) if writers_of(gid) != ROOT and not _private(gid, who)]
    return f"can be written by {others[0]}" if others else ""


def _private(gid: int, who: Account | None) -> bool:
    """Return whether a group is a user's own, with nobody else in it.

    It has the user's name too: of a group that people share, a directory such as sssd's may list nobody.
    """
    if who is None or gid != who.gid:
        return False
    try:
        entry = grp.getgrgid(gid)
    except KeyError:
        return False
    uids = {user.pw_uid for user in pwd.getpwall() if user.pw_gid == gid}
    return entry.gr_name == who.name and set(entry.gr_mem) <= {who.name, "root"} and uids <= {0, who.uid}


def open_to_all(path: str) -> str:
    """Return the folder, a path's own or one above, in which everybody can rename what is others'; empty where there is none.

    Raises:
        OSError: they cannot all be looked at.
    """
    here = os.path.realpath(path)
    while True:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(here).st_mode
            if stat.S_ISDIR(mode) and mode & 0o002 and not mode & stat.S_ISVTX:
                return here
        if here == "/":
            return ""
        here = os.path.dirname(here)


def reach(path: str, who: Account | None = None, file: bool = False) -> Reached:
    """Open as much of a path as is there; the caller closes the descriptor.

    Args:
        path: the path.
        who: the job's user, which is never one of the distribution's services.
        file: whether the path may lead to a file; it is then the one that is missing, though C(writers) of it count.

    Raises:
        Unsafe: a link is on the way that others than root can have made.
        OSError: something else than a folder is on the way, or it cannot be looked at.
    """
    parts = collections.deque(part for part in path.split("/") if part not in ("", "."))
    handle = os.open("/", _WALK)
    names: list[str] = []
    only_root = only_system = True
    changer = ""
    links = 0

    def judge(here: str, found: os.stat_result, shown: str) -> None:
        nonlocal only_root, only_system, changer
        only_root, only_system = only_root and writers(here, found) == ROOT, only_system and systems(here, found, who)
        if not only_root and not changer:
            whose = name_of(found.st_uid) if found.st_uid else "all users" if found.st_mode & 0o002 else _groups(here, found.st_gid)
            changer = f"{shown} ({whose})"

    try:
        while True:
            judge(f"/proc/self/fd/{handle}", os.fstat(handle), f"/{'/'.join(names)}")
            if not parts:
                return Reached(handle, f"/{'/'.join(names)}", [], only_root, only_system, changer)
            part = parts.popleft()
            try:
                entered = os.open(part, _WALK, dir_fd=handle)
            except FileNotFoundError:
                return Reached(handle, f"/{'/'.join(names)}", [part, *parts], only_root, only_system, changer)
            except NotADirectoryError:
                link = _link(part, handle)
                here = f"/{'/'.join([*names, part])}"
                if link is None:
                    if file and not parts:
                        judge(f"/proc/self/fd/{handle}/{part}", os.stat(part, dir_fd=handle, follow_symlinks=False), here)
                        return Reached(handle, f"/{'/'.join(names)}", [part], only_root, only_system, changer)
                    raise NotADirectoryError(errno.ENOTDIR, "it is no folder", here) from None
                links += 1
                if not only_root or links > LINKS:
                    raise Unsafe(f"{here} is a link, which others than root can change", changer) from None
                parts.extendleft(reversed([word for word in link.split("/") if word not in ("", ".")]))
                if link.startswith("/"):
                    os.close(handle)
                    handle = os.open("/", _WALK)
                    names = []
                continue
            except OSError as error:
                raise OSError(error.errno, error.strerror, f"/{'/'.join([*names, part])}") from None
            os.close(handle)
            handle = entered
            names = names[:-1] if part == ".." else [*names, part]
    except BaseException:
        os.close(handle)
        raise


def _groups(path: str, gid: int) -> str:
    """Return in words who else than root may write by the group's bits."""
    return "whoever its access control list names" if _listed(path) else f"the group {group_of(gid)}"


def _link(name: str, folder: int) -> str | None:
    """Return what a link in an opened folder leads to, None where it is none."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return None


@contextlib.contextmanager
def pinned(path: str, *names: str) -> t.Iterator[str]:
    """Yield a path that leads to a folder as it is now, whatever its names become meanwhile.

    Args:
        path: the folder.
        names: folders to enter from there, each in the one before and never through a link.

    Raises:
        Unsafe: a link is on the way that others than root can have made.
        OSError: there is no such folder.
    """
    found = reach(path)
    try:
        if found.missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        with contextlib.ExitStack() as stack:
            handle = found.handle
            for name in names:
                handle = os.open(name, _WALK, dir_fd=handle)
                stack.callback(os.close, handle)
            here = f"/proc/self/fd/{handle}"
            try:
                yield here
            except Exception as error:
                _named(error, here, os.path.join(path, *names))
                raise
    finally:
        os.close(found.handle)


def _named(error: Exception, here: str, path: str) -> None:
    """Let an error name a folder by its path: nobody can do anything with a descriptor's."""
    here = re.escape(here) + r"(?![0-9])"
    if isinstance(error, OSError):
        for key in ("filename", "filename2"):
            if isinstance(getattr(error, key), str):
                setattr(error, key, re.sub(here, lambda _match: path, getattr(error, key)))
    else:
        error.args = tuple(re.sub(here, lambda _match: path, text) if isinstance(text, str) else text for text in error.args)


def make_folder(path: str, who: Account | None, mend: bool = False, look: bool = False) -> str:
    """Make a folder where there is none; one that is there keeps its owner and mode, unless it is the product's own.

    Root makes it where every folder above is root's, else the user does, in a folder of its own.

    Args:
        path: the folder.
        who: the user that it belongs to; None for root.
        mend: whether the folder is the product's own, whose owner and mode are put right if nobody but root can have made it.
        look: say only what would be done.

    Returns:
        What was done: C(made), C(mended), or an empty string.

    Raises:
        Unsafe: a link is on the way that others than root can have made, or a folder of root's is in others' hands.
        OSError: it cannot be made.
    """
    try:
        found = reach(path, who)
    except PermissionError:
        # Root of a node is nobody on a network file system, and only the user can look into its own folders there.
        if who is None:
            raise
        return str(as_user(who, lambda: _make_own(path, look)))
    try:
        if not found.missing:
            return _mend(found, who, mend, look)
        if look:
            return "made"
        if found.systems or who is None:
            try:
                _make(found, who)
                return "made"
            except PermissionError:  # root of a node is nobody on a network file system
                if who is None:
                    raise
        return str(as_user(who, lambda: _make_own(path, look)))
    finally:
        os.close(found.handle)


def _make_own(path: str, look: bool) -> str:
    """Make a folder with the rights of this process; return what was done."""
    if os.path.isdir(path):
        return ""
    if not look:
        os.makedirs(path, mode=0o755, exist_ok=True)
    return "made"


def _make(found: Reached, who: Account | None) -> None:
    """Make the missing folders as root, each in the one before; the last one is the user's."""
    handle = os.dup(found.handle)
    try:
        for name in found.missing:
            os.mkdir(name, 0o755, dir_fd=handle)
            entered = os.open(name, _WALK, dir_fd=handle)
            os.close(handle)
            handle = entered
        here = f"/proc/self/fd/{handle}"
        made = os.fstat(handle)
        # Somebody who may write above could have put another folder under the name; a new one is empty.
        if who is not None and made.st_uid != who.uid:
            if os.listdir(here):
                raise Unsafe(f"{found.path}/{'/'.join(found.missing)} was changed while it was made")
            os.chown(here, who.uid, who.gid)
    finally:
        os.close(handle)


def _mend(found: Reached, who: Account | None, own: bool, look: bool) -> str:
    """Put owner and mode of a folder of the product's right, as an interrupted run or another umask left them."""
    now = os.fstat(found.handle)
    here = f"/proc/self/fd/{found.handle}"
    above = os.open("..", _WALK, dir_fd=found.handle)
    try:
        ours = own and systems(f"/proc/self/fd/{above}", os.fstat(above), who)
    finally:
        os.close(above)
    if not ours or (who is not None and now.st_uid not in (0, who.uid)):
        return ""
    if who is None and now.st_uid != 0:
        raise Unsafe(f"{found.path} belongs to {name_of(now.st_uid)}, but root was expected")
    mode = stat.S_IMODE(now.st_mode)
    if who is not None and now.st_uid == who.uid:
        wanted = mode | 0o700
    else:
        wanted = (mode | 0o755) & ~0o022
    given = who is not None and now.st_uid != who.uid
    if not given and mode == wanted:
        return ""
    if not look:
        if who is not None and given:
            os.chown(here, who.uid, who.gid)
        os.chmod(here, wanted)
    return "mended"


def read_text(path: str, limit: int = ANSWER, only_roots: bool = False, links: bool = False) -> str:
    """Return the text of a regular file; links, devices, pipes and files that are too large are refused.

    Args:
        path: the file.
        limit: the largest size in bytes.
        only_roots: whether a file that others than root can write is refused too.
        links: whether the path may be a link to such a file.

    Raises:
        OSError: it cannot be read, or is not such a file.
    """
    handle = os.open(path, os.O_RDONLY | (0 if links else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        if only_roots and not roots(found):
            raise PermissionError(errno.EPERM, "others than root can write it", path)
        data = b""
        while len(data) <= limit:
            block = os.read(handle, 1 << 20)
            if not block:
                return data.decode("utf-8", "replace")
            data += block
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", path)
    finally:
        os.close(handle)


def write_new(path: str, text: str, mode: int) -> None:
    """Write a file that is not there yet, in a folder of root's; the mode is right from the first moment on.

    Raises:
        FileExistsError: the name is taken, by whatever it is.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
        os.fchmod(stream.fileno(), mode)


def probe_writing(folder: str) -> None:
    """Make and remove a file in a folder, with the rights of this process.

    Raises:
        OSError: that is not possible.
    """
    name = os.path.join(folder, f".onprem.torch-{os.getpid()}-{os.urandom(4).hex()}")
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    os.unlink(name)


def remove_tree(folder: str, name: str) -> bool:
    """Remove an entry of one's own folder with all that is in it, whatever others have made there; return whether all is gone.

    Its name is free at once, so that what cannot be removed holds nobody up. rm follows no link, and unlike Python's rmtree
    it goes to any depth (POSIX rm).

    Args:
        folder: the folder; may be one that ``pinned`` yields.
        name: the entry.
    """
    away = f".{name}.{os.urandom(4).hex()}.removed"
    leftovers = [entry for entry in os.listdir(folder) if entry.startswith(f".{name}.") and entry.endswith(".removed")]
    try:
        os.rename(os.path.join(folder, name), os.path.join(folder, away))
        leftovers.append(away)
    except FileNotFoundError:
        pass
    if not leftovers:
        return True
    command = ["rm", "-rf", "--one-file-system", "--", *(f"./{entry}" for entry in leftovers)]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0
