# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""apt and dpkg for the module nvidia_packages: their locks, holds, and what an interruption left."""

from __future__ import annotations

import fcntl
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import apt_state
from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run

LOCK = "/var/lib/dpkg/lock-frontend"
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C",
    "NEEDRESTART_SUSPEND": "1",
    "APT_LISTCHANGES_FRONTEND": "none",
}


class Apt:
    """apt and dpkg of a node. What a run releases is held again where it fails."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loose: list[str] = []
        run.on_failure.append(self.hold_again)

    def hold_again(self) -> None:
        """Hold what was released."""
        self.hold(self.loose)

    def packages(self) -> apt_state.Installed:
        """Return dpkg's state."""
        return apt_state.parse_status(read_text(apt_state.STATUS))

    def get(self, words: t.Sequence[str]) -> tuple[int, str]:
        """Run apt-get and return its exit status and all it printed."""
        lock = f"DPkg::Lock::Timeout={self.run.params['lock_timeout']}"
        command = ["apt-get", "-o", lock, "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", *words]
        code, out, err = self.run.module.run_command(command, environ_update=ENVIRONMENT)
        return code, f"{out}\n{err}"

    def refresh(self, words: t.Sequence[str]) -> tuple[int, str]:
        """Run apt-get update; apt does not wait for another update, such as the one that systemd starts after a boot."""
        end = time.monotonic() + self.run.params["lock_timeout"]
        while True:
            code, text = self.get(words)
            if not code or not apt_state.lists_locked(text) or time.monotonic() > end:
                return code, text
            time.sleep(1)

    def options(self) -> list[str]:
        """Return apt-get's options for every installation."""
        return [
            "--no-install-recommends",
            "--allow-downgrades",
            "--allow-change-held-packages",
            *("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"),
        ]

    def wait_for(self, lock: t.IO[str]) -> None:
        """Take dpkg's lock, which another program may hold for a while."""
        end = time.monotonic() + self.run.params["lock_timeout"]
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > end:
                    self.run.fail(
                        f"another program has held dpkg's lock for {self.run.params['lock_timeout']} s; "
                        "wait until it is done (ps -e | grep -E 'apt|dpkg'), then run this again"
                    )
                time.sleep(0.5)

    def hold(self, names: t.Sequence[str], word: str = "hold") -> None:
        """Put packages on hold, or release them with the word C(install)."""
        if names:
            text = "".join(f"{name} {word}\n" for name in names)
            code, _out, err = self.run.module.run_command(["dpkg", "--set-selections"], data=text)
            if code:
                self.run.fail(f"dpkg cannot {'hold' if word == 'hold' else 'release'} {', '.join(names)} ({err.strip()}); try it by hand")

    def release(self) -> None:
        """Release all packages that the pins name; they are held again in the end, or by a failure."""
        state = self.packages()
        mine = [name for name in apt_state.family(state, self.run.pins) if state[name]["want"] == "hold"]
        self.hold(mine, word="install")
        self.loose += mine

    def holds(self) -> None:
        """Hold everything that the pins name."""
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
            self.hold(loose)

    def heal(self) -> None:
        """Finish what an interrupted dpkg left half done."""
        broken = apt_state.broken(self.packages())
        if not broken and not apt_state.interrupted():
            return
        self.run.result["healed"] = broken or ["dpkg's journal"]
        self.run.before["interrupted packages"], self.run.after["interrupted packages"] = "\n".join(broken) + "\n", ""
        if self.run.check:
            return
        with open(LOCK, "w", encoding="utf-8") as lock:
            self.wait_for(lock)
            environment = {**ENVIRONMENT, "DPKG_FRONTEND_LOCKED": "1"}
            self.run.module.run_command(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], environ_update=environment)
        if apt_state.broken(self.packages()):
            self.release()
            self.refresh(["update"])
            code, text = self.get(["install", "--fix-broken", "--yes", *self.options()])
            left = apt_state.broken(self.packages())
            if left:
                # A package that was half unpacked has to be unpacked again.
                code, text = self.get(["install", "--reinstall", "--yes", *self.options(), *left])
                left = apt_state.broken(self.packages())
            if left:
                self.run.fail(
                    f"the packages {', '.join(left)} are broken and dpkg --configure -a and apt-get --fix-broken do not "
                    f"repair them ({apt_state.complaint(text) if code else 'they stay half installed'}); repair them by hand"
                )
