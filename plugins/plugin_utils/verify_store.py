# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verdicts on the control node: one folder for each fingerprint, with the history and the reports.

    STORE/FINGERPRINT/history.json      one entry for each run, oldest first
    STORE/FINGERPRINT/TIME.json, .html  the reports (UTC)
    STORE/latest.json, latest.html      links to the last report of any fingerprint
"""

from __future__ import annotations

import json
import os
import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils.baseline import KEPT_RUNS


def folder_of(store: str, task_vars: t.Mapping[str, t.Any]) -> str:
    """Return the folder of the verdicts; empty means beside the inventory."""
    beside = os.path.join(str(task_vars.get("inventory_dir") or os.getcwd()), ".state", "verify")
    return os.path.abspath(os.path.expanduser(store)) if store else beside


def write(path: str, text: str) -> None:
    """Replace a file in one step."""
    with open(f"{path}.partial", "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(f"{path}.partial", path)


class Store:
    """The verdicts of one fingerprint."""

    def __init__(self, store: str, fingerprint: str) -> None:
        self.store = store
        self.folder = os.path.join(store, fingerprint)
        self.path = os.path.join(self.folder, "history.json")

    def history(self) -> list[dict[str, t.Any]]:
        """Return the earlier runs, oldest first; a file that cannot be read counts as none."""
        try:
            with open(self.path, encoding="utf-8") as stream:
                found = json.load(stream)
        except (OSError, ValueError):
            return []
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def keep(self, entry: dict[str, t.Any], report: dict[str, t.Any], page: str) -> dict[str, str]:
        """Add a run with its reports, drop the oldest beyond KEPT_RUNS, and return the paths of the new reports."""
        os.makedirs(self.folder, exist_ok=True)
        name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(entry["time"]))
        runs = [*self.history(), {**entry, "report": name}]
        texts = {"json": json.dumps(report, indent=1, sort_keys=True) + "\n", "html": page}
        paths = {}
        for kind, text in texts.items():
            paths[kind] = os.path.join(self.folder, f"{name}.{kind}")
            write(paths[kind], text)
            self._link(kind, paths[kind])
        write(self.path, json.dumps(runs[-KEPT_RUNS:], indent=1) + "\n")
        for old in runs[:-KEPT_RUNS]:
            for kind in texts:
                try:
                    os.unlink(os.path.join(self.folder, f"{old.get('report')}.{kind}"))
                except OSError:
                    pass  # somebody tidied up already
        return paths

    def _link(self, kind: str, path: str) -> None:
        """Let latest.KIND lead to a report."""
        link = os.path.join(self.store, f"latest.{kind}")
        partial = f"{link}.partial"
        if os.path.lexists(partial):
            os.unlink(partial)
        os.symlink(os.path.relpath(path, self.store), partial)
        os.replace(partial, link)
