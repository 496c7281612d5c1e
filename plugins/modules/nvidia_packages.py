#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_packages
short_description: Keep a set of packages of NVIDIA's apt repository at one exact version
version_added: 0.1.0
author:
  - The onprem.torch maintainers (@onprem-torch)
description:
  - Keeps a repository with its verified key, pins, packages, holds, files and services as one state, in one step.
    A run that has nothing to do reads a few files and starts no apt.
  - All installed packages that a pin names get the pin's version and are held, so that no upgrade tears them apart.
  - Finishes what an interrupted dpkg left half done first.
  - Nothing is installed unless apt's simulation works, removes no foreign package, and the disk has room.
options:
  settings:
    description: The state.
    type: dict
    required: true
    suboptions:
      name:
        description: Name of the set; part of the name of its preferences file.
        type: str
        required: true
      repository:
        description: A flat apt repository. Empty for packages of sources that the node has already.
        type: dict
        default: {}
        suboptions:
          url:
            description: Its URL.
            type: str
          key_url:
            description: URL of the OpenPGP key that signs it.
            type: str
          key_fingerprint:
            description: Fingerprint of that key, 40 hexadecimal digits; any other key is refused.
            type: str
      packages:
        description: Packages that shall be installed.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the package.
            type: str
            required: true
          version:
            description: Its version, which may end in C(*). Empty for any.
            type: str
            default: ""
      further:
        description: >-
          Packages of later sets. Nothing is installed unless the repository has them too, so that what is missing is not
          found half-way.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the package.
            type: str
            required: true
          version:
            description: Its version, which may end in C(*). Empty for any.
            type: str
            default: ""
      pins:
        description: Versions for packages that may come along.
        type: list
        elements: dict
        default: []
        suboptions:
          packages:
            description: Names, in which C(*) stands for any text.
            type: list
            elements: str
            required: true
          version:
            description: Their version, which may end in C(*). Empty to hold them at the one that they have.
            type: str
            required: true
      files:
        description: Text by path of files that shall have it.
        type: dict
        default: {}
      services:
        description: Units that shall be enabled, and run once the kernel module does.
        type: list
        elements: str
        default: []
      kernel_module:
        description: Kernel module that the packages bring.
        type: str
        default: ""
      kernel_module_version:
        description: The version that shall run.
        type: str
        default: ""
      kernel_module_flavour:
        description: Whether it shall be the C(open) or the C(proprietary) one. Empty for any.
        type: str
        default: ""
      modules:
        description: Kernel modules that are loaded once that one runs.
        type: list
        elements: str
        default: []
  loaded:
    description: Fail unless the kernel module runs at its version. For the time after a reboot.
    type: bool
    default: false
  lock_timeout:
    description: Seconds to wait for another program that holds dpkg's lock.
    type: int
    default: 300
attributes:
  check_mode:
    description: Can run in check mode and predict changes.
    support: full
  diff_mode:
    description: Shows what changes.
    support: full
"""

EXAMPLES = r"""
- name: Install NCCL at one version
  onprem.torch.nvidia_packages:
    settings:
      name: nccl
      repository:
        url: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/
        key_url: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/3bf863cc.pub
        key_fingerprint: EB693B3035CD5710E231E123A4B469963BF863CC
      packages:
        - {name: libnccl2, version: 2.29.7-1+cuda12.9}
      pins:
        - {packages: [libnccl2, libnccl-dev], version: 2.29.7-1+cuda12.9}
"""

RETURN = r"""
installed:
  description: Packages that were installed or changed, with their versions.
  returned: success
  type: dict
removed:
  description: Packages that gave way.
  returned: success
  type: list
  elements: str
held:
  description: Packages that were put on hold.
  returned: success
  type: list
  elements: str
healed:
  description: Packages that an interruption had left half done.
  returned: success
  type: list
  elements: str
reboot_reason:
  description: Why a reboot is needed; empty where none is.
  returned: success
  type: str
