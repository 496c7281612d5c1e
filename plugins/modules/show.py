# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: show
short_description: Print the plan, a job's status as a table, or why it ended early
version_added: 0.1.0
description:
  - Prints lines for a person on the control node, or the same as JSON for a program.
options:
  view:
    description: What to print.
    type: str
    choices: [plan, status, why]
    required: true
  plan:
    description: The result of M(onprem.torch.plan).
    type: dict
    required: true
  variable:
    description: Variable in which each host holds the result of M(onprem.torch.torchrun_info).
    type: str
    default: __torchrun_info
  firewall_variable:
    description:
      - Variable in which each host holds the answer of M(onprem.torch.peer_firewall) to state V(verified).
    type: str
    default: __firewall_status
  format:
    description: Text or JSON.
    type: str
    choices: [text, json]
    default: text
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
- name: Show the plan
  onprem.torch.show:
    view: plan
    plan: "{{ cluster_plan }}"
  run_once: true
"""

RETURN = r"""
lines:
  description: The printed lines.
  returned: always
  type: list
  elements: str
"""
