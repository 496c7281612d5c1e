# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The variables a user may set: their types, and sentences for values that do not fit.

The specification is the roles' own ``meta/argument_specs.yml``, so that what is documented is what is checked.
"""

from __future__ import annotations

import difflib
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import secret_texts

# Roles whose prefix nobody else is likely to use: every unknown name with it is a slip of the pen.
OWN_PREFIXES = ("torchrun_", "pytorch_", "nccl_verify_", "nvidia_driver_")
# How alike two names must be after their prefix to call one a misspelling of the other (difflib ratio, 0 to 1): with a
# prefix of ours, and with one that others may use too.
ALIKE = 0.6
VERY_ALIKE = 0.75
# Names that plays themselves set with a known prefix.
INTERNAL = frozenset({"cluster_plan", "cluster_group", "cluster_serial"})


def shown(value: t.Any) -> str:
    """Return a value as a person would write it, short enough for a sentence."""
    # Hidden before it is cut: half a URL no longer shows where its password ends.
    text = secret_texts.value_redacted(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 60 else text[:57] + "…"


def kind_of(value: t.Any) -> str:
    """Return what kind of value something is, for a sentence about a secret."""
    if value is None:
        return "no value"
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "a mapping", list: "a list", tuple: "a list", str: "a text"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


def convert(value: t.Any, spec: dict[str, t.Any]) -> tuple[t.Any, str]:
    """Return the value in its specified type and what was expected where it does not fit (else an empty string).

    Digits in a string are a number, since ``-e name=1`` gives strings; the string "false" is no boolean, since it is
    true in every test that forgets to convert it.
    """
    if value is None:
        return (None, "") if not spec.get("required") else (None, "a value")
    kind = spec.get("type", "str")
    if kind == "bool":
        return (value, "") if isinstance(value, bool) else (None, "true or false without quotes")
    if kind == "int":
        if isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return None, "a whole number"
    elif kind == "float":
        if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None, "a number"
        value = float(value)
    elif kind in ("str", "path", "raw"):
        if kind != "raw" and isinstance(value, (dict, list, tuple)):
            return None, "text"
        value = value if kind == "raw" else str(value)
    elif kind == "dict":
        if not isinstance(value, dict):
            return None, "a mapping of names to values"
        value = dict(value)
    elif kind == "list":
        if not isinstance(value, (list, tuple)):
            return None, "a list"
        items = []
        elements = spec.get("elements", "raw")
        for item in value:
            # An item without a value is a slip: it would become the word None.
            converted, expected = convert(item, {"type": elements, "required": elements != "raw"})
            if expected:
                return None, f"a list of which each element is {expected}"
            items.append(converted)
        value = items
    choices = spec.get("choices")
    if choices and value not in choices:
        return None, "one of " + ", ".join(str(choice) for choice in choices)
    return value, ""


def nearest(name: str, known: t.Iterable[str], alike: float = ALIKE) -> str:
    """Return the known name with the same prefix that is most like ``name``, or an empty string where none is alike."""
    prefix, _separator, rest = name.partition("_")
    others = [entry.partition("_")[2] for entry in known if entry.startswith(f"{prefix}_")]
    found = difflib.get_close_matches(rest, others, n=1, cutoff=alike)
    return f"{prefix}_{found[0]}" if found else ""


def unknown_names(names: t.Iterable[str], known: t.Collection[str]) -> dict[str, str]:
    """Return the variables with a prefix of ours that no role has, each with the nearest right name (or '')."""
    prefixes = {name.split("_")[0] + "_" for name in known}
    slips = {}
    for name in names:
        if name in known or name in INTERNAL or name.startswith("_") or not name.startswith(tuple(prefixes)):
            continue
        own = name.startswith(OWN_PREFIXES)
        right = nearest(name, known, ALIKE if own else VERY_ALIKE)
        if right or own:
            slips[name] = right
    return slips
