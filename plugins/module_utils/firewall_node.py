# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything the firewall module reads from and does to a node: files, commands, processes. The logic is elsewhere."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils import firewall_files as files
from ansible_collections.onprem.torch.plugins.module_utils import firewall_firewalld as firewalld
from ansible_collections.onprem.torch.plugins.module_utils import firewall_iptables as iptables
from ansible_collections.onprem.torch.plugins.module_utils import firewall_ufw as ufw
from ansible_collections.onprem.torch.plugins.module_utils.firewall_sets import OUR_SET, normal

Run = Callable[..., "tuple[int, str, str]"]
SSH_SOCKETS = ("ssh.socket", "sshd.socket")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


class NodeError(Exception):
    """A command of the node failed; the text is one sentence."""


class Node:
    """The node that the module runs on."""

    def __init__(self, run: Run) -> None:
        """run: AnsibleModule.run_command, or a function like it."""
        self._run = run

    def which(self, name: str) -> Optional[str]:
        """The path of a program, also of those in sbin."""
        return shutil.which(name, path=_SBIN)

    def command(self, args: Sequence[str], data: Optional[str] = None, check: bool = True) -> str:
        """Run a program and return what it wrote. Raises NodeError when it fails and `check` is set."""
        program = self.which(args[0]) or args[0]
        code, out, err = self._run([program, *args[1:]], data=data, binary_data=True, environ_update={"LC_ALL": "C"})
        if code and check:
            detail = " ".join((err or out).split())[:500]
            raise NodeError(f"`{' '.join(args)}` failed with code {code}: {detail}")
        return out

    def read(self, path: str) -> Optional[str]:
        """A file's text, None where there is none."""
        try:
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as handle:
                return handle.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, content: str, mode: int) -> None:
        """Replace a file as one step; an existing file keeps its owner and mode."""
        folder = os.path.dirname(path)
        os.makedirs(folder, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".onprem-torch-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
                stream.write(content)
            try:
                status = os.stat(path)
                os.chown(temporary, status.st_uid, status.st_gid)
                os.chmod(temporary, status.st_mode & 0o7777)
            except FileNotFoundError:
                os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def remove(self, path: str) -> None:
        """Remove a file, and its folder where that is ours and empty now."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        folder = os.path.dirname(path)
        for candidate in (folder, os.path.dirname(folder)):
            if "onprem.torch" in candidate or candidate.endswith("nftables.service.d"):
                try:
                    os.rmdir(candidate)
                except OSError:
                    break

    def listing(self, folder: str) -> list[str]:
        """Full paths of the files in a folder, sorted; none where it does not exist."""
        try:
            return sorted(os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def ruleset(self) -> list[Mapping[str, Any]]:
        """The live nftables ruleset. Raises NodeError."""
        return list(json.loads(self.command(["nft", "-j", "list", "ruleset"]))["nftables"])

    def kernel_range(self) -> tuple[int, int]:
        """The kernel's ephemeral ports (first, last)."""
        first, last = (int(part) for part in (self.read(files.RANGE_SYSCTL) or "32768 60999").split())
        return first, last

    def set_kernel_range(self, first: int, last: int) -> None:
        """Set the kernel's ephemeral ports."""
        with open(files.RANGE_SYSCTL, "w", encoding="ascii") as handle:
            handle.write(f"{first} {last}\n")

    def units(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """LoadState, ActiveState, UnitFileState and, of sockets, Listen of units, with one call. Empty without systemd."""
        names = list(names)
        if not os.path.isdir("/run/systemd/system"):
            return {}
        out = self.command(["systemctl", "show", "--property=Id,LoadState,ActiveState,UnitFileState,Listen", *names], check=False)
        found: dict[str, dict[str, str]] = {}
        for block, name in zip(out.strip().split("\n\n"), names):
            found[name] = {}
            for line in block.splitlines():
                key, _equals, value = line.partition("=")
                found[name][key] = f"{found[name][key]}\n{value}" if key in found[name] else value  # Listen comes once for each address
        return found

    def has_interface(self, name: str) -> bool:
        """Whether a network interface of this name exists."""
        return os.path.exists(f"/sys/class/net/{name}")

    def interfaces(self) -> list[str]:
        """The names of the network interfaces."""
        return sorted(os.listdir("/sys/class/net"))

    def management_ports(self, units: Mapping[str, Mapping[str, str]]) -> list[int]:
        """Ports on which sshd takes connections: those of its configuration and its sockets, and that of the session we run in.

        units: what `units` says of SSH_SOCKETS.
        """
        ports = self._sshd_ports("/etc/ssh/sshd_config", 0)
        for name in SSH_SOCKETS:
            if units.get(name, {}).get("ActiveState") == "active":
                ports |= {int(port) for port in re.findall(r":(\d+) \(Stream\)", units[name].get("Listen", ""))}
        connection = self._ssh_connection()
        if connection:
            ports.add(int(connection.split()[3]))
        return sorted(ports or {22})

    def _sshd_ports(self, path: str, depth: int) -> set[int]:
        """The ports that a file of sshd's configuration, and those that it includes, name."""
        ports: set[int] = set()
        for line in (self.read(path) or "").splitlines():
            words = re.split(r"[\s=]+", line.strip().replace('"', ""))
            keyword = words[0].lower()
            if keyword == "include" and depth < 8:
                for pattern in words[1:]:
                    for included in sorted(glob.glob(os.path.join("/etc/ssh", pattern))):
                        ports |= self._sshd_ports(included, depth + 1)
            elif keyword == "port" and len(words) >= 2 and words[1].isdigit():
                ports.add(int(words[1]))
            elif keyword == "listenaddress" and len(words) >= 2:
                match = re.fullmatch(r"(?:\[[^\]]*\]|[^:\[\]]+):(\d+)", words[1])
                if match:
                    ports.add(int(match.group(1)))
        return ports

    def _ssh_connection(self) -> Optional[str]:
        """SSH_CONNECTION of the session we run in; sudo takes it out of our own environment, so ask the ancestors."""
        pid = os.getpid()
        for _step in range(32):
            try:
                with open(f"/proc/{pid}/environ", "rb") as handle:
                    for entry in handle.read().split(b"\0"):
                        if entry.startswith(b"SSH_CONNECTION="):
                            value = entry.split(b"=", 1)[1].decode()
                            return value if re.fullmatch(r"\S+ \d+ \S+ \d+", value) else None
                with open(f"/proc/{pid}/stat", "rb") as handle:
                    pid = int(handle.read().rsplit(b")", 1)[1].split()[1])
            except (OSError, ValueError, IndexError):
                return None
            if pid <= 1:
                return None
        return None

    def iptables_legacy(self) -> list[Mapping[str, Any]]:
        """The rules of legacy iptables in nft's form, empty without any. They are invisible to nft; the kernel says whether there are."""
        found: list[Mapping[str, Any]] = []
        for version, proc, program in ((4, "/proc/net/ip_tables_names", "iptables-legacy"), (6, "/proc/net/ip6_tables_names", "ip6tables-legacy")):
            if "filter" in (self.read(proc) or "").split() and self.which(program):
                found += iptables.items(self.command([program, "-S"], check=False), version, iptables.LEGACY)
        return found

    def iptables_nft(self, ruleset: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The ruleset with the tables of iptables-nft as iptables shows them, where nft does not show all of them."""
        programs = {4: "iptables-nft", 6: "ip6tables-nft"}
        versions = [version for version in iptables.hidden_from_nft(ruleset) if self.which(programs[version])]
        shown = {version: self.command([programs[version], "-S"], check=False) for version in versions}
        return iptables.replaced(ruleset, {version: text for version, text in shown.items() if text.strip()})

    def bus(self, interface: str, method: str, *arguments: str, path: str = firewalld.BUS_PATH) -> Any:
        """The answer of firewalld to a call over D-Bus. Raises NodeError.

        busctl takes milliseconds, firewall-cmd a sixth of a second each time.
        """
        out = self.command(["busctl", "--json=short", "call", firewalld.BUS, path, firewalld.BUS + interface, method, *arguments])
        values = json.loads(out)["data"] if out.strip() else []
        return _plain(values[0]) if values else None

    def bus_property(self, interface: str, name: str, path: str = firewalld.BUS_PATH) -> str:
        """A property of firewalld's, empty where this release has none of the name."""
        out = self.command(["busctl", "--json=short", "get-property", firewalld.BUS, path, firewalld.BUS + interface, name], check=False)
        try:
            return str(json.loads(out)["data"])
        except (ValueError, KeyError):
            return ""

    def firewalld(self) -> firewalld.Live:
        """What firewalld says of itself and of our things. Raises NodeError."""
        numbers = re.findall(r"\d+", self.bus_property("", "version"))
        live = firewalld.Live(version=(int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else (0, 0))
        live.backend = self.bus_property(".config", "FirewallBackend", path=firewalld.BUS_PATH + "/config") or "nftables"
        if firewalld.POLICY in self.bus(".policy", "getPolicies"):
            settings = self.bus(".policy", "getPolicySettings", "s", firewalld.POLICY)
            live.rules = frozenset(settings.get("rich_rules", []))
        for name in self.bus(".ipset", "getIPSets"):
            if OUR_SET.fullmatch(name):
                _version, _short, _description, live.kinds[name], _options, entries = self.bus(".ipset", "getIPSetSettings", "s", name)
                live.sets[name] = normal(entries)
        return live

    def lost_by_reload(self) -> list[list[str]]:
        """Commands that bring back what firewalld forgets in a reload. Raises NodeError."""
        config = firewalld.BUS_PATH + "/config"
        direct = [self.bus(".direct", method) for method in ("getAllChains", "getAllRules", "getAllPassthroughs")]
        if [sorted(rows, key=str) for rows in direct] != [sorted(rows, key=str) for rows in self.bus(".config.direct", "getSettings", path=config)]:
            raise NodeError(
                "firewalld holds direct rules that are not permanent, and the reload that a change needs would drop them; "
                "keep them with `firewall-cmd --runtime-to-permanent`, or remove them."
            )
        zones = self._now_and_permanent("zone", "getZones", "getZoneSettings2", "getZoneNames", "getZoneByName", "getSettings2")
        policies = self._now_and_permanent("policy", "getPolicies", "getPolicySettings", "getPolicyNames", "getPolicyByName", "getSettings")
        services = {name: self._service_now_and_permanent(name) for name in firewalld.used_services(zones, policies)}
        waiting = firewalld.loaded_by_reload("zone", zones) + firewalld.loaded_by_reload("policy", policies) + firewalld.changed_by_reload(services)
        if waiting:
            raise NodeError(
                f"firewalld's permanent configuration holds what is not loaded yet ({', '.join(waiting)}), and the reload that a change needs would "
                "load it; do so yourself with `firewall-cmd --reload`, or remove it."
            )
        ipsets: dict[str, tuple[Iterable[str], Iterable[str]]] = {}
        kept = set(self.bus(".config", "getIPSetNames", path=config))
        for name in self.bus(".ipset", "getIPSets"):
            if name in kept and not OUR_SET.fullmatch(name):
                path = self.bus(".config", "getIPSetByName", "s", name, path=config)
                ipsets[name] = (self.bus(".ipset", "getEntries", "s", name), self.bus(".config.ipset", "getEntries", path=path))
        return firewalld.lost_by_reload(zones, policies, ipsets)

    def _service_now_and_permanent(self, name: str) -> firewalld.Both:
        """What a service stands for, as it is and as it is kept; None where there is none, as after its file was removed."""
        config = firewalld.BUS_PATH + "/config"
        now = self.bus("", "getServiceSettings2", "s", name) if name in self.bus("", "listServices") else None
        if name not in self.bus(".config", "getServiceNames", path=config):
            return now, None
        return now, self.bus(".config.service", "getSettings2", path=self.bus(".config", "getServiceByName", "s", name, path=config))

    def _now_and_permanent(self, kind: str, names: str, settings: str, kept_names: str, by_name: str, kept_settings: str) -> dict[str, firewalld.Both]:
        """All zones' or policies' settings, as they are and as they are kept; the arguments are firewalld's words for asking."""
        config = firewalld.BUS_PATH + "/config"
        kept = {
            name: self.bus(f".config.{kind}", kept_settings, path=self.bus(".config", by_name, "s", name, path=config))
            for name in self.bus(".config", kept_names, path=config)
        }
        live = {name: self.bus(f".{kind}", settings, "s", name) for name in self.bus(f".{kind}", names)}
        return {name: (live.get(name), kept.get(name)) for name in {*live, *kept}}

    def ufw(self, enabled: bool) -> ufw.Live:
        """What the kernel holds of our rules in ufw's chains, and of our ipsets."""
        live = ufw.Live()
        if enabled:
            six = ufw.manages_ipv6(self.read(ufw.SETTINGS) or "")
            for version in (4, 6) if six else (4,):
                out = self.command([ufw.PROGRAMS[version], "-S", ufw.CHAINS[version]], check=False)
                live.rules[version] = ufw.comments(out) if out.strip() else None
        if self.which("ipset"):
            live.sets = {name: value for name, value in ufw.parse_ipsets(self.command(["ipset", "save"], check=False)).items() if OUR_SET.fullmatch(name)}
        return live


def _plain(value: Any) -> Any:
    """busctl's JSON without its type tags."""
    if isinstance(value, dict):
        if set(value) == {"type", "data"}:
            return _plain(value["data"])
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
