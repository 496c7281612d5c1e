#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nccl_all_reduce
short_description: Measure a cluster's all-reduce, judge it and name what is slow
version_added: 0.1.0
description:
  - Runs one all-reduce measurement over all nodes of a plan, through C(torch.distributed.run), in a transient systemd unit
    with the job's own properties and a hard time limit.
  - Before torch starts, all nodes check their connections, versions and settings with each other, so that what is wrong is
    named in seconds and nothing hangs.
  - One verification is six tasks, because every node must be launched before any is waited for. This way C(forks) below
    the number of nodes cannot block it. The role C(onprem.torch.nccl_verify) holds the six tasks.
  - V(decided), V(configured) and V(judged) run once, on the control node; V(prepared), V(started) and V(collected) run on
    every node.
  - It never reports a change. All that it leaves on a node is removed when the result is collected.
options:
  state:
    description:
      - V(decided) checks the settings and says whether a verification is needed.
      - V(prepared) copies the programs to the node and looks whether they can run there.
      - V(configured) joins what the nodes told; nothing is launched where one of them cannot run it.
      - V(started) starts the unit of the node and returns at once.
      - V(collected) waits for the unit of the node, takes its result and removes everything.
      - V(judged) returns the verdict, keeps it, writes the report and prints it on one screen.
    type: str
    choices: [decided, prepared, configured, started, collected, judged]
    required: true
  plan:
    description: The result of M(onprem.torch.plan), for V(decided).
    type: dict
  verification:
    description: The result of V(decided), or of V(configured) from V(started) on.
    type: dict
  variable:
    description: Variable in which each host holds the result of V(prepared), for V(configured), or V(collected), for V(judged).
    type: str
    default: ""
  when:
    description:
      - V(auto) verifies where no verdict is known for this fingerprint or the last one is too old or failed, and never
        beside a job that runs.
      - V(always) verifies, and fails where a job runs.
      - V(never) does not verify.
    type: str
    choices: [auto, always, never]
    default: always
  valid_days:
    description: Days for which a verdict that did not fail counts, with O(when=auto).
    type: int
    default: 30
  fail:
    description: Whether the verdict C(fail) fails the task, for V(judged). With V(false) it is only returned.
    type: bool
    default: true
  store:
    description: Folder on the control node for verdicts, history and reports. Empty for C(.state/verify) beside the inventory.
    type: str
    default: ""
  backend:
    description: Backend of torch.distributed. V(auto) is nccl where every node has a usable GPU, else gloo.
    type: str
    choices: [auto, nccl, gloo]
    default: auto
  size_min:
    description: Smallest message in bytes, such as V(8) or V(64K) (powers of 1024).
    type: str
    default: "8"
  size_max:
    description: Largest message in bytes. Empty for 2 GiB on GPUs and 4 MiB on CPUs.
    type: str
    default: ""
  size_factor:
    description: Each size is the one before times this.
    type: int
    default: 2
  iterations:
    description: Timed calls for each size.
    type: int
    default: 20
  warmup:
    description: Calls before the timed ones, for each size.
    type: int
    default: 1
  dtype:
    description: Type of the elements.
    type: str
    choices: [float64, float32, float16, bfloat16, int64, int32, int8, uint8]
    default: float32
  operation:
    description: Reduction.
    type: str
    choices: [sum, min, max]
    default: sum
  minimum_gbytes_per_second:
    description: Bus bandwidth that the all-reduce must reach, in GB/s, or V(auto) to derive it from what the hardware reports.
    type: str
    default: auto
  pairwise:
    description: Whether pairs are measured. V(auto) does so on a shortfall and where a figure cannot be judged.
    type: str
    choices: [auto, always, never]
    default: auto
  pair_size:
    description: Bytes of a message between a pair. Empty for 128 MiB on GPUs and 1 MiB on CPUs.
    type: str
    default: ""
  correctness_repeats:
    description: Repetitions of the exact check of every element.
    type: int
    default: 3
  timeout:
    description: Seconds that the measurement may take.
    type: int
    default: 300
  arrival_timeout:
    description: Seconds that the nodes wait for each other.
    type: int
    default: 30
  interface:
    description: Interface to measure over on every node. Empty for the plan's.
    type: str
    default: ""
  environment:
    description: Environment variables of the measurement, such as NCCL_DEBUG. For the states V(decided) and V(started).
    type: dict
    default: {}
  programs:
    description: Text of the programs by file name; set by the action plugin.
    type: dict
    default: {}
  launch:
    description: What this node runs; set by the action plugin.
    type: dict
    default: {}
  environment_file:
    description: Text of the file with the environment of the measurement; set by the action plugin.
    type: str
    default: ""
  token:
    description: What tells this run's connections from a stranger's; set by the action plugin.
    type: str
    default: ""
  run:
    description: The run that this is done for, which must still hold the node; set by the action plugin.
    type: dict
    default: {}
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says whether it would verify; nothing is measured.
    support: full
  diff_mode:
    description: Changes nothing, so shows no difference.
    support: none
  action:
    description: The action plugin decides and judges on the control node.
    support: full
