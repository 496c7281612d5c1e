# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles' public variables, read from their own files, and a host's values of them."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils import value_checks
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


def load(loader: t.Any, roles: t.Collection[str] = ()) -> Catalog:
    """Read argument_specs.yml and defaults/main.yml of roles.

    Args:
        loader: Ansible's DataLoader; it marks the defaults as templates that may be trusted.
        roles: their names; all of the cluster's where none is given.
    """
    specs: dict[str, dict[str, t.Any]] = {}
    defaults: dict[str, t.Any] = {}
    for role in sorted(roles or set(os.listdir(ROLES)) - NOT_OF_THE_CLUSTER):
        path = os.path.join(ROLES, role, "meta", "argument_specs.yml")
        if not os.path.exists(path):
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
        # Most defaults are no templates and need converting only once, not for each host.
        self._constants = {
            name: checks.convert(catalog.defaults.get(name), spec)[0]
            for name, spec in catalog.specs.items()
            if not templar.is_template(catalog.defaults.get(name))
        }

    def raw(self, host: str) -> dict[str, t.Any]:
        """Return the host's variables as they stand in the inventory."""
        return dict(self._hostvars.raw_get(host))

    def environment(self, host: str) -> tuple[dict[str, t.Any], t.Any]:
        """Return the host's variables as they stand, and a templar that knows them."""
        raw = self.raw(host)
        return raw, self._templar.copy_with_new_env(available_variables={**self._catalog.defaults, **raw, "hostvars": self._hostvars})

    def host(self, name: str) -> tuple[Host, list[Problem]]:
        """Return the host with its typed variables, and the problems with them."""
        raw, templar = self.environment(name)
        problems = []
        for slip, right in checks.unknown_names(raw, self._catalog.specs).items():
            cure = f"write {right}" if right else "remove it, or see the list of variables in docs/variables.md"
            problems.append(Problem(name, slip, f"{slip} is no variable of this collection", cure))
        values: dict[str, t.Any] = {}
        for variable in self._catalog.specs:
            if raw.get(variable) is None:
                continue
            value, problem = self._read(name, variable, raw[variable], templar)
            if problem:
                problems.append(problem)
            else:
                values[variable] = value
        # Defaults that are made of other variables are made of those that could be read: one mistake, one sentence.
        lost = {key: self._catalog.defaults.get(key) for key in self._catalog.specs if key not in values}
        derived = self._templar.copy_with_new_env(available_variables={**raw, **lost, "hostvars": self._hostvars})
        for variable, spec in self._catalog.specs.items():
            if variable in values:
                continue
            if variable in self._constants:
                values[variable] = self._constants[variable]
                continue
            value, problem = self._read(name, variable, self._catalog.defaults[variable], derived)
            values[variable] = None if problem else value
        problems += value_checks.check(name, values)
        return Host(name, values, {}, str(raw.get("ansible_host") or name)), problems

    def _read(self, host: str, variable: str, value: t.Any, templar: t.Any) -> tuple[t.Any, Problem | None]:
        """Return the typed value of a variable, or the problem with it."""
        try:
            value = templar.template(value)
        except Exception as error:  # whatever a template or a secret raises, the user gets a sentence
            return None, unreadable(host, variable, error)
        value, expected = checks.convert(given := value, self._catalog.specs[variable])
        if expected:
            text = f"{variable} is {checks.shown(given)}, but {expected} was expected"
            return None, Problem(host, variable, text, f"correct {variable} in the inventory")
        return value, None


def unreadable(host: str, variable: str, error: Exception) -> Problem:
    """Return the problem of a value that Ansible cannot read: a secret without its key, or a broken template."""
    reason = " ".join(str(error).split())
    if "vault" in reason.lower() or "decrypt" in reason.lower():
        text = f"{variable} is encrypted and cannot be read"
        return Problem(host, variable, text, "give the right key with --vault-password-file or --ask-vault-pass")
    reason = reason if len(reason) <= 160 else reason[:159] + "…"
    return Problem(host, variable, f"{variable} cannot be read ({reason.rstrip('.')})", "correct the expression")
