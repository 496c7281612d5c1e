# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one way in which text gets to the operator's terminal: nodes and jobs have shaped parts of it."""

from __future__ import annotations

import typing as t

from ansible.utils.display import Display
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input

display = Display()
# Longer than any table or report.
MOST = 16 << 20


def show(lines: str | t.Sequence[str]) -> None:
    """Print a line, or a block of lines with an empty one before and after it."""
    if isinstance(lines, str):
        display.display(hostile_input.printable(lines, MOST))
    else:
        text = "\n".join(hostile_input.printable(line, MOST, lines=True) for line in lines)
        display.display(f"\n{text}\n")


def warn(line: str) -> None:
    """Print a warning."""
    display.warning(hostile_input.printable(line, MOST))
