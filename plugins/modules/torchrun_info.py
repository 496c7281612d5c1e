#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: torchrun_info
short_description: Tell how a node's part of a job fares
version_added: 0.1.0
description:
  - Reads the unit's state, the supervisor's state, the newest checkpoint and the last step line of a job on one node.
options:
  job:
    description: Name of the job.
    type: str
    required: true
  root:
    description: Folder of the job on the node.
    type: path
    required: true
  checkpoint_dir:
    description: Folder of the checkpoints.
    type: path
    default: ""
  checkpoint_glob:
    description: Pattern of the checkpoints' names.
    type: str
    default: "*"
  step_pattern:
    description: Regular expression that finds the line of a training step.
    type: str
    default: ""
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Changes nothing, so shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: See how the job fares
  onprem.torch.torchrun_info:
    job: train
    root: /var/lib/torchrun/train
"""

RETURN = r"""
info:
  description: What was found.
  returned: always
  type: dict
  contains:
    unit:
      description: Active state of the unit, or C(absent).
      type: str
    result:
      description: Result of the unit's last run, as systemd names it.
      type: str
    since:
      description: Time of the unit's last change of state, in seconds since 1970.
      type: float
    state:
      description: The supervisor's state, as docs/supervisor.md describes it.
      type: dict
    checkpoint:
      description: C(path), C(name), C(time) in seconds since 1970 and C(bytes) of the newest checkpoint.
      type: dict
    step:
      description: Last line of a training step.
      type: str
    release:
      description: Id of the current release.
      type: str
"""

import glob
import json
import os
import re
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import job_folders, node_facts

PROPERTIES = ("LoadState", "ActiveState", "Result", "StateChangeTimestampMonotonic")
# Step lines are looked for in so many of the journal's last lines.
JOURNAL_LINES = 400


def newest(folder: str, pattern: str) -> dict[str, object]:
    """Return the newest file that matches, empty where there is none."""
    found = []
    for path in glob.glob(os.path.join(folder, pattern)):
        try:
            found.append((os.path.getmtime(path), path))
        except OSError:
            continue  # replaced while we looked
    if not found:
        return {}
    modified, path = max(found)
    return {"path": path, "name": os.path.basename(path), "time": modified, "bytes": os.path.getsize(path)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "job": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "checkpoint_dir": {"type": "path", "default": ""},
            "checkpoint_glob": {"type": "str", "default": "*"},
            "step_pattern": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    unit = f"torchrun-{params['job']}.service"
    _code, stdout, _stderr = module.run_command(["systemctl", "show", *(f"--property={name}" for name in PROPERTIES), unit])
    show = dict(line.split("=", 1) for line in stdout.splitlines() if "=" in line)
    there = show.get("LoadState") == "loaded"
    try:
        state = json.loads(node_facts.read_text(os.path.join(params["root"], "state", "state.json"), "{}"))
    except ValueError:
        state = {}
    since = int(show.get("StateChangeTimestampMonotonic") or 0) / 1e6
    step = ""
    if params["step_pattern"] and there:
        command = ["journalctl", "--unit", unit, "--output", "cat", "--lines", str(JOURNAL_LINES), "--quiet", "--no-pager"]
        _code, stdout, _stderr = module.run_command(command)
        lines = [line for line in stdout.splitlines() if re.search(params["step_pattern"], line)]
        step = lines[-1].strip() if lines else ""
    module.exit_json(
        changed=False,
        info={
            "unit": show.get("ActiveState", "") if there else "absent",
            "result": show.get("Result", ""),
            "since": time.time() - time.monotonic() + since if since else None,
            "state": state,
            "checkpoint": newest(params["checkpoint_dir"], params["checkpoint_glob"]) if params["checkpoint_dir"] else {},
            "step": step,
            "release": job_folders.current(params["root"]),
        },
    )


if __name__ == "__main__":
    main()
