#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nspawn_node
short_description: Boot a systemd node on this machine
version_added: 0.1.0
description:
  - Boots a node with systemd, SSH and its own network address in systemd-nspawn, on an overlay over a root file system.
  - Works on hosts with and without systemd as PID 1, and over whatever a killed run left behind.
  - A node keeps what was written to it, and its address, over its own reboot and over V(powered_off).
options:
  name:
    description: Name of the node, which becomes its host name.
    type: str
    required: true
  state:
    description:
      - V(present) boots the node. One that runs with the same settings is left alone.
      - V(waited_for) waits until a node that boots answers.
      - V(powered_off) ends the node at once, as a loss of power does.
      - V(rebooted) reboots it from inside.
      - V(absent) powers it off and removes what it has written.
    type: str
    choices: [present, waited_for, absent, rebooted, powered_off]
    default: present
  state_dir:
    description: Folder for the nodes of a lab.
    type: path
    required: true
  root_file_system:
    description: Folders that are the lower layers of the root file system, topmost first.
    type: list
    elements: path
    default: []
  address:
    description: IPv4 address with prefix length.
    type: str
    default: ""
  address6:
    description: IPv6 address with prefix length.
    type: str
    default: ""
  gateway:
    description: IPv4 gateway.
    type: str
    default: ""
  bridge:
    description: Bridge of this machine that the node is plugged into.
    type: str
    required: true
  devices:
    description: Device files that the node gets, such as C(/dev/nvidia0).
    type: list
    elements: path
    default: []
  binds:
    description: Paths of this machine that the node sees read-only.
    type: list
    elements: path
    default: []
  environment:
    description: Environment of the node's first process.
    type: dict
    default: {}
  memory:
    description:
      - Memory that all nodes of this O(state_dir) may use together, such as V(80%) of this machine's or V(16G). Empty for no limit.
      - Needs the memory controller of cgroups, version 1 or 2; there is no limit without it.
    type: str
    default: ""
  user:
    description: User of the root file system who may log in with O(authorized_key).
    type: str
    default: ops
  authorized_key:
    description: Public key that may log in.
    type: str
    default: ""
  distribution:
    description: Name of the distribution in the root file system, for the settings' record only.
    type: str
    default: ""
  wait:
    description: Whether to wait until the node answers SSH and its services are up.
    type: bool
    default: true
  timeout:
    description: Seconds to wait for that.
    type: int
    default: 60
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says what would change and changes nothing.
    support: full
  diff_mode:
    description: Shows the settings that change.
    support: full
"""

EXAMPLES = r"""
- name: Boot a node
  onprem.torch.nspawn_node:
    name: lab1
    state_dir: /var/lib/lab
    root_file_system: [/var/cache/lab/debian-12]
    bridge: onprem0
    address: 198.18.0.11/24
    gateway: 198.18.0.1
    authorized_key: "{{ lookup('ansible.builtin.file', 'id_ed25519.pub') }}"
"""

RETURN = r"""
host_key:
  description: The node's public SSH host key.
  returned: when the node is present
  type: str
machine:
  description: Name of the node among the machines of this host.
  returned: always
  type: str
running:
  description: State of the node's services, as C(systemctl is-system-running) tells it.
  returned: when waited for
  type: str
