# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: rollback
short_description: Decide to which release a job goes back
version_added: 0.1.0
description:
  - Decides once for all nodes, from what M(onprem.torch.torchrun_info) has found on each.
  - Refuses where not all nodes have run and kept the same earlier release.
options:
  hosts:
    description: The nodes of the job, in the order of their ranks.
    type: list
    elements: str
    required: true
  release:
    description: Id of the release to go back to. Empty for the one that ran before the newest.
    type: str
    default: ""
  variable:
    description: Variable in which each host holds the result of M(onprem.torch.torchrun_info).
    type: str
    default: __torchrun_info
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
- name: Decide to which release the job goes back
  onprem.torch.rollback:
    hosts: "{{ cluster_plan.order }}"
  run_once: true
"""

RETURN = r"""
decision:
  description: C(rollback), or C(follow) where the release runs already.
  returned: success
  type: str
release:
  description: Id of the release to run.
  returned: success
  type: str
"""
