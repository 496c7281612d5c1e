#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: peer_firewall
short_description: Let a job's peers through a node's firewall, and only them
version_added: "0.1.0"
author:
  - The onprem.torch maintainers (@onprem-torch)
description:
  - Opens the ports of a C(torch.distributed.run) job to the addresses of the job's nodes, on whichever firewall the node has.
  - Where no firewall keeps others out, a table of its own drops new TCP connections from others to the job's ports,
    and on the training interface to the ephemeral range, and nothing else.
  - Finds out the active firewall, compares what is wanted with files and live rules, and changes what differs,
    as one step. When nothing differs, this one module run is all that a node is asked for.
  - Rules name sets, so that any number of nodes is one rule. Several jobs share a node; each adds and removes only its own.
  - A change is put back by a timer on the node unless it is confirmed over a new connection, which the action plugin
    of the same name opens right after the change.
  - Never enables or disables a firewall, and never changes a rule that it did not make.
options:
  run:
    description: The run that this is done for, which must still hold the node; set by the action plugin.
    type: dict
    default: {}
  state:
    description:
      - V(present) makes the rules hold, V(absent) removes this job's (and with the last job everything the module made).
      - V(verified) changes nothing and lists what differs.
    type: str
    choices: [present, absent, verified]
    default: present
  job:
    description:
      - The job's name.
      - May be left out with O(state=absent), which then removes all jobs' rules, and with O(state=verified).
    type: str
  ports:
    description: TCP ports of the job that only peers may reach.
    type: list
    elements: int
    default: []
  peers:
    description: IPv4 and IPv6 addresses of all nodes of the job, as seen on the training interface.
    type: list
    elements: str
    default: []
  interface:
    description: The training interface.
    type: str
  trust_peers:
    description: Whether peers may reach every port on the training interface, or O(ports) and O(ephemeral_ports) only.
    type: bool
    default: true
  ephemeral_ports:
    description:
      - The range C(first-last) to which the kernel's ephemeral ports are narrowed when the peers are not trusted.
      - Unused with O(trust_peers=true), where the kernel's range stays as it is.
    type: str
    default: 50000-60999
  protect:
    description: Whether others are kept out by a table of our own where no firewall of the node does so.
    type: bool
    default: true
  monitoring_ports:
    description: TCP ports that sources of their own may reach, as for metrics.
    type: list
    elements: dict
    default: []
    suboptions:
      port:
        description: The port.
        type: int
        required: true
      sources:
        description: Addresses or networks.
        type: list
        elements: str
        required: true
  backend:
    description: The firewall to write to; V(auto) takes the active one, and plain nftables where none is.
    type: str
    choices: [auto, nftables, firewalld, ufw]
    default: auto
  rollback_after:
    description: Seconds after which an unconfirmed change is put back.
    type: int
    default: 60
  confirm:
    description: The name of the change to confirm, which ends its timer. Used by the action plugin.
    type: str
attributes:
  check_mode:
    description: Can run in check_mode and return changed status prediction without modifying target
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check_mode), when in diff mode
    support: full
"""

EXAMPLES = r"""
- name: Let the peers in
  onprem.torch.peer_firewall:
    job: digits
    ports: [29500, 29501, 29600]
    peers: [198.18.0.11, 198.18.0.12]
    interface: eth1

- name: Remove what the job was given
  onprem.torch.peer_firewall:
    job: digits
    state: absent

- name: Say what differs
  onprem.torch.peer_firewall:
    state: verified
  register: firewall
"""

RETURN = r"""
backend:
  description: The firewall that was written to, V(none) when nothing is left.
  type: str
  returned: success
protected:
  description: Whether our own table keeps others out, because no firewall of the node does.
  type: bool
  returned: success
opened:
  description: Chains of the user's that drop by default and therefore jump to our rules.
  type: list
  elements: str
  returned: success
jobs:
  description: Names of the jobs whose rules the node holds.
  type: list
  elements: str
  returned: success
differences:
  description: What differed from the wanted state, a sentence each.
  type: list
  elements: str
  returned: success
in_sync:
  description: Whether nothing differed.
  type: bool
  returned: success
missing_packages:
  description: Packages that have to be installed before the rules can be loaded; nothing was changed then.
  type: list
  elements: str
  returned: success
pending:
  description: Whether the change awaits its confirmation.
  type: bool
  returned: success
change:
  description: The name of the change that awaits its confirmation.
  type: str
  returned: when O(state) changed something
rolled_back:
  description: Whether the change was put back because nothing confirmed it in time.
  type: bool
  returned: when confirming
expired:
  description: Whether that was because its time was up, and not by a restart or another run.
  type: bool
  returned: when confirming what was put back
problems:
  description: Every reason why the request was refused, a sentence each.
  type: list
  elements: str
  returned: failure
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.onprem.torch.plugins.module_utils import node_lock, run_lease
from ansible_collections.onprem.torch.plugins.module_utils.firewall_apply import Request, carry_out
from ansible_collections.onprem.torch.plugins.module_utils.firewall_node import Node, NodeError
from ansible_collections.onprem.torch.plugins.module_utils.firewall_rollback import confirm
from ansible_collections.onprem.torch.plugins.module_utils.firewall_spec import SpecError


def main() -> None:
    """Read the arguments, carry out the request, report."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent", "verified"], "default": "present"},
            "job": {"type": "str"},
            "ports": {"type": "list", "elements": "int", "default": []},
            "peers": {"type": "list", "elements": "str", "default": []},
            "interface": {"type": "str"},
            "trust_peers": {"type": "bool", "default": True},
            "ephemeral_ports": {"type": "str", "default": "50000-60999"},
            "protect": {"type": "bool", "default": True},
            "monitoring_ports": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"port": {"type": "int", "required": True}, "sources": {"type": "list", "elements": "str", "required": True}},
            },
            "backend": {"type": "str", "choices": ["auto", "nftables", "firewalld", "ufw"], "default": "auto"},
            "rollback_after": {"type": "int", "default": 60},
            "confirm": {"type": "str"},
            "run": {"type": "dict", "default": {}},
        },
        required_if=[("state", "present", ("job",))],
        supports_check_mode=True,
    )
    node = Node(module.run_command)
    try:
        if module.params["confirm"]:
            result = confirm(node, module.params["confirm"])
        else:
            arguments = {name: value for name, value in module.params.items() if name not in ("confirm", "run")}
            result = carry_out(node, Request(**arguments), module.check_mode, lambda: run_lease.require(module.params["run"]))
    except SpecError as error:
        module.fail_json(msg=" ".join(error.problems), problems=error.problems)
    except NodeError as error:
        module.fail_json(msg=str(error), problems=[str(error)])
    except node_lock.Busy as error:
        text = f"The firewall was not changed: {error}."
        module.fail_json(msg=text, problems=[text])
    module.exit_json(**result)


if __name__ == "__main__":
    main()
