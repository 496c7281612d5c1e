# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A problem of the user's, as one sentence: which host, which variable, what was expected, what to do."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass


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


def report(problems: t.Sequence[Problem]) -> str:
    """Return all problems as one text: a headline and a line each."""
    count = len(problems)
    headline = f"{count} problem{'s' if count > 1 else ''} found, nothing was changed:"
    return "\n".join([headline, *(f"  - {problem.sentence()}" for problem in problems)])
