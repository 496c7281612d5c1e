# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""An ordinary machine, whose first process is systemd: this machine's root file system, booted in a container with all rights."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import time
import typing as t
from pathlib import Path

from clone import ROOT

MACHINE = "onprem-host"
CACHE = Path("~/.cache/onprem.torch").expanduser()


def _nspawn() -> t.Any:
    spec = importlib.util.spec_from_file_location("nspawn", ROOT / "plugins/module_utils/nspawn.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nspawn = _nspawn()


class SystemdHost:
    """The machine. It shares this machine's network, a folder that it works in, and the lab's cache; else nothing is written to."""

    def __init__(self, place: Path, shared: Path) -> None:
        self.place, self.root, self.shared = place, place / "root", shared

    def __enter__(self) -> SystemdHost:
        self.remove()
        subprocess.run(["mount", "-t", "tmpfs", "onprem-host", self.place], check=True)
        for name in ("root", "upper", "work"):
            (self.place / name).mkdir()
        options = f"lowerdir=/,upperdir={self.place}/upper,workdir={self.place}/work"
        subprocess.run(["mount", "-t", "overlay", "onprem-host", "-o", options, self.root], check=True)
        # A host may write to /proc/sys, which nspawn denies a container otherwise; basic.target: none of this machine's services.
        words = ["env", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes", "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"]
        words += ["--link-journal=no", "--timezone=off", "--capability=all", "--system-call-filter=@known", f"--machine={MACHINE}"]
        words += [f"--directory={self.root}", f"--bind={self.shared}", f"--bind={CACHE}", "--", "systemd.unit=basic.target"]
        console = str(self.place / "console.log")
        nspawn.start(nspawn.boot_words(MACHINE, words, console), console)
        deadline = time.monotonic() + 30
        while self.run("systemctl", "is-active", "basic.target", check=False).strip() != "active":
            assert time.monotonic() < deadline, Path(console).read_text(encoding="utf-8", errors="replace")[-3000:]
            time.sleep(0.2)
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def run(self, *words: str, check: bool = True, seconds: float = 300) -> str:
        """Type a command on the machine, in the shared folder; its output."""
        leader = nspawn.leader(str(self.root))
        if not leader:
            assert not check, f"{MACHINE} is off"
            return ""
        enter = ["nsenter", f"--target={leader}", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--", "env", f"--chdir={self.shared}"]
        environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "VIRTUAL_ENV", "ANSIBLE_CONFIG")}
        done = subprocess.run(
            [*enter, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def units(self) -> list[str]:
        """Return the units of nodes that systemd knows, in whatever state."""
        listed = self.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nspawn-*")
        return sorted(line.split()[0] for line in listed.splitlines() if line.strip())

    def remove(self) -> None:
        """End the machine with all that runs on it."""
        for pid in nspawn.processes(str(self.root)):
            os.kill(pid, signal.SIGKILL)
        for group in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
            with contextlib.suppress(OSError):
                Path(group, nspawn.GROUPS, "alone", MACHINE, "cgroup.kill").write_text("1", encoding="ascii")
        for path in (str(self.root), str(self.place)):
            while nspawn.mounted(path):
                subprocess.run(["umount", "--lazy", path], check=True)
