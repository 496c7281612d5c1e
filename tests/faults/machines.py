# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Booted systemd nodes on one host, with a hand on their power and their cable.

Needs root, systemd-nspawn, iproute2, nftables and mmdebstrap. Everything made here is removed by close().
"""
from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import time

BRIDGE, SUBNET = "onpremS0", "198.18.32"
PACKAGES = ("systemd,systemd-sysv,dbus,openssh-server,python3,python3-venv,python3-apt,sudo,iproute2,nftables,"
            "ca-certificates,iputils-ping,procps")
BOOT = """
if mountpoint -q /sys/fs/cgroup; then umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; fi
mkdir -p "/sys/fs/cgroup/faults/$2"
echo $$ >"/sys/fs/cgroup/faults/$2/cgroup.procs"
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
while :; do     # 133: the node has asked for a reboot
  systemd-nspawn --quiet --register=no --keep-unit --boot --link-journal=no --resolv-conf=copy-host \
    --directory="$1/root" --network-bridge="$3" --machine="$2" --bind-ro="$4"
  [ $? = 133 ] || break
done
"""


def run(*words, check=True, **options):
    """A command on the host; its output."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


class Machine:
    """One node: a root file system of its own, an address, a power switch."""

    def __init__(self, hall, number):
        self.hall, self.name = hall, f"fault{number + 1}"
        self.address = f"{SUBNET}.{number + 11}"
        self.folder = hall.folder / self.name
        self.process = None

    def boot(self):
        """Power on; returns when SSH answers."""
        for part in ("upper/etc/systemd/network", "upper/root/.ssh", "work", "root"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        upper = self.folder / "upper"
        (upper / "etc/hostname").write_text(self.name + "\n")
        (upper / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (upper / "etc/systemd/network/10-host0.network").write_text(
            f"[Match]\nName=host0\n[Network]\nAddress={self.address}/24\nGateway={SUBNET}.1\nLinkLocalAddressing=no\n")
        (upper / "root/.ssh").chmod(0o700)
        shutil.copy(self.hall.key.with_suffix(".pub"), upper / "root/.ssh/authorized_keys")
        if not os.path.ismount(self.folder / "root"):
            run("mount", "-t", "overlay", "overlay", "-o",
                f"lowerdir={self.hall.base},upperdir={upper},workdir={self.folder}/work", str(self.folder / "root"))
        deadline = time.monotonic() + 10
        while os.path.exists(f"/sys/class/net/vb-{self.name}") and time.monotonic() < deadline:
            time.sleep(0.1)
        log = open(self.folder / "console.log", "ab")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", BOOT, "boot", str(self.folder), self.name,
             BRIDGE, str(self.hall.environment)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.wait_up()

    def wait_up(self, seconds=60):
        """Until systemd has finished starting and SSH answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.leader() and self.shell("systemctl is-active ssh multi-user.target | sort -u", check=False).strip() == "active":
                return
            time.sleep(0.3)
        raise RuntimeError(f"{self.name} did not come up:\n{(self.folder / 'console.log').read_text()[-2000:]}")

    def container(self):
        """The process id of systemd-nspawn."""
        if not self.process:
            return 0
        children = run("pgrep", "-P", str(self.process.pid), "systemd-nspawn", check=False).split()
        return int(children[0]) if children else 0

    def leader(self):
        """The host's id of the node's PID 1."""
        found = run("pgrep", "-P", str(self.container() or 1), "-x", "systemd", check=False).split() if self.container() else []
        return int(found[0]) if found else 0

    def shell(self, command, check=True, timeout=60):
        """A command as root inside, without the network."""
        leader = self.leader()
        if not leader:
            raise RuntimeError(f"{self.name} is off")
        return run("nsenter", "--target", str(leader), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--",
                   "/bin/sh", "-c", command, check=check, timeout=timeout)

    def power_off(self):
        """Pull the plug: everything inside dies at once, nothing says goodbye."""
        if not self.process:
            return
        container = self.container()
        os.kill(self.process.pid, signal.SIGKILL)       # the loop, so that it does not boot again
        if container:
            run("ip", "link", "del", f"vb-{self.name}", check=False)    # the cable first: no TCP reset gets out
            os.kill(container, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def reboot(self):
        """systemctl reboot inside; returns when the node is back."""
        before = self.shell("cat /proc/sys/kernel/random/boot_id; stat -c %Y /proc/1 2>/dev/null", check=False)
        leader = self.leader()
        self.shell("systemctl reboot", check=False)
        deadline = time.monotonic() + 120
        while self.leader() in (0, leader):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not reboot {before}")
            time.sleep(0.2)
        self.wait_up()

    def cable(self, plugged):
        """Pull or plug the training cable; the node itself stays up."""
        run("ip", "link", "set", f"vb-{self.name}", "up" if plugged else "down")

    def pids(self, pattern):
        """Ids inside the node of processes whose command line matches."""
        return [int(word) for word in self.shell(f"pgrep -f '{pattern}' || true").split()]

    def close(self):
        self.power_off()
        time.sleep(0.2)
        run("umount", "-l", str(self.folder / "root"), check=False)


class Hall:
    """A bridge and the machines on it."""

    def __init__(self, folder, environment, count=4):
        self.folder, self.environment = pathlib.Path(folder), pathlib.Path(environment)
        self.base, self.key = self.folder / "base", self.folder / "key"
        self.machines = [Machine(self, number) for number in range(count)]

    def open(self):
        """Base file system, bridge, all machines."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        if not self.base.exists():
            partial = self.folder / "base.partial"
            shutil.rmtree(partial, ignore_errors=True)
            run("mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(partial))
            (partial / "etc/machine-id").write_text("")
            wants = partial / "etc/systemd/system/multi-user.target.wants"
            wants.mkdir(parents=True, exist_ok=True)
            (wants / "systemd-networkd.service").symlink_to("/usr/lib/systemd/system/systemd-networkd.service")
            partial.rename(self.base)
        if not os.path.exists(f"/sys/class/net/{BRIDGE}"):
            run("ip", "link", "add", BRIDGE, "type", "bridge")
            run("ip", "address", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
            run("ip", "link", "set", BRIDGE, "up")
        for machine in self.machines:
            machine.boot()

    def close(self):
        for machine in self.machines:
            machine.close()
        run("ip", "link", "del", BRIDGE, check=False)
        for machine in self.machines:
            shutil.rmtree(machine.folder, ignore_errors=True)
