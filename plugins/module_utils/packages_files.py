# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of the module nvidia_packages: written in one step, put back by a failure, and let count."""

from __future__ import annotations

import os
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run

# What makes a changed file count, by its folder.
APPLY = {
    "/etc/modprobe.d": ["update-initramfs", "-u"],
    "/etc/systemd/logind.conf.d": ["systemctl", "try-reload-or-restart", "systemd-logind.service"],
    "/etc/systemd/system": ["systemctl", "daemon-reload"],
}
# Which folders still have to count: a run that is killed before they do is finished by the next one.
PENDING = "/var/lib/onprem.torch/pending"


class Files:
    """The files of a run; those that it wrote before anything was installed are put back where it fails."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.undo: list[tuple[str, t.Optional[bytes]]] = []
        run.on_failure.append(self.restore)

    def restore(self) -> None:
        """Put back what was written."""
        for path, content in reversed(self.undo):
            if content is None:
                os.unlink(path)
            else:
                self.write(path, content)

    def keep(self) -> None:
        """Let what was written stay, whatever comes."""
        self.undo.clear()

    def write(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Replace a file in one step; at no moment can more people read it than may."""
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        partial = f"{path}.partial"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
        os.rename(partial, path)

    def replace(self, path: str, content: bytes) -> None:
        """Write a file, and note what was there."""
        old = None
        if os.path.exists(path):
            with open(path, "rb") as stream:
                old = stream.read()
        self.write(path, content)
        self.undo.append((path, old))

    def put(self, path: str, content: str) -> None:
        """Let a file have a content, and note the difference."""
        old = read_text(path) if os.path.exists(path) else None
        if old == content:
            return
        self.run.before[path], self.run.after[path] = old or "", content
        if self.run.check:
            return
        self.note(path)
        self.replace(path, content.encode())

    def put_secret(self, path: str, content: str) -> None:
        """Let a file that only root reads have a content; the difference tells no more than that it changes."""
        if os.path.exists(path) and read_text(path) == content and os.stat(path).st_mode & 0o7777 == 0o600:
            return
        self.run.before[path], self.run.after[path] = "", "user and password\n"
        if not self.run.check:
            # Not put back by a failure: an old password is as good as none.
            self.write(path, content.encode(), 0o600)

    def remove_secret(self, path: str) -> None:
        """Let such a file be gone."""
        if os.path.exists(path):
            self.run.before[path], self.run.after[path] = "user and password\n", ""
            if not self.run.check:
                os.unlink(path)

    def remove(self, path: str) -> None:
        """Let a file be gone, and note the difference."""
        if not os.path.exists(path):
            return
        self.run.before[path], self.run.after[path] = read_text(path), ""
        if self.run.check:
            return
        self.note(path)
        with open(path, "rb") as stream:
            self.undo.append((path, stream.read()))
        os.unlink(path)

    def note(self, path: str) -> None:
        """Note that a file's folder has to count again."""
        if os.path.dirname(path) in APPLY:
            self.write(os.path.join(PENDING, os.path.dirname(path).replace("/", "_")), b"")

    def apply(self) -> None:
        """Let changed files count, those of a run that was killed too."""
        for folder, words in APPLY.items():
            note = os.path.join(PENDING, folder.replace("/", "_"))
            if not os.path.exists(note) or self.run.check:
                continue
            if self.run.module.get_bin_path(words[0], opt_dirs=["/usr/sbin", "/sbin"]):
                code, out, err = self.run.module.run_command(words)
                if code:
                    reason = " ".join((err or out).split())[-300:]
                    self.run.fail(f"{' '.join(words)} failed after a file in {folder} changed ({reason}); repair that and run this again")
            os.unlink(note)