"""

import fcntl
import os
import re
import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_url
from ansible_collections.onprem.torch.plugins.module_utils import apt_state, driver_state, openpgp
from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text

KEYRINGS = "/etc/apt/keyrings"
SOURCES = "/etc/apt/sources.list.d/onprem-torch-nvidia.sources"
LOCK = "/var/lib/dpkg/lock-frontend"
MIB = 1024**2
# What makes a changed file count, by its folder.
APPLY = {
    "/etc/modprobe.d": ["update-initramfs", "-u"],
    "/etc/systemd/logind.conf.d": ["systemctl", "try-reload-or-restart", "systemd-logind.service"],
    "/etc/systemd/system": ["systemctl", "daemon-reload"],
}
# Which folders still have to count: a run that is killed before they do is finished by the next one.
PENDING = "/var/lib/onprem.torch/pending"
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C",
    "NEEDRESTART_SUSPEND": "1",
    "APT_LISTCHANGES_FRONTEND": "none",
}


class Node:
    """The node's packages, and the changes to them."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.settings = module.params["settings"]
        self.pins = self.settings["pins"] or []
        self.repository = {key: value for key, value in (self.settings["repository"] or {}).items() if value}
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        self.result: dict[str, t.Any] = {"installed": {}, "removed": [], "held": [], "healed": [], "reboot_reason": ""}
        self.undo: list[tuple[str, t.Optional[bytes]]] = []
        self.chosen: list[str] = []
        self.loose: list[str] = []

    def fail(self, text: str) -> t.NoReturn:
        """End with one sentence; files that this run wrote before anything was installed are put back."""
        for path, content in reversed(self.undo):
            if content is None:
                os.unlink(path)
            else:
                self.write(path, content)
        # Cleared first: holding them may fail, too.
        loose, self.loose = self.loose, []
        self.hold(loose)
        self.module.fail_json(msg=text, **self.result)

    def packages(self) -> apt_state.Installed:
        """Return dpkg's state."""
        return apt_state.parse_status(read_text(apt_state.STATUS))

    def apt(self, words: t.Sequence[str]) -> tuple[int, str]:
        """Run apt-get and return its exit status and all it printed."""
        lock = f"DPkg::Lock::Timeout={self.module.params['lock_timeout']}"
        command = ["apt-get", "-o", lock, "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", *words]
        code, out, err = self.module.run_command(command, environ_update=ENVIRONMENT)
        return code, f"{out}\n{err}"

    def refresh(self, words: t.Sequence[str]) -> tuple[int, str]:
        """Run apt-get update; apt does not wait for another update, such as the one that systemd starts after a boot."""
        end = time.monotonic() + self.module.params["lock_timeout"]
        while True:
            code, text = self.apt(words)
            if not code or not apt_state.lists_locked(text) or time.monotonic() > end:
                return code, text
            time.sleep(1)

    def write(self, path: str, content: bytes) -> None:
        """Replace a file in one step."""
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        partial = f"{path}.partial"
        with open(partial, "wb") as stream:
            stream.write(content)
        os.chmod(partial, 0o644)
        os.rename(partial, path)

    def put(self, path: str, content: str) -> None:
        """Let a file have a content, and note the difference."""
        old = read_text(path) if os.path.exists(path) else None
        if old == content:
            return
        self.before[path], self.after[path] = old or "", content
        if self.module.check_mode:
            return
        if os.path.dirname(path) in APPLY:
            self.write(os.path.join(PENDING, os.path.dirname(path).replace("/", "_")), b"")
        self.write(path, content.encode())
        self.undo.append((path, None if old is None else old.encode()))

    def key(self) -> str:
        """Let the repository's key lie on the node, and return its path; any other key is refused."""
        wanted = self.repository.get("key_fingerprint", "").replace(" ", "").upper()
        url = self.repository["key_url"]
        for path in (f"{KEYRINGS}/onprem-torch-nvidia.{end}" for end in ("asc", "gpg")):
            if os.path.exists(path):
                with open(path, "rb") as stream:
                    try:
                        if openpgp.fingerprints(stream.read()) == [wanted]:
                            return path
                    except openpgp.KeyFileError:
                        pass
        answer, info = fetch_url(self.module, url, timeout=20)
        if answer is None or info["status"] not in (200, None):
            self.fail(
                f"the key of the repository {self.repository['url']} cannot be fetched from {url} ({info['msg']}); "
                "correct cuda_repository_key_url, or let this node reach it"
            )
        data = answer.read()
        try:
            found = openpgp.fingerprints(data)
        except openpgp.KeyFileError as error:
            self.fail(f"{url} is no key for the repository {self.repository['url']} ({error}); correct cuda_repository_key_url")
        if found != [wanted]:
            self.fail(
                f"the key at {url} has the fingerprint {', '.join(found)}, but {wanted or 'a known one'} was expected, so it is "
                "refused; find out who changed it, and set cuda_repository_key_fingerprint only if you trust it"
            )
        path = f"{KEYRINGS}/onprem-torch-nvidia.{'asc' if openpgp.is_armored(data) else 'gpg'}"
        self.before[path], self.after[path] = "", f"key {wanted}\n"
        if not self.module.check_mode:
            old = None
            if os.path.exists(path):
                with open(path, "rb") as stream:
                    old = stream.read()
            self.write(path, data)
            self.undo.append((path, old))
        return path

    def files(self) -> None:
        """Let the repository, the pins and all other files be as they shall."""
        if self.repository:
            self.put(SOURCES, apt_state.source(self.repository["url"], self.key()))
        if self.pins:
            stale = apt_state.released(self.packages(), self.pins, apt_state.own_pins(name=self.settings["name"]))
            for name in stale:
                self.before[f"hold {name}"], self.after[f"hold {name}"] = "held\n", ""
            if not self.module.check_mode:
                self.hold(stale, word="install")
                self.loose = stale
            self.put(f"/etc/apt/preferences.d/onprem-torch-{self.settings['name']}.pref", apt_state.preferences(self.pins))
        for path, content in (self.settings["files"] or {}).items():
            self.put(path, content)

    def foreign_holds(self) -> None:
        """Refuse to change what somebody else holds."""
        found = apt_state.foreign_holds(self.packages(), self.settings["packages"] or [], self.pins, apt_state.own_pins())
        if found:
            text = ", ".join(f"{name} is held at {version}, but {wanted} is wanted" for name, version, wanted in found)
            names = " ".join(name for name, _version, _wanted in found)
            self.fail(f"{text}, and the hold is somebody else's; release it on the node (apt-mark unhold {names}), or set the version that it is held at")

    def apply(self) -> None:
        """Let changed files count, those of a run that was killed too."""
        for folder, words in APPLY.items():
            note = os.path.join(PENDING, folder.replace("/", "_"))
            if not os.path.exists(note) or self.module.check_mode:
                continue
            if self.module.get_bin_path(words[0], opt_dirs=["/usr/sbin", "/sbin"]):
                code, out, err = self.module.run_command(words)
                if code:
                    reason = " ".join((err or out).split())[-300:]
                    self.fail(f"{' '.join(words)} failed after a file in {folder} changed ({reason}); repair that and run this again")
            os.unlink(note)

    def heal(self) -> None:
        """Finish what an interrupted dpkg left half done."""
        broken = apt_state.broken(self.packages())
        if not broken and not apt_state.interrupted():
            return
        self.result["healed"] = broken or ["dpkg's journal"]
        self.before["interrupted packages"], self.after["interrupted packages"] = "\n".join(broken) + "\n", ""
        if self.module.check_mode:
            return
        with open(LOCK, "w", encoding="utf-8") as lock:
            self.wait_for(lock)
            environment = {**ENVIRONMENT, "DPKG_FRONTEND_LOCKED": "1"}
            self.module.run_command(["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"], environ_update=environment)
        if apt_state.broken(self.packages()):
            self.release()
            self.refresh(["update"])
            code, text = self.apt(["install", "--fix-broken", "--yes", *self.options()])
            left = apt_state.broken(self.packages())
            if left:
                # A package that was half unpacked has to be unpacked again.
                code, text = self.apt(["install", "--reinstall", "--yes", *self.options(), *left])
                left = apt_state.broken(self.packages())
            if left:
                self.fail(
                    f"the packages {', '.join(left)} are broken and dpkg --configure -a and apt-get --fix-broken do not "
                    f"repair them ({apt_state.complaint(text) if code else 'they stay half installed'}); repair them by hand"
                )

    def wait_for(self, lock: t.IO[str]) -> None:
        """Take dpkg's lock, which another program may hold for a while."""
        end = time.monotonic() + self.module.params["lock_timeout"]
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > end:
                    self.fail(
                        f"another program has held dpkg's lock for {self.module.params['lock_timeout']} s; "
                        "wait until it is done (ps -e | grep -E 'apt|dpkg'), then run this again"
                    )
                time.sleep(0.5)

    def options(self) -> list[str]:
        """Return apt-get's options for every installation."""
        return [
            "--no-install-recommends",
            "--allow-downgrades",
            "--allow-change-held-packages",
            *("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"),
        ]

    def hold(self, names: t.Sequence[str], word: str = "hold") -> None:
        """Put packages on hold, or release them with the word C(install)."""
        if names:
            text = "".join(f"{name} {word}\n" for name in names)
            code, _out, err = self.module.run_command(["dpkg", "--set-selections"], data=text)
            if code:
                self.fail(f"dpkg cannot {'hold' if word == 'hold' else 'release'} {', '.join(names)} ({err.strip()}); try it by hand")

    def release(self) -> None:
        """Release all packages that the pins name; they are held again in the end, or by a failure."""
        state = self.packages()
        mine = [name for name in apt_state.family(state, self.pins) if state[name]["want"] == "hold"]
        self.hold(mine, word="install")
        self.loose += mine

    def update(self) -> None:
        """Read the repository's list; a repository that cannot be read or verified is an error."""
        if not self.repository:
            return
        only = ["-o", f"Dir::Etc::SourceList={SOURCES}", "-o", "Dir::Etc::SourceParts=/dev/null"]
        code, text = self.refresh([*only, "-o", "APT::Get::List-Cleanup=0", "-o", "APT::Update::Error-Mode=any", "update"])
        if code or apt_state.failed_update(text, self.repository["url"]):
            self.fail(
                f"the repository {self.repository['url']} cannot be used ({apt_state.complaint(text)}); "
                "let this node reach it, or set cuda_repository_url and its key to one that it can use"
            )

    def versions(self, wanted: t.Sequence[t.Mapping[str, str]], strict: bool) -> list[str]:
        """Return ``name=version`` of packages with the newest version that fits; what is not on offer is an error."""
        _code, out, _err = self.module.run_command(["apt-cache", "madison", *[entry["name"] for entry in wanted]], environ_update=ENVIRONMENT)
        offer = apt_state.parse_madison(out)
        chosen = []
        for entry in wanted:
            fitting = [version for version in offer.get(entry["name"], []) if apt_state.fits(version, entry["version"])]
            if fitting:
                chosen.append(f"{entry['name']}={fitting[0]}" if entry["version"] else entry["name"])
            elif strict and entry["name"].startswith("linux-headers-"):
                self.fail(
                    f"this node's apt sources have no {entry['name']}, which DKMS needs for a kernel that is installed; "
                    "install the newest kernel (apt-get full-upgrade), reboot into it and run this again"
                )
            elif strict:
                have = ", ".join(offer.get(entry["name"], [])[:5]) or "no version of it"
                where = self.repository.get("url") or "this node's apt sources"
                self.fail(
                    f"{where} has no {entry['name']} {entry['version']} (it has {have}); "
                    "choose a version that it has, or another repository"
                )
        return chosen

    def room(self, installs: t.Mapping[str, str]) -> None:
        """Check that the disk has room for what will be downloaded and unpacked."""
        names = [f"{name}={version}" for name, version in installs.items()]
        _code, out, _err = self.module.run_command(["apt-cache", "show", *names], environ_update=ENVIRONMENT)
        download, on_disk = apt_state.parse_sizes(out)
        for folder, needed in (("/var/cache/apt", download), ("/usr", on_disk)):
            state = os.statvfs(folder)
            free = state.f_bavail * state.f_frsize
            if free < needed:
                self.fail(
                    f"{folder} has {free // MIB} MiB free, but {needed // MIB} MiB are needed for {self.settings['name']}; free some space"
                )

    def install(self) -> None:
        """Bring every package to its version: those that are wanted, and those that a pin names."""
        state = self.packages()
        wanted = apt_state.lacking(state, self.settings["packages"] or [])
        names = {entry["name"] for entry in wanted}
        torn = [
            {"name": name, "version": version}
            for name, version in apt_state.family(state, self.pins).items()
            if name not in names and not apt_state.fits(state[name]["version"], version)
        ]
        if not wanted and not torn:
            return
        for entry in [*wanted, *torn]:
            old = apt_state.installed(state, entry["name"])
            self.before[f"package {entry['name']}"] = f"{old}\n" if old else ""
            self.after[f"package {entry['name']}"] = f"{entry['version'] or 'any version'}\n"
            self.result["installed"][entry["name"]] = entry["version"]
        if self.module.check_mode:
            return
        self.update()
        self.versions(apt_state.lacking(state, self.settings["further"] or []), strict=True)
        # apt removes nothing that is on hold, such as the other kind of kernel modules.
        self.release()
        code, text = self.simulate(wanted, torn)
        if code:
            # Dependencies come from the distribution, whose lists may be old or missing.
            self.refresh(["update"])
            code, text = self.simulate(wanted, torn)
        if code:
            self.fail(f"apt cannot install {self.settings['name']} ({apt_state.complaint(text)}); correct what it names, nothing was installed")
        installs, removes = apt_state.parse_simulation(text)
        foreign = [name for name in removes if name not in apt_state.family(state, self.pins)]
        if foreign:
            self.fail(
                f"installing {self.settings['name']} would remove {', '.join(foreign)}; remove them yourself if nobody needs them"
            )
        self.room(installs)
        self.undo.clear()
        words = ["install", "--yes", *self.options(), *self.chosen]
        code, text = self.apt(words)
        if code and re.search(r"404|Failed to fetch", text):
            self.refresh(["update"])
            code, text = self.apt(words)
        if code:
            self.holds()
            self.fail(f"apt cannot install {self.settings['name']} ({apt_state.complaint(text)}); correct what it names and run this again")
        self.result["installed"] = installs
        self.result["removed"] = removes

    def simulate(self, wanted: t.Sequence[dict[str, str]], torn: t.Sequence[dict[str, str]]) -> tuple[int, str]:
        """Choose exact versions and let apt say what it would do."""
        if len(self.versions(wanted, strict=False)) < len(wanted):
            self.refresh(["update"])
        self.chosen = [*self.versions(wanted, strict=True), *self.versions(torn, strict=False)]
        return self.apt(["install", "--simulate", *self.options(), *self.chosen])

    def holds(self) -> None:
        """Hold everything that the pins name."""
        self.loose = []
        state = self.packages()
        loose = [name for name in apt_state.family(state, self.pins) if state[name]["want"] != "hold"]
        if not loose:
            return
        self.result["held"] = loose
        for name in loose:
            self.before.setdefault(f"hold {name}", "")
            self.after[f"hold {name}"] = "held\n"
        if not self.module.check_mode:
            self.hold(loose)

    def reboot_reason(self) -> str:
        """Return why the node needs a reboot for the kernel module that is installed."""
        settings = self.settings
        mine = apt_state.family(self.packages(), self.pins)
        asked = [name for name in driver_state.asking() if name in mine]
        found = driver_state.kernel(settings["kernel_module"])
        return driver_state.reboot_reason(settings["kernel_module"], settings["kernel_module_version"], settings["kernel_module_flavour"], found, asked)

    def load(self, name: str) -> str:
        """Load a kernel module and return why that does not work; a module that Secure Boot refuses is an error."""
        if os.path.isdir(f"/sys/module/{name.replace('-', '_')}") or self.module.check_mode:
            return ""
        code, _out, err = self.module.run_command(["modprobe", name])
        refusal = driver_state.refusal(name, err) if code else ""
        if refusal:
            self.fail(refusal)
        if code:
            return f"the kernel module {name} cannot be loaded ({err.strip() or 'no reason was given'})"
        self.before[f"kernel module {name}"], self.after[f"kernel module {name}"] = "", "loaded\n"
        return ""

    def kernel(self) -> None:
        """Load the kernel modules, or say why a reboot is needed."""
        name = self.settings["kernel_module"]
        if not name:
            return
        reason = self.reboot_reason()
        # A container has its host's kernel.
        own = not driver_state.kernel(name).container and not self.module.check_mode
        if reason and own:
            # The reboot has to find the module that it is for.
            _code, _out, err = self.module.run_command(["modprobe", "--dry-run", name])
            refusal = driver_state.refusal(name, err)
            if refusal:
                self.fail(refusal)
        if not reason and own:
            reason = self.load(name) or self.reboot_reason()
            for further in [] if reason else self.settings["modules"] or []:
                problem = self.load(further)
                if problem:
                    self.fail(f"{problem}; look at dmesg")
        self.result["reboot_reason"] = reason
        if self.module.params["loaded"] and reason:
            self.fail(f"{name} {self.settings['kernel_module_version']} does not run after the reboot ({reason}); look at dkms status and dmesg")

    def services(self) -> None:
        """Enable the units, and start them once the module runs."""
        units = self.settings["services"] or []
        if not units:
            return
        code, out, _err = self.module.run_command(["systemctl", "show", "--property=Id,LoadState,UnitFileState,ActiveState", *units])
        if code:
            return
        module = self.settings["kernel_module"]
        runs = not module or os.path.isdir(f"/sys/module/{module}")
        for paragraph in out.split("\n\n"):
            fields = dict(line.partition("=")[::2] for line in paragraph.splitlines() if "=" in line)
            if fields.get("LoadState") != "loaded":
                continue
            words = []
            if fields["UnitFileState"] in ("disabled", "linked"):
                words.append("enable")
            if runs and fields["ActiveState"] in ("inactive", "failed") and not self.result["reboot_reason"]:
                words.append("start")
            for word in words:
                self.before.setdefault(f"unit {fields['Id']}", "")
                self.after[f"unit {fields['Id']}"] = self.after.get(f"unit {fields['Id']}", "") + f"{word}\n"
                if self.module.check_mode:
                    continue
                code, _out, err = self.module.run_command(["systemctl", word, fields["Id"]])
                if code:
                    self.fail(f"{fields['Id']} cannot be {word}ed ({err.strip()}); look at journalctl -u {fields['Id']}")

    def run(self) -> None:
        """Do it all, in the order in which it can be interrupted and done again."""
        if not os.path.exists(apt_state.STATUS):
            self.fail("this node has no dpkg, but Debian or Ubuntu was expected; set nvidia_driver_manage: false, cuda_toolkit: false")
        self.heal()
        self.foreign_holds()
        self.files()
        self.install()
        self.holds()
        self.apply()
        self.kernel()
        self.services()
        changed = {key for key in self.after if self.before.get(key, "") != self.after[key]}
        diff = [{"before_header": key, "after_header": key, "before": self.before.get(key, ""), "after": self.after[key]} for key in sorted(changed)]
        self.module.exit_json(changed=bool(changed), diff=diff, **self.result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "settings": {
                "type": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "repository": {
                        "type": "dict",
                        "default": {},
                        "options": {
                            "url": {"type": "str"},
                            "key_url": {"type": "str", "no_log": False},
                            "key_fingerprint": {"type": "str", "no_log": False},
                        },
                    },
                    "packages": {
                        "type": "list",
                        "elements": "dict",
                        "default": [],
                        "options": {"name": {"type": "str", "required": True}, "version": {"type": "str", "default": ""}},
                    },
                    "further": {
                        "type": "list",
                        "elements": "dict",
                        "default": [],
                        "options": {"name": {"type": "str", "required": True}, "version": {"type": "str", "default": ""}},
                    },
                    "pins": {
                        "type": "list",
                        "elements": "dict",
                        "default": [],
                        "options": {
                            "packages": {"type": "list", "elements": "str", "required": True},
                            "version": {"type": "str", "required": True},
                        },
                    },
                    "files": {"type": "dict", "default": {}},
                    "services": {"type": "list", "elements": "str", "default": []},
                    "kernel_module": {"type": "str", "default": ""},
                    "kernel_module_version": {"type": "str", "default": ""},
                    "kernel_module_flavour": {"type": "str", "default": ""},
                    "modules": {"type": "list", "elements": "str", "default": []},
                },
            },
            "loaded": {"type": "bool", "default": False},
            "lock_timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    Node(module).run()


if __name__ == "__main__":
    main()
