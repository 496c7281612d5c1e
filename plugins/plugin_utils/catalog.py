# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles' public variables, read from their own files, and a host's values of them."""

from __future__ import annotations

import os
import re
import typing as t
from dataclasses import dataclass

from ansible.errors import AnsibleError
from ansible_collections.onprem.torch.plugins.module_utils import secret_texts, value_checks
from ansible_collections.onprem.torch.plugins.module_utils import variables as checks
from ansible_collections.onprem.torch.plugins.module_utils.plan import Host
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem, masked
from ansible_collections.onprem.torch.plugins.plugin_utils import vaulted

ROLES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "roles")
MANIFEST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "versions.yml")
# The lab's variables describe the machine that boots the lab, not the cluster.
NOT_OF_THE_CLUSTER = frozenset({"lab"})
# Variables whose URLs may have a user and password. The plan gets them without; who uses one asks for them (Reader.credentials).
URLS = ("cluster_mirror", "cuda_repository_url", "cuda_repository_key_url", "pytorch_index_url", "pytorch_extra_index_urls")


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


# What is no secret on a node, whatever the inventory makes of it.
SEEN_ON_NODES = (
    "torchrun_job",
    "torchrun_user",
    "torchrun_root",
    "torchrun_log_root",
    "torchrun_checkpoint_dir",
    "torchrun_checkpoint_glob",
    "torchrun_data_paths",
    "torchrun_source",
    "torchrun_script",
    "pytorch_root",
    "pytorch_environment",
    "pytorch_python",
)

# Made for the command line, where -e name=true gives a text.
FOR_ONE_RUN = ("cluster_take_over", "torchrun_accept_lost_progress")


class Reader:
    """Reads the values that hosts have for the catalog's variables, each on its own, so that one bad value hides no other."""

    def __init__(self, catalog: Catalog, templar: t.Any, hostvars: t.Any) -> None:
        self._catalog = catalog
        self._templar = templar
        self._hostvars = hostvars
        self._secrets: dict[str, set[str]] = {}
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
        hidden = self.secrets(name)
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
        if hidden and vaulted.shown_by(raw, "torchrun_args", values.get("torchrun_args") or []):
            text = "torchrun_args holds a vaulted value, but everybody on a node sees the arguments of its processes"
            problems.append(Problem(name, "torchrun_args", text, "hand it over in torchrun_environment"))
        alone = vaulted.by_themselves({key: value for key, value in raw.items() if not key.startswith(vaulted.NOT_THE_USERS)})
        for variable in SEEN_ON_NODES:
            value = values.get(variable)
            if alone and value and vaulted.among(alone, value if isinstance(value, list) else [value]):
                text = f"{variable} holds a vaulted value, but everybody on a node sees the names of its users, jobs and files"
                problems.append(Problem(name, variable, text, "write it down as it is"))
                values[variable] = None  # so that no node is asked for it
        for variable in URLS:
            if values.get(variable):
                problem = url_problem(name, variable, values[variable])
                problems += [problem] if problem else []
                values[variable] = None if problem else without_credentials(values[variable])
        problems += value_checks.check(name, values)
        return Host(name, values, {}, str(raw.get("ansible_host") or name)), masked(problems, hidden)

    def secrets(self, host: str) -> set[str]:
        """Return the plain texts of all vaulted values of a host."""
        if host not in self._secrets:
            self._secrets[host] = vaulted.of_host(self.raw(host))
        return self._secrets[host]

    def all_secrets(self, hosts: t.Iterable[str]) -> set[str]:
        """Return the plain texts of all vaulted values of several hosts; a sentence may compare them."""
        found: set[str] = set()
        for host in hosts:
            try:
                found |= self.secrets(host)
            except Exception:  # a file of the inventory that cannot be read, which is a problem of its own
                continue
        return found

    def value(self, host: str, variable: str) -> t.Any:
        """Return the typed value of one variable, which may be a secret.

        Raises:
            AnsibleError: it cannot be read, which the plan has said already.
        """
        raw, templar = self.environment(host)
        given = raw.get(variable)
        value, problem = self._read(host, variable, self._catalog.defaults.get(variable) if given is None else given, templar)
        if problem:
            raise AnsibleError(masked([problem], self.secrets(host))[0].sentence())
        return value

    def credentials(self, host: str) -> dict[str, str]:
        """Return C(user:password) by URL of the variables that have them; a secret."""
        found: dict[str, str] = {}
        for variable in URLS:
            if variable in self._catalog.specs:
                found.update(credentials_of(self.value(host, variable) or []))
        return found

    def _read(self, host: str, variable: str, value: t.Any, templar: t.Any) -> tuple[t.Any, Problem | None]:
        """Return the typed value of a variable, or the problem with it."""
        try:
            value = templar.template(value)
        except Exception as error:  # whatever a template or a secret raises, the user gets a sentence
            return None, unreadable(host, variable, error, self._catalog.specs[variable].get("no_log", False))
        if variable in FOR_ONE_RUN and isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        value, expected = checks.convert(given := value, self._catalog.specs[variable])
        if expected:
            secret = self._catalog.specs[variable].get("no_log") or (variable in URLS and "@" in str(given))
            what = checks.kind_of(given) if secret else checks.shown(given)
            text = f"{variable} is {what}, but {expected} was expected"
            return None, Problem(host, variable, text, f"correct {variable} in the inventory")
        return value, None


def credentials_of(value: t.Any) -> dict[str, str]:
    """Return C(user:password) of a URL, or of each of a list, by the URL without them."""
    urls = [secret_texts.split_url(str(url)) for url in (value if isinstance(value, (list, tuple)) else [value])]
    return {plain: userinfo for plain, userinfo in urls if userinfo}


def without_credentials(value: t.Any) -> t.Any:
    """Return a URL, or each of a list, without user and password."""
    if isinstance(value, (list, tuple)):
        return [without_credentials(entry) for entry in value]
    return secret_texts.split_url(str(value))[0]


def url_problem(host: str, variable: str, value: t.Any) -> Problem | None:
    """Return the problem of a URL, or of one of a list, whose secrets cannot be told from the rest; it is not shown."""
    urls = [str(url) for url in (value if isinstance(value, (list, tuple)) else [value])]
    if any(secret_texts.unclear(url) for url in urls):
        text = f"{variable} has a user or password with a character that has to be quoted"
        return Problem(host, variable, text, "write / as %2F, a space as %20, and an @ that belongs to a path as %40")
    if any(secret_texts.has_credentials(secret_texts.split_url(url)[0]) for url in urls):
        text = f"{variable} has a token behind its ?, which everybody on a node could read"
        return Problem(host, variable, text, "give it as user or password, as in https://USER:PASSWORD@HOST/")
    return None


def unreadable(host: str, variable: str, error: Exception, secret: bool = False) -> Problem:
    """Return the problem of a value that Ansible cannot read: a secret without its key, or a broken template.

    What is wrong with a template of a secret is told only where it is a name that is not known.
    """
    reason = " ".join(str(error).split())
    if "vault" in reason.lower() or "decrypt" in reason.lower():
        text = f"{variable} is encrypted and cannot be read"
        return Problem(host, variable, text, "give the right key with --vault-password-file or --ask-vault-pass")
    if secret:
        reason = ", ".join(re.findall(r"'\w+' is undefined", reason)) or "its template is wrong"
    reason = secret_texts.redacted(reason)
    reason = reason if len(reason) <= 160 else reason[:159] + "…"
    return Problem(host, variable, f"{variable} cannot be read ({reason.rstrip('.')})", "correct the expression")
