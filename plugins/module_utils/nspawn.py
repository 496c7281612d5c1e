# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A systemd-nspawn node on this machine: its folders, its process, and how it is booted and lost.

The process table is the only record of what runs: a pid file could lie after a crash. A node is known by the folder of its
root file system, which no other lab has; names, bridges and subnets of labs may be the same.

    STATE_DIR/NAME/upper, work    what the node has written (overlay)
    STATE_DIR/NAME/root           the mounted root file system
    STATE_DIR/NAME/settings.json  what the running node was booted with
    STATE_DIR/NAME/console.log    its console
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import socket
import subprocess
import typing as t

# An interface name has at most 15 characters (linux/if.h, IFNAMSIZ); nspawn makes "vb-" + machine.
LONGEST_MACHINE = 11
# What a running node was booted with, in its folder.
SETTINGS_FILE = "settings.json"
# Services and timers that a node of a lab has no use for, and that would cost the shared CPUs.
MASKED_UNITS = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "man-db.timer",
    "console-getty.service",
    "getty@.service",
    "getty.target",
    "systemd-networkd-wait-online.service",
    "systemd-resolved.service",
)


class Machine(t.NamedTuple):
    """An nspawn process of a node, as its command line tells it."""

    pid: int
    name: str  # of the machine
    root: str  # folder of its root file system, without links
    bridge: str

    @property
    def node(self) -> str:
        """Name of the node."""
        return os.path.basename(os.path.dirname(self.root))

    @property
    def nodes(self) -> str:
        """Folder of all nodes of its lab."""
        return os.path.dirname(os.path.dirname(self.root))

    @property
    def kept(self) -> bool:
        """Whether its lab is still there: a checkout that was deleted leaves nothing but what is mounted."""
        return os.path.exists(os.path.join(os.path.dirname(self.root), SETTINGS_FILE))


def located(path: str) -> str:
    """Return a path whose folder has no links. A link that lies there itself is not followed: users write beside nodes."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def digest(folder: str) -> str:
    """Return what tells the lab of one folder from that of another."""
    return hashlib.sha256(located(folder).encode(errors="surrogateescape")).hexdigest()[:8]


def machine_name(name: str, nodes: str) -> str:
    """Return a name for nspawn that no other lab's node has, short enough for an interface.

    Args:
        name: name of the node.
        nodes: folder of all nodes of the lab.
    """
    return f"{name[:4].rstrip('-')}-{digest(os.path.join(nodes, name))[:6]}"


def machine_of(pid: int, words: t.Sequence[str]) -> Machine | None:
    """Return the node that a command line boots, None where it boots none."""
    if not words or os.path.basename(words[0]) != "systemd-nspawn":
        return None
    options = dict(word[2:].split("=", 1) for word in words[1:] if word.startswith("--") and "=" in word)
    if "machine" not in options or "directory" not in options:
        return None
    return Machine(pid, options["machine"], located(options["directory"]), options.get("network-bridge", ""))


def read_command(pid: int) -> list[str]:
    """Return the command line of a process, empty where it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return stream.read().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def machines() -> list[Machine]:
    """Return all nspawn processes of this machine, oldest first."""
    pids = sorted(int(path[6:]) for path in glob.glob("/proc/[0-9]*"))
    return [found for found in (machine_of(pid, read_command(pid)) for pid in pids) if found]


def processes(root: str) -> list[int]:
    """Return the nspawn processes on a root file system's folder, oldest first."""
    place = located(root)
    return [found.pid for found in machines() if found.root == place]


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
            return [int(word) for word in stream.read().split()]
    except OSError:
        return []


def leader(root: str) -> int:
    """Return the host's pid of the node's first process, 0 where the node is off."""
    for pid in processes(root):
        for child in children(pid):
            if os.path.basename((read_command(child) or [""])[0]) in ("systemd", "init"):
                return child
    return 0


