# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""apt and dpkg for the module nvidia_packages: their locks, holds, and what an interruption left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import apt_state
from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run

LOCK = "/var/lib/dpkg/lock-frontend"
# How long apt itself waits for a lock that was free a moment ago: it does not notice that nobody waits for it any more.
MOMENT = 5
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C",
    "NEEDRESTART_SUSPEND": "1",
    "APT_LISTCHANGES_FRONTEND": "none",
}


def holder(lock: t.IO[str]) -> str:
    """Return who holds a lock, in brackets; empty where the kernel does not tell."""
    # struct flock of 64-bit Linux: type, whence, start, length, process (fcntl(2)).
    layout = "hhqqi4x"
    asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _whence, _start, _length, process = struct.unpack(layout, fcntl.fcntl(lock, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK or process <= 0:
        return ""
    name = read_text(f"/proc/{process}/comm").strip()
    return f"({name or 'unknown'}, process {process}) "


class Apt:
    """apt and dpkg of a node. What a run releases is held again where it fails."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loose: list[str] = []
        run.on_failure.append(self.hold_again)

    def hold_again(self) -> None:
        """Hold what was released, whoever has the node by now."""
        self.hold(self.loose, in_any_case=True)

    def packages(self) -> apt_state.Installed:
        """Return dpkg's state."""
        return apt_state.parse_status(read_text(apt_state.STATUS))

    def get(self, words: t.Sequence[str], patience: int | None = None) -> tuple[int, str]:
        """Run apt-get and return its exit status and all it printed."""
        lock = f"DPkg::Lock::Timeout={self.run.params['lock_timeout'] if patience is None else patience}"
        command = ["apt-get", "-o", lock, "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", *words]
        code, out, err = self.run.module.run_command(command, environ_update=ENVIRONMENT)
        return code, f"{out}\n{err}"

    def change(self, words: t.Sequence[str]) -> tuple[int, str]:
        """Run apt-get to change packages, once nobody else has dpkg's lock and if it is still wanted then."""
        end = time.monotonic() + self.run.params["lock_timeout"]
        while True:
            self.wait()
            code, text = self.get(words, MOMENT)
            if not code or not apt_state.packages_locked(text) or time.monotonic() > end:
                return code, text

    def refresh(self, words: t.Sequence[str]) -> tuple[int, str]:
        """Run apt-get update; apt does not wait for another update, such as the one that systemd starts after a boot."""
        end = time.monotonic() + self.run.params["lock_timeout"]
        while True:
            code, text = self.get(words)
            if not code or not apt_state.lists_locked(text) or time.monotonic() > end:
                return code, text
            self.run.go_on()
            time.sleep(1)

    def options(self) -> list[str]:
        """Return apt-get's options for every installation."""
        return [
            "--no-install-recommends",
            "--allow-downgrades",
            "--allow-change-held-packages",
            # The newest headers would bring the newest kernel along, since both are of one source package.
            *("-o", "APT::Get::Upgrade-By-Source-Package=false"),
            *("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"),
        ]

    @contextlib.contextmanager
    def locked(self, in_any_case: bool = False) -> t.Iterator[dict[str, str]]:
        """Hold dpkg's lock, which another program may have for a while; dpkg itself waits for nobody.

        Args:
            in_any_case: also where the run has lost the node, or was given up: what it has begun is brought to its end.

        Yields the environment in which dpkg knows that its caller has the lock.
        """
        end = time.monotonic() + self.run.params["lock_timeout"]
        with open(LOCK, "w", encoding="utf-8") as lock:
            while True:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > end:
                        self.run.fail(
                            f"another program {holder(lock)}has held dpkg's lock for {self.run.params['lock_timeout']} s; "
                            "wait until it is done, then run this again"
                        )
                    if not in_any_case:
                        self.run.go_on()
                    time.sleep(0.5)
            if not in_any_case:
                self.run.go_on()
            yield {**ENVIRONMENT, "DPKG_FRONTEND_LOCKED": "1"}

    def wait(self) -> None:
        """Wait until nobody else has dpkg's lock, so that it is told in a sentence where that takes too long."""
        with self.locked():
            pass

    def hold(self, names: t.Sequence[str], word: str = "hold", in_any_case: bool = False) -> None:
        """Put packages on hold, or release them with the word C(install); see ``locked``."""
        if names:
            text = "".join(f"{name} {word}\n" for name in names)
            with self.locked(in_any_case) as environment:
                code, _out, err = self.run.module.run_command(["dpkg", "--set-selections"], data=text, environ_update=environment)
            if code:
                self.run.fail(f"dpkg cannot {'hold' if word == 'hold' else 'release'} {', '.join(names)} ({err.strip()}); try it by hand")

    def release(self) -> None:
        """Release all packages that the pins name; they are held again in the end, or by a failure."""
        state = self.packages()
        mine = [name for name in apt_state.family(state, self.run.pins) if state[name]["want"] == "hold"]
        self.hold(mine, word="install")
        self.loose += mine

    def holds(self) -> None:
        """Hold everything that the pins name; where that ends an installation, whoever has the node by now."""
        begun = bool(self.loose or self.run.result["installed"])
        self.loose = []
        state = self.packages()
        loose = [name for name in apt_state.family(state, self.run.pins) if state[name]["want"] != "hold"]
        if not loose:
            return
        self.run.result["held"] = loose
        for name in loose:
            self.run.before.setdefault(f"hold {name}", "")
            self.run.after[f"hold {name}"] = "held\n"
        if not self.run.check:
            self.hold(loose, in_any_case=begun)

    def half_done(self) -> bool:
        """Return whether dpkg has work that is not finished."""
        return bool(apt_state.broken(self.packages())) or apt_state.interrupted()

    def note_healing(self) -> None:
        """Note what is finished."""
        broken = apt_state.broken(self.packages())
        self.run.result["healed"] = broken or ["dpkg's journal"]
        self.run.before["interrupted packages"], self.run.after["interrupted packages"] = "\n".join(broken) + "\n", ""

    def unrepaired(self) -> list[str]:
        """Return the packages left half done that stay at their version, and so have to be repaired."""
        packages = self.packages()
        other = apt_state.replaced(packages, self.run.pins)
        return [name for name in apt_state.broken(packages) if name not in other]

    def heal(self) -> None:
        """Finish what an interrupted dpkg left half done, such as a module that DKMS could not build.

        What gets another version is left to the installation: the other version may be the cure.
        """
        if not self.half_done():
            return
        if self.run.check:
            self.note_healing()
            return
        with self.locked() as environment:
            # Without the lock it may have been somebody else's work that was not finished yet.
            if not self.half_done():
                return
            self.note_healing()
            self.run.module.run_command(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], environ_update=environment)
        if self.unrepaired():
            self.release()
            self.refresh(["update"])
            code, text = self.change(["install", "--fix-broken", "--yes", *self.options()])
            left = self.unrepaired()
            if left:
                # A package that was half unpacked has to be unpacked again.
                code, text = self.change(["install", "--reinstall", "--yes", *self.options(), *left])
                left = self.unrepaired()
            if left:
                self.run.fail(
                    f"the packages {', '.join(left)} are broken and dpkg --configure -a and apt-get --fix-broken do not "
                    f"repair them ({apt_state.complaint(text) if code else 'they stay half installed'}); repair them by hand"
                )
