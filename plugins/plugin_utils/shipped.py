# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A job's source as the control node sends it: read by whoever runs the play, who may read more than who wrote the source."""

from __future__ import annotations

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, source_tree
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem

SOURCE = "torchrun_source"
LINKS = "torchrun_source_links"
# What reading a source, which anybody may have written, can end in.
ERRORS = (source_tree.SourceError, OSError, ValueError, RecursionError)


def members(path: str, links: bool) -> dict[str, str]:
    """Return relative name → path of every file that is sent, for source_tree.opened_straight.

    Args:
        path: the source.
        links: whether links may lead out of it.

    Raises:
        One of ERRORS: it cannot be sent.
    """
    return source_tree.files(path, links=source_tree.OUTSIDE if links else source_tree.INSIDE)


def pack(path: str, links: bool, expected: str, archive: str) -> None:
    """Write the archive of a source, which has the hash that the plan has seen.

    Raises:
        One of ERRORS: it cannot be sent, or has changed.
    """
    found = source_tree.pack(members(path, links), archive, source_tree.opened_straight)
    if expected and found != expected:
        raise source_tree.SourceError(f"{hostile_input.shown(path)} changed since the plan was made")


def problem(source: str, error: Exception) -> Problem:
    """Return the problem of a source that cannot be sent.

    Args:
        source: the value of the variable.
        error: one of ERRORS.
    """
    cure = "correct the path (relative paths start at the inventory's folder)"
    if isinstance(error, source_tree.LinkError):
        allow = "" if error.forbidden else f", or set {LINKS}: true, which sends what all such links lead to"
        cure = f"remove the link or put a copy in its place{allow}"
    elif isinstance(error, source_tree.LimitError):
        cure = "name a smaller folder, or leave data on the nodes (torchrun_data_paths)"
    elif isinstance(error, source_tree.MisnamedError):
        cure = "rename it"
    return Problem("", SOURCE, f"{SOURCE} is {source!r}, but {reason(error)}", cure)


def reason(error: Exception) -> str:
    """Return why a source cannot be sent, as part of a sentence."""
    if isinstance(error, source_tree.SourceError):
        return str(error)
    if isinstance(error, OSError):
        name = hostile_input.shown(str(error.filename)) if error.filename else "it"
        return f"{name} cannot be read ({error.strerror or hostile_input.shown(str(error))})"
    return f"it cannot be read ({hostile_input.shown(str(error))})"
