# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles' public variables, read from their own files, and a host's values of them."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from ansible.errors import AnsibleError
from ansible_collections.onprem.torch.plugins.module_utils import variables as checks
from ansible_collections.onprem.torch.plugins.module_utils.plan import Host
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

ROLES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "roles")
MANIFEST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "versions.yml")
# The lab's variables describe the machine that boots the lab, not the cluster.
NOT_OF_THE_CLUSTER = frozenset({"lab"})


@dataclass(frozen=True)
class Catalog:
    """Specification and default (an untemplated value) of every public variable of the roles."""

    specs: dict[str, dict[str, t.Any]]
    defaults: dict[str, t.Any]


def load(loader: t.Any) -> Catalog:
    """Read argument_specs.yml and defaults/main.yml of every role.

    Args:
        loader: Ansible's DataLoader; it marks the defaults as templates that may be trusted.
    """
    specs: dict[str, dict[str, t.Any]] = {}
    defaults: dict[str, t.Any] = {}
    for role in sorted(os.listdir(ROLES)):
        path = os.path.join(ROLES, role, "meta", "argument_specs.yml")
        if role in NOT_OF_THE_CLUSTER or not os.path.exists(path):
            continue
        specs.update(loader.load_from_file(path)["argument_specs"]["main"]["options"])
        path = os.path.join(ROLES, role, "defaults", "main.yml")
        if os.path.exists(path):
            defaults.update(loader.load_from_file(path, trusted_as_template=True) or {})
    return Catalog(specs, defaults)


class Reader:
    """Reads the values that hosts have for the catalog's variables, each on its own, so that one bad value hides no other."""

    def __init__(self, catalog: Catalog, templar: t.Any, hostvars: t.Any) -> None:
        self._catalog = catalog
        self._templar = templar
        self._hostvars = hostvars

    def raw(self, host: str) -> dict[str, t.Any]:
        """Return the host's variables as they stand in the inventory."""
        return dict(self._hostvars.raw_get(host))

    def host(self, name: str) -> tuple[Host, list[Problem]]:
        """Return the host with its typed variables, and the problems with them."""
        raw = self.raw(name)
        problems = []
        for slip, right in checks.unknown_names(raw, self._catalog.specs).items():
            cure = f"write {right}" if right else "remove it, or see the list of variables in docs/variables.md"
            problems.append(Problem(name, slip, f"{slip} is no variable of this collection", cure))
        values: dict[str, t.Any] = {}
        available = {**self._catalog.defaults, **raw}
        templar = self._templar.copy_with_new_env(available_variables=available)
        for variable, spec in self._catalog.specs.items():
            if variable not in available:
                continue
            try:
                value = templar.template(available[variable])
            except AnsibleError as error:
                problems.append(unreadable(name, variable, error))
                value = self._default(variable)
            value, expected = checks.convert(value, spec)
            if expected:
                given = checks.shown(templar.template(available[variable]))
                text = f"{variable} is {given}, but {expected} was expected"
                problems.append(Problem(name, variable, text, f"correct {variable} in the inventory"))
                value, _expected = checks.convert(self._default(variable), spec)
            values[variable] = value
        address = raw.get("ansible_host")
        try:
            address = str(templar.template(address)) if address else name
        except AnsibleError as error:
            problems.append(unreadable(name, "ansible_host", error))
            address = name
        return Host(name, values, {}, address), problems

    def _default(self, variable: str) -> t.Any:
        """Return the default of a variable, None where it has none or its default needs the broken value."""
        try:
            return self._templar.copy_with_new_env(available_variables=self._catalog.defaults).template(
                self._catalog.defaults.get(variable)
            )
        except AnsibleError:
            return None


def unreadable(host: str, variable: str, error: Exception) -> Problem:
    """Return the problem of a value that Ansible cannot read: a secret without its key, or a broken template."""
    reason = " ".join(str(error).split())
    if "vault" in reason.lower() or "decrypt" in reason.lower():
        text = f"{variable} is encrypted and cannot be read"
        return Problem(host, variable, text, "give the right key with --vault-password-file or --ask-vault-pass")
    return Problem(host, variable, f"{variable} cannot be read ({reason[:160]})", "correct the expression")
