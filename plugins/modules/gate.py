# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: gate
short_description: Decide what a job needs to run its staged release
version_added: 0.1.0
description:
  - Reads what M(onprem.torch.torchrun_unit) told on every host and decides once for the whole job.
  - Fails where the nodes hold different sources or one could not be prepared.
options:
  hosts:
    description: Hosts of the job in the order of their ranks.
    type: list
    elements: str
    required: true
  variable:
    description: Variable in which each host holds the result of M(onprem.torch.torchrun_unit).
    type: str
    default: __torchrun_unit
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
- name: Decide what the job needs
  onprem.torch.gate:
    hosts: "{{ cluster_plan.order }}"
  run_once: true
  register: __torchrun_gate
"""

RETURN = r"""
decision:
  description: One of C(start), C(switch), C(follow), C(finished) and C(limited) (C(--limit) leaves out nodes).
  returned: success
  type: str
"""
