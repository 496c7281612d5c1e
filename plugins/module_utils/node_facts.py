# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node says of itself, read from files of the kernel and the distribution.

Every function takes ``root``, the folder that stands for ``/``, so that recorded trees are fixtures.
Nothing here writes, needs a driver or asks the network.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shlex
import socket
import struct
import subprocess
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import safe_files

TCP_LISTEN = "0A"  # net/tcp_states.h: TCP_LISTEN = 10
# For who holds the listening sockets: seconds in all, and descriptors of a process.
OWNER_SECONDS = 3.0
MOST_DESCRIPTORS = 4096


def read_text(path: str, default: str = "") -> str:
    """Return the text of a file, or ``default`` where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return default


def distribution(root: str = "/") -> dict[str, str]:
    """Return id, version, codename and name from os-release(5)."""
    fields: dict[str, str] = {}
    for line in read_text(os.path.join(root, "etc/os-release")).splitlines():
        key, separator, value = line.partition("=")
        if separator:
            fields[key] = unquoted(value)
    return {
        "id": fields.get("ID", ""),
        "version": fields.get("VERSION_ID", ""),
        "codename": fields.get("VERSION_CODENAME", ""),
        "name": fields.get("PRETTY_NAME", ""),
    }


def unquoted(value: str) -> str:
    """Return a value of os-release without its shell quotes; a value with a quote too few as it stands."""
    try:
        return " ".join(shlex.split(value))
    except ValueError:
        return value.strip("\"'")


def number(text: str) -> int:
    """Return a text as a number, 0 where it is none."""
    return int(text) if text.isdigit() else 0


def ephemeral_ports(root: str = "/") -> list[int]:
    """Return the first and last port that the kernel hands out (ip_local_port_range)."""
    words = read_text(os.path.join(root, "proc/sys/net/ipv4/ip_local_port_range"), "32768 60999").split()
    return [int(words[0]), int(words[1])]


def decode_address(text: str) -> tuple[str, int]:
    """Decode an ADDRESS:PORT of /proc/net/tcp or tcp6 (hexadecimal, 32-bit words in host order)."""
    address, port = text.split(":")
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)


def socket_owners(inodes: t.Collection[str], root: str = "/") -> dict[str, int]:
    """Return the processes that hold some socket inodes, as far as this user may see them and they are found in time.

    Any user may have many processes with many descriptors each, so the look ends with the last socket or after a while.
    """
    owners: dict[str, int] = {}
    deadline = time.monotonic() + OWNER_SECONDS
    wanted = set(inodes)
    for process in sorted(glob.glob(os.path.join(root, "proc/[0-9]*")), key=lambda path: int(os.path.basename(path))):
        with contextlib.suppress(OSError), os.scandir(os.path.join(process, "fd")) as entries:  # it may end while we look
            for _number, entry in zip(range(MOST_DESCRIPTORS), entries):
                target = os.readlink(entry.path)
                if target.startswith("socket:[") and target[8:-1] in wanted:
                    owners[target[8:-1]] = int(os.path.basename(process))
        if len(owners) == len(wanted) or time.monotonic() > deadline:
            break
    return owners


def unit_of(pid: int, root: str = "/") -> str:
    """Return the systemd service that holds a process, or an empty string."""
    match = re.search(r"/([^/]+\.service)(?:/|$)", read_text(os.path.join(root, f"proc/{pid}/cgroup")), re.M)
    return match.group(1) if match else ""


def listening(root: str = "/") -> list[dict[str, t.Any]]:
    """Return every listening TCP socket: port, address, and the process, command and unit that hold it."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in read_text(os.path.join(root, "proc/net", name)).splitlines()[1:]:
            words = line.split()
            if len(words) > 9 and words[3] == TCP_LISTEN:
                found.append((*decode_address(words[1]), words[9]))
    owners = socket_owners({inode for _address, _port, inode in found}, root) if found else {}
    sockets = []
    for address, port, inode in sorted(set(found), key=lambda item: (item[1], item[0])):
        pid = owners.get(inode, 0)
        sockets.append(
            {
                "address": address,
                "port": port,
                "pid": pid,
                "command": read_text(os.path.join(root, f"proc/{pid}/comm")).strip() if pid else "",
                "unit": unit_of(pid, root) if pid else "",
            }
        )
    return sockets


def nearest_folder(path: str, root: str = "/") -> str:
    """Return the folder in which ``path`` is, or would be, made: itself or the nearest one above that exists."""
    candidate = os.path.join(root, path.lstrip("/"))
    while not os.path.exists(candidate):
        candidate = os.path.dirname(candidate)
    return candidate


def free_bytes(path: str, root: str = "/") -> int:
    """Return the bytes that are free for root-owned folders where ``path`` is, or would be, made."""
    status = os.statvfs(nearest_folder(path, root))
    return status.f_bavail * status.f_frsize


def file_system(path: str, root: str = "/") -> int:
    """Return what tells the file system of a path from others."""
    return os.stat(nearest_folder(path, root)).st_dev


def version_text(path: str) -> str:
    """Return the text of a file of somebody's environment, empty where there is no such regular file of a sane size."""
    try:
        return safe_files.read_text(path, 1 << 20, links=True)
    except OSError:
        return ""


def torch_version(environment: str, root: str = "/") -> str:
    """Return the version of the torch that lies in an environment (or the distribution's), unimported."""
    pattern = os.path.join(root, environment.lstrip("/"), "lib/python3*/*-packages/torch/version.py")
    for path in sorted(glob.glob(pattern)):
        match = re.search(r"""^__version__\s*=\s*['"]([^'"]+)""", version_text(path), re.M)
        if match:
            return match.group(1)
    return ""


