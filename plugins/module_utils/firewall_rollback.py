# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""A change of the firewall that is put back unless it is confirmed: by a timer, by a restart of the node, or by the next run."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils import firewall_files as files
from ansible_collections.onprem.torch.plugins.module_utils import invoker, node_lock
from ansible_collections.onprem.torch.plugins.module_utils.firewall_node import Node, NodeError

# How long a run waits for another one to confirm its change before it puts that back, and for another one to end, in seconds.
# A confirmation takes one new SSH connection; a run that was interrupted never confirms.
PATIENCE = 20
LOCK_PATIENCE = 60


def begin(
    node: Node,
    existed: Mapping[str, bool],
    commands: Sequence[str],
    links: Mapping[str, bool],
    kernel_range: Optional[tuple[int, int]],
    rollback_after: int,
) -> str:
    """Keep what the change touches, start the timer, and return the change's name, which its confirmation has to tell.

    existed: path of every file that changes to whether it exists. commands, links, kernel_range: see rollback_script.
    """
    for suffix in ("", ".confirmed", ".running"):
        shutil.rmtree(files.ROLLBACK_DIR + suffix, ignore_errors=True)
    os.makedirs(files.ROLLBACK_DIR, mode=0o700)
    for path, there in existed.items():
        if there:
            copy = f"{files.ROLLBACK_DIR}/files{path}"
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copy2(path, copy)
    name = uuid.uuid4().hex
    node.write(f"{files.ROLLBACK_DIR}/restore", files.restore_script(), 0o755)
    node.write(f"{files.ROLLBACK_DIR}/change", name, 0o600)
    node.write(f"{files.ROLLBACK_DIR}/rollback.sh", files.rollback_script(existed, commands, links, kernel_range), 0o755)
    node.write(files.CHANGED_FILE, name, 0o600)
    node.write(files.ROLLBACK_UNIT_FILE, files.rollback_unit_file(), 0o644)
    os.makedirs(os.path.dirname(files.ROLLBACK_UNIT_LINK), exist_ok=True)
    if not os.path.islink(files.ROLLBACK_UNIT_LINK):
        os.symlink(files.ROLLBACK_UNIT_FILE, files.ROLLBACK_UNIT_LINK)
    kept = [os.path.join(folder, entry) for folder, _folders, entries in os.walk(files.ROLLBACK_DIR) for entry in entries]
    _to_disk([files.ROLLBACK_UNIT_FILE, files.ROLLBACK_UNIT_LINK, *kept])
    node.command(
        [
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={files.ROLLBACK_UNIT}.service",
            f"--on-active={rollback_after}s",
            "--timer-property=AccuracySec=1s",
        ]
    )
    return name


def _to_disk(paths: Sequence[str]) -> None:
    """See to it that a power cut does not leave the change on the disk without these."""
    for path in [*paths, *sorted({os.path.dirname(path) for path in paths})]:
        if not os.path.islink(path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def confirm(node: Node, name: str) -> dict[str, Any]:
    """End the timer of this change: the connection that brought this order is the proof that access works."""
    with _lock():
        if node.read(files.CONFIRMED_FILE) == name:  # the answer to an earlier order was lost
            return {"changed": False, "rolled_back": False}
        if node.read(f"{files.ROLLBACK_DIR}/change") != name or not _moved():
            return {"changed": False, "rolled_back": True, "expired": node.read(files.EXPIRED_FILE) == name}
        node.write(files.CONFIRMED_FILE, name, 0o600)
        node.command(["systemctl", "stop", f"{files.ROLLBACK_UNIT}.timer"], check=False)
        _clear(node)
        return {"changed": False, "rolled_back": False}


def _clear(node: Node) -> None:
    """Remove what a confirmed change has no use for any more."""
    for path in (files.ROLLBACK_UNIT_LINK, files.ROLLBACK_UNIT_FILE, files.CHANGED_FILE):
        node.remove(path)
    shutil.rmtree(files.ROLLBACK_DIR + ".confirmed", ignore_errors=True)
    try:
        os.rmdir(os.path.dirname(files.ROLLBACK_DIR))
    except OSError:
        pass  # others keep something there, too


def _moved() -> bool:
    """Whether the change's folder was taken away from the roll-back, which takes it likewise."""
    try:
        os.rename(files.ROLLBACK_DIR, files.ROLLBACK_DIR + ".confirmed")
    except FileNotFoundError:
        return False
    return True


def put_back(node: Node) -> None:
    """Put the unconfirmed change back now."""
    node.command(["systemctl", "stop", f"{files.ROLLBACK_UNIT}.timer"], check=False)
    node.command(["/bin/sh", f"{files.ROLLBACK_DIR}/rollback.sh"], check=False)


@contextmanager
def alone(node: Node, read_only: bool, still_ours: Callable[[], None]) -> Iterator[None]:
    """One run at a time changes the firewall, and begins from what is confirmed. Raises NodeError when another does not end.

    still_ours: asked after all waiting; raises where another run has the node by now.
    """
    if read_only:
        yield
        return
    # One for all waiting: one that is made after whoever asked has gone knows nothing of it.
    with invoker.Invoker() as asker:
        while True:
            reason = asker.gone()
            if reason:
                raise NodeError(f"The firewall was not changed: this run was given up ({reason}).")
            with _lock():
                if not _awaits_confirmation():
                    still_ours()
                    _settle(node)
                    yield
                    return
            time.sleep(0.5)


def _settle(node: Node) -> None:
    """Put back what an interrupted run has left, and wait for what is being put back. Raises NodeError."""
    if os.path.isdir(files.ROLLBACK_DIR):
        put_back(node)
    elif os.path.isdir(files.ROLLBACK_DIR + ".confirmed"):  # the power went while it was confirmed
        _clear(node)
    for _attempt in range(100):
        if not os.path.isdir(files.ROLLBACK_DIR + ".running"):
            return
        time.sleep(0.1)
    raise NodeError(f"The last change is still being put back ({files.ROLLBACK_DIR}.running exists); look at `systemctl status {files.ROLLBACK_UNIT}`.")


def _awaits_confirmation() -> bool:
    """Whether another run may still confirm its change."""
    try:
        return time.time() - os.stat(files.ROLLBACK_DIR + "/change").st_mtime < PATIENCE
    except FileNotFoundError:
        return False


@contextmanager
def _lock() -> Iterator[None]:
    """Held while the firewall is changed. Raises NodeError."""
    with ExitStack() as held:
        try:
            held.enter_context(node_lock.held("firewall", LOCK_PATIENCE))
        except (node_lock.Gone, node_lock.Unsafe) as error:
            raise NodeError(f"The firewall was not changed: {error}.") from None
        except node_lock.Busy:
            raise NodeError(f"Another run has been changing the firewall for {LOCK_PATIENCE} s; wait for it, or look at `ps` on the node.") from None
        yield
