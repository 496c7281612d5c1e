# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A systemd-nspawn node on this machine: its folders, its process, and how it is booted and lost.

The process table is the only record of what runs: a pid file could lie after a crash.

    STATE_DIR/NAME/upper, work    what the node has written (overlay)
    STATE_DIR/NAME/root           the mounted root file system
    STATE_DIR/NAME/settings.json  what the running node was booted with
    STATE_DIR/NAME/console.log    its console
"""

from __future__ import annotations

import glob
import hashlib
import os
import socket
import subprocess
import typing as t

# An interface name has at most 15 characters (linux/if.h, IFNAMSIZ); nspawn makes "vb-" + machine.
LONGEST_MACHINE = 11
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


def machine_name(name: str, bridge: str) -> str:
    """Return a name for nspawn that is unique beside other labs and short enough for an interface."""
    digest = hashlib.sha256(f"{bridge}/{name}".encode()).hexdigest()
    short = f"{name}-{digest[:2]}"
    return short if len(short) <= LONGEST_MACHINE else f"{name[:4].rstrip('-')}-{digest[:6]}"


def read_command(pid: int) -> list[str]:
    """Return the command line of a process, empty where it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return stream.read().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def processes(machine: str, directory: str) -> list[int]:
    """Return the nspawn processes of a machine on a directory, oldest first."""
    found = []
    for path in glob.glob("/proc/[0-9]*"):
        pid = int(path[6:])
        words = read_command(pid)
        if words and os.path.basename(words[0]) == "systemd-nspawn" and f"--machine={machine}" in words:
            if f"--directory={directory}" in words:
                found.append(pid)
    return sorted(found)


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
            return [int(word) for word in stream.read().split()]
    except OSError:
        return []


def leader(machine: str, directory: str) -> int:
    """Return the host's pid of the node's first process, 0 where the node is off."""
    for pid in processes(machine, directory):
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

# nspawn wants a plain cgroup2 mount and an identity of the host; where PID 1 is no systemd both are made so that only this
# node sees them. nspawn enters a cgroup of its own, this shell stays outside: a cgroup with processes cannot hand
# controllers to its children.
WITHOUT_SYSTEMD = f"""
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup || exit 1
if [ ! -s /etc/machine-id ]; then
    id=$(mktemp) && tr -d - </proc/sys/kernel/random/uuid >"$id" || exit 1
    touch /etc/machine-id && mount --bind "$id" /etc/machine-id && rm "$id" || exit 1
fi
group=/sys/fs/cgroup/onprem-lab/$1
mkdir -p "$group" || exit 1
shift
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


def boot_words(machine: str, words: t.Sequence[str], console: str) -> list[str]:
    """Return the command that starts nspawn, again after each reboot of the node, so that it outlives its caller."""
    if unified_systemd():
        properties = [f"{name}={REBOOT_STATUS}" for name in ("RestartForceExitStatus", "SuccessExitStatus")]
        # With nspawn the node ends at once, as if its plug had been pulled; its own systemd would not heed a SIGTERM.
        properties += ["Delegate=yes", "KillMode=mixed", f"StandardOutput=append:{console}", "StandardError=inherit"]
        options = [f"--property={entry}" for entry in properties]
        return ["systemd-run", "--quiet", f"--unit={unit_name(machine)}", *options, "--collect", "--", *words]
    return ["setsid", "unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", WITHOUT_SYSTEMD, "boot", machine, *words]


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
