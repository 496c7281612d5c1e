"""Asking nodes from the control node: what the inventory, the connection or a node's root make of it stays a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleConnectionFailure
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.playbook.play_context import PlayContext
from ansible.playbook.task import Task
from ansible.plugins import loader as plugins
from ansible.template import Templar
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager
from ansible_collections.onprem.torch.plugins.action import cluster_run, nvidia_packages, peer_firewall, pytorch_environment, torchrun_unit
from ansible_collections.onprem.torch.plugins.module_utils import run_lease
from ansible_collections.onprem.torch.plugins.plugin_utils import given_up, runs, terminal
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
LEASE = run_lease.shaped({"id": "x", "who": "ops@desk", "verb": "train", "job": "train", "control": "there", "pid": 1, "start": 1})


def surroundings(tmp_path, variables, action=cluster_run):
    """An action of the host a, whose modules run on this machine, and Ansible's hostvars."""
    hosts = {"a": {"ansible_connection": "local", "ansible_remote_tmp": str(tmp_path / "remote"), "ansible_become": False, **variables}}
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts}}))
    (tmp_path / "hosts.json").rename(tmp_path / "hosts.yml")
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(tmp_path / "hosts.yml")])
    manager = VariableManager(loader=loader, inventory=inventory)
    hostvars = HostVars(inventory, manager, loader)
    context = PlayContext()
    connection = plugins.connection_loader.get("local", context)
    task = Task.load({"onprem.torch.cluster_run": {}}, variable_manager=manager, loader=loader)
    return action.ActionModule(task, connection, context, loader, Templar(loader, {}), plugins), hostvars


@pytest.fixture
def said(monkeypatch):
    """What is said on the terminal."""
    texts = []
    monkeypatch.setattr(terminal.display, "warning", texts.append)
    monkeypatch.setattr(terminal.display, "display", texts.append)
    return texts


@pytest.mark.parametrize("value", ["{{ nonexistent_thing }}", "{{ lookup('file', '/nowhere/at/all') }}", "{{ 1 / 0 }}"])
def test_a_variable_that_nobody_needs_may_have_no_value(tmp_path, value):
    action, hostvars = surroundings(
        tmp_path, {"unrelated": value, "python": sys.executable, "ansible_python_interpreter": "{{ python }}", "ansible_become": "{{ 1 == 2 }}"}
    )
    assert runs.ask(action, {"a": {"state": "looked"}}, hostvars)["a"]["problem"] == ""


@pytest.mark.parametrize("variable", ["ansible_python_interpreter", "ansible_remote_tmp"])
def test_a_variable_that_the_connection_needs_is_named(tmp_path, variable):
    action, hostvars = surroundings(tmp_path, {variable: "{{ nonexistent_thing }}"})
    assert "nonexistent_thing" in runs.ask(action, {"a": {"state": "looked"}}, hostvars)["a"]["problem"]


@pytest.mark.parametrize("kind", ["an error", "no JSON", "nobody reads", "killed"])
def test_whatever_happens_there_is_no_second_worker(monkeypatch, kind):
    def answers(*_arguments):
        if kind == "an error":
            raise SystemExit(3)
        if kind == "killed":
            os.kill(os.getpid(), 9)
        if kind == "nobody reads":
            os.close(reading)
        return {"run": {1, 2} if kind == "no JSON" else "x" * (1 << 20)}

    reading = None
    monkeypatch.setattr(runs, "_answer", answers)
    pipe = os.pipe

    def made():
        nonlocal reading
        reading, writing = pipe()
        return reading, writing

    monkeypatch.setattr(os, "pipe", made)
    me = os.getpid()
    try:
        pid, handle = runs._asked(None, "a", {}, None)
        if kind == "nobody reads":
            os.close(handle)
    finally:
        if os.getpid() != me:
            os._exit(99)  # the child came back
    if kind != "nobody reads":
        with os.fdopen(handle) as stream:
            answer = runs.received(stream.read())
        assert answer["run"] == {} and (answer["problem"] == "no answer" or kind == "no JSON")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-9 if kind == "killed" else 0)


KEYS = ["id", "who", "verb", "job", "control", "boot", "pid", "start", "since", "renewed", "lease", "silent", "taken", "problem"]
HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\x1b]0;OWNED\x07"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=20,
)


@given(HOSTILE, HOSTILE, HOSTILE, st.sampled_from(["train", "stop"]))
def test_what_a_node_tells_is_shaped(run, lease, problem, verb):
    """Whatever its root makes it tell, as its first answer and as a later one: no error, nothing that acts on a terminal."""
    for found in (run, {"taken": True, "lease": lease, "silent": run}, {"lease": {"id": "x", "who": problem, "pid": run}}, {"problem": problem}):
        variables = {"__cluster_node": {"run": found}}
        later = runs.received(json.dumps({"failed": False, "run": found}))
        assert later["problem"].isprintable()
        for answer in (runs.told(variables), later["run"]):
            now = run_lease.standing({"a": answer, "b": {}}, runs.identity(verb, "train"), False)
            for each in {**now.others, **now.dead, **now.interrupted}.values():
                assert run_lease.described(each).isprintable()
        assert runs.carried(variables) == run_lease.shaped(runs.carried(variables))
    assert runs.received(json.dumps({"failed": True, "msg": problem}))["problem"].isprintable()