seealso:
  - module: onprem.torch.plan
"""

EXAMPLES = r"""
- name: Decide whether the cluster is to be verified
  onprem.torch.nccl_all_reduce:
    state: decided
    plan: "{{ cluster_plan }}"
    store: "{{ inventory_dir }}/.state/verify"
    minimum_gbytes_per_second: 350
  run_once: true
  register: verification

- name: Prepare the node
  onprem.torch.nccl_all_reduce:
    state: prepared
    verification: "{{ verification }}"
  register: prepared

- name: Join what the nodes told
  onprem.torch.nccl_all_reduce:
    state: configured
    verification: "{{ verification }}"
    variable: prepared
  run_once: true
  register: configured

- name: Start the measurement
  onprem.torch.nccl_all_reduce:
    state: started
    verification: "{{ configured }}"
  register: started

- name: Collect the result
  onprem.torch.nccl_all_reduce:
    state: collected
    verification: "{{ configured }}"
  register: collected

- name: Judge
  onprem.torch.nccl_all_reduce:
    state: judged
    verification: "{{ configured }}"
    variable: collected
  run_once: true
"""

RETURN = r"""
needed:
  description: Whether a verification is to be made.
  returned: when state is V(decided)
  type: bool
verdict:
  description: C(pass), C(warn) (such as unknown hardware) or C(fail).
  returned: when state is V(judged)
  type: str
report:
  description: Everything that was found; the JSON report holds the same (docs/verify.md describes all keys).
  returned: when state is V(judged)
  type: dict
  contains:
    answers:
      description:
        - The figures inside the node, on the wire and of the application's all-reduce, each judged by itself.
        - Each has C(status), C(measured), C(expected), C(minimum) (GB/s), C(arithmetic), C(baseline) and C(sentence).
      type: list
      elements: dict
    culprits:
      description:
        - What is slow, each with C(kind), C(host), C(device), C(peer), C(measured), C(expected) (GB/s) and C(evidence).
        - C(kind) is C(node), C(device), C(link), C(block) (what joins sets of nodes) or C(network), a whole rail (C(device)), or
          so many links without a pattern that none is named; C(host) is empty then, or the node inside which it is so.
      type: list
      elements: dict
    failures:
      description: What failed, one sentence each.
      type: list
      elements: str
    checks:
      description: Findings of the checks before the measurement, with C(check), C(status), C(host), C(peer) and C(sentence).
      type: list
      elements: dict
    nccl_tests:
      description: The rows of all sizes in the shape of nccl-tests' JSON (version 3).
      type: dict
    plateau:
      description: Size (bytes) and bus bandwidth (GB/s) at which the curve is flat.
      type: dict
    latency:
      description: Seconds of the smallest message, launched from Python and from a CUDA graph.
      type: dict
    correctness:
      description: Repetitions, number of wrong elements, and for each wrong rank its first wrong element and chunk.
      type: dict
    transport:
      description: How pairs of ranks reach each other, from NCCL's own log.
      type: dict
    versions:
      description: Versions of torch, CUDA, NCCL, driver and Python by host.
      type: dict
    pairs:
      description: Bandwidth in GB/s of each direction of each pair that was measured.
      type: list
      elements: dict
files:
  description: Paths of the JSON report and of the page on the control node.
  returned: when state is V(judged)
  type: dict