def unified_systemd() -> bool:
    """Return whether systemd is PID 1 of this host and has one cgroup hierarchy; nspawn needs no help then."""
    return os.path.isdir("/run/systemd/system") and os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def nspawn_words(
    machine: str, name: str, directory: str, bridge: str, devices: t.Sequence[str], binds: t.Sequence[str], environment: t.Mapping[str, str]
) -> list[str]:
    """Return the command that boots a node."""
    words = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--link-journal=no"]
    words += ["--resolv-conf=copy-host", "--timezone=off", f"--machine={machine}", f"--hostname={name}"]
    words += [f"--directory={directory}", f"--network-bridge={bridge}"]
    words += [f"--bind={path}" for path in devices]
    if devices:
        # NVIDIA's libraries make device files that are missing, also those of GPUs that are another node's.
        words += ["--drop-capability=CAP_MKNOD"]
    words += [f"--bind-ro={path}" for path in binds]
    words += [f"--setenv={key}={value}" for key, value in sorted(environment.items())]
    return words


# nspawn ends with this status when the node asks for a reboot; its caller has to start it again (systemd-nspawn(1)).
REBOOT_STATUS = 133

# Folder of the labs' cgroups below each hierarchy.
GROUPS = "onprem-lab"

# nspawn wants a plain cgroup2 mount and an identity of the host; where PID 1 is no systemd both are made so that only this
# node sees them. nspawn enters a cgroup of its own, this shell stays outside: a cgroup with processes cannot hand
# controllers to its children. The limit of memory is that of all nodes of the lab; a machine without the controller, or
# one whose root cgroup does not hand it on, has none.
WITHOUT_SYSTEMD = f"""
node=$1 lab=$2 memory=$3
shift 3
old=/sys/fs/cgroup/memory/{GROUPS}/$lab
if [ "$memory" -gt 0 ] && [ -e /sys/fs/cgroup/memory/memory.limit_in_bytes ] && mkdir -p "$old"; then
    echo 1 >"$old/memory.use_hierarchy"
    echo "$memory" >"$old/memory.limit_in_bytes" && echo $$ >"$old/cgroup.procs"
fi 2>/dev/null
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup || exit 1
if [ ! -s /etc/machine-id ]; then
    id=$(mktemp) && tr -d - </proc/sys/kernel/random/uuid >"$id" || exit 1
    touch /etc/machine-id && mount --bind "$id" /etc/machine-id && rm "$id" || exit 1
fi
labs=/sys/fs/cgroup/{GROUPS}
group=$labs/$lab/$node
mkdir -p "$group" || exit 1
if [ "$memory" -gt 0 ] && grep -qw memory /sys/fs/cgroup/cgroup.controllers; then
    for parent in /sys/fs/cgroup "$labs" "$labs/$lab"; do echo +memory >"$parent/cgroup.subtree_control"; done
    echo "$memory" >"$labs/$lab/memory.max"
fi 2>/dev/null
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
while :; do
    /bin/sh -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$group" "$@"
    status=$?
    [ $status -eq {REBOOT_STATUS} ] || exit $status
done
"""


def unit_name(machine: str) -> str:
    """Return the unit of a node where systemd is PID 1 of this host."""
    return f"nspawn-{machine}.service"


def slice_name(lab: str) -> str:
    """Return the slice of a lab's nodes where systemd is PID 1 of this host. A dash would make it part of another one."""
    return f"onpremlab{lab}.slice"