def torch_build(environment: str, root: str = "/") -> dict[str, str]:
    """Return the versions of CUDA and NCCL that an environment's torch uses, unimported; empty where it has none.

    NCCL's is that of NVIDIA's wheel beside it; a torch with an NCCL of its own inside does not tell.
    """
    folder = os.path.join(root, environment.lstrip("/"), "lib/python3*/*-packages")
    texts = [version_text(path) for path in sorted(glob.glob(os.path.join(folder, "torch/version.py")))]
    cuda = next(iter(re.findall(r"""^cuda\b[^=]*=\s*['"]([\d.]+)""", "\n".join(texts[:1]), re.M)), "")
    wheels = glob.glob(os.path.join(folder, "nvidia_nccl_cu*.dist-info"))
    nccl = [match.group(1) for match in (re.search(r"nvidia_nccl_cu\d+-([\d.]+)\.dist-info", path) for path in wheels) if match]
    return {"cuda": cuda, "nccl": nccl[0] if nccl and cuda else ""}


def machine(root: str = "/") -> dict[str, str]:
    """Return what tells a machine from others: the id of its installation and that of its kernel's boot."""
    return {
        "machine_id": read_text(os.path.join(root, "etc/machine-id")).strip(),
        "boot_id": read_text(os.path.join(root, "proc/sys/kernel/random/boot_id")).strip(),
    }


def same_machine(one: t.Mapping[str, t.Any], other: t.Mapping[str, t.Any], container: bool) -> bool:
    """Return whether a node is the machine that Ansible runs on.

    They share the id of the boot where Ansible runs on the node, or in a container on it. A node that is a container
    shares it with its host too, and is another machine unless it has the same installation.
    """
    return bool(one["boot_id"]) and one["boot_id"] == other["boot_id"] and (not container or one["machine_id"] == other["machine_id"])


def python_version(python: str) -> str:
    """Return the version that a Python executable reports, or an empty string."""
    try:
        command = [python, "-I", "-S", "-c", "import platform; print(platform.python_version())"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def parse_addresses(links: list[dict[str, t.Any]]) -> list[dict[str, t.Any]]:
    """Return the interfaces of ``ip -json address``: name, state, mtu, addresses with prefix, virtual or not.

    Link-local addresses are left out: they do not name a node to its peers.
    """
    interfaces = []
    for link in links:
        addresses = [
            f"{entry['local']}/{entry['prefixlen']}"
            for entry in link.get("addr_info", [])
            if entry.get("local") and entry.get("scope") != "link"
        ]
        interfaces.append(
            {
                "name": link.get("ifname", ""),
                "up": "UP" in link.get("flags", []),
                "loopback": "LOOPBACK" in link.get("flags", []),
                "mtu": link.get("mtu", 0),
                "addresses": addresses,
            }
        )
    return interfaces


def resolved_name(name: str) -> list[str]:
    """Return the addresses that the node's own name resolves to on the node."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def environments(root_folder: str, root: str = "/") -> list[str]:
    """Return the Python environments that lie in the folder ``environments`` of ``root_folder``."""
    if not root_folder:
        return []
    return sorted(glob.glob(os.path.join(root, root_folder.lstrip("/"), "environments/*/")))


def digest_of(path: str) -> str:
    """Return the start of the SHA-256 of a file, empty where it cannot be read."""
    text = read_text(path)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def jobs(root: str = "/") -> list[dict[str, t.Any]]:
    """Return our jobs on the node, from the section [X-OnpremTorch] of their units; active means: has processes."""
    found = []
    for path in sorted(glob.glob(os.path.join(root, "etc/systemd/system/torchrun-*.service"))):
        fields = dict(re.findall(r"^(\w+)=(.*)$", read_text(path).partition("[X-OnpremTorch]")[2], re.M))
        unit = os.path.basename(path)
        events = read_text(os.path.join(root, "sys/fs/cgroup/system.slice", unit, "cgroup.events"))
        found.append(
            {
                "job": fields.get("Job", ""),
                "unit": unit,
                "active": "populated 1" in events,
                "devices": fields.get("Devices", ""),
                "master_port": number(fields.get("MasterPort", "")),
                "supervisor_port": number(fields.get("SupervisorPort", "")),
            }
        )
    return found


def secret_ids(root: str = "/") -> dict[str, str]:
    """Return job → start of the SHA-256 of its secret. A job that is provisioned and was never started has no unit yet."""
    paths = glob.glob(os.path.join(root, "etc/torchrun/*.secret"))
    return {os.path.basename(path)[: -len(".secret")]: digest_of(path) for path in sorted(paths)}


def firewalls(root: str = "/") -> dict[str, list[str]]:
    """Return which of firewalld and ufw are installed, and which are active.

    The cgroup of firewalld's service exists while it runs; ufw is no process, its configuration says whether it is on.
    """
    programs = {"firewalld": "usr/sbin/firewalld", "ufw": "usr/sbin/ufw"}
    installed = [name for name, path in programs.items() if os.path.exists(os.path.join(root, path))]
    cgroups = ("sys/fs/cgroup/system.slice/firewalld.service", "sys/fs/cgroup/systemd/system.slice/firewalld.service")
    active = ["firewalld"] if any(os.path.isdir(os.path.join(root, path)) for path in cgroups) else []
    settings = read_text(os.path.join(root, "etc/ufw/ufw.conf"))
    if "ufw" in installed and any(line.strip().lower() == "enabled=yes" for line in settings.splitlines()):
        active.append("ufw")
    return {"installed": installed, "active": active}


def system_bus(root: str = "/") -> bool:
    """Return whether the system's D-Bus can be asked, as every systemctl does that is not root's."""
    return os.path.exists(os.path.join(root, "run/dbus/system_bus_socket"))
