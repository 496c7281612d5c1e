"""A virtual machine with a kernel of its own, which a container has not: Debian's, on an emulated processor.

It needs no virtualisation by the processor and no privilege of QEMU's. This machine takes the boot loader's part: whenever
the guest stops or reboots, the newest kernel on its disk is started.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import typing as t
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path("~/.cache/onprem.torch/kernel").expanduser()
SUITE = "bookworm"
ARCHIVE = "http://deb.debian.org/debian"
SECURITY = "http://security.debian.org/debian-security"
# linux-image-amd64 is what a user has, so that upgrades bring later kernels.
PACKAGES = (
    "ca-certificates,dbus,gcc,iproute2,initramfs-tools,kmod,libpam-systemd,linux-image-amd64,make,openssh-server,python3,python3-apt,"
    "sudo,systemd,systemd-sysv,udev"
)
BRIDGE, TAP = "onpremK0", "onpremK1"
NETWORK, GATEWAY, ADDRESS = "198.18.80.0/24", "198.18.80.1", "198.18.80.11"
# What udev's first disk and the root file system need; a whole initramfs would take the emulated processor minutes.
DRIVERS = ("virtio_pci", "virtio_blk", "ext4")


def hook() -> str:
    """Return the shell commands that make a machine of a root file system, whose folder is the first argument."""
    return f"""set -e
chroot "$1" useradd --create-home --shell /bin/bash ops
echo "ops ALL=(ALL) NOPASSWD: ALL" >"$1/etc/sudoers.d/ops"
chmod 0440 "$1/etc/sudoers.d/ops"
printf 'PasswordAuthentication no\\nUseDNS no\\nAuthorizedKeysFile /etc/ssh/ops.keys\\nHostKey /etc/ssh/ssh_host_ed25519_key\\n' \
    >"$1/etc/ssh/sshd_config.d/test.conf"
rm -f "$1"/etc/ssh/ssh_host_* "$1/etc/resolv.conf"
cp /etc/resolv.conf "$1/etc/resolv.conf"
echo kernel12 >"$1/etc/hostname"
printf '127.0.0.1 localhost kernel12\\n' >"$1/etc/hosts"
echo "/dev/vda / ext4 defaults 0 1" >"$1/etc/fstab"
printf '[Match]\\nName=eth0\\n[Network]\\nAddress={ADDRESS}/24\\nGateway={GATEWAY}\\n' >"$1/etc/systemd/network/lan.network"
chroot "$1" systemctl enable --quiet systemd-networkd.service
chroot "$1" systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer systemd-networkd-wait-online.service
echo 'Acquire::Languages "none";' >"$1/etc/apt/apt.conf.d/99test"
mkdir -p "$1/var/log/journal" "$1/usr/src/onprem_gpu-1" "$1/var/lib/dkms/onprem_gpu/1"
cp {HERE}/gpu_device/* "$1/usr/src/onprem_gpu-1"
ln -s /usr/src/onprem_gpu-1 "$1/var/lib/dkms/onprem_gpu/1/source"
kernel=$(basename "$1"/lib/modules/*)
chroot "$1" apt-get --quiet=2 --no-install-recommends install "linux-headers-$kernel"
chroot "$1" make --silent -C "/lib/modules/$kernel/build" M=/usr/src/onprem_gpu-1 modules
mkdir -p "$1/lib/modules/$kernel/updates/dkms"
mv "$1/usr/src/onprem_gpu-1/onprem_gpu.ko" "$1/lib/modules/$kernel/updates/dkms"
chroot "$1" make --silent -C "/lib/modules/$kernel/build" M=/usr/src/onprem_gpu-1 clean
chroot "$1" apt-get --quiet=2 --autoremove purge "linux-headers-$kernel"
chroot "$1" depmod "$kernel"
echo onprem_gpu >"$1/etc/modules-load.d/onprem_gpu.conf"
sed -i 's/^MODULES=.*/MODULES=list/; s/^# COMPRESSLEVEL=.*/COMPRESSLEVEL=1/' "$1/etc/initramfs-tools/initramfs.conf"
printf '%s\\n' {' '.join(DRIVERS)} >>"$1/etc/initramfs-tools/modules"
chroot "$1" update-initramfs -u
printf 'deb {ARCHIVE} {SUITE} main\\ndeb {SECURITY} {SUITE}-security main\\n' >"$1/etc/apt/sources.list"
"""


def root_file_system() -> Path:
    """Return the folder of the machine's files, which is built once for each recipe."""
    recipe = [SUITE, PACKAGES, hook(), *(path.read_text() for path in sorted((HERE / "gpu_device").iterdir()))]
    folder = CACHE / hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.iterdir():
        shutil.rmtree(old)
    partial = folder.with_suffix(".partial")
    # Without security updates, so that there is a newer kernel to upgrade to.
    words = ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", f"--customize-hook={hook()}", SUITE, str(partial), ARCHIVE]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(f"the machine's files cannot be built: {done.stderr[-3000:]}")
    partial.rename(folder)
    return folder


