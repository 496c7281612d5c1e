# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: members
short_description: Decide which hosts take part in a job
version_added: 0.1.0
description:
  - Takes the hosts of the group, and puts a spare into the place of each that is marked with C(torchrun_node_out).
  - The others keep their places, and with them their ranks.
options:
  group:
    description: Name of the inventory group with the nodes.
    type: str
    required: true
  spares:
    description: Name of the inventory group with the spares, used in its order.
    type: str
    default: spares
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
- name: Decide which hosts take part
  onprem.torch.members:
    group: train
  register: __cluster_members
"""

RETURN = r"""
members:
  description: C(host), C(replaces) (empty for its own place) and C(rank) (the explicit rank that it takes over), in order.
  returned: success
  type: list
  elements: dict
replaced:
  description: Node that is out → spare.
  returned: success
  type: dict
problems:
  description: What is wrong, with C(host), C(variable) and C(message).
  returned: failure
  type: list
  elements: dict
"""
