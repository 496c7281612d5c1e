# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A problem of the user's, as one sentence: which host, which variable, what was expected, what to do."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input

# Hosts that a sentence names before it counts the rest.
NAMES_SHOWN = 8
# Characters of a sentence.
MOST_WIDTH = 20_000


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        host: inventory name of the node, or an empty string where the whole cluster is meant.
        variable: the variable to change, or an empty string where no variable causes it.
        text: what is the case and what was expected.
        cure: what to do, in the imperative.
    """

    host: str
    variable: str
    text: str
    cure: str

    def sentence(self) -> str:
        """Return the whole as one sentence."""
        prefix = f"{self.host}: " if self.host else ""
        return f"{prefix}{self.text}; {self.cure}."

    def as_dict(self) -> dict[str, str]:
        """Return the parts and the sentence."""
        return {"host": self.host, "variable": self.variable, "message": self.sentence()}


def merged(problems: t.Sequence[Problem]) -> list[Problem]:
    """Return the problems, those that differ in nothing but the host as one, in the order of their first mention.

    A mistake in the group's variables is a problem of each host, but a person has to read and to repair it once.
    """
    hosts: dict[tuple[str, str, str], list[str]] = {}
    for problem in problems:
        names = hosts.setdefault((problem.variable, problem.text, problem.cure), [])
        if problem.host not in names:
            names.append(problem.host)
    return [Problem(listed(names), *parts) for parts, names in hosts.items()]


def listed(names: t.Sequence[str]) -> str:
    """Return names as a text that stays readable for hundreds of them."""
    if len(names) <= NAMES_SHOWN:
        return ", ".join(name for name in names if name)
    return f"{', '.join(names[:NAMES_SHOWN])} and {len(names) - NAMES_SHOWN} more"


def report(problems: t.Sequence[Problem]) -> str:
    """Return all problems as one text: a headline and a line each."""
    lines = [f"  - {problem.sentence()}" for problem in merged(problems)]
    headline = f"{len(lines)} problem{'s' if len(lines) > 1 else ''} found, nothing was changed:"
    # Parts of it may come from a node or a job.
    return "\n".join(hostile_input.printable(line, MOST_WIDTH) for line in [headline, *lines])
