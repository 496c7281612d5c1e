# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Commands on several hosts at once, from one action, each over its own connection of Ansible's.

A task that runs on every host holds a fork for each; following the journals of more nodes than there are forks would
stop at the first ones. Hence one action with a thread for each node.
"""

from __future__ import annotations

import typing as t

from ansible import constants as C
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase


class Shell(ActionBase):
    """Runs shell commands on one host. No task of its own: it is made by another action, with that one's surroundings."""

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Not an action that a playbook could name."""
        raise NotImplementedError

    def output(self, command: str) -> str | None:
        """Return what a command prints; None where the host does not answer."""
        try:
            return str(self._low_level_execute_command(command)["stdout"])
        except (AnsibleConnectionFailure, AnsibleError):
            return None


def options(kind: str, name: str, variables: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return the host's variables that are options of a plugin."""
    return {key: variables[key] for key in C.config.get_plugin_vars(kind, name) if key in variables}


def shell(action: ActionBase, host: str, hostvars: t.Mapping[str, t.Any]) -> Shell:
    """Return a shell on a host of the inventory, with its own user, key, become and so on.

    Args:
        action: the action that asks.
        host: inventory name.
        hostvars: Ansible's hostvars.
    """
    variables = hostvars[host]
    loaders = action._shared_loader_obj
    context = action._play_context.copy()
    connection = loaders.connection_loader.get(
        variables.get("ansible_connection") or action._connection.transport, context, task_uuid=str(action._task._uuid)
    )
    task_keys = action._task.dump_attrs()
    if boolean(variables.get("ansible_become", action._task.become), strict=False):
        method = str(variables.get("ansible_become_method") or action._task.become_method or "sudo")
        connection.set_become_plugin(loaders.become_loader.get(method))
        if context.become_pass:
            task_keys["become_pass"] = context.become_pass
        connection.become.set_options(task_keys=task_keys, var_options=options("become", method, variables))
    else:
        connection.set_become_plugin(None)
    connection.set_options(task_keys=task_keys, var_options=options("connection", connection._load_name, variables))
    connection._shell.set_options(task_keys=task_keys, var_options=options("shell", connection._shell._load_name, variables))
    return Shell(action._task, connection, context, action._loader, action._templar, loaders)
