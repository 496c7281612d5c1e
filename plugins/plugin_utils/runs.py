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

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.onprem.torch.plugins.module_utils import invoker
from ansible_collections.onprem.torch.plugins.plugin_utils import connections

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


def carried(task_vars: t.Mapping[str, t.Any] | None) -> dict[str, t.Any]:
    """Return the lease that this run has on the task's host, for its modules; empty where it has taken none."""
    told = ((task_vars or {}).get("__cluster_node") or {}).get("run") or {}
    return dict(told["lease"]) if told.get("taken") else {}


def holding(hosts: t.Iterable[str], hostvars: t.Any) -> dict[str, dict[str, t.Any]]:
    """Return the leases that this run has, by host."""
    leases = {host: carried(hostvars.raw_get(host)) for host in hosts}
    return {host: lease for host, lease in leases.items() if lease}


def ask(action: ActionBase, arguments: t.Mapping[str, dict[str, t.Any]], hostvars: t.Any) -> dict[str, dict[str, t.Any]]:
    """Run the module cluster_run on several nodes at once; return their answers, with ``failed`` and ``msg`` where there is none.

    Args:
        action: the action that asks.
        arguments: the module's, by host.
        hostvars: Ansible's hostvars.
    """
    hosts, answers = list(arguments), {}
    for first in range(0, len(hosts), AT_ONCE):
        reading = {host: _asked(action, host, arguments[host], hostvars) for host in hosts[first : first + AT_ONCE]}
        for host, (pid, handle) in reading.items():
            with os.fdopen(handle, encoding="utf-8") as stream:
                text = stream.read()
            os.waitpid(pid, 0)
            answers[host] = json.loads(text) if text else {"failed": True, "msg": "no answer"}
    return answers


def _asked(action: ActionBase, host: str, arguments: dict[str, t.Any], hostvars: t.Any) -> tuple[int, int]:
    """Ask a node in a process of its own, since Ansible's modules cannot be run in threads; return its id and where it answers."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    answer: dict[str, t.Any] = {"failed": True, "msg": "no answer"}
    try:
        shell = connections.shell(action, host, hostvars)
        answer = shell._execute_module(MODULE, arguments, task_vars=dict(hostvars[host]))
    except (AnsibleConnectionFailure, AnsibleError) as error:
        answer["msg"] = str(error)
    finally:
        with os.fdopen(writing, "w", encoding="utf-8") as stream:
            json.dump({key: answer.get(key) for key in ("failed", "msg", "run", "module_stderr")}, stream)
        os._exit(0)


def give_back(action: ActionBase, leases: t.Mapping[str, dict[str, t.Any]], hostvars: t.Any) -> None:
    """Give nodes back; one that cannot be reached keeps a lease of a dead run, which nobody minds."""
    ask(action, {host: {"state": "given_back", "run": lease} for host, lease in leases.items()}, hostvars)