class Machine:
    """The machine, from its disk to its shell.

    Attributes:
        boots: how often a kernel was started.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk.img"
        self.boots = 0
        self.stopping = False
        self.qemu: t.Optional[subprocess.Popen[bytes]] = None
        self.problem = ""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        end_leftovers()
        subprocess.run(["mke2fs", "-q", "-q", "-t", "ext4", "-d", str(root_file_system()), str(self.disk), "40G"], check=True)
        for name, target in (("id_ed25519", "ops.keys"), ("host", "ssh_host_ed25519_key")):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(folder / name)], check=True)
            self.debugfs("write", f"write {folder / name}{'.pub' if name != 'host' else ''} /etc/ssh/{target}")
        self.debugfs("write", "set_inode_field /etc/ssh/ssh_host_ed25519_key mode 0100600")
        key = (folder / "host.pub").read_text().rsplit(" ", 1)[0]
        (folder / "known_hosts").write_text(f"{ADDRESS} {key}\n")

    def debugfs(self, mode: str, command: str) -> str:
        """Read or write the disk while the machine is off."""
        words = ["debugfs", *(["-w"] if mode == "write" else []), "-R", command, str(self.disk)]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def kernel(self) -> str:
        """Return the release of the newest kernel on the disk, and have it and its initramfs beside the disk."""
        names = [word for word in self.debugfs("read", "ls /boot").split() if word.startswith("vmlinuz-")]
        release = max((name.partition("-")[2] for name in names), key=lambda text: [int(part) for part in re.findall(r"\d+", text)])
        for name in ("vmlinuz", "initrd.img"):
            self.debugfs("read", f"dump /boot/{name}-{release} {self.folder / name}")
        return release

    def start(self) -> None:
        """Start the newest kernel on the disk."""
        check = subprocess.run(["e2fsck", "-p", str(self.disk)], capture_output=True, text=True, check=False)
        if check.returncode > 1:
            self.problem = f"the disk is damaged: {check.stdout}{check.stderr}"
            return
        self.kernel()
        self.boots += 1
        words = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048", "-nodefaults", "-display", "none"),
            *("-name", f"onprem-torch-kernel-{TAP}", "-no-reboot", "-device", "virtio-rng-pci"),
            *("-kernel", str(self.folder / "vmlinuz"), "-initrd", str(self.folder / "initrd.img")),
            *("-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off panic=5"),
            *("-serial", f"file:{self.folder / f'console-{self.boots}.log'}"),
            *("-drive", f"file={self.disk},format=raw,if=virtio,cache=unsafe"),
            *("-netdev", f"tap,id=lan,ifname={TAP},script=no,downscript=no", "-device", "virtio-net-pci,netdev=lan,mac=52:54:00:18:80:11"),
        ]
        with (self.folder / "qemu.log").open("ab") as log:
            self.qemu = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # pylint: disable=consider-using-with
        threading.Thread(target=self.watch, args=(self.qemu,), daemon=True).start()

    def watch(self, qemu: subprocess.Popen[bytes]) -> None:
        """Start the machine again whenever it has stopped."""
        qemu.wait()
        if not self.stopping:
            self.start()

    def stop(self) -> None:
        """Pull the plug."""
        self.stopping = True
        if self.qemu:
            self.qemu.kill()
            self.qemu.wait()

    def ssh_words(self) -> list[str]:
        """Return the ssh command that logs in."""
        options = (f"UserKnownHostsFile={self.folder / 'known_hosts'}", "ConnectTimeout=5", "BatchMode=yes", "ServerAliveInterval=15")
        return ["ssh", "-i", str(self.folder / "id_ed25519"), *(word for option in options for word in ("-o", option)), f"ops@{ADDRESS}"]

    def shell(self, command: str, check: bool = True, timeout: int = 600) -> str:
        """Run a command as root and return what it prints."""
        words = [*self.ssh_words(), f"sudo sh -c {shlex.quote(command)}"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def wait(self, boots: int = 1, seconds: int = 300) -> None:
        """Wait until a kernel that was started as the given one or later answers."""
        deadline = time.monotonic() + seconds
        # Nothing answers until sshd runs; a unit that has failed is no reason to wait.
        while not (self.boots >= boots and self.shell("systemctl is-system-running --wait || true", check=False)):
            if self.problem or time.monotonic() > deadline:
                console = self.folder / f"console-{self.boots}.log"
                raise AssertionError(self.problem or f"the machine does not answer: {console.read_text(errors='replace')[-2000:]}")
            time.sleep(1)

    def reboot(self) -> None:
        """Reboot as a user does, and wait until it is back."""
        boots = self.boots
        self.shell("systemctl --no-block reboot", check=False)
        self.wait(boots + 1)


def end_leftovers() -> None:
    """End the machine of a run that was killed."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"onprem-torch-kernel-{TAP}".encode() in words:
            os.kill(int(path.parent.name), signal.SIGKILL)
