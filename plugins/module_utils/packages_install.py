# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Installation for the module nvidia_packages: simulated, weighed, then done."""

from __future__ import annotations

import os
import re
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import apt_sources, apt_state
from ansible_collections.onprem.torch.plugins.module_utils.packages_apt import ENVIRONMENT, Apt
from ansible_collections.onprem.torch.plugins.module_utils.packages_files import Files
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run
from ansible_collections.onprem.torch.plugins.module_utils.packages_source import SOURCES

MIB = 1024**2


class Installation:
    """Every package at its version: those that are wanted, and those that a pin names."""

    def __init__(self, run: Run, apt: Apt, files: Files) -> None:
        self.run = run
        self.apt = apt
        self.files = files
        self.chosen: list[str] = []

    def foreign_holds(self) -> None:
        """Refuse to change what somebody else holds."""
        found = apt_state.foreign_holds(self.apt.packages(), self.run.settings["packages"] or [], self.run.pins, apt_state.own_pins())
        if found:
            text = ", ".join(f"{name} is held at {version}, but {wanted} is wanted" for name, version, wanted in found)
            names = " ".join(name for name, _version, _wanted in found)
            self.run.fail(f"{text}, and the hold is somebody else's; release it on the node (apt-mark unhold {names}), or set the version that it is held at")

    def update(self) -> None:
        """Read the repository's list; a repository that cannot be read or verified is an error."""
        if not self.run.repository:
            return
        only = ["-o", f"Dir::Etc::SourceList={SOURCES}", "-o", "Dir::Etc::SourceParts=/dev/null"]
        code, text = self.apt.refresh([*only, "-o", "APT::Get::List-Cleanup=0", "-o", "APT::Update::Error-Mode=any", "update"])
        status = apt_state.refused(text)
        if status:
            self.run.fail(
                f"the repository {self.run.repository['url']} refuses the user or password ({status}); correct them in "
                "cuda_repository_url or cluster_mirror, as in https://USER:PASSWORD@HOST/PATH"
            )
        if code or apt_state.failed_update(text, self.run.repository["url"]):
            self.run.fail(
                f"the repository {self.run.repository['url']} cannot be used ({apt_state.complaint(text)}); "
                "let this node reach it, or set cuda_repository_url and its key to one that it can use"
            )

    def versions(self, wanted: t.Sequence[t.Mapping[str, str]], strict: bool) -> list[str]:
        """Return ``name=version`` of packages with the newest version that fits; what is not on offer is an error."""
        words = ["apt-cache", "madison", *[entry["name"] for entry in wanted]]
        _code, out, err = self.run.module.run_command(words, environ_update=ENVIRONMENT)
        if apt_state.unreadable_sources(err):
            rivals = [entry.path for entry in apt_sources.flat(apt_sources.collect(), self.run.repository.get("url", ""), SOURCES)]
            cure = f"remove the repository from {', '.join(rivals)}" if rivals else "correct what it names"
            self.run.fail(f"apt cannot read this node's sources ({apt_state.complaint(err)}); {cure}")
        offer = apt_state.parse_madison(out, self.run.repository.get("url", ""))
        chosen = []
        for entry in wanted:
            fitting = [version for version in offer.get(entry["name"], []) if apt_state.fits(version, entry["version"])]
            if fitting:
                chosen.append(f"{entry['name']}={fitting[0]}" if entry["version"] else entry["name"])
            elif strict and entry["name"].startswith("linux-headers-"):
                self.run.fail(
                    f"this node's apt sources have no {entry['name']}, which DKMS needs for a kernel that is installed; "
                    "install the newest kernel (apt-get full-upgrade), reboot into it and run this again"
                )
            elif strict:
                have = ", ".join(offer.get(entry["name"], [])[:5]) or "no version of it"
                where = self.run.repository.get("url") or "this node's apt sources"
                self.run.fail(
                    f"{where} has no {entry['name']} {entry['version']} (it has {have}); "
                    "choose a version that it has, or another repository"
                )
        return chosen

    def room(self, installs: t.Mapping[str, str]) -> None:
        """Check that the disk has room for what will be downloaded and unpacked."""
        names = [f"{name}={version}" for name, version in installs.items()]
        _code, out, _err = self.run.module.run_command(["apt-cache", "show", *names], environ_update=ENVIRONMENT)
        download, on_disk = apt_state.parse_sizes(out)
        for folder, needed in (("/var/cache/apt", download), ("/usr", on_disk)):
            state = os.statvfs(folder)
            free = state.f_bavail * state.f_frsize
            if free < needed:
                self.run.fail(
                    f"{folder} has {free // MIB} MiB free, but {needed // MIB} MiB are needed for {self.run.settings['name']}; free some space"
                )

    def install(self) -> None:
        """Bring every package to its version: those that are wanted, and those that a pin names."""
        state = self.apt.packages()
        wanted = apt_state.lacking(state, self.run.settings["packages"] or [])
        names = {entry["name"] for entry in wanted}
        torn = self.on_offer(
            [
                {"name": name, "version": version}
                for name, version in apt_state.family(state, self.run.pins).items()
                if name not in names and not apt_state.fits(state[name]["version"], version)
            ]
        )
        if not wanted and not torn:
            return
        for entry in [*wanted, *torn]:
            old = apt_state.installed(state, entry["name"])
            self.run.before[f"package {entry['name']}"] = f"{old}\n" if old else ""
            self.run.after[f"package {entry['name']}"] = f"{entry['version'] or 'any version'}\n"
            self.run.result["installed"][entry["name"]] = entry["version"]
        if self.run.check:
            return
        self.update()
        self.versions(apt_state.lacking(state, self.run.settings["further"] or []), strict=True)
        # apt removes nothing that is on hold, such as the other kind of kernel modules.
        self.apt.release()
        code, text = self.simulate(wanted, torn)
        if code:
            # Dependencies come from the distribution, whose lists may be old or missing.
            self.apt.refresh(["update"])
            code, text = self.simulate(wanted, torn)
        if code:
            self.run.fail(f"apt cannot install {self.run.settings['name']} ({apt_state.complaint(text)}); correct what it names, nothing was installed")
        installs, removes = apt_state.parse_simulation(text)
        own = {*apt_state.family(state, self.run.pins), *apt_state.replaced(state, self.run.pins)}
        foreign = [name for name in removes if name not in own]
        if foreign:
            self.run.fail(
                f"installing {self.run.settings['name']} would remove {', '.join(foreign)}; remove them yourself if nobody needs them"
            )
        self.room(installs)
        self.apt.wait()
        self.files.keep()
        words = ["install", "--yes", *self.apt.options(), *self.chosen]
        code, text = self.apt.change(words)
        if code and re.search(r"404|Failed to fetch", text):
            self.apt.refresh(["update"])
            code, text = self.apt.change(words)
        if code:
            self.apt.holds()
            self.run.fail(f"apt cannot install {self.run.settings['name']} ({apt_state.complaint(text)}); correct what it names and run this again")
        for name in removes:
            self.run.after[f"package {name}"] = ""
        self.run.result["installed"] = installs
        self.run.result["removed"] = removes

    def on_offer(self, unfit: list[dict[str, str]]) -> list[dict[str, str]]:
        """Return which installed packages can be brought to their version.

        Some have no such version, such as Ubuntu's firmware of an older branch, and stay as they are.
        """
        if not unfit:
            return []
        pinned = [entry for entry in self.run.settings["packages"] or [] if entry["version"]]
        if not self.run.check and len(self.versions(pinned, strict=False)) < len(pinned):
            # apt's lists are old or missing, and tell nothing.
            self.update()
        offered = {entry.partition("=")[0] for entry in self.versions(unfit, strict=False)}
        return [entry for entry in unfit if entry["name"] in offered]

    def simulate(self, wanted: t.Sequence[dict[str, str]], torn: t.Sequence[dict[str, str]]) -> tuple[int, str]:
        """Choose exact versions and let apt say what it would do."""
        if len(self.versions(wanted, strict=False)) < len(wanted):
            self.apt.refresh(["update"])
        command = ["install", "--simulate", *self.apt.options()]
        chosen = self.versions(wanted, strict=True)
        # What gives way to the wanted ones, such as the other kind of kernel modules, gets no other version.
        code, text = self.apt.get([*command, *chosen])
        gone = [] if code else apt_state.parse_simulation(text)[1]
        self.chosen = [*chosen, *self.versions([entry for entry in torn if entry["name"] not in gone], strict=False)]
        return self.apt.get([*command, *self.chosen])
