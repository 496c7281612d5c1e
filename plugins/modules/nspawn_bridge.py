#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nspawn_bridge
short_description: Make the network that lab nodes are plugged into
version_added: 0.1.0
description:
  - Makes a bridge with an address, forwarding, an nftables table that lets the nodes reach the outside by masquerading,
    and network namespaces for outsiders, who are on the same network and no peers.
  - Raises the kernel's limits of inotify instances and neighbours where they are too low for many nodes; they stay so.
options:
  name:
    description: Name of the bridge.
    type: str
    required: true
  state:
    description: Whether it is there. V(absent) removes bridge, table and outsiders.
    type: str
    choices: [present, absent]
    default: present
  address:
    description: IPv4 address of the bridge with prefix length; the nodes' gateway.
    type: str
    default: ""
  address6:
    description: IPv6 address of the bridge with prefix length.
    type: str
    default: ""
  masquerade:
    description: Whether the nodes reach the outside by masquerading; needs nf_tables in the kernel.
    type: bool
    default: true
  state_dir:
    description:
      - Folder of the lab's nodes, as for M(onprem.torch.nspawn_node). The bridge carries it as the alias of its interface.
      - A bridge that carries another folder is another lab's, and left alone; so is one that no lab has made.
    type: path
    default: ""
  outsiders:
    description: Network namespaces, each with C(name), C(address) and, if wanted, C(address6), both with prefix length.
    type: list
    elements: dict
    default: []
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says whether something would change.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Make the lab's network
  onprem.torch.nspawn_bridge:
    name: onprem0
    address: 198.18.0.1/24
"""

RETURN = r"""
changes:
  description: What was made or removed.
  returned: always
  type: list
  elements: str