"""

import json
import os
import time
import uuid

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import lab_network, nspawn, nspawn_end

# Between a node's reboot and its next boot nspawn ends and is started again.
SECONDS_OFF_DURING_REBOOT = 5.0
SETTINGS = ("root_file_system", "address", "address6", "gateway", "bridge", "devices", "binds", "environment", "distribution", "memory")


class Node:
    """One node on this machine."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.quietly = nspawn_end.quietly(module)
        self.name = self.params["name"]
        self.nodes = nspawn.located(self.params["state_dir"])
        self.folder = os.path.join(self.nodes, self.name)
        self.root = os.path.join(self.folder, "root")
        self.upper = os.path.join(self.folder, "upper")
        self.machine = nspawn.machine_name(self.name, self.nodes)
        self.settings_path = os.path.join(self.folder, nspawn.SETTINGS_FILE)
        try:
            self.memory = nspawn.memory_bytes(self.params["memory"], nspawn.machine_memory())
        except ValueError:
            self.fail(f"memory is {self.params['memory']!r}, but a share such as 80% or bytes such as 16G were expected; correct lab_memory")
        self.settings = {**{key: self.params[key] for key in SETTINGS}, "machine": self.machine}

    def fail(self, text: str) -> None:
        """Fail with a sentence that names the node."""
        self.module.fail_json(msg=f"{self.name}: {text}", machine=self.machine)

    def run(self, *words: str) -> str:
        """Run a command and return what it prints."""
        returncode, stdout, stderr = self.module.run_command(list(words))
        if returncode != 0:
            self.fail(f"{' '.join(words[:4])} … failed: {(stderr or stdout).strip()}")
        return stdout

    def is_on(self) -> bool:
        """Return whether the node runs."""
        return bool(nspawn.processes(self.root))

    def booted_with(self) -> dict[str, object]:
        """Return the settings that the node was booted with."""
        try:
            with open(self.settings_path, encoding="utf-8") as stream:
                return json.load(stream)
        except (OSError, ValueError):
            return {}

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the node's, whatever an interrupted run left there."""
        full = os.path.join(self.upper, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(f"{full}.partial", "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(f"{full}.partial", mode)
        os.rename(f"{full}.partial", full)

    def prepare(self) -> None:
        """Write what makes the node this one: name, network, identity, keys."""
        params = self.params
        self.write("etc/hostname", f"{self.name}\n")
        # As Debian's installer does it: the own name resolves to loopback.
        self.write("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n::1 localhost ip6-localhost\n")
        network = nspawn.network_file(params["address"], params["address6"], params["gateway"])
        self.write("etc/systemd/network/10-host0.network", network)
        if not os.path.exists(os.path.join(self.upper, "etc/machine-id")):
            self.write("etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)
        key = os.path.join(self.upper, "etc/ssh/ssh_host_ed25519_key")
        os.makedirs(os.path.dirname(key), exist_ok=True)
        if not os.path.exists(f"{key}.pub"):
            for path in (key, f"{key}.pub"):
                if os.path.exists(path):
                    os.unlink(path)
            self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", key)
        if params["authorized_key"]:
            self.authorize()

    def authorize(self) -> None:
        """Let the key log in as the user."""
        try:
            uid, gid, home = nspawn.account(self.params["root_file_system"], self.params["user"])
        except KeyError:
            self.fail(f"the root file system has no user {self.params['user']!r}; set user to one that it has")
            return
        folder = os.path.join(home.lstrip("/"), ".ssh")
        self.write(os.path.join(folder, "authorized_keys"), self.params["authorized_key"].strip() + "\n", 0o600)
        for path, mode in ((home.lstrip("/"), 0o755), (folder, 0o700), (os.path.join(folder, "authorized_keys"), 0o600)):
            full = os.path.join(self.upper, path)
            os.chown(full, uid, gid)
            os.chmod(full, mode)

    def mount(self) -> None:
        """Mount the overlay; one that a killed run left is mounted anew."""
        os.makedirs(self.root, exist_ok=True)
        os.makedirs(os.path.join(self.folder, "work"), exist_ok=True)
        nspawn_end.unmount(self.root, self.quietly)
        lowers = self.params["root_file_system"]
        for path in lowers:
            if not os.path.isdir(os.path.join(path, "usr")) and len(lowers) == 1:
                self.fail(f"root_file_system {path} is no root file system; build it first (role lab)")
        options = f"lowerdir={':'.join(lowers)},upperdir={self.upper},workdir={os.path.join(self.folder, 'work')}"
        self.run("mount", "-t", "overlay", f"onprem-{self.machine}", "-o", options, self.root)

    def boot(self) -> None:
        """Boot the node."""
        params = self.params
        if not params["root_file_system"] or not params["address"]:
            self.fail("root_file_system and address are needed to boot it")
        owner = lab_network.owner_of(self.quietly("ip", "-json", "-details", "address", "show"), params["bridge"])
        if owner not in ("", self.nodes):
            self.fail(f"the bridge {params['bridge']} belongs to another lab by now, {lab_network.shown(owner)}; boot the lab again")
        self.prepare()
        self.mount()
        words = nspawn.nspawn_words(
            self.machine, self.name, self.root, params["bridge"], params["devices"], params["binds"], params["environment"]
        )
        with open(self.settings_path, "w", encoding="utf-8") as stream:
            json.dump(self.settings, stream)
        console = os.path.join(self.folder, "console.log")
        lab = nspawn.digest(self.nodes)
        if nspawn.unified_systemd():
            self.quietly("systemctl", "set-property", "--runtime", nspawn.slice_name(lab), f"MemoryMax={self.memory or 'infinity'}")
        nspawn.start(nspawn.boot_words(self.machine, words, console, lab, self.memory), console)
        deadline = time.monotonic() + 10
        while not self.is_on():
            if time.monotonic() > deadline:
                self.fail(f"systemd-nspawn did not start: {self.console()}")
            time.sleep(0.05)

    def console(self) -> str:
        """Return the last words of the console."""
        try:
            with open(os.path.join(self.folder, "console.log"), encoding="utf-8", errors="replace") as stream:
                return " | ".join(stream.read().split("\n")[-4:]).strip()[-300:] or "the console is empty"
        except OSError:
            return "there is no console"

    def power_off(self) -> None:
        """End the node at once, and what a killed nspawn left of it."""
        try:
            nspawn_end.end(self.root, self.quietly)
        except TimeoutError as error:
            self.fail(str(error))

    def inside(self, *words: str) -> str:
        """Run a command inside the node and return what it prints."""
        pid = nspawn.leader(self.root)
        if not pid:
            return ""
        return self.quietly("nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", *words)

    def wait(self, not_leader: int = 0) -> str:
        """Wait until the node answers and return the state of its services."""
        address = self.params["address"].split("/")[0]
        deadline = time.monotonic() + self.params["timeout"]
        seen = time.monotonic()
        while time.monotonic() < deadline:
            if self.is_on():
                seen = time.monotonic()
            elif time.monotonic() - seen > SECONDS_OFF_DURING_REBOOT:
                self.fail(f"the node has ended while it booted: {self.console()}")
            pid = nspawn.leader(self.root)
            if pid and pid != not_leader and nspawn.answers_ssh(address):
                state = self.inside("systemctl", "is-system-running").strip()
                if state in ("running", "degraded"):
                    return state
            time.sleep(0.2)
        self.fail(f"the node did not answer SSH at {address} within {self.params['timeout']} s: {self.console()}")
        return ""

    def present(self) -> dict[str, object]:
        """Boot the node where it does not run with these settings."""
        before = self.booted_with()
        running = self.is_on()
        changed = not running or before != self.settings
        result: dict[str, object] = {"changed": changed}
        if changed:
            result["diff"] = {"before": json.dumps(before if running else {}, indent=2), "after": json.dumps(self.settings, indent=2)}
        if self.module.check_mode:
            return result
        if changed:
            self.power_off()
            self.boot()
        if self.params["wait"]:
            result["running"] = self.wait()
        result["host_key"] = self.host_key()
        return result

    def waited_for(self) -> dict[str, object]:
        """Wait until a node that boots answers."""
        return {"changed": False, "running": self.wait(), "host_key": self.host_key()}

    def host_key(self) -> str:
        """Return the node's public host key."""
        with open(os.path.join(self.upper, "etc/ssh/ssh_host_ed25519_key.pub"), encoding="utf-8") as stream:
            return " ".join(stream.read().split()[:2])

    def powered_off(self) -> dict[str, object]:
        """End the node at once."""
        changed = self.is_on()
        if changed and not self.module.check_mode:
            self.power_off()
        return {"changed": changed}

    def rebooted(self) -> dict[str, object]:
        """Reboot the node from inside."""
        if not self.is_on():
            self.fail("the node is off, so it cannot be rebooted; use state present")
        if self.module.check_mode:
            return {"changed": True}
        before = nspawn.leader(self.root)
        self.inside("systemctl", "reboot")
        result: dict[str, object] = {"changed": True}
        if self.params["wait"]:
            result["running"] = self.wait(not_leader=before)
        return result

    def absent(self) -> dict[str, object]:
        """Remove the node and everything it wrote."""
        changed = nspawn_end.there(self.folder)
        if changed and not self.module.check_mode:
            try:
                nspawn_end.remove(self.folder, self.quietly)
            except TimeoutError as error:
                self.fail(str(error))
        return {"changed": changed}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "waited_for", "absent", "rebooted", "powered_off"], "default": "present"},
            "state_dir": {"type": "path", "required": True},
            "root_file_system": {"type": "list", "elements": "path", "default": []},
            "address": {"type": "str", "default": ""},
            "address6": {"type": "str", "default": ""},
            "gateway": {"type": "str", "default": ""},
            "bridge": {"type": "str", "required": True},
            "devices": {"type": "list", "elements": "path", "default": []},
            "binds": {"type": "list", "elements": "path", "default": []},
            "environment": {"type": "dict", "default": {}},
            "memory": {"type": "str", "default": ""},
            "user": {"type": "str", "default": "ops"},
            "authorized_key": {"type": "str", "default": "", "no_log": False},
            "distribution": {"type": "str", "default": ""},
            "wait": {"type": "bool", "default": True},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    node = Node(module)
    if os.geteuid() != 0:
        node.fail("root is needed to boot nodes; run the play as root or with sudo")
    result = getattr(node, module.params["state"])()
    module.exit_json(machine=node.machine, **result)


if __name__ == "__main__":
    main()
