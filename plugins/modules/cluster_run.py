#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cluster_run
short_description: Have the nodes of a cluster to oneself
version_added: 0.1.0
description:
  - Two runs that change one cluster at the same time disturb each other; each verb that changes something holds the nodes
    that it changes from its first look on, and gives them back before it follows the job.
  - M(onprem.torch.node_info) takes the node when it looks; this module settles what it found. All nodes or none are taken.
  - A run whose process has ended on this control node, or that has given no sign of life for 20 minutes anywhere,
    is taken over.
options:
  state:
    description:
      - V(taken) takes all nodes of the play, and waits for another run that holds one of them.
      - V(looked) says who holds nodes and changes nothing.
      - V(given_back) gives the node back, V(ended) all nodes of the play, where a host of it has failed and so ends the run.
        What cannot be given back is a warning.
    type: str
    choices: [taken, looked, given_back, ended]
    default: looked
  verb:
    description: What the run does.
    type: str
    default: ""
  job:
    description: Name of the job that it does it for.
    type: str
    default: ""
  wait:
    description: How long to wait for another run, in seconds; 0 refuses at once.
    type: raw
    default: 60
  take_over:
    description: Whether another run is taken over, whatever it does. It changes nothing any more from then on.
    type: raw
    default: false
  run:
    description: The run; set by the action plugin.
    type: dict
    default: {}
  over:
    description: Ids of the runs that are taken over; set by the action plugin.
    type: list
    elements: str
    default: []
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Takes nothing, since nothing is changed.
    support: full
  diff_mode:
    description: Changes nothing of the node's, so shows no difference.
    support: none
  action:
    description: The action plugin decides on the control node, and asks the nodes only where it has to.
    support: full
seealso:
  - module: onprem.torch.node_info
"""

EXAMPLES = r"""
- name: Have the cluster to oneself
  onprem.torch.cluster_run:
    state: taken
    verb: train
    job: train
    wait: 60
  run_once: true
  register: run

- name: Give the cluster back
  onprem.torch.cluster_run:
    state: given_back

- name: Verify, and do not keep the cluster where that fails
  block:
    - name: Verify
      ansible.builtin.import_role:
        name: onprem.torch.nccl_verify
  always:
    - name: Give the cluster back where this run ends early
      onprem.torch.cluster_run:
        state: ended
      run_once: true
"""

RETURN = r"""
waited:
  description: Whether the nodes were not free at the first look, so that they have to be looked at again.
  returned: when state is V(taken)
  type: bool
holders:
  description: Who else holds a node, in words.
  returned: when state is V(taken) or V(looked)
  type: list
  elements: str
run:
  description: Whether the node was C(taken), its C(lease), and C(silent), the seconds since its last sign of life.
  returned: on a node
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import node_lock, run_lease


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["taken", "looked", "given_back", "ended"], "default": "looked"},
            "verb": {"type": "str", "default": ""},
            "job": {"type": "str", "default": ""},
            "wait": {"type": "raw", "default": 60},
            "take_over": {"type": "raw", "default": False},
            "run": {"type": "dict", "default": {}},
            "over": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    run, state = module.params["run"], module.params["state"]
    if module.check_mode:
        state = "looked"
    try:
        if state == "given_back":
            run_lease.give_back(run["id"])
            module.exit_json(changed=False)
        module.exit_json(changed=False, run=run_lease.told(run if state == "taken" else {}, module.params["over"]))
    except node_lock.Busy as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
