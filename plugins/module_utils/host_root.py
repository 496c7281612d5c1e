# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The root file system of the machine itself as the lower layer of nodes: what has to lie above it, and what beside it.

The machine may have no systemd, no SSH and no iproute2. Debian packages that lie in a folder are unpacked into a layer
above the machine's files, with accounts, units and settings that make it boot. Nothing of the machine is changed.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import typing as t

# Folders of the machine that nodes must not see: its units, its network, its keys, its logs.
HIDDEN = ("etc/systemd", "usr/lib/systemd", "etc/ssh", "etc/netplan", "etc/network", "var/log", "var/lib/systemd")
# What packages hold for people only.
DOCUMENTATION = ("usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/lintian/", "usr/share/bash-completion/")
# Before /usr was merged, packages had these at the top.
MERGED = ("bin", "sbin", "lib", "lib64")
# Programs that the machine needs to carry nodes.
PROGRAMS = ("ip", "tc", "bridge", "nft", "ssh", "scp", "sftp", "ssh-keygen", "systemd-nspawn")
ENABLED = {
    "multi-user.target.wants": ("ssh.service", "systemd-networkd.service"),
    "sockets.target.wants": ("systemd-networkd.socket",),
}
SYSTEM_ACCOUNTS = ("messagebus", "sshd", "systemd-network")
SYSTEM_GROUPS = ("systemd-journal",)
SSHD = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin no
PasswordAuthentication no
UsePAM yes
UseDNS no
Subsystem sftp /usr/lib/openssh/sftp-server
"""
CONTROL_DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
LIBRARY = re.compile(r"lib[^/]*\.so\.\d+$")


class Account(t.NamedTuple):
    """Lines that add a user or a group to the account files."""

    passwd: str
    group: str
    shadow: str


def merged(path: str) -> str:
    """Return the path of a package's member on a file system with merged /usr, relative to its root."""
    path = path.lstrip("./")
    top, _slash, _rest = path.partition("/")
    return f"usr/{path}" if top in MERGED else path


def wanted_members(names: t.Sequence[str], present: t.Callable[[str], bool]) -> list[str]:
    """Return the members of a package that are unpacked.

    A library that the machine has already is left out: its own programs may need what only its own version has.

    Args:
        names: the members' paths on a file system with merged /usr.
        present: whether the machine has a path.
    """
    libraries = [name for name in names if LIBRARY.search(name)]
    has_them = any(present(name) for name in libraries)
    wanted = []
    for name in names:
        if name.startswith(DOCUMENTATION):
            continue
        if has_them and re.search(r"/lib[^/]*\.so(\.[\d.]+)?$", name):
            continue
        wanted.append(name)
    return wanted


def identifiers(text: str) -> set[int]:
    """Return the numbers of a passwd(5) or group(5) file."""
    return {int(fields[2]) for fields in (line.split(":") for line in text.splitlines()) if len(fields) > 3 and fields[2].isdigit()}


def names_of(text: str) -> set[str]:
    """Return the names of a passwd(5), group(5) or shadow(5) file."""
    return {line.split(":")[0] for line in text.splitlines() if ":" in line}


def free(taken: set[int], numbers: t.Iterable[int]) -> int:
    """Return the first number that is not taken, and take it.

    Raises:
        ValueError: all are taken.
    """
    for number in numbers:
        if number not in taken:
            taken.add(number)
            return number
    raise ValueError("there is no free number for an account")


