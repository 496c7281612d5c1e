# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks into folders that may hang or mislead: with the rights of the job's user, for a limited time, and never an exception."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, safe_files


def reader(user: str) -> safe_files.Account | None:
    """Return who looks: the job's user, root where it is yet to be made. A user with root's rights needs no dropping."""
    who = safe_files.account(user)
    return who if who is None or who.uid else None


class Looks:
    """Several looks of one user, and a sentence on each that brought no answer.

    Attributes:
        failed: the sentences.
        dead: paths that did not answer; nobody waits for them again.
    """

    def __init__(self, who: safe_files.Account | None, dead: set[str] | None = None) -> None:
        self.who = who
        self.failed: list[str] = []
        self.dead = set() if dead is None else dead

    def at(self, path: str, work: t.Callable[[], t.Any], default: t.Any, seconds: float = safe_files.SECONDS) -> t.Any:
        """Return what was found, a default where no answer comes; ``path`` is what the sentence then names."""
        shown = hostile_input.printable(path, 200)
        if path in self.dead:
            return default
        try:
            return safe_files.as_user(self.who, work, seconds)
        except TimeoutError:
            self.dead.add(path)
            self.failed.append(f"{shown} does not answer within {seconds:.0f} s")
        except OSError as error:
            self.failed.append(f"{shown} cannot be looked at: {(error.strerror or str(error)).lower()}")
        except RuntimeError as error:
            # "Odd: …" is a sentence for people already; of the others the kind tells something.
            name, _colon, text = str(error).partition(": ")
            self.failed.append(text if name == hostile_input.Odd.__name__ else f"{shown} cannot be looked at: {error}")
        return default


def answers(question: t.Callable[[str], t.Any], paths: t.Sequence[str]) -> dict[str, t.Any]:
    """Return root's answer for each path; none for one whose file system does not answer in time."""
    look = Looks(None)
    found = {path: look.at(path, lambda path=path: question(path), None) for path in paths}
    return {path: answer for path, answer in found.items() if answer is not None}
