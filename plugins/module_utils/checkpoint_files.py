# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which files and folders are a job's checkpoints: one rule for the plan, the status and the setting aside.

What matches torchrun_checkpoint_glob below torchrun_checkpoint_dir, without following a link to a folder. What playbooks/restart.yml
has set aside is none any more. The job writes there, so all of this runs as its user.
"""

from __future__ import annotations

import os
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input

# Begins the name of a folder with what was set aside.
SET_ASIDE = "set-aside-"
# Ends the name of a checkpoint that is not whole yet.
UNFINISHED = ".tmp"
# Names that are looked at, and seconds that this may take, where the answer has to be whole.
NAMES, SECONDS = 1_000_000, 25.0


def find(folder: str, pattern: str, whole: bool = True) -> list[hostile_input.Found]:
    """Return the checkpoints of a folder.

    Args:
        folder: where they lie; none where it is empty or not there.
        pattern: what they are called.
        whole: whether all have to be found, or only what is found in some seconds.

    Raises:
        hostile_input.Odd: not all of them can be found.
    """
    if not folder:
        return []
    found = hostile_input.find(folder, pattern, NAMES, SECONDS, True) if whole else hostile_input.find(folder, pattern)
    return [entry for entry in found if not entry.path.startswith(SET_ASIDE)]


def recent(folder: str, pattern: str, whole: bool) -> list[hostile_input.Found]:
    """Return them without those that are still being written, newest first. As the supervisor does, see find."""
    found = [entry for entry in find(folder, pattern, whole) if not entry.path.endswith(UNFINISHED)]
    return sorted(found, key=lambda entry: (entry.modified, entry.path), reverse=True)


def was_set_aside(path: str, folder: str) -> bool:
    """Return whether the path of a checkpoint leads into a folder of what was set aside, as far as its name tells.

    Args:
        path: the path.
        folder: where the job's checkpoints lie, which may be such a folder itself.
    """
    prefix = folder.rstrip("/") + "/"
    if folder and path.startswith(prefix):
        return path[len(prefix) :].startswith(SET_ASIDE)
    return any(part.startswith(SET_ASIDE) for part in path.split("/"))


def newest(folder: str, pattern: str) -> dict[str, t.Any]:
    """Return path, name, time and bytes of the newest checkpoint, empty where there is none."""
    found = recent(folder, pattern, whole=False)
    if not found:
        return {}
    latest = found[0]
    path = hostile_input.printable(os.path.join(folder, latest.path), 4096)
    return {"path": path, "name": os.path.basename(path), "time": latest.modified, "bytes": latest.size}
