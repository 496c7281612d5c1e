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
      description: The starts of the job, oldest first, with C(release), C(time), C(back), C(kept) and C(checkpoints) (folder and pattern).
      type: list
      elements: dict
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import clean_module, hostile_input, job_evidence, job_folders, journal, node_facts, supervisor_state

PROPERTIES = ("LoadState", "ActiveState", "Result", "StateChangeTimestampMonotonic")
# Step lines are looked for in so many of the journal's last lines.
JOURNAL_LINES = 400
SMI = ["--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader"]
DAYS_OF_KERNEL = 7
# A firewall that logs packets may fill a disk.
KERNEL_LINES = "--lines=100000"


def gpu_processes(module: AnsibleModule) -> list[dict[str, object]]:
    """Return who holds GPU memory; nobody where there is no driver."""
    tool = module.get_bin_path("nvidia-smi")
    if not tool:
        return []
    code, stdout, _stderr = module.run_command([tool, *SMI])
    return job_evidence.gpu_processes(stdout, node_facts.unit_of) if code == 0 else []


def evidence(module: AnsibleModule) -> dict[str, object]:
    """Return what the node itself tells about the end of a job."""
    params = module.params
    since = f"--since=-{DAYS_OF_KERNEL}d"
    _code, kernel, _stderr = module.run_command(["journalctl", "--dmesg", "--output=short-unix", "--quiet", "--no-pager", since, KERNEL_LINES])
    places = [params["checkpoint_dir"], params["log_dir"], params["root"], "/dev/shm", "/tmp"]
    return {
        "kernel": job_evidence.kernel_events(kernel),
        "errors": job_evidence.error_files(params["log_dir"]) if params["log_dir"] else [],
        "room": job_evidence.room(path for path in places if path),
    }


def main() -> None:
    module = clean_module.CleanModule(
        argument_spec={
            "job": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
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
    state, odd = supervisor_state.read(params["root"])
    since = int(show.get("StateChangeTimestampMonotonic") or 0) / 1e6
    step, step_time = "", None
    if params["step_pattern"] and there:
        command = ["journalctl", "--unit", unit, "--lines", str(JOURNAL_LINES), *journal.AS_JSON]
        _code, stdout, _stderr = module.run_command(command)
        step, step_time = job_evidence.last_step(journal.entries("", stdout)[0], params["step_pattern"])
    module.exit_json(
        changed=False,
        info=hostile_input.tidy(
            {
                "unit": show.get("ActiveState", "") if there else "absent",
                "result": show.get("Result", ""),
                "since": time.time() - time.monotonic() + since if since else None,
                "state": state,
                "state_odd": odd,
                "checkpoint": node_facts.newest(params["checkpoint_dir"], params["checkpoint_glob"]),
                "step": step,
                "step_time": step_time,
                "gpus": gpu_processes(module),
                "evidence": evidence(module) if params["evidence"] else {},
                "release": job_folders.current(params["root"]),
                "releases": job_folders.history(params["root"]),
            }
        ),
    )


if __name__ == "__main__":
    main()
