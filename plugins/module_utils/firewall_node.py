# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything the firewall module reads from and does to a node: files, commands, processes. The logic is elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from ansible_collections.onprem.torch.plugins.module_utils import firewall_files as files

Run = Callable[..., "tuple[int, str, str]"]
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
            with open(path, encoding="utf-8") as handle:
                return handle.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, content: str, mode: int) -> None:
        """Replace a file as one step; an existing file keeps its owner and mode."""
        folder = os.path.dirname(path)
        os.makedirs(folder, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".onprem-torch-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
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

    def jobs(self) -> dict[str, str]:
        """The jobs' files: path to text."""
        return {path: self.read(path) or "" for path in self.listing(files.JOBS_DIR) if path.endswith(".json")}

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
        """LoadState, ActiveState and UnitFileState of units, with one call. Empty without systemd."""
        names = list(names)
        if not os.path.isdir("/run/systemd/system"):
            return {}
        out = self.command(["systemctl", "show", "--property=Id,LoadState,ActiveState,UnitFileState", *names], check=False)
        found: dict[str, dict[str, str]] = {}
        for block, name in zip(out.strip().split("\n\n"), names):
            found[name] = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        return found

    def has_interface(self, name: str) -> bool:
        """Whether a network interface of this name exists."""
        return os.path.exists(f"/sys/class/net/{name}")

    def interfaces(self) -> list[str]:
        """The names of the network interfaces."""
        return sorted(os.listdir("/sys/class/net"))

    def management_ports(self) -> list[int]:
        """Ports on which sshd takes connections: those of its configuration, and that of the session we run in."""
        ports: set[int] = set()
        for path in ["/etc/ssh/sshd_config", *self.listing("/etc/ssh/sshd_config.d")]:
            for line in (self.read(path) or "").splitlines():
                words = re.split(r"[\s=]+", line.strip())
                if len(words) >= 2 and words[0].lower() == "port" and words[1].isdigit():
                    ports.add(int(words[1]))
                elif len(words) >= 2 and words[0].lower() == "listenaddress":
                    match = re.fullmatch(r"(?:\[[^\]]*\]|[^:\[\]]+):(\d+)", words[1])
                    if match:
                        ports.add(int(match.group(1)))
        connection = self._ssh_connection()
        if connection:
            ports.add(int(connection.split()[3]))
        return sorted(ports or {22})

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

    def legacy_iptables_drops(self) -> Optional[str]:
        """The rule or policy of legacy iptables that drops by default on the way in, None without one.

        Legacy rules are invisible to nft; the kernel says whether there are any.
        """
        for proc, program in (("/proc/net/ip_tables_names", "iptables-legacy"), ("/proc/net/ip6_tables_names", "ip6tables-legacy")):
            if "filter" not in (self.read(proc) or "").split() or not self.which(program):
                continue
            for line in self.command([program, "-S", "INPUT"], check=False).splitlines():
                if re.fullmatch(r"-P INPUT DROP|-A INPUT(?: -m comment --comment \S+)? -j (?:DROP|REJECT.*)", line):
                    return f"{program}: {line}"
        return None
