# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: follow
short_description: Follow a job on the terminal
version_added: 0.1.0
description:
  - Prints rank 0's journal while it is written, until the first step, the end or a failure of the job.
  - Ending the play does not end the job.
options:
  job:
    description: The key C(job) of the result of M(onprem.torch.plan).
    type: dict
    required: true
  host:
    description: Inventory name of the node with rank 0; the task runs there.
    type: str
    required: true
  wait_for:
    description: When to return.
    type: str
    choices: [first_step, finished]
    default: first_step
  again:
    description: The command that follows the job again, to be shown.
    type: str
    default: ""
  others:
    description: Inventory names of the other nodes, which are asked what keeps them while no step is seen.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Can run in check mode and return the same.
    support: full
  diff_mode:
    description: Changes nothing, so shows no difference.
    support: none
  action:
    description: Runs on the control node.
    support: full
author:
  - The onprem.torch maintainers (@onprem-torch)
"""

EXAMPLES = r"""
- name: Follow the job
  onprem.torch.follow:
    job: "{{ cluster_plan.job }}"
    host: "{{ inventory_hostname }}"
    others: "{{ cluster_plan.order[1:] }}"
  when: inventory_hostname == cluster_plan.order[0]
"""

RETURN = r"""
outcome:
  description: One of C(running), C(finished), C(failed), C(stopped) and C(unknown).
  returned: always
  type: str
last_step:
  description: The last line of a training step.
  returned: success
  type: str
last_line:
  description: The last line that rank 0 printed.
  returned: success
  type: str
checkpoint:
  description: Path of the newest checkpoint on rank 0.
  returned: success
  type: str
"""
