# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values that have the right type and still cannot be meant: names, paths, ranges, patterns, signs."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import folder_access, secret_texts
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem
from ansible_collections.onprem.torch.plugins.module_utils.variables import kind_of, shown

JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
# What useradd of Debian and Ubuntu takes without --badname.
USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# PEP 440 without epochs; a local part such as +cu130 may follow.
VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.(post|dev)\d+)*(\+[A-Za-z0-9.]+)?")
# Folders that a job, or root for it, writes to. The other paths may well be the system's.
WRITTEN = ("torchrun_root", "torchrun_log_root", "torchrun_checkpoint_dir", "torchrun_data_paths", "pytorch_root")
# What MemoryMax= of systemd.resource-control(5) takes, with a unit.
MEMORY = re.compile(r"[1-9]\d{0,5}[MGT]|([1-9]\d?|100)%")
FOLDERS = ("torchrun_root", "torchrun_log_root", "torchrun_checkpoint_dir", "pytorch_root", "pytorch_environment", "pytorch_python")
# The smallest value of each number. Ports and ranks have checks of their own.
SMALLEST = {
    "torchrun_start_timeout": 1,
    "torchrun_stop_timeout": 1,
    "torchrun_max_restarts": 0,
    "torchrun_hang_timeout": 0,
    "torchrun_keep_releases": 1,
    "firewall_rollback_after": 1,
    "nvidia_driver_reboot_timeout": 1,
}

Finding = t.Tuple[str, str, str]  # variable, what is the case, what to do


def names(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """The job's name becomes part of a unit's name, the user's part of a command; a version goes to pip."""
    expected = {
        "torchrun_job": (JOB_NAME, "at most 63 letters, digits, '_', '.' and '-' that begin with a letter or digit were expected"),
        "torchrun_user": (USER_NAME, "at most 32 lower-case letters, digits, '_' and '-' were expected"),
    }
    for variable, (pattern, text) in expected.items():
        value = variables.get(variable)
        if value is not None and not pattern.fullmatch(value):
            yield variable, f"{variable} is {shown(value)}, but {text}", "choose another name"
    if variables.get("torchrun_user") == "root":
        yield "torchrun_user", "torchrun_user is 'root', but a user without root's rights was expected", "name another user; it is made where it is missing"
    version = variables.get("pytorch_version")
    if version and not VERSION.fullmatch(version):
        yield "pytorch_version", f"pytorch_version is {shown(version)}, but a version was expected", "write one such as 2.13.0"
    elif version and not re.match(r"\d+\.\d+\.\d+", version):
        # YAML takes 2.10 for the number 2.1, another release.
        text = f"pytorch_version is {shown(version)}, but all three numbers of a release were expected"
        yield "pytorch_version", text, "write one such as 2.13.0"


def paths(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """Paths on nodes are absolute and hold nothing that ends a line of a unit."""
    named = [(name, variables.get(name)) for name in FOLDERS]
    named += [("torchrun_data_paths", path) for path in variables.get("torchrun_data_paths") or []]
    source = variables.get("torchrun_source") or ""
    if source.startswith("remote:"):
        named.append(("torchrun_source", source[len("remote:") :]))
    root = variables.get("torchrun_root") or "/"
    for variable, path in named:
        if variable == "torchrun_checkpoint_dir" and not root.startswith("/") and str(path).startswith(root):
            continue  # it follows from the root, which is named already
        if path and (not path.startswith("/") or not path.isprintable()):
            yield variable, f"{variable} names {shown(path)}, but an absolute path was expected", "begin it with /"
        elif variable in ("torchrun_data_paths", "torchrun_source") and not path:
            yield variable, f"{variable} names an empty path, but an absolute path was expected", "begin it with /"
        elif path and variable in WRITTEN:
            forbidden = folder_access.forbidden(variable, path)
            follows = variable == "torchrun_checkpoint_dir" and str(path).startswith(root.rstrip("/") + "/")
            # What follows from a root that is named already is not told again.
            if forbidden and not (follows and folder_access.forbidden("torchrun_root", root)):
                yield (variable, *forbidden)


def numbers(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """Times and counts have a smallest value."""
    for variable, smallest in SMALLEST.items():
        value = variables.get(variable)
        if value is not None and value < smallest:
            yield variable, f"{variable} is {value}, but {smallest} or more was expected", "choose a larger number"


def environment(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """Environment variables have names that shells know and values that mean one text."""
    variable = "torchrun_environment"
    for name, value in (variables.get(variable) or {}).items():
        if not isinstance(name, str) or not ENVIRONMENT_NAME.fullmatch(name):
            text = f"{variable} holds the name {shown(name)}, but letters, digits and '_' were expected"
            yield variable, text, "rename it"
        elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
            # YAML's true would become Python's True, and its null the word None.
            yield variable, f"{variable} gives {name} {kind_of(value)}, but text or a number was expected", "put it in quotes"
        elif isinstance(value, str) and not value.replace("\n", "").replace("\t", "").isprintable():
            yield variable, f"{variable} gives {name} a value with control characters, but text was expected", "remove them"


def packages(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """Requirements stand on command lines and in records of the nodes, so that they hold no password."""
    for variable in ("pytorch_packages", "pytorch_constraints"):
        if any(secret_texts.has_credentials(str(entry)) for entry in variables.get(variable) or []):
            text = f"{variable} holds a URL with a user, a password or a token, which everybody on a node could read"
            yield variable, text, "put the package on an index, and its user into pytorch_extra_index_urls"


def patterns(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """The pattern of a step is a regular expression."""
    variable = "torchrun_step_pattern"
    value = variables.get(variable) or ""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        yield variable, f"{variable} is {shown(value)}, but a regular expression was expected ({error})", "correct the expression"


def memory(variables: t.Mapping[str, t.Any]) -> t.Iterator[Finding]:
    """A limit of memory has a unit: a bare number would be bytes, which no process starts in."""
    variable = "torchrun_memory_max"
    value = variables.get(variable) or ""
    if value and not MEMORY.fullmatch(value):
        text = f"{variable} is {shown(value)}, but a share of a node's memory or an amount of it was expected"
        yield variable, text, "write one such as 90% or 200G, or leave it empty"


def check(host: str, variables: t.Mapping[str, t.Any]) -> list[Problem]:
    """Return every problem with the values of one host's variables.

    Args:
        host: its name.
        variables: typed values by name; None for one that is not set.
    """
    return [
        Problem(host, variable, text, cure)
        for look in (names, paths, numbers, memory, environment, packages, patterns)
        for variable, text, cure in look(variables)
    ]
