#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nspawn_lab
short_description: Keep a lab apart from others, and remove what is left of it
version_added: 0.1.0
description:
  - Refuses a bridge or a network that another lab, or anybody else, has on this machine, before anything is changed.
  - Removes what is left of labs whose folders are gone where it is in the way, and nodes of this lab that are listed no more.
  - Nodes are found by what runs, what is mounted and what lies in the folder, not by an inventory.
options:
  state:
    description:
      - V(present) makes room for the lab.
      - V(absent) removes nodes, bridges, outsiders and the firewall's tables of the lab, whatever an inventory says by now.
    type: str
    choices: [present, absent]
    default: present
  state_dir:
    description: Folder of the lab's nodes, as for M(onprem.torch.nspawn_node).
    type: path
    required: true
  bridge:
    description: Bridge that the lab wants, or has had.
    type: str
    required: true
  networks:
    description: Networks that the lab wants.
    type: list
    elements: str
    default: []
  nodes:
    description: Names of the nodes that stay.
    type: list
    elements: str
    default: []
  take_over:
    description: Whether another lab that has the bridge or a network is removed in place of being left alone.
    type: bool
    default: false
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says what would be removed.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Make room for the lab
  onprem.torch.nspawn_lab:
    state_dir: /var/lib/lab/nodes
    bridge: onprem0
    networks: [198.18.0.0/24]
    nodes: [lab1, lab2]
"""

RETURN = r"""
removed:
  description: What was removed, a sentence each.
  returned: always
  type: list
  elements: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import lab_network, nspawn, nspawn_end


class Lab:
    """A lab among others on this machine."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.nodes = nspawn.located(self.params["state_dir"])
        self.removed: list[str] = []
        self.run = nspawn_end.quietly(module)
        self.links = lab_network.links(self.run("ip", "-json", "-details", "address", "show"), self.run("ip", "-json", "netns", "list"))

    def tables(self) -> dict[str, str]:
        """Return the labs' nftables tables by name."""
        found = [line.split()[-1] for line in self.run("nft", "list", "tables", "ip").splitlines() if line.strip()]
        return {name: self.run("nft", "list", "table", "ip", name) for name in found if name.startswith(lab_network.table(""))}

    def present(self) -> None:
        """Make room for the lab."""
        params = self.params
        lab = lab_network.Lab(self.nodes, params["bridge"], tuple(name for name in params["networks"] if name), params["take_over"])
        routes = [self.run("ip", version, "-json", "route", "show") for version in ("-4", "-6")]
        found = lab_network.look(lab, self.links, routes, nspawn.machines(), self.tables())
        if found.problems:
            self.module.fail_json(msg="; and ".join(found.problems))
        for root in sorted({machine.root for machine in found.end}):
            place = os.path.dirname(os.path.dirname(root))
            self.remove_node(os.path.dirname(root), f"of the lab of {lab_network.shown(place)}")
        for bridge in found.remove:
            self.remove_bridge(bridge)
        for bridge in lab_network.bridges_of(self.nodes, self.links):
            if bridge not in (params["bridge"], *found.remove):
                self.remove_bridge(bridge)
        for name in nspawn_end.left_nodes(self.nodes):
            if name not in params["nodes"]:
                self.remove_node(os.path.join(self.nodes, name), "which the inventory no longer has")

    def absent(self) -> None:
        """Remove all that is left of the lab."""
        for name in nspawn_end.left_nodes(self.nodes):
            self.remove_node(os.path.join(self.nodes, name))
        bridges = set(lab_network.bridges_of(self.nodes, self.links))
        name, rules = self.params["bridge"], self.tables().get(lab_network.table(self.params["bridge"]), "")
        link = next((link for link in self.links if link.name == name), None)
        used = any(machine.bridge == name for machine in nspawn.machines())
        if link and not used and lab_network.belongs(link, self.nodes, self.links, rules):
            bridges.add(name)
        elif rules and not used and not (link and link.alias.startswith(lab_network.ALIAS.strip())):
            # It has outlived its bridge, or an earlier release has made it for a bridge that is not the lab's.
            self.remove_table(name)
        for bridge in sorted(bridges):
            self.remove_bridge(bridge)
        if not self.module.check_mode:
            nspawn_end.remove_lab_groups(self.nodes, self.run)

    def remove_node(self, folder: str, which: str = "") -> None:
        """Remove a node."""
        name = os.path.basename(folder)
        self.removed.append(" ".join(["node", name, which]).strip())
        if self.module.check_mode:
            return
        try:
            nspawn_end.remove(folder, self.run)
        except TimeoutError as error:
            self.module.fail_json(msg=f"{name}: {error}; see what holds it ({folder}), and run this again")

    def remove_bridge(self, bridge: str) -> None:
        """Remove a bridge of a lab with the outsiders on it and its table."""
        commands = [["ip", "netns", "delete", name] for name in lab_network.outsiders(bridge, self.links)]
        commands += [["ip", "link", "delete", bridge]]
        self.removed.append(f"bridge {bridge}")
        if lab_network.table(bridge) in self.tables():
            self.remove_table(bridge)
        if self.module.check_mode:
            return
        # Nodes whose nspawn was killed, and whose folder is gone, live on.
        plugs = {link.name[len(lab_network.PLUG) :] for link in self.links if link.master == bridge and link.name.startswith(lab_network.PLUG)}
        nspawn_end.kill(nspawn_end.members(plugs))
        for command in commands:
            self.run(*command)

    def remove_table(self, bridge: str) -> None:
        """Remove the nftables table of a bridge."""
        self.removed.append(f"table {lab_network.table(bridge)}")
        if not self.module.check_mode:
            self.run("nft", "delete", "table", "ip", lab_network.table(bridge))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "state_dir": {"type": "path", "required": True},
            "bridge": {"type": "str", "required": True},
            "networks": {"type": "list", "elements": "str", "default": []},
            "nodes": {"type": "list", "elements": "str", "default": []},
            "take_over": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    if os.geteuid() != 0:
        module.fail_json(msg="root is needed to boot nodes; run the play as root or with sudo")
    lab = Lab(module)
    getattr(lab, module.params["state"])()
    module.exit_json(changed=bool(lab.removed), removed=lab.removed)


if __name__ == "__main__":
    main()