"""

import json
import os
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import (
    clean_module,
    environment,
    folder_acl,
    hostile_input,
    node_facts,
    node_lock,
    run_lease,
    safe_files,
    verify_config,
)

NODE_PROGRAM = "nccl_verify_node.py"
POLL_SECONDS = 0.2
# Bytes of a result, which comes from programs that run as the job's user.
RESULT_LIMIT = 64 << 20
# Bytes of the journal that are read where there is no result.
JOURNAL_LIMIT = 1 << 16
# In a folder in which nobody but root can put anything.
ENVIRONMENT_FILE = "/run/nccl-verify.env"


class Verification:
    """This node's part of a verification."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.launch = module.params["launch"]
        self.run = module.params["run"]
        self.folder = verify_config.FOLDER

    def systemctl(self, *words: str) -> str:
        """Run systemctl and return what it prints; a unit that is not known is no error."""
        _returncode, stdout, _stderr = self.module.run_command(["systemctl", *words, verify_config.UNIT])
        return str(stdout)

    def state(self) -> str:
        """Return ActiveState of the unit."""
        return self.systemctl("show", "--property=ActiveState", "--value").strip()

    def busy(self) -> bool:
        """Return whether a verification is there, of whatever run."""
        return self.state() in ("active", "activating", "deactivating", "reloading")

    def owner(self) -> str:
        """Return for whom the unit runs."""
        return self.systemctl("show", "--property=Description", "--value").strip()

    def prepared(self) -> dict[str, object]:
        """Write the programs and return what can be said before anything starts."""
        problems = []
        user, python = self.launch["user"], self.launch["python"]
        who = safe_files.account(user)
        if who is None:
            problems.append(f"there is no user {user}, which the job runs as; provision the nodes first (playbooks/provision.yml)")
        if not os.path.exists(python):
            problems.append(f"there is no {python}; provision the nodes first (playbooks/provision.yml) or correct pytorch_environment")
        else:
            version = node_facts.torch_version(os.path.dirname(os.path.dirname(python)))
            if not version:
                problems.append(f"{python} has no torch; provision the nodes first or correct pytorch_environment")
            elif self.launch["backend"] == "nccl" and "+cpu" in version:
                problems.append(f"torch {version} has no NCCL, but nccl_verify_backend is nccl; install a torch for CUDA or set gloo")
        if self.busy() and not self.run:
            # With a lease of this node, whoever began it has ended or was taken over.
            problems.append(f"a verification runs already ({self.owner()}); wait for it, or end it with systemctl stop {verify_config.UNIT}")
        if not problems and who:
            self.write_programs(who)
        return {"problems": problems, "ephemeral_ports": node_facts.ephemeral_ports()}

    def write_programs(self, who: safe_files.Account) -> None:
        """Put the programs into a fresh folder of root's; what an interrupted verification left is ended and removed.

        Only the folder below it, for the results, belongs to the job's user.
        """
        if self.busy():
            self.systemctl("stop")
        self.remove()
        os.mkdir(self.folder, 0o755)
        for name, text in self.module.params["programs"].items():
            safe_files.write_new(os.path.join(self.folder, name), text, 0o644)
        safe_files.make_folder(verify_config.RESULTS, who)

    def remove(self) -> None:
        """Remove the folder and the environment, which lie in a folder of root's. What the job's user keeps alive in it is left aside."""
        if os.path.lexists(ENVIRONMENT_FILE):
            os.unlink(ENVIRONMENT_FILE)
        safe_files.remove_tree(os.path.dirname(self.folder), os.path.basename(self.folder))

    def started(self) -> dict[str, object]:
        """Start the transient unit; it waits for the other nodes by itself."""
        who = safe_files.account(self.launch["user"])
        if who is None:
            self.module.fail_json(msg=f"there is no user {self.launch['user']} any more; provision the nodes again (playbooks/provision.yml)")
        # The token in it is for the job's user alone; its group may be everybody's.
        config = {**self.launch["config"], "token": self.module.params["token"]}
        path = os.path.join(self.folder, "config.json")
        safe_files.write_new(path, json.dumps(config), 0o600)
        folder_acl.let_read(path, who.uid)
        words = ["systemd-run", f"--unit={verify_config.UNIT}", "--collect", "--quiet", "--no-block"]
        words.append(f"--description=Verification of {run_lease.described(self.run) if self.run else 'a run without a lease'}")
        words += [f"--property={line}" for line in self.launch["properties"]]
        # Command lines and a unit's properties are for everybody to read, so that the environment is in a file of root's.
        environment.write_atomically(ENVIRONMENT_FILE, self.module.params["environment_file"], 0o600)
        words += [f"--property=EnvironmentFile={ENVIRONMENT_FILE}"]
        words += ["/usr/bin/python3", os.path.join(self.folder, NODE_PROGRAM), self.folder]
        self.systemctl("reset-failed")
        returncode, stdout, stderr = self.module.run_command(words)
        if returncode != 0:
            self.module.fail_json(msg=f"systemd-run failed: {(stderr or stdout).strip()}")
        return {"time": time.time()}

    def collected(self) -> dict[str, object]:
        """Wait until the unit is gone, and return what it left; nothing of it stays."""
        end = time.monotonic() + self.launch["seconds"]
        while self.busy():
            # What runs now may be another run's, which has taken the node over.
            run_lease.require(self.run)
            if time.monotonic() > end:
                self.systemctl("stop")  # RuntimeMaxSec should have done so
                break
            time.sleep(POLL_SECONDS)
        run_lease.require(self.run)
        result = self.result()
        journal = ""
        if not result:
            # The newest first: what ran there decides how much a line holds.
            words = ["journalctl", "--reverse", "--quiet", "--no-pager", "--output=cat", "--lines=30", f"--unit={verify_config.UNIT}"]
            journal = "\n".join(reversed(safe_files.printed(words, JOURNAL_LIMIT).splitlines()))
        self.remove()
        return {"result": result, "journal": journal[-4000:]}

    def result(self) -> dict[str, object]:
        """Return what the programs have written as the job's user; empty where it is no JSON object in a regular file."""
        try:
            with safe_files.pinned(self.folder, os.path.basename(verify_config.RESULTS)) as folder:
                found = hostile_input.parse_json(hostile_input.read_text(folder, "result.json", RESULT_LIMIT))
        except (OSError, ValueError, safe_files.Unsafe):
            return {}
        return found if isinstance(found, dict) else {}


