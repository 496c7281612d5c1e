#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_info
short_description: Tell what a node is, for the plan
version_added: 0.1.0
description:
  - Reads the distribution, Python, systemd, addresses, listening ports, disk space, clock and the GPU and network
    hardware of a node. Reads only, except that O(verb) takes the node; needs no NVIDIA driver.
  - The action plugin of this name turns a node that cannot be reached, has no sudo or no Python into a finding in
    C(error), so that the plan can name every such node at once.
options:
  disk_paths:
    description: Absolute paths whose file systems are asked for their free bytes. They need not exist.
    type: list
    elements: str
    default: []
  paths:
    description: Absolute paths that are looked for.
    type: list
    elements: str
    default: []
  folders:
    description:
      - What the job's user is to be able to do where, each with C(variable), C(path) and C(use), which is V(write), V(own), V(read),
        V(source), V(run) or V(trust). It is tried with that user's rights; a file that is made for it is removed at once.
    type: list
    elements: dict
    default: []
  user:
    description: Name of the job's user. Programs of others run with its rights, or as nobody where it is yet to be made.
    type: str
    default: torchrun
  environments:
    description: Python environments whose torch version is read without importing torch.
    type: list
    elements: str
    default: []
  environments_root:
    description: Folder whose C(environments) are read in the same way.
    type: str
    default: ""
  job:
    description: Name of the job, for its place at its last start, and for the run that is at work for it.
    type: str
    default: ""
  job_root:
    description: Folder of the job, for what its supervisor has written.
    type: str
    default: ""
  checkpoint_dir:
    description: Folder whose newest checkpoint is looked for.
    type: str
    default: ""
  checkpoint_glob:
    description: Pattern of the checkpoints' names.
    type: str
    default: "*"
  packages:
    description: Names of Debian packages to tell of, in which C(*) stands for any text.
    type: list
    elements: str
    default: []
  python:
    description: The Python that torch is to run with.
    type: str
    default: /usr/bin/python3
  verb:
    description:
      - What the run does, such as C(train). The node is taken for the run before it is looked at, unless another run has it;
        M(onprem.torch.cluster_run) settles that.
      - Empty for a look that takes nothing. In check mode, and with C(delegate_to), nothing is taken either.
    type: str
    default: ""
  run:
    description: The run that takes the node; set by the action plugin.
    type: dict
    default: {}
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Changes nothing, so shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Look at the node
  onprem.torch.node_info:
    disk_paths: [/var/lib/torchrun]
  register: __node_info
"""

RETURN = r"""
run:
  description: >-
    Which run has the node: whether this one has C(taken) it, the C(lease), empty for nobody's, and C(silent), the seconds since
    the last sign of life of whoever has it.
  returned: success
  type: dict