def boot_words(machine: str, words: t.Sequence[str], console: str, lab: str = "alone", memory: int = 0) -> list[str]:
    """Return the command that starts nspawn, again after each reboot of the node, so that it outlives its caller.

    Args:
        machine: name of the machine.
        words: command of nspawn.
        console: file of the console.
        lab: what tells the lab from others (digest).
        memory: bytes that all nodes of the lab may use together; 0 for no limit.
    """
    if unified_systemd():
        properties = [f"{name}={REBOOT_STATUS}" for name in ("RestartForceExitStatus", "SuccessExitStatus")]
        # With nspawn the node ends at once, as if its plug had been pulled; its own systemd would not heed a SIGTERM.
        properties += ["Delegate=yes", "KillMode=mixed", f"StandardOutput=append:{console}", "StandardError=inherit"]
        options = [f"--slice={slice_name(lab)}", *(f"--property={entry}" for entry in properties)]
        return ["systemd-run", "--quiet", f"--unit={unit_name(machine)}", *options, "--collect", "--", *words]
    private = ["setsid", "unshare", "--mount", "--propagation", "private"]
    return [*private, "/bin/sh", "-c", WITHOUT_SYSTEMD, "boot", machine, lab, str(memory), *words]


def start(words: t.Sequence[str], console: str) -> None:
    """Start a process that outlives the module, with its output in a file."""
    with open(console, "wb") as stream:
        subprocess.Popen(  # pylint: disable=consider-using-with
            words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, close_fds=True, cwd="/", start_new_session=True
        )


def network_file(address: str, address6: str, gateway: str) -> str:
    """Return the text of the node's .network file."""
    lines = ["[Match]", "Name=host0", "[Network]", f"Address={address}"]
    if address6:
        lines += [f"Address={address6}"]
    if gateway:
        lines += [f"Gateway={gateway}"]
    return "\n".join([*lines, "LinkLocalAddressing=ipv6", "IPv6AcceptRA=no", ""])


def answers_ssh(address: str, timeout: float = 1.0) -> bool:
    """Return whether an SSH server greets on port 22 of an address."""
    try:
        with socket.create_connection((address, 22), timeout=timeout) as connection:
            connection.settimeout(timeout)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def mounted(path: str) -> bool:
    """Return whether something is mounted on a path."""
    with open("/proc/self/mountinfo", encoding="utf-8") as stream:
        return any(line.split()[4].replace("\\040", " ") == path for line in stream)


def mounts_below(folder: str, mountinfo: str) -> list[str]:
    """Return what is mounted on a folder or below it, the deepest first.

    Args:
        folder: path without links.
        mountinfo: text of /proc/self/mountinfo.
    """
    points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in mountinfo.splitlines()]
    return sorted((point for point in points if f"{point}/".startswith(f"{folder}/")), key=len, reverse=True)


def memory_bytes(value: str, total: int) -> int:
    """Return a limit of memory in bytes, 0 for none.

    Args:
        value: share of the memory as in 80%, or bytes, with K, M, G or T for powers of 1024; empty for none.
        total: memory of this machine in bytes.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d{1,15})([KMGT%]?)", value)
    if not value:
        return 0
    if not found or not int(found[1]) or (found[2] == "%" and int(found[1]) > 100):
        raise ValueError(f"{value!r} is no amount of memory")
    number, unit = int(found[1]), found[2]
    return total * number // 100 if unit == "%" else number * 1024 ** " KMGT".index(unit or " ")


def machine_memory() -> int:
    """Return the bytes of memory that this machine may use: its own, or those of the container that it is."""
    with open("/proc/meminfo", encoding="ascii") as stream:
        found = [int(stream.readline().split()[1]) * 1024]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as stream:
                found.append(int(stream.read()))
        except (OSError, ValueError):
            continue
    return min(found)


def account(lowers: t.Sequence[str], user: str) -> tuple[int, int, str]:
    """Return uid, gid and home of a user in the root file system's layers.

    Raises:
        KeyError: no layer has the user.
    """
    for lower in lowers:
        try:
            with open(os.path.join(lower, "etc/passwd"), encoding="utf-8") as stream:
                for line in stream:
                    fields = line.strip().split(":")
                    if fields[0] == user:
                        return int(fields[2]), int(fields[3]), fields[5]
        except OSError:
            continue
    raise KeyError(user)
