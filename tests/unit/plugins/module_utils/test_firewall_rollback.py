# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may change the firewall: one run at a time, and only one that still has the node after it has waited."""

from __future__ import annotations

import functools

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import firewall_apply as apply
from ansible_collections.onprem.torch.plugins.module_utils import firewall_rollback as rollback
from ansible_collections.onprem.torch.plugins.module_utils import node_lock, run_lease
from ansible_collections.onprem.torch.plugins.module_utils.firewall_node import NodeError


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The node's folders are the test's; what is returned takes the lock at once or raises Busy."""
    held = functools.partial(node_lock.held, folder=str(tmp_path))
    monkeypatch.setattr(node_lock, "held", held)
    monkeypatch.setattr(rollback.files, "ROLLBACK_DIR", str(tmp_path / "rollback"))
    return functools.partial(held, "firewall", 0)


def is_held(lock):
    try:
        with lock():
            return False
    except node_lock.Busy:
        return True


def test_a_run_that_lost_the_node_while_it_waited_changes_nothing(lock, monkeypatch):
    def lost():
        assert is_held(lock), "asked before the waiting"
        raise run_lease.Lost("ops@desk has taken the node over from this run")

    monkeypatch.setattr(apply, "gather", lambda _node: pytest.fail("it goes on"))
    monkeypatch.setattr(rollback, "_settle", lambda _node: pytest.fail("it goes on"))
    with pytest.raises(run_lease.Lost, match="has taken the node over"):
        apply.carry_out(None, apply.Request(), False, lost)
    assert not is_held(lock)


@pytest.mark.parametrize("request_, check_mode", [(apply.Request(), True), (apply.Request(state="verified"), False)])
def test_who_only_looks_asks_nobody(lock, monkeypatch, request_, check_mode):
    def looked(_node):
        raise NodeError("looked")

    monkeypatch.setattr(apply, "gather", looked)
    with lock(), pytest.raises(NodeError, match="looked"):
        apply.carry_out(None, request_, check_mode, lambda: pytest.fail("asked"))


def test_a_module_for_which_nobody_waits_does_not_wait_for_a_confirmation(lock, monkeypatch):
    gone = []

    class Invoker(rollback.invoker.Invoker):
        """The first one, which is there when whoever asked ends; later ones do not see it."""

        def __init__(self):
            self.first = not gone
            gone.append("")
            super().__init__()

        def gone(self):
            return gone[0] if self.first else ""

    def awaited():
        gone[0] = "the process that started it has ended"
        return True

    monkeypatch.setattr(rollback.invoker, "Invoker", Invoker)
    monkeypatch.setattr(rollback, "_awaits_confirmation", awaited)
    with pytest.raises(NodeError, match="was not changed: this run was given up"):
        with rollback.alone(None, False, lambda: None):
            pass


def test_what_goes_wrong_while_it_is_held_is_not_taken_for_a_busy_lock(lock):
    with pytest.raises(node_lock.Busy, match="another lock"):
        with rollback._lock():
            raise node_lock.Busy("another lock")
