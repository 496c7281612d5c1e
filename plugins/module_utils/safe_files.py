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
import select
import signal
import stat
import subprocess
import time
import typing as t

# Seconds for a question to a file system; a dead one never answers.
SECONDS = 10.0
# Bytes that a child may answer.
ANSWER = 4 << 20
# Ids of users and groups below are the distribution's own services (login.defs: UID_MIN, GID_MIN).
FIRST_PERSON = 1000
# A user without any rights, where the job's is yet to be made.
NOBODY = 65534
# Links on the way to a folder, as many as the kernel follows.
LINKS = 40
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Unsafe(Exception):
    """Others than root can lead root astray here; the message is a sentence's first half."""


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
        systems: the same, but the distribution's groups may write (Ubuntu's /var/log belongs to root:syslog, 0775).
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
        RuntimeError: the work raised something else, or the child was killed.
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
            if who is not None:
                drop(who)
            data = json.dumps(_attempt(work)).encode()
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


def _attempt(work: t.Callable[[], t.Any]) -> dict[str, t.Any]:
    """Return the result of the work, or its error, as a child hands it back."""
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


# --- relative to opened folders ---


def roots(found: os.stat_result) -> bool:
    """Return whether nobody but root can change what lies in a folder, or a file."""
    return found.st_uid == 0 and not found.st_mode & 0o022


def systems(found: os.stat_result) -> bool:
    """Return whether a folder is root's and besides at most one of the distribution's groups can change it."""
    return found.st_uid == 0 and not found.st_mode & 0o002 and (not found.st_mode & 0o020 or found.st_gid < FIRST_PERSON)


def reach(path: str) -> Reached:
    """Open as much of a path as is there; the caller closes the descriptor.

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
    try:
        while True:
            found = os.fstat(handle)
            only_root, only_system = only_root and roots(found), only_system and systems(found)
            if not roots(found) and not changer:
                who = name_of(found.st_uid) if found.st_uid else "all users" if found.st_mode & 0o002 else f"the group {group_of(found.st_gid)}"
                changer = f"/{'/'.join(names)} ({who})"
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
                    raise NotADirectoryError(errno.ENOTDIR, "it is no folder", here) from None
                links += 1
                if not only_root or links > LINKS:
                    raise Unsafe(f"{here} is a link, which others than root can change") from None
                parts.extendleft(reversed([word for word in link.split("/") if word not in ("", ".")]))
                if link.startswith("/"):
                    os.close(handle)
                    handle = os.open("/", _WALK)
                    names = []
                continue
            os.close(handle)
            handle = entered
            names = names[:-1] if part == ".." else [*names, part]
    except BaseException:
        os.close(handle)
        raise


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
            yield f"/proc/self/fd/{handle}"
    finally:
        os.close(found.handle)


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
    found = reach(path)
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
        as_user(who, lambda: os.makedirs(path, mode=0o755, exist_ok=True))
        return "made"
    finally:
        os.close(found.handle)


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
        ours = own and systems(os.fstat(above))
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
    """Remove an entry of a folder of root's with all that is in it, whatever others have made there; return whether all is gone.

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
