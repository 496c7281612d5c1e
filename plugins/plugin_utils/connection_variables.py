# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The variables that Ansible itself connects with.

Ansible reads them before any task runs and ends with an error of its own for the first bad one, so they are checked
before the first task on a node.
"""

from __future__ import annotations

import typing as t

from ansible.module_utils.parsing.convert_bool import boolean
from ansible.parsing.vault import EncryptedString
from ansible.plugins.loader import become_loader, connection_loader
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem
from ansible_collections.onprem.torch.plugins.module_utils.variables import shown
from ansible_collections.onprem.torch.plugins.plugin_utils.catalog import unreadable


def port(value: t.Any) -> str:
    """Return what was expected where a value is no port, else an empty string."""
    return "" if str(value).isdecimal() and 0 < int(value) < 65536 else "a port from 1 to 65535"


def truth(value: t.Any) -> str:
    """Return what was expected where a value is no boolean, as Ansible reads it, else an empty string."""
    try:
        boolean(value, strict=True)
    except TypeError:
        return "true or false"
    return ""


def connection(value: t.Any) -> str:
    """Return what was expected where a value names no connection plugin, else an empty string."""
    return "" if connection_loader.has_plugin(str(value)) else "a connection plugin such as ssh"


def become_method(value: t.Any) -> str:
    """Return what was expected where a value names no become plugin, else an empty string."""
    return "" if become_loader.has_plugin(str(value)) else "a become plugin such as sudo"


CHECKS: dict[str, t.Callable[[t.Any], str]] = {
    "ansible_port": port,
    "ansible_ssh_port": port,
    "ansible_become": truth,
    "ansible_pipelining": truth,
    "ansible_ssh_pipelining": truth,
    "ansible_connection": connection,
    "ansible_become_method": become_method,
}


# What decides which hosts take part is read before the plan, too.
EARLY = ("torchrun_node_out", "torchrun_node_rank")


def check(host: str, raw: t.Mapping[str, t.Any], templar: t.Any) -> list[Problem]:
    """Return the problems with the connection variables of one host.

    Args:
        host: its name.
        raw: its variables as they stand in the inventory.
        templar: a templar that knows them.
    """
    problems = []
    for variable, value in raw.items():
        early = variable.startswith("ansible_") and (variable in CHECKS or isinstance(value, (str, EncryptedString)))
        if not early and variable not in EARLY:
            continue
        try:
            value = templar.template(value)
        except Exception as error:  # whatever a template or a secret raises, the user gets a sentence
            problems.append(unreadable(host, variable, error))
            continue
        expected = CHECKS[variable](value) if variable in CHECKS and value is not None else ""
        if expected:
            text = f"{variable} is {shown(value)}, but {expected} was expected"
            problems.append(Problem(host, variable, text, f"correct {variable} in the inventory"))
    return problems
