# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: plan
short_description: Decide what every node is and does
version_added: 0.1.0
description:
  - Computes the cluster's plan once, on the control node, from the inventory's variables and from what
    M(onprem.torch.node_info) found on every host of the group.
  - Names everything that is wrong at once, one sentence each, before anything is changed.
  - Runs on the control node only; give the task C(run_once).
options:
  group:
    description: Name of the inventory group that holds the nodes.
    type: str
    required: true
  nodes_variable:
    description: Name of the variable in which each host holds the result of M(onprem.torch.node_info).
    type: str
    default: __cluster_node
  nodes:
    description:
      - Whether the nodes have been looked at. With V(false) nothing is planned; the task fails where the group is empty, or
        where Ansible could not connect to a host because a variable such as C(ansible_user) cannot be read.
      - Give this task to C(localhost) before the first task on the nodes.
    type: bool
    default: true
  spares:
    description: Name of the inventory group of spares, which are checked too with O(nodes=false).
    type: str
    default: spares
  starts:
    description:
      - Whether the job is to be started, so that no rank may begin from less than the newest checkpoint that it has or had.
    type: bool
    default: false
  reads_source:
    description:
      - Whether the job's source is read on the control node. With V(false) the plan names no release, for what ships nothing.
    type: bool
    default: true
  fail:
    description: Whether problems fail the task. With V(false) they are only returned.
    type: bool
    default: true
author:
  - The onprem.torch maintainers (@onprem-torch)
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
"""

EXAMPLES = r"""
- name: Plan the cluster
  onprem.torch.plan:
    group: train
  run_once: true
  register: cluster_plan
"""

RETURN = r"""
order:
  description: Hosts in the order of their ranks.
  returned: when nothing is wrong, or with O(fail=false)
  type: list
  elements: str
nodes:
  description: By host C(rank), C(address), C(address6), C(interface), C(nproc), C(devices), hardware and variables.
  returned: when nothing is wrong, or with O(fail=false)
  type: dict
peers:
  description: Training addresses of all nodes, as C(ipv4) and C(ipv6).
  returned: when nothing is wrong, or with O(fail=false)
  type: dict
job:
  description: Name, unit, MASTER_ADDR, ports, script, arguments, folders and release of the job.
  returned: when nothing is wrong, or with O(fail=false)
  type: dict
fingerprint:
  description: Changes when the nodes, their hardware or versions change.
  returned: when nothing is wrong, or with O(fail=false)
  type: str
problems:
  description: What is wrong, with C(host), C(variable) and C(message).
  returned: when nothing is wrong, or with O(fail=false)
  type: list
  elements: dict
"""