node:
  description: The findings.
  returned: success
  type: dict
  contains:
    error:
      description: Why the node could not be read, in one sentence; empty where it could.
      type: str
    distribution:
      description: C(id), C(version), C(codename) and C(name) of os-release.
      type: dict
    architecture:
      description: Machine name, such as C(x86_64).
      type: str
    kernel:
      description: Release of the running kernel.
      type: str
    machine_id:
      description: Content of /etc/machine-id.
      type: str
    hostname:
      description: Name of the node as its kernel knows it.
      type: str
    hostname_addresses:
      description: Addresses that this name resolves to on the node.
      type: list
      elements: str
    systemd:
      description: Whether systemd is PID 1.
      type: bool
    system_bus:
      description: Whether there is a system D-Bus, over which the job's user asks systemd.
      type: bool
    uid:
      description: Id of the user that modules run as; 0 for root.
      type: int
    python:
      description: C(path) and C(version) of the Python that torch is to run with; an empty version where there is none.
      type: dict
    interfaces:
      description: Interfaces with C(name), C(up), C(loopback), C(mtu) in bytes and C(addresses) (address/prefix).
      type: list
      elements: dict
    ephemeral_ports:
      description: First and last port of net.ipv4.ip_local_port_range.
      type: list
      elements: int
    listening:
      description: Listening TCP sockets with C(address), C(port), C(pid), C(command) and C(unit).
      type: list
      elements: dict
    firewalls:
      description: Which of firewalld and ufw are C(installed), and which are C(active).
      type: dict
    disk:
      description: Free bytes by path.
      type: dict
    file_systems:
      description: Number of the file system by path, the same for those that share one.
      type: dict
    paths:
      description: Whether each path exists.
      type: dict
    access:
      description: >-
        What was found of each of O(folders), with C(error) where the job's user cannot use it, C(real), C(home), C(changer),
        C(owner), C(mode), C(missing), C(rootless) (where root cannot make what it has to), C(refused) (why it
        is none of the job's own, and what to do) and C(exists) (whether the user does).
      type: list
      elements: dict
    torch:
      description: Version of torch by environment; empty where there is none.
      type: dict
    torch_builds:
      description: C(cuda) and C(nccl) versions that each environment's torch was built with; empty where it has none.
      type: dict
    packages:
      description: >-
        State of the packages that were asked for, and of those that an interruption left half done: C(version), C(want),
        C(flag) and C(state) of dpkg by name.
      type: dict
    own_pins:
      description: Names of packages that this collection pins and holds.
      type: list
      elements: str
    boot_id:
      description: Id of this boot of the kernel.
      type: str
    control_node:
      description: Whether this is the machine that Ansible runs on.
      type: bool
    secret_ids:
      description: Job of this collection → start of the SHA-256 of its secret.
      type: dict
    jobs:
      description: The jobs of this collection on the node, with C(job), C(unit), C(active), C(devices) and ports.
      type: list
      elements: dict
    state_odd:
      description: Why nothing is known of the job's supervisor although it has left a state, as a sentence; else empty.
      type: str
    past:
      description:
        - The job's last start and the newest checkpoints that lie there, lay there, or were seen on other nodes.
        - C(unread) tells why some of it is not known.
      type: dict
    glibc:
      description: Version of the C library, which decides the wheels that fit.
      type: str
    clock_offset_seconds:
      description: Seconds by which the node's clock is surely ahead of the control node's (negative when behind).
      type: float
    cpus:
      description: CPUs that the node may use.
      type: int
    memory_bytes:
      description: Total memory in bytes.
      type: int
    hardware:
      description: GPUs, NVSwitches, network adapters and driver, as documented in docs/nvidia.md.
      type: dict
"""

import json
import os
import platform
import socket
import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import (
    apt_state,
    folder_access,
    hardware,
    hostile_input,
    job_past,
    looks,
    node_facts,
    node_lock,
    run_lease,
    safe_files,
    supervisor_state,
)


def state_odd(job_root: str, who: safe_files.Account | None) -> str:
    """Return why nothing is known of the job's supervisor although it has left a state, as a sentence; else empty."""
    look = looks.Looks(who)
    return str(look.at(job_root, lambda: supervisor_state.read(job_root)[1], "") or "; ".join(look.failed))


def there(paths: t.Sequence[str], who: safe_files.Account | None) -> dict[str, bool]:
    """Return whether each path exists; none of which that cannot be told.

    The job's user is asked first: root of a node is nobody on a network file system, and sees nothing of a private folder there.
    """
    found = {}
    asked = [looks.Looks(user) for user in ([who, None] if who else [None])]
    for path in paths:
        seen = [look.at(path, lambda path=path: exists(path), None) for look in asked]
        if any(answer is not None for answer in seen):
            found[path] = True in seen
    return found


def exists(path: str) -> bool | None:
    """Return whether a path exists, None where this process may not know."""
    try:
        os.stat(path)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None


def python_version(python: str, who: safe_files.Account | None) -> str:
    """Return the version of the Python for torch, run with the rights of the job's user, or of nobody."""
    runner = who or safe_files.Account("nobody", safe_files.NOBODY, safe_files.NOBODY, ())
    command = [python, "-I", "-S", "-c", "import platform; print(platform.python_version())"]
    status, output, _errors = safe_files.run_as(runner, command, 20)
    return output.strip()[:40] if status == 0 else ""


def lease(run: dict[str, object]) -> dict[str, object]:
    """Take the node for a run, and tell who has it. What only root may do is not tried as another user: the plan asks for root."""
    try:
        return run_lease.told(run if os.geteuid() == 0 else {})
    except node_lock.Busy as error:
        return {"problem": f"the node cannot be taken for this run: {error}"}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "disk_paths": {"type": "list", "elements": "str", "default": []},
            "paths": {"type": "list", "elements": "str", "default": []},
            "folders": {"type": "list", "elements": "dict", "default": []},
            "user": {"type": "str", "default": "torchrun"},
            "environments": {"type": "list", "elements": "str", "default": []},
            "environments_root": {"type": "str", "default": ""},
            "job": {"type": "str", "default": ""},
            "job_root": {"type": "str", "default": ""},
            "checkpoint_dir": {"type": "str", "default": ""},
            "checkpoint_glob": {"type": "str", "default": "*"},
            "packages": {"type": "list", "elements": "str", "default": []},
            "python": {"type": "str", "default": "/usr/bin/python3"},
            "verb": {"type": "str", "default": ""},
            "run": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    # First of all: what another run changes meanwhile would make the look worthless.
    run = lease(module.params["run"])
    now = time.time()
    returncode, links, stderr = module.run_command(["ip", "-json", "address"])
    if returncode != 0:
        module.fail_json(msg=f"the command ip (package iproute2) is needed to read the addresses: {stderr.strip()}")
    python = module.params["python"]
    params = module.params
    reader = looks.reader(params["user"])
    environments = [*module.params["environments"], *node_facts.environments(module.params["environments_root"])]
    roots = looks.Looks(None)  # an environment may lie on a file system that is gone
    name = socket.gethostname()
    node = {
        "error": "",
        "distribution": node_facts.distribution(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        **node_facts.machine(),
        "hostname": name,
        "hostname_addresses": node_facts.resolved_name(name),
        "systemd": os.path.isdir("/run/systemd/system"),
        "system_bus": node_facts.system_bus(),
        "uid": os.geteuid(),
        "python": {
            "path": python,
            "version": python_version(python, reader),
        },
        "interfaces": node_facts.parse_addresses(json.loads(links)),
        "ephemeral_ports": node_facts.ephemeral_ports(),
        "listening": node_facts.listening(),
        "firewalls": node_facts.firewalls(),
        "disk": looks.answers(node_facts.free_bytes, params["disk_paths"]),
        "file_systems": looks.answers(node_facts.file_system, params["disk_paths"]),
        "paths": there(params["paths"], reader),
        "access": [folder_access.look(user=params["user"], **entry) for entry in params["folders"]],
        "torch": {path: roots.at(path, lambda path=path: node_facts.torch_version(path), "") for path in environments},
        "torch_builds": {path: roots.at(path, lambda path=path: node_facts.torch_build(path), {"cuda": "", "nccl": ""}) for path in environments},
        "packages": apt_state.chosen(apt_state.parse_status(node_facts.read_text(apt_state.STATUS)), module.params["packages"]),
        "own_pins": apt_state.own_pins(),
        "jobs": node_facts.jobs(),
        "secret_ids": node_facts.secret_ids(),
        "state_odd": state_odd(params["job_root"], reader) if params["job_root"] else "",
        "past": job_past.look(params["job"], params["checkpoint_dir"], params["checkpoint_glob"], reader) if params["job"] else {},
        "glibc": platform.libc_ver()[1],
        "time": now,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "hardware": hardware.collect(root="/"),
    }
    # Users of the node choose the names of their processes and files.
    module.exit_json(changed=False, node=hostile_input.tidy(node, 1 << 20, lines=True), run=run)


if __name__ == "__main__":
    main()