def accounts(passwd: str, group: str, shadow: str, user: str) -> Account:
    """Return the account files with the accounts that a node needs beside those of the machine.

    Args:
        passwd: text of /etc/passwd.
        group: text of /etc/group.
        shadow: text of /etc/shadow.
        user: who may log in and use sudo.
    """
    taken = identifiers(passwd) | identifiers(group)
    texts = {"passwd": passwd, "group": group, "shadow": shadow}

    def add(which: str, name: str, line: str) -> None:
        if name not in names_of(texts[which]):
            separator = "\n" if texts[which] and not texts[which].endswith("\n") else ""
            texts[which] += f"{separator}{line}\n"

    for name in SYSTEM_GROUPS:
        add("group", name, f"{name}:x:{free(taken, range(999, 100, -1))}:")
    for name in (*SYSTEM_ACCOUNTS, user):
        if name in names_of(texts["passwd"]):
            continue
        number = free(taken, range(2000, 60000) if name == user else range(999, 100, -1))
        group_number = next((int(line.split(":")[2]) for line in texts["group"].splitlines() if line.startswith(f"{name}:")), number)
        home, shell = (f"/home/{name}", "/bin/bash") if name == user else ("/nonexistent", "/usr/sbin/nologin")
        add("group", name, f"{name}:x:{number}:")
        add("passwd", name, f"{name}:x:{number}:{group_number}::{home}:{shell}")
        add("shadow", name, f"{name}:*:20000:0:99999:7:::")
    return Account(texts["passwd"], texts["group"], texts["shadow"])


def mount_points(mountinfo: str) -> list[str]:
    """Return the mount points of /proc/self/mountinfo, the longest first."""
    found = {line.split()[4].replace("\\040", " ") for line in mountinfo.splitlines() if len(line.split()) > 4}
    return sorted(found, key=lambda path: (-len(path), path))


def binds(mountinfo: str, paths: t.Iterable[str]) -> list[str]:
    """Return the mounts that nodes need beside the root file system, since an overlay does not see what is mounted on it.

    Args:
        mountinfo: text of /proc/self/mountinfo.
        paths: real paths that nodes must see.
    """
    points = mount_points(mountinfo)
    needed = set()
    for path in paths:
        point = next((point for point in points if path == point or path.startswith(point.rstrip("/") + "/")), "/")
        needed.add(point)
    # Container engines mount the driver's files one by one.
    needed |= {point for point in points if re.match(r"/usr/.*(nvidia|libcuda)", point)}
    needed.discard("/")
    return sorted(point for point in needed if not any(point.startswith(f"{other}/") for other in needed))


def gpu_files(root: str = "/") -> list[str]:
    """Return the device files of the machine's NVIDIA GPUs, by number."""
    found = [path for path in glob.glob(os.path.join(root, "dev/nvidia[0-9]*")) if re.search(r"nvidia\d+$", path)]
    return sorted(found, key=lambda path: int(re.sub(r".*\D", "", path)))


def share(devices: t.Sequence[str], nodes: int, index: int) -> list[str]:
    """Return the devices of one of several nodes: as many for each, or one that several nodes share where there are more nodes.

    Args:
        devices: device files, in order.
        nodes: how many nodes share them.
        index: which node, from 0.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    if devices and nodes > len(devices) and nodes % len(devices) == 0:
        return [devices[index * len(devices) // nodes]]
    if nodes < 1 or len(devices) % nodes:
        raise ValueError(f"{len(devices)} GPUs cannot be divided evenly among {nodes} nodes")
    each = len(devices) // nodes
    return list(devices[index * each : (index + 1) * each])


def library_folders(layer: str, triplet: str) -> str:
    """Return LD_LIBRARY_PATH for the layer's programs when they run on the machine itself."""
    return ":".join(os.path.join(layer, path) for path in (f"usr/lib/{triplet}", f"usr/lib/{triplet}/systemd", "usr/lib/systemd"))


def wrapper(program: str, layer: str, triplet: str) -> str:
    """Return a shell script that runs a program of the layer on the machine itself."""
    folders = library_folders(layer, triplet)
    return f'#!/bin/sh\nexec env LD_LIBRARY_PATH="{folders}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}" "{program}" "$@"\n'


def program_in(layer: str, name: str) -> str:
    """Return the path of a program in the layer, an empty text where it has none."""
    for folder in ("usr/bin", "usr/sbin"):
        path = os.path.join(layer, folder, name)
        if os.path.isfile(path) and os.stat(path).st_mode & stat.S_IXUSR:
            return path
    return ""


def loaded_paths(maps: str, names: t.Sequence[str]) -> list[str]:
    """Return the files of shared libraries that a process has loaded, from /proc/PID/maps."""
    found = {line.split(None, 5)[5] for line in maps.splitlines() if len(line.split(None, 5)) == 6}
    return sorted(path for path in found if any(os.path.basename(path).startswith(name) for name in names))