"""

import contextlib
import ipaddress
import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import lab_network, nspawn, nspawn_end

FORWARD = "/proc/sys/net/ipv4/ip_forward"
INSTANCES = "/proc/sys/fs/inotify/max_user_instances"
# Each systemd takes a few inotify instances of the one user they all are to the kernel: 128 last for some 20 nodes.
ENOUGH_INSTANCES = 8192
# One table for all nodes holds what each knows of each other; where 1024 are too few, connections are dropped in silence.
NEIGHBOURS = ("/proc/sys/net/ipv4/neigh/default/gc_thresh3", "/proc/sys/net/ipv6/neigh/default/gc_thresh3")
ENOUGH_NEIGHBOURS = 65536


class Bridge:
    """The network of a lab."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.quietly = nspawn_end.quietly(module)
        self.name = self.params["name"]
        self.nodes = nspawn.located(self.params["state_dir"]) if self.params["state_dir"] else ""
        self.changes: list[str] = []

    def run(self, *words: str) -> str:
        """Run a command and return what it prints."""
        returncode, stdout, stderr = self.module.run_command(list(words))
        if returncode != 0:
            self.module.fail_json(msg=f"{' '.join(words)} failed: {stderr.strip()}")
        return stdout

    def change(self, what: str, *commands: list[str]) -> None:
        """Remember a change and, outside check mode, make it."""
        self.changes.append(what)
        if not self.module.check_mode:
            for command in commands:
                self.run(*command)

    def links(self) -> list[lab_network.Link]:
        """Return the interfaces of this machine."""
        return lab_network.links(self.quietly("ip", "-json", "-details", "address", "show"))

    def addresses(self, link: str, *namespace: str) -> set[str]:
        """Return the addresses of an interface with prefix lengths."""
        output = self.quietly("ip", *namespace, "-json", "address", "show", "dev", link)
        return {address for item in lab_network.links(output) for address in item.addresses}

    def bridge(self) -> lab_network.Link | None:
        """Return the bridge, None where there is none."""
        return next((link for link in self.links() if link.name == self.name), None)

    def is_ours(self, bridge: lab_network.Link) -> bool:
        """Return whether the bridge is this lab's."""
        return lab_network.belongs(bridge, self.nodes, self.links(), self.quietly("nft", "list", "table", "ip", self.table()))

    def table(self) -> str:
        """Return the name of the nftables table."""
        return lab_network.table(self.name)

    def rules(self) -> str:
        """Return the nftables rules: masquerade what leaves the bridge, and let a default-drop forward policy pass it."""
        network = ipaddress.ip_interface(self.params["address"]).network
        return (
            f"table ip {self.table()} {{\n"
            "\tchain postrouting {\n"
            "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
            f'\t\tip saddr {network} oifname != "{self.name}" masquerade\n'
            "\t}\n"
            "}\n"
        )

    def sysctl(self, path: str, least: int) -> None:
        """Raise a kernel setting to what is needed; never lower it."""
        with open(path, encoding="ascii") as stream:
            now = int(stream.read())
        if now >= least:
            return
        if not self.module.check_mode:
            with open(path, "w", encoding="ascii") as stream:
                stream.write(str(least))
        self.changes.append(f"{path} = {least}")

    def room_for_neighbours(self) -> None:
        """Raise the number of neighbours where this machine allows it; a container may not, and small labs do not need it."""
        for path in NEIGHBOURS:
            if os.access(path, os.W_OK):
                with contextlib.suppress(OSError):
                    self.sysctl(path, ENOUGH_NEIGHBOURS)

    def present(self) -> None:
        """Make what is missing."""
        params = self.params
        if not params["address"]:
            self.module.fail_json(msg=f"{self.name}: address is needed to make the bridge")
        if not lab_network.BRIDGE_NAME.fullmatch(self.name):
            self.module.fail_json(
                msg=f"lab_bridge is {self.name!r}, but at most 15 letters, digits, '_', '.' and '-' that begin with a letter were expected"
            )
        bridge = self.bridge()
        if not bridge:
            self.change(f"bridge {self.name}", ["ip", "link", "add", self.name, "type", "bridge"])
        elif bridge.owner not in ("", self.nodes) or bridge.kind != "bridge":
            self.module.fail_json(msg=f"{self.name} is another lab's ({lab_network.shown(bridge.owner)}), or no bridge; set lab_bridge")
        elif not self.is_ours(bridge):
            self.module.fail_json(msg=f"{self.name} is a bridge that no lab has made; it is left alone: set lab_bridge to another name")
        self.sign(bridge.alias if bridge else "")
        wanted = {address for address in (params["address"], params["address6"]) if address}
        there = set(bridge.addresses) if bridge else set()
        for address in sorted(wanted - there):
            nodad = ["nodad"] if ":" in address else []
            self.change(f"address {address}", ["ip", "address", "add", address, "dev", self.name, *nodad])
        # Of a lab that has got another subnet. What somebody has given a bridge that is not signed yet is not ours.
        for address in sorted(there - wanted) if self.nodes and bridge and bridge.owner == self.nodes else []:
            self.change(f"no address {address}", ["ip", "address", "delete", address, "dev", self.name])
        if not (bridge and bridge.up):
            self.change("link up", ["ip", "link", "set", self.name, "up"])
        self.sysctl(INSTANCES, ENOUGH_INSTANCES)
        self.room_for_neighbours()
        if params["masquerade"]:
            self.masquerade()
        for outsider in params["outsiders"]:
            self.outsider(outsider)

    def sign(self, there: str) -> None:
        """Let the bridge say whose it is."""
        try:
            wanted = lab_network.alias(self.nodes)
        except ValueError as error:
            self.module.fail_json(msg=str(error))
        if wanted != there:
            self.change(f"owner {self.nodes or 'a lab without a folder'}", ["ip", "link", "set", "dev", self.name, "alias", wanted])

    def masquerade(self) -> None:
        """Let the nodes reach what this machine reaches."""
        self.sysctl(FORWARD, 1)
        there = self.quietly("nft", "--stateless", "list", "table", "ip", self.table())
        if there.split() != self.rules().split():
            self.changes.append(f"table {self.table()}")
            if not self.module.check_mode:
                self.load_rules(bool(there))

    def load_rules(self, replace: bool) -> None:
        """Put the table into the kernel, in one step."""
        text = (f"delete table ip {self.table()}\n" if replace else "") + self.rules()
        returncode, _stdout, stderr = self.module.run_command(["nft", "--file", "-"], data=text)
        if returncode != 0:
            self.module.fail_json(msg=f"nft does not take the rules of {self.table()}: {stderr.strip()}")

    def namespaces(self) -> set[str]:
        """Return the names of the network namespaces."""
        return {item["name"] for item in json.loads(self.quietly("ip", "-json", "netns", "list") or "[]")}

    def inside(self, namespace: str) -> list[lab_network.Link]:
        """Return the interfaces in a network namespace that are in use."""
        output = self.quietly("ip", "-netns", namespace, "-json", "-details", "address", "show")
        return [link for link in lab_network.links(output) if link.up or link.addresses]

    def outsider(self, outsider: dict[str, str]) -> None:
        """Make a namespace with an interface on the bridge."""
        name = outsider["name"]
        host_end = f"{lab_network.OUTSIDER}{name}"[:15]
        wanted = {outsider[key] for key in ("address", "address6") if outsider.get(key)}
        inside = ("-netns", name)
        end = next((link for link in self.links() if link.name == host_end), None)
        there = name in self.namespaces()
        if end and end.master not in ("", self.name):
            self.module.fail_json(msg=f"the outsider {name} is on the bridge {end.master} already; name it differently in lab_outsiders")
        if there and end and end.master and wanted <= self.addresses("out0", *inside):
            return
        inhabited = [link.name for link in self.inside(name) if link.name not in ("lo", "out0")] if there else []
        if inhabited:
            self.module.fail_json(
                msg=f"the network namespace {name} has interfaces that no lab has made ({', '.join(inhabited)}); rename it in lab_outsiders"
            )
        self.changes.append(f"outsider {name}")
        if self.module.check_mode:
            return
        self.quietly("ip", "netns", "delete", name)
        self.quietly("ip", "link", "delete", host_end)
        self.run("ip", "netns", "add", name)
        self.run("ip", "link", "add", host_end, "type", "veth", "peer", "name", "out0", "netns", name)
        self.run("ip", "link", "set", host_end, "master", self.name, "up")
        self.run("ip", *inside, "link", "set", "lo", "up")
        for address in sorted(wanted):
            self.run("ip", *inside, "address", "add", address, "dev", "out0", *(["nodad"] if ":" in address else []))
        self.run("ip", *inside, "link", "set", "out0", "up")

    def absent(self) -> None:
        """Remove what is there and this lab's; a bridge that no lab has made is left alone with all that is on it."""
        bridge = self.bridge()
        if bridge and not self.is_ours(bridge):
            return
        for outsider in self.params["outsiders"]:
            if outsider["name"] in self.namespaces() and not self.elsewhere(outsider["name"]):
                self.change(f"outsider {outsider['name']}", ["ip", "netns", "delete", outsider["name"]])
        if bridge:
            self.change(f"bridge {self.name}", ["ip", "link", "delete", self.name])
        if self.quietly("nft", "list", "table", "ip", self.table()):
            self.change(f"table {self.table()}", ["nft", "delete", "table", "ip", self.table()])

    def elsewhere(self, outsider: str) -> bool:
        """Return whether a namespace is on another bridge, or somebody else's."""
        end = next((link for link in self.links() if link.name == f"{lab_network.OUTSIDER}{outsider}"[:15]), None)
        return bool(end and end.master not in ("", self.name)) or any(link.name not in ("lo", "out0") for link in self.inside(outsider))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "state_dir": {"type": "path", "default": ""},
            "address": {"type": "str", "default": ""},
            "address6": {"type": "str", "default": ""},
            "masquerade": {"type": "bool", "default": True},
            "outsiders": {"type": "list", "elements": "dict", "default": []},
        },
        supports_check_mode=True,
    )
    bridge = Bridge(module)
    getattr(bridge, module.params["state"])()
    module.exit_json(changed=bool(bridge.changes), changes=bridge.changes)


if __name__ == "__main__":
    main()
