# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""This run of ansible-playbook, and the nodes that it holds (see module_utils/run_lease.py)."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import time
import typing as t

from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, invoker, run_lease
from ansible_collections.onprem.torch.plugins.plugin_utils import connections, terminal

MODULE = "onprem.torch.cluster_run"
# Nodes that are asked at the same time.
AT_ONCE = 32


def control_node() -> str:
    """Return what tells the processes of this machine, or container, from those of others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as stream:
            parts = [stream.read().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:  # no Linux, so that processes are told by nothing but their signs of life
        parts = [socket.gethostname(), str(os.getppid())]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def identity(verb: str, job: str) -> dict[str, t.Any]:
    """Return who this run is: the same in every action of one ansible-playbook, whose forks they run in.

    Args:
        verb: what it does, such as train.
        job: name of the job that it does it for.
    """
    pid = os.getppid()
    known = invoker.stat(pid)
    start = known[2] if known else 0
    try:
        since = os.stat(f"/proc/{pid}").st_ctime
    except OSError:
        since = time.time()
    control = control_node()
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    name = hashlib.sha256(f"{control}/{pid}/{start}".encode()).hexdigest()[:16]
    who = f"{user}@{socket.gethostname()}"
    return {"id": name, "who": who, "verb": verb, "job": job, "since": since, "control": control, "pid": pid, "start": start}


def told(variables: t.Mapping[str, t.Any] | None) -> dict[str, t.Any]:
    """Return what the look at a host found of its lease (see run_lease.answered); empty where it was not asked."""
    return run_lease.answered(((variables or {}).get("__cluster_node") or {}).get("run"))


def carried(task_vars: t.Mapping[str, t.Any] | None) -> dict[str, t.Any]:
    """Return the lease that this run has on the task's host, for its modules; empty where it has taken none."""
    answer = told(task_vars)
    return answer["lease"] if answer.get("taken") else {}


def holding(hosts: t.Iterable[str], hostvars: t.Any) -> dict[str, dict[str, t.Any]]:
    """Return the leases that this run has, by host."""
    leases = {host: carried(hostvars.raw_get(host)) for host in hosts}
    return {host: lease for host, lease in leases.items() if lease}


def ask(action: ActionBase, arguments: t.Mapping[str, dict[str, t.Any]], hostvars: t.Any) -> dict[str, dict[str, t.Any]]:
    """Run the module cluster_run on several nodes at once.

    Args:
        action: the action that asks.
        arguments: the module's, by host.
        hostvars: Ansible's hostvars.

    Returns:
        By host: ``problem``, why there is no answer, else an empty text; ``run``, the answer (see run_lease.answered).
    """
    hosts, answers = list(arguments), {}
    for first in range(0, len(hosts), AT_ONCE):
        reading = {host: _asked(action, host, arguments[host], hostvars) for host in hosts[first : first + AT_ONCE]}
        for host, (pid, handle) in reading.items():
            with os.fdopen(handle, encoding="utf-8", errors="replace") as stream:
                text = stream.read()
            os.waitpid(pid, 0)
            answers[host] = received(text)
    return answers


def received(text: str) -> dict[str, t.Any]:
    """Return what the process that asked a node has written, shaped: the node has made parts of it."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):  # it was killed
        answer = {}
    run = run_lease.answered(answer.get("run"))
    return {"problem": problem(answer) if answer.get("failed") or not answer else run.get("problem", ""), "run": run}


def problem(answer: t.Mapping[str, t.Any]) -> str:
    """Return why a node could not be asked, in one line."""
    words = str(answer.get("msg") or "").split() or ["no", "answer"]
    return hostile_input.printable(" ".join(words))


def _asked(action: ActionBase, host: str, arguments: dict[str, t.Any], hostvars: t.Any) -> tuple[int, int]:
    """Ask a node in a process of its own, since Ansible's modules cannot be run in threads; return its id and where it answers."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    # Whatever happens, this copy of Ansible's worker does not go on as a second one.
    try:
        text = json.dumps(_answer(action, host, arguments, hostvars), default=str)
        with os.fdopen(writing, "w", encoding="utf-8") as stream:
            stream.write(text)
    finally:
        os._exit(0)


def _answer(action: ActionBase, host: str, arguments: dict[str, t.Any], hostvars: t.Any) -> dict[str, t.Any]:
    """Return the module's answer, or what kept it from running."""
    try:
        shell = connections.shell(action, host, hostvars)
        # As a task of the host's own has them: what the module needs is templated when it is needed. Some other variable of
        # the inventory may have no value at all.
        variables = dict(hostvars.raw_get(host))
        shell._templar = action._templar.copy_with_new_env(available_variables={**variables, "hostvars": hostvars})
        answer = shell._execute_module(MODULE, arguments, task_vars=variables)
    except Exception as error:  # whatever it is, the node was not asked
        return {"failed": True, "msg": str(error)}
    if answer.get("failed") and not answer.get("msg"):
        answer["msg"] = answer.get("module_stderr")
    return {key: answer.get(key) for key in ("failed", "msg", "run")}


def give_back(action: ActionBase, leases: t.Mapping[str, dict[str, t.Any]], hostvars: t.Any) -> None:
    """Give nodes back, and warn of those that could not be: what the run has done is done all the same."""
    for host, answer in ask(action, {host: {"state": "given_back", "run": lease} for host, lease in leases.items()}, hostvars).items():
        if answer["problem"]:
            kept(host, answer["problem"])


def kept(host: str, reason: str) -> None:
    """Say that a node keeps its lease, which is that of a dead run as soon as this one has ended."""
    terminal.warn(f"{host}: the lease could not be given back ({reason}); it ends with this run")
