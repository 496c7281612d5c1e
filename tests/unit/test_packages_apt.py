"""dpkg's lock and apt: whoever waited for it asks again whether the work is still wanted, and brings to its end what was begun."""

from __future__ import annotations

import fcntl
import multiprocessing

import pytest
from ansible_collections.onprem.torch.plugins.module_utils import apt_state, invoker, packages_apt, run_lease
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run

LOCKED = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 4711 (apt-get)"


class Failed(Exception):
    """The module has ended with a failure."""


class Module:
    """A module whose commands are noted, not run."""

    check_mode = False

    def __init__(self, answers=()):
        self.params = {"settings": {"pins": [{"packages": ["cuda*"], "version": "1"}]}, "lock_timeout": 3000, "run": {"id": "x"}}
        self.commands = []
        self.answers = list(answers)

    def run_command(self, words, data=None, environ_update=None):
        self.commands.append([*words, *(data or "").splitlines()])
        return (100, "", self.answers.pop(0)) if self.answers else (0, "", "")

    def fail_json(self, msg, **_result):
        raise Failed(msg)


@pytest.fixture
def why(tmp_path, monkeypatch):
    """Why the work is not wanted any more, by kind; nothing as long as it is."""
    kinds = {}

    def require(run):
        assert run == {"id": "x"}
        if kinds.get("lost"):
            raise run_lease.Lost("ops@desk has taken the node over from this run")

    monkeypatch.setattr(run_lease, "require", require)
    monkeypatch.setattr(invoker.Invoker, "gone", lambda _self: kinds.get("gone", ""))
    monkeypatch.setattr(packages_apt, "LOCK", str(tmp_path / "lock"))
    return kinds


def _holds(path, begun, done):
    with open(path, "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        begun.set()
        done.wait()


@pytest.fixture
def another(why):
    """Another program that has the lock until what is returned is called."""
    context = multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Event()
    process = context.Process(target=_holds, args=(packages_apt.LOCK, begun, done))
    process.start()
    assert begun.wait(60)

    def ends():
        done.set()
        process.join()

    yield ends
    ends()


KINDS = pytest.mark.parametrize("kind, words", [("lost", "has taken the node over"), ("gone", "was given up")])
ACTIONS = {
    "hold": lambda apt: apt.hold(["cuda-12"]),
    "wait": lambda apt: apt.wait(),
    "install": lambda apt: apt.change(["install", "--yes", "cuda-12"]),
}


@KINDS
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("free", [True, False], ids=["the lock gets free", "the lock stays"])
def test_what_is_not_wanted_any_more_is_not_done_after_waiting(why, another, monkeypatch, kind, words, action, free):
    module = Module()
    apt = packages_apt.Apt(Run(module))

    def waits(_seconds):
        why[kind] = "its output is read by nobody any more"
        if free:
            another()

    monkeypatch.setattr(packages_apt.time, "sleep", waits)
    with pytest.raises(Failed, match=words):
        ACTIONS[action](apt)
    assert module.commands == []


@KINDS
def test_the_list_of_the_repository_is_not_waited_for_by_nobody(why, kind, words):
    module = Module(["E: Could not get lock /var/lib/apt/lists/lock"] * 3)
    apt = packages_apt.Apt(Run(module))
    why[kind] = "its output is read by nobody any more"
    with pytest.raises(Failed, match=words):
        apt.refresh(["update"])
    assert len(module.commands) == 1


@KINDS
def test_what_was_released_is_held_again(why, kind, words):
    module = Module()
    apt = packages_apt.Apt(Run(module))
    apt.loose = ["cuda-12"]
    why[kind] = "its output is read by nobody any more"
    with pytest.raises(Failed, match=words):
        apt.change(["install", "--yes", "cuda-12"])
    assert module.commands == [["dpkg", "--set-selections", "cuda-12 hold"]]


@KINDS
@pytest.mark.parametrize("begun", [True, False])
def test_an_installation_ends_with_holds_whoever_has_the_node(why, monkeypatch, kind, words, begun):
    module = Module()
    run = Run(module)
    apt = packages_apt.Apt(run)
    monkeypatch.setattr(apt, "packages", lambda: {"cuda-12": {"want": "install", "state": "installed", "version": "1"}})
    why[kind] = "its output is read by nobody any more"
    if begun:
        run.result["installed"] = {"cuda-12": "1"}
        apt.holds()
        assert module.commands == [["dpkg", "--set-selections", "cuda-12 hold"]]
    else:
        with pytest.raises(Failed, match=words):
            apt.holds()
        assert module.commands == []


def test_apt_does_not_wait_by_itself_for_a_lock_that_was_taken_meanwhile(why):
    module = Module([LOCKED, LOCKED])
    assert packages_apt.Apt(Run(module)).change(["install", "--yes", "cuda-12"])[0] == 0
    assert len(module.commands) == 3 and all(f"DPkg::Lock::Timeout={packages_apt.MOMENT}" in words for words in module.commands)


def test_a_run_that_lost_the_node_while_apt_worked_does_not_go_on_to_a_reboot(why):
    run = Run(Module())
    run.result["reboot_reason"] = "another driver runs"
    why["lost"] = True
    with pytest.raises(Failed, match="as they should be, but .* has taken the node over"):
        run.end()


@pytest.mark.parametrize(
    "text, locked",
    [
        (LOCKED, True),
        ("E: Could not get lock /var/lib/dpkg/lock-frontend - open (11: Resource temporarily unavailable)", True),
        ("E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process using it?", True),
        ("E: Unable to lock the administration directory (/var/lib/dpkg/), is another process using it?", True),
        ("E: Could not get lock /var/cache/apt/archives/lock. It is held by process 12 (apt)", True),
        ("E: Unable to locate package cuda-12", False),
        ("E: Unable to acquire anything", False),
    ],
)
def test_a_lock_that_keeps_apt_from_beginning(text, locked):
    assert apt_state.packages_locked(text) == locked
