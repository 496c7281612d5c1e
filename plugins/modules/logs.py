# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Only its documentation: the action plugin of the same name does the work on the control node.

from __future__ import annotations

DOCUMENTATION = r"""
module: logs
short_description: Print the journals of all nodes of a job, merged
version_added: 0.1.0
description:
  - Prints the lines of all ranks and supervisors by time, each with its host and rank.
  - Follows them until the job ends. Ending the play does not end the job.
  - Run it once; it asks all nodes of the plan itself, so the number of forks does not matter.
options:
  plan:
    description: The result of M(onprem.torch.plan).
    type: dict
    required: true
  follow:
    description: Whether to go on until the job ends.
    type: bool
    default: true
  since:
    description:
      - Where to begin, as C(journalctl --since) understands it, such as C(10 min ago).
      - Empty for the last start of each node's unit.
    type: str
    default: ""
  rank:
    description: Global rank whose lines are printed, or V(all).
    type: str
    default: all
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
- name: Print what rank 3 has said
  onprem.torch.logs:
    plan: "{{ cluster_plan }}"
    follow: false
    rank: "3"
  run_once: true
"""

RETURN = r"""
outcome:
  description: One of C(running), C(finished), C(failed), C(stopped) and C(unknown).
  returned: success
  type: str
lines:
  description: How many lines were printed.
  returned: success
  type: int
unreachable_hosts:
  description: Hosts that did not answer the last look.
  returned: success
  type: list
  elements: str
"""
