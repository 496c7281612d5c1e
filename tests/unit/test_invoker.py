"""A module that waits for a lock ends with whoever asked for it: real processes, pipes and sockets."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import invoker, node_lock

CONFTEST = os.path.join(os.path.dirname(__file__), "conftest.py")
# Says on a file descriptor what became of it.
WAITS = f"""
import os, runpy, sys
runpy.run_path({CONFTEST!r})
from ansible_collections.onprem.torch.plugins.module_utils import node_lock
told = int(sys.argv[2])
os.write(told, b"waits ")
try:
    with node_lock.held("x", 30, sys.argv[1]):
        os.write(told, b"acts")
except node_lock.Gone as error:
    os.write(told, str(error).encode())
"""
RELAY = "import subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[int(sys.argv[-1])])"


def waiting(folder, stdout, relay=False):
    """Start a process that waits for the lock, by a relay if asked; return it and where it tells what became of it."""
    reading, writing = os.pipe()
    words = [sys.executable, "-c", WAITS, folder, str(writing)]
    if relay:  # sudo with use_pty: a parent of the module holds what Ansible reads, the module's own output is the parent's
        words = [sys.executable, "-c", RELAY, *words]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL, pass_fds=[writing])
    os.close(writing)
    assert os.read(reading, 6) == b"waits "
    time.sleep(1)  # until it surely waits
    return process, reading


def rest(reading):
    with os.fdopen(reading, "rb") as stream:
        return stream.read().decode()


@pytest.mark.parametrize("relay", [False, True], ids=["its own output", "a parent's output"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_whose_output_nobody_reads_any_more_does_not_act(tmp_path, kind, relay):
    if kind == "pipe":
        ours, theirs = os.pipe()
    else:
        pair = socket.socketpair()
        ours, theirs = (each.detach() for each in pair)
    with node_lock.held("x", 0, str(tmp_path)):
        process, told = waiting(str(tmp_path), theirs, relay)
        os.close(theirs)
        os.close(ours)
        assert "output is read by nobody" in rest(told)
    process.wait()


def test_whose_parent_ends_does_not_act(tmp_path):
    with node_lock.held("x", 0, str(tmp_path)):
        process, told = waiting(str(tmp_path), subprocess.DEVNULL, relay=True)
        process.kill()
        process.wait()
        assert "has ended" in rest(told)


def test_who_is_waited_for_acts_once_the_lock_is_free(tmp_path):
    ours, theirs = os.pipe()
    with node_lock.held("x", 0, str(tmp_path)):
        process, told = waiting(str(tmp_path), theirs)
    assert rest(told) == "acts"
    process.wait()
    os.close(ours)
    os.close(theirs)


def test_processes_are_known_by_id_and_start():
    with subprocess.Popen(["sleep", "60"]) as process:
        name, parent, start = invoker.stat(process.pid)
        assert (name, parent) == ("sleep", os.getpid()) and start > 0
        process.send_signal(signal.SIGKILL)
        while invoker.stat(process.pid):  # a zombie has ended, too
            time.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_no_other_user_can_hold_make_or_replace_a_lock(tmp_path):
    os.chmod(tmp_path, 0o711)
    for parent in tmp_path.parents:
        if parent.name.startswith("pytest"):
            os.chmod(parent, 0o711)
    folder = str(tmp_path / "locks")
    with node_lock.held("x", 0, folder):
        pass
    attack = f"""
import fcntl, os
os.setgid(65534); os.setuid(65534)
for attempt in (lambda: fcntl.flock(os.open({folder!r} + "/x.lock", os.O_RDONLY), fcntl.LOCK_EX), lambda: os.open({folder!r} + "/y.lock", os.O_CREAT),
                lambda: os.symlink("/etc", {folder!r} + "/y.lock"), lambda: os.mkdir({folder!r} + "/y.lock"), lambda: os.unlink({folder!r} + "/x.lock"),
                lambda: os.rename({folder!r}, {folder!r} + "2")):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemExit("this worked")
"""
    assert os.path.isdir(folder)
    subprocess.run([sys.executable, "-c", attack], check=True)
    with node_lock.held("x", 0, folder), node_lock.held("y", 0, folder):
        assert stat.S_IMODE(os.stat(f"{folder}/x.lock").st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "file", "another user's"])
def test_a_folder_that_is_not_roots_is_refused_with_a_sentence(tmp_path, kind):
    folder = tmp_path / "locks"
    if kind == "link":
        folder.symlink_to("/tmp")
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        if os.geteuid() != 0:
            pytest.skip("needs root, to give a folder away")
        os.chown(folder, 65534, 65534)
    with pytest.raises(node_lock.Unsafe, match="a folder of root's was expected|one of root's was expected"):
        with node_lock.held("x", 0, str(folder)):
            pass


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x.lock"
    {"link": lambda: path.symlink_to("/etc/hostname"), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(node_lock.Unsafe, match="remove it"):
        with node_lock.held("x", 5, str(tmp_path)):
            pass