@pytest.mark.parametrize("kind", ["unreachable", "busy", "no module"])
def test_a_node_that_cannot_be_given_back_fails_nothing(tmp_path, monkeypatch, said, kind):
    action, _hostvars = surroundings(tmp_path, {})

    def execute(*_arguments, **_named):
        if kind == "unreachable":
            raise AnsibleConnectionFailure("Connection timed out\x1b[2J")
        return {"failed": True, "msg": "busy"} if kind == "busy" else {"failed": True, "module_stderr": "no such file"}

    monkeypatch.setattr(action, "_execute_module", execute)
    action._task.args = {"state": "given_back"}
    result = action.run(task_vars={"inventory_hostname": "a", "__cluster_node": {"run": {"taken": True, "lease": LEASE}}})
    assert not result.get("failed") and not result.get("unreachable")
    (text,) = said
    assert text.startswith("a: the lease could not be given back (") and text.endswith("); it ends with this run") and text.isprintable()


def test_of_several_nodes_those_that_cannot_be_given_back_are_named(monkeypatch, said):
    monkeypatch.setattr(runs, "ask", lambda _action, arguments, _hostvars: {host: {"problem": "busy" if host == "b" else "", "run": {}} for host in arguments})
    runs.give_back(None, {"a": LEASE, "b": LEASE}, None)
    assert said == ["b: the lease could not be given back (busy); it ends with this run"]


@pytest.mark.parametrize("module", [nvidia_packages, peer_firewall, pytorch_environment, torchrun_unit])
def test_whatever_ends_the_task_ends_the_connection_of_a_module_that_may_wait(tmp_path, monkeypatch, module):
    action, hostvars = surroundings(tmp_path, {}, module)
    asked = []

    def execute(*_arguments, **_named):
        raise KeyboardInterrupt

    monkeypatch.setattr(action, "_execute_module", execute)
    monkeypatch.setattr(given_up, "children", lambda parent: asked.append(parent) or [])
    with pytest.raises(KeyboardInterrupt):
        action.run(task_vars={"inventory_hostname": "a", "hostvars": hostvars})
    assert asked == [os.getpid()]


def plays(book, given=None):
    """The plays of a playbook and of those that it imports, in their order, and the verb for which its look takes the nodes."""
    found, verb = [], ""
    for each in yaml.safe_load(book.read_text()):
        if "ansible.builtin.import_playbook" in each:
            variables = {**each.get("vars", {}), **(given or {})}
            inner, taken = plays(book.parent / each["ansible.builtin.import_playbook"], variables)
            found += inner
            verb = variables.get("look_takes", taken)
        else:
            found.append(each)
    return found, verb


def gives_back(task):
    told = task.get("onprem.torch.cluster_run", {}).get("state")
    if told in ("given_back", "ended"):
        assert task["tags"] == ["always"], f"{task['name']}: with --tags the nodes are taken all the same"
        assert bool(task.get("run_once")) == (told == "ended")
    return told


@pytest.mark.parametrize("book", [path for path in sorted((ROOT / "playbooks").glob("*.yml")) if plays(path)[1]], ids=lambda path: path.stem)
def test_a_verb_that_takes_the_nodes_gives_them_back_however_it_ends(book):
    """What comes between its look and where it gives them back stands in blocks that do so where it fails."""
    held = False
    for play in plays(book)[0]:
        if any(task.get("ansible.builtin.import_role", {}).get("name") == "onprem.torch.cluster" for task in play["tasks"]):
            held = True  # the plan gives them back where it fails
            continue
        for task in play["tasks"]:
            if "block" in task:
                ends = [gives_back(each) for each in task["always"]]
                assert "ended" in ends, play["name"]
                held = held and not ("given_back" in ends and book.stem == "stop")
            elif gives_back(task):
                held = False
            else:
                only_looks = "onprem.torch.show" in task or task.get("ansible.builtin.import_role", {}).get("tasks_from") == "status"
                assert not held or only_looks or play["hosts"] == "localhost", (play["name"], task["name"])
    assert not held


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a /run of its own")
@pytest.mark.parametrize("serial, bad, kept", [("100%", "none", True), ("100%", "b", False), (1, "a", False)])
def test_a_run_that_fails_gives_all_nodes_back(tmp_path, serial, bad, kept):
    """In Ansible's own hands: whichever host fails, the nodes of the others are given back, too."""
    task = {"onprem.torch.cluster_run": {"state": "ended"}, "run_once": True}
    work = {"ansible.builtin.command": "/bin/false", "when": f"inventory_hostname == '{bad}'"}
    found = {"run": {"taken": True, "lease": LEASE}}
    common = {"hosts": "all", "gather_facts": False, "any_errors_fatal": True}
    look = {**common, "tasks": [{"ansible.builtin.set_fact": {"__cluster_node": found}}]}
    play = {**common, "serial": serial, "tasks": [{"block": [work], "always": [task]}]}
    local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    (tmp_path / "book.yml").write_text(json.dumps([look, play]))
    (tmp_path / "hosts.yml").write_text(json.dumps({"all": {"hosts": {"a": local, "b": local, "c": local}}}))
    (tmp_path / "run.json").write_text(json.dumps(LEASE))
    command = f"""mount -t tmpfs tmpfs /run && mkdir -m 755 /run/onprem.torch && cp {tmp_path}/run.json /run/onprem.torch/ || exit 99
{sys.executable} -m ansible playbook -i {tmp_path}/hosts.yml {tmp_path}/book.yml; code=$?
test -e /run/onprem.torch/run.json && echo kept; exit $code"""
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    assert ended.returncode == (0 if bad == "none" else 2), ended.stdout
    assert ("kept" in ended.stdout.splitlines()) == kept and "could not be given back" not in ended.stdout, ended.stdout
