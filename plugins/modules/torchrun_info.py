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
  user:
    description: The job's user, with whose rights its folders are looked at.
    type: str
    default: torchrun
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
  evidence:
    description: Whether to look for causes of an early end in the kernel's log, torchrun's reports and the file systems.
    type: bool
    default: false
  log_dir:
    description: Folder of torchrun's logs, for O(evidence=true).
    type: path
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
      description: The supervisor's state, as docs/supervisor.md describes it; empty where it is not what a supervisor writes.
      type: dict
    state_odd:
      description: Why there is no state although there is a file, as a sentence; else empty.
      type: str
    unread:
      description: What could not be looked at, such as a file system that does not answer, as sentences.
      type: list
      elements: str
    place:
      description: C(host) and torchrun's options in the unit that lie beneath its place in the cluster; empty without a unit.
      type: dict
    checkpoint:
      description: C(path), C(name), C(time) in seconds since 1970 and C(bytes) of the newest checkpoint.
      type: dict
    step:
      description: Last line of a training step.
      type: str
    step_time:
      description: When it was printed, in seconds since 1970; null where there is none.
      type: float
    gpus:
      description: Processes that hold GPU memory, with C(gpu), C(pid), C(name), C(unit) and C(used_mib).
      type: list
      elements: dict
    evidence:
      description: C(kernel) events, C(errors) of workers and C(room) of file systems; with O(evidence=true).
      type: dict
    release:
      description: Id of the current release.
      type: str
    releases:
      description:
        - The starts of the job, oldest first, with C(release), C(time), C(back), C(kept), C(checkpoints) (folder and pattern) and
          C(place), as above.
      type: list
      elements: dict
"""

import shlex
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import (
    checkpoint_files,
    clean_module,
    hostile_input,
    job_evidence,
    job_folders,
    journal,
    looks,
    node_facts,
    safe_files,
    supervisor_state,
)

PROPERTIES = ("LoadState", "ActiveState", "Result", "StateChangeTimestampMonotonic")
# Step lines are looked for in so many of the journal's last lines.
JOURNAL_LINES = 400
SMI = ["--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader"]
DAYS_OF_KERNEL = 7
# A firewall that logs packets may fill a disk.
KERNEL_LINES = "--lines=100000"
# For looks that go through many files; they end by themselves in less.
CHECKPOINTS_SECONDS = 20.0
ERRORS_SECONDS = 40.0


def gpu_processes(module: AnsibleModule) -> list[dict[str, object]]:
    """Return who holds GPU memory; nobody where there is no driver."""
    tool = module.get_bin_path("nvidia-smi")
    if not tool:
        return []
    code, stdout, _stderr = module.run_command([tool, *SMI])
    return job_evidence.gpu_processes(stdout, node_facts.unit_of) if code == 0 else []


def evidence(module: AnsibleModule, look: looks.Looks) -> dict[str, object]:
    """Return what the node itself tells about the end of a job."""
    params = module.params
    since = f"--since=-{DAYS_OF_KERNEL}d"
    _code, kernel, _stderr = module.run_command(["journalctl", "--dmesg", "--output=short-unix", "--quiet", "--no-pager", since, KERNEL_LINES])
    places = [params["checkpoint_dir"], params["log_dir"], params["root"], "/dev/shm", "/tmp"]
    log_dir = params["log_dir"]
    return {
        "kernel": job_evidence.kernel_events(kernel),
        "errors": look.at(log_dir, lambda: job_evidence.error_files(log_dir), [], ERRORS_SECONDS) if log_dir else [],
        "room": [found for path in places if path for found in look.at(path, lambda path=path: job_evidence.room([path]), [])],
    }


def jobs_own(params: dict[str, object], look: looks.Looks) -> dict[str, object]:
    """Return what lies in the job's folders: its state, newest checkpoint and releases."""
    root, folder, pattern = (str(params[name]) for name in ("root", "checkpoint_dir", "checkpoint_glob"))
    states = looks.Looks(look.who, look.dead)
    state, odd = states.at(root, lambda: supervisor_state.read(root), ({}, ""))
    roots = looks.Looks(None, look.dead)
    releases = roots.at(
        root, lambda: {"release": job_folders.current(root), "releases": job_folders.history(root), "unsafe": job_folders.unsafe(root)}, {}
    )
    found = {
        "state": state,
        "state_odd": odd or "; ".join(states.failed),
        "checkpoint": look.at(folder, lambda: checkpoint_files.newest(folder, pattern), {}, CHECKPOINTS_SECONDS),
        "release": releases.get("release", ""),
        "releases": releases.get("releases", []),
    }
    unsafe = releases.get("unsafe", "")
    # Of a root that does not answer, the state's look has told.
    look.failed += [*roots.failed, *([unsafe] if unsafe else [])]
    return found


def unit_text(unit: str) -> str:
    """Return the text of a unit in root's folder; empty where there is none."""
    return node_facts.read_text(f"/etc/systemd/system/{unit}")


def main() -> None:
    module = clean_module.CleanModule(
        argument_spec={
            "job": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "user": {"type": "str", "default": "torchrun"},
            "checkpoint_dir": {"type": "path", "default": ""},
            "checkpoint_glob": {"type": "str", "default": "*"},
            "step_pattern": {"type": "str", "default": ""},
            "evidence": {"type": "bool", "default": False},
            "log_dir": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    unit = f"torchrun-{params['job']}.service"
    _code, stdout, _stderr = module.run_command(["systemctl", "show", *(f"--property={name}" for name in PROPERTIES), unit])
    show = dict(line.split("=", 1) for line in stdout.splitlines() if "=" in line)
    there = show.get("LoadState") == "loaded"
    since = int(show.get("StateChangeTimestampMonotonic") or 0) / 1e6
    step, step_time = "", None
    if params["step_pattern"] and there:
        # The newest first: the job decides how much a line holds, so not all of them may be read.
        command = ["journalctl", "--reverse", "--unit", unit, "--lines", str(JOURNAL_LINES), *journal.AS_JSON]
        # It ends before printed() kills it, so that awk prints what it has.
        words = journal.shortened(" ".join(map(shlex.quote, command)), int(safe_files.SECONDS) - 2)
        lines = journal.entries("", safe_files.printed(["sh", "-c", words]))[0]
        step, step_time = job_evidence.last_step(lines[::-1], params["step_pattern"])
    look = looks.Looks(looks.reader(params["user"]))
    found = {**jobs_own(params, look), "evidence": evidence(module, look) if params["evidence"] else {}}
    module.exit_json(
        changed=False,
        info=hostile_input.tidy(
            {
                "unit": show.get("ActiveState", "") if there else "absent",
                "result": show.get("Result", ""),
                "since": time.time() - time.monotonic() + since if since else None,
                **found,
                "unread": look.failed,
                "place": job_folders.place(unit_text(unit)),
                "step": step,
                "step_time": step_time,
                "gpus": gpu_processes(module),
            }
        ),
    )


if __name__ == "__main__":
    main()