def main() -> None:
    module = clean_module.CleanModule(
        argument_spec={
            "state": {
                "type": "str",
                "choices": ["decided", "prepared", "configured", "started", "collected", "judged"],
                "required": True,
            },
            "plan": {"type": "dict"},
            "verification": {"type": "dict"},
            "variable": {"type": "str", "default": ""},
            "when": {"type": "str", "choices": ["auto", "always", "never"], "default": "always"},
            "valid_days": {"type": "int", "default": 30},
            "fail": {"type": "bool", "default": True},
            "store": {"type": "str", "default": ""},
            "backend": {"type": "str", "choices": ["auto", "nccl", "gloo"], "default": "auto"},
            "size_min": {"type": "str", "default": "8"},
            "size_max": {"type": "str", "default": ""},
            "size_factor": {"type": "int", "default": 2},
            "iterations": {"type": "int", "default": 20},
            "warmup": {"type": "int", "default": 1},
            "dtype": {
                "type": "str",
                "choices": ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8"],
                "default": "float32",
            },
            "operation": {"type": "str", "choices": ["sum", "min", "max"], "default": "sum"},
            "minimum_gbytes_per_second": {"type": "str", "default": "auto"},
            "pairwise": {"type": "str", "choices": ["auto", "always", "never"], "default": "auto"},
            "pair_size": {"type": "str", "default": ""},
            "correctness_repeats": {"type": "int", "default": 3},
            "timeout": {"type": "int", "default": 300},
            "arrival_timeout": {"type": "int", "default": 30},
            "interface": {"type": "str", "default": ""},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "programs": {"type": "dict", "default": {}},
            "launch": {"type": "dict", "default": {}},
            # Not in launch, since modules write their arguments to the node's journal.
            "environment_file": {"type": "str", "default": "", "no_log": True},
            "token": {"type": "str", "default": "", "no_log": True},
            "run": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    state = module.params["state"]
    if state not in ("prepared", "started", "collected"):
        module.fail_json(msg=f"state {state} runs on the control node; call the module from a play, not alone")
    if module.check_mode:
        module.exit_json(changed=False, skipped=True)
    os.umask(0o022)  # a node's own may hide the programs from the job's user
    try:
        with run_lease.at_work(module.params["run"]):
            result = getattr(Verification(module), state)()
    except node_lock.Busy as error:
        module.fail_json(msg=f"the verification does not go on: {error}")
    except (OSError, RecursionError, safe_files.Unsafe) as error:
        module.fail_json(msg=f"{verify_config.FOLDER} cannot be used ({error}); remove it and verify again")
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
