#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nvidia_packages
short_description: Packages of one version that stay at it, with their repository, files and services
version_added: 0.1.0
description:
  - Brings NVIDIA packages to exact versions from a signed repository, pins and holds them, so that no upgrade of the
    system tears driver and libraries apart. Works on Debian and Ubuntu.
  - Repairs what an interrupted dpkg left behind before it does anything else.
  - One call does all of it, and with nothing to do asks only dpkg and systemd.
options:
  settings:
    description: What the node is brought to, as the plan decides it.
    type: dict
    required: true
    suboptions:
      name:
        description: Name of the set, which names its pins. Sets beside each other keep their own pins and holds.
        type: str
        required: true
      repository:
        description: C(url), C(suite) (default C(/)), C(key_url) (URL, or path on the node) and C(key_fingerprint) of its only key. Empty for none.
        type: dict
        default: {}
      packages:
        description: Packages, each with C(name) and C(version), a pattern such as C(580.159.03-*). An empty version allows any.
        type: list
        elements: dict
        default: []
      pins:
        description: What else belongs to the set, each with C(packages) (patterns of names) and C(version). It is pinned and held too.
        type: list
        elements: dict
        default: []
      files:
        description: Content of files by their path.
        type: dict
        default: {}
      services:
        description: Services that are enabled, and started where the kernel module is loaded.
        type: list
        elements: str
        default: []
      kernel_module:
        description: Kernel module that the packages bring. It is loaded where none of its name is, which can spare the reboot.
        type: str
        default: ""
      kernel_module_version:
        description: Version that it has to have, or its first numbers.
        type: str
        default: ""
  loaded:
    description: Whether to fail where the kernel module is not loaded in its version, as after a reboot.
    type: bool
    default: false
  lock_timeout:
    description: Seconds to wait for another package manager.
    type: int
    default: 300
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says what would change and changes nothing.
    support: full
  diff_mode:
    description: Shows files, versions and holds before and after.
    support: full
"""

EXAMPLES = r"""
- name: Keep NCCL at one version
  onprem.torch.nvidia_packages:
    settings:
      name: nccl
      repository:
        url: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/
        key_url: https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/3bf863cc.pub
        key_fingerprint: EB693B3035CD5710E231E123A4B469963BF863CC
      packages:
        - name: libnccl2
          version: 2.28.9-1+cuda13.0
"""

RETURN = r"""
packages:
  description: Version of each package of the set after the task (before it in check mode).
  returned: success
  type: dict
held:
  description: Packages on hold that belong to the set.
  returned: success
  type: list
  elements: str
removed:
  description: Packages that apt removed since they conflict with the set.
  returned: success
  type: list
  elements: str
healed:
  description: Whether an interrupted installation was completed first.
  returned: success
  type: bool
reboot_reason:
  description: Why the node has to be rebooted; empty where it has not.
  returned: success
  type: str
missing_services:
  description: Services that no installed package brings.
  returned: success
  type: list
  elements: str
"""

import os
import re
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_url
from ansible_collections.onprem.torch.plugins.module_utils import apt, openpgp

KEYRINGS = "/etc/apt/keyrings"
SOURCES = "/etc/apt/sources.list.d"
PREFERENCES = "/etc/apt/preferences.d"
REPOSITORY = "onprem-torch-nvidia"
# What makes a changed file count, by its folder.
APPLY = {
    "/etc/modprobe.d": ["update-initramfs", "-u"],
    "/etc/systemd/logind.conf.d": ["systemctl", "try-reload-or-restart", "systemd-logind.service"],
}
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "NEEDRESTART_SUSPEND": "1",
    "LC_ALL": "C",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


class Set:
    """A set of packages on this node."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.settings: dict[str, t.Any] = module.params["settings"]
        self.repository: dict[str, str] = self.settings["repository"]
        self.packages: list[dict[str, str]] = self.settings["packages"]
        self.kernel_module = self.settings["kernel_module"]
        self.changed = False
        self.before: list[str] = []
        self.after: list[str] = []
        self.removed: list[str] = []
        self.healed = False

    def run(self, *words: str) -> tuple[int, str, str]:
        """Run a command and return its status and what it printed."""
        answer: tuple[int, str, str] = self.module.run_command(list(words), environ_update=ENVIRONMENT)
        return answer

    def apt_get(self, *words: str) -> tuple[int, str]:
        """Run apt-get, waiting for another package manager to end."""
        status, out, err = self.run("apt-get", "-o", f"DPkg::Lock::Timeout={self.params['lock_timeout']}", *words)
        return status, out + err

    def fail(self, text: str) -> None:
        """Fail with a sentence."""
        self.module.fail_json(msg=text)

    def note(self, before: str, after: str) -> None:
        """Remember a difference."""
        self.changed = True
        if before:
            self.before.append(before)
        if after:
            self.after.append(after)

    def installed(self) -> dict[str, apt.Installed]:
        """Return all packages that dpkg knows."""
        return apt.parse_installed(self.run("dpkg-query", "--show", f"--showformat={apt.FORMAT}")[1])

    # -- what an interrupted run left -------------------------------------------------------------------------------

    def heal(self, known: t.Mapping[str, apt.Installed]) -> bool:
        """Complete what a killed dpkg left; return whether there was anything."""
        journal = [name for name in os.listdir("/var/lib/dpkg/updates") if name.isdigit()] if os.path.isdir("/var/lib/dpkg/updates") else []
        broken = sorted(name for name, package in known.items() if not package.whole)
        if not journal and not broken:
            return False
        self.healed = True
        self.note(f"interrupted: {', '.join(broken) or 'dpkg'}", "")
        if self.module.check_mode:
            return True
        status, out, err = self.run("dpkg", "--force-confold", "--configure", "-a")
        more, text = self.apt_get("--fix-broken", "--yes", "--allow-downgrades", "--allow-change-held-packages", "install")
        # What was unpacked but never completely can be in neither's hands; the installation that follows replaces it.
        left = [name for name, package in self.installed().items() if not package.whole]
        mine = {package["name"] for package in self.packages}
        if (status or more) and any(name not in mine for name in left):
            self.fail(
                f"an interrupted installation ({', '.join(left) or 'dpkg'}) cannot be completed: {apt.install_error(err + out + text)}; "
                "run dpkg --configure -a on the node and repair what it names"
            )
        return True

    # -- files ------------------------------------------------------------------------------------------------------

    def read(self, path: str) -> t.Optional[bytes]:
        """Return the content of a file, None where there is none."""
        try:
            with open(path, "rb") as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def write(self, path: str, content: t.Optional[bytes]) -> None:
        """Write a file whole or not at all; None removes it."""
        if content is None:
            if os.path.exists(path):
                os.unlink(path)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.onprem-partial"
        with open(partial, "wb") as stream:
            stream.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)

    def place(self, path: str, content: bytes, show: bool = True) -> bool:
        """Bring a file to a content; return whether it had another one."""
        old = self.read(path)
        if old == content:
            return False
        self.note(f"{path}\n{(old or b'').decode('utf-8', 'replace')}" if old is not None and show else "", f"{path}\n{content.decode('utf-8', 'replace') if show else ''}")
        if not self.module.check_mode:
            self.write(path, content)
        return True

    def apply(self, path: str) -> None:
        """Make a changed file count, where the program that does so is installed."""
        words = APPLY.get(os.path.dirname(path))
        if not words or not self.module.get_bin_path(words[0], opt_dirs=["/usr/sbin", "/sbin"]):
            return
        status, out, err = self.run(*words)
        if status != 0:
            self.fail(f"{' '.join(words)} failed after {path} changed: {(err or out).strip()[-300:]}")

    def keyring_path(self) -> str:
        """Return the path of the repository's keyring."""
        return f"{KEYRINGS}/{REPOSITORY}.gpg"

    def sources_path(self) -> str:
        """Return the path of the repository's source."""
        return f"{SOURCES}/{REPOSITORY}.sources"

    def key_is_right(self, data: bytes) -> str:
        """Return why a key is not the expected one; an empty text where it is."""
        wanted = re.sub(r"\s", "", self.repository.get("key_fingerprint") or "").upper()
        try:
            found = openpgp.fingerprints(data)
        except openpgp.NoKeyError as error:
            return f"is no OpenPGP key ({error})"
        return "" if found == [wanted] else f"has the fingerprint {', '.join(found)}, but {wanted or 'none'} was expected"

    def fetch_key(self) -> bytes:
        """Return the repository's key from its URL or path."""
        place = self.repository["key_url"]
        if place.startswith("/"):
            data = self.read(place)
            if data is None:
                self.fail(f"the repository's key {place} is not on the node; correct cuda_repository_key_url")
        else:
            answer, info = fetch_url(self.module, place, timeout=30)
            if info["status"] != 200:
                self.fail(
                    f"the repository's key {place} cannot be read ({info.get('msg', 'no answer')}); check the node's network, "
                    "or set cuda_repository_url or cluster_mirror to a repository that it reaches"
                )
            data = answer.read()
        wrong = self.key_is_right(data or b"")
        if wrong:
            self.fail(f"the repository's key {place} {wrong}; nothing was changed: correct cuda_repository_key_fingerprint only after checking who changed the key")
        return openpgp.dearmor(data or b"")

    def provide_repository(self) -> dict[str, t.Optional[bytes]]:
        """Bring key and source into place and return what was there, by path, where that changed."""
        if not self.repository or not self.packages:
            return {}
        undo: dict[str, t.Optional[bytes]] = {}
        path = self.keyring_path()
        old = self.read(path)
        if old is None or self.key_is_right(old):
            if self.module.check_mode:
                self.note("", path)
            elif self.place(path, self.fetch_key(), show=False):
                undo[path] = old
        path = self.sources_path()
        old = self.read(path)
        if self.place(path, apt.sources(self.repository, self.keyring_path()).encode()):
            undo[path] = old
        return undo

    def update(self, undo: t.Mapping[str, t.Optional[bytes]]) -> None:
        """Read what the repository offers; take its new files back where it cannot be used."""
        if not self.repository:
            return
        url = self.repository["url"]
        status, text = self.apt_get(
            "-o", f"Dir::Etc::sourcelist={self.sources_path()}", "-o", "Dir::Etc::sourceparts=-", "-o", "APT::Get::List-Cleanup=0",
            "-o", "APT::Update::Error-Mode=any", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "update",
        )
        if status == 0:
            return
        for path, content in undo.items():
            self.write(path, content)
        lock = apt.install_error(text) if "Could not get lock" in text else ""
        why = lock or apt.update_error(text, url)
        self.fail(f"{why}; check cuda_repository_url, cuda_repository_key_url and the node's network. Nothing was installed.")

    # -- packages ---------------------------------------------------------------------------------------------------

    def wrong(self, known: t.Mapping[str, apt.Installed]) -> list[dict[str, str]]:
        """Return the packages that are not completely there in their version."""
        return [
            package
            for package in self.packages
            if package["name"] not in known
            or not known[package["name"]].whole
            or not apt.matches(known[package["name"]].version, package["version"])
        ]

    def mine(self, known: t.Mapping[str, apt.Installed]) -> list[str]:
        """Return the installed packages that the set holds."""
        own = [package["name"] for package in self.packages if package["version"] and package["name"] in known]
        return sorted({*own, *apt.covered(known, self.settings["pins"])})

    def foreign_holds(self, known: t.Mapping[str, apt.Installed], wrong: t.Sequence[t.Mapping[str, str]], first: bool) -> None:
        """Fail where somebody else holds a package at another version."""
        held = [f"{package['name']} {known[package['name']].version}" for package in wrong if package["name"] in known and known[package["name"]].held]
        if held and first:
            self.fail(
                f"{', '.join(held)} is on hold, but not by this collection, and another version is wanted; "
                "run apt-mark unhold for it on the node, or set the version that it is held at"
            )

    def resolve(self, wrong: t.Sequence[t.Mapping[str, str]]) -> list[str]:
        """Return the words ``name=version`` for apt-get; fail where the repositories lack one."""
        offers = apt.parse_madison(self.run("apt-cache", "madison", *[package["name"] for package in wrong])[1])
        words, lacking = [], []
        for package in wrong:
            versions = offers.get(package["name"], [])
            fitting = [version for version in versions if apt.matches(version, package["version"])]
            if fitting:
                words.append(f"{package['name']}={fitting[0]}")
            else:
                there = ", ".join(versions[:4]) or "no version"
                lacking.append(f"{package['name']} {package['version']} (on offer: {there})".replace("  ", " "))
        if lacking:
            where = self.repository.get("url") or "the node's repositories"
            self.fail(f"{where} lacks {'; '.join(lacking)}; set a version that it has, or another cuda_repository_url")
        return words

    def refresh_system(self) -> None:
        """Read what the system's own repositories offer, for dependencies. One that fails is its owner's concern."""
        self.apt_get("update")

    def install(self, wrong: t.Sequence[t.Mapping[str, str]], undo: t.Mapping[str, t.Optional[bytes]]) -> None:
        """Install the packages that are wrong, with the others of the set, so that apt solves them together."""
        self.update(undo)
        words = self.resolve(wrong)
        arguments = (
            "--yes", "--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages",
            "-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
        )
        status, text = self.apt_get("--simulate", *arguments, "install", *words)
        if status != 0:
            self.refresh_system()
            status, text = self.apt_get("--simulate", *arguments, "install", *words)
        if status != 0:
            self.fail(f"apt cannot install {', '.join(words)}: {apt.install_error(text)}")
        self.removed = sorted(re.findall(r"^Remv (\S+)", text, re.M))
        status, text = self.apt_get(*arguments, "install", *words)
        if status != 0:
            self.fail(f"apt could not install {', '.join(words)}: {apt.install_error(text)}; run the play again to complete it")

    def hold(self, known: t.Mapping[str, apt.Installed]) -> None:
        """Hold what belongs to the set."""
        names = [name for name in self.mine(known) if not known[name].held]
        if not names:
            return
        self.note("", "".join(f"hold {name}\n" for name in names))
        if not self.module.check_mode:
            status, out, err = self.run("apt-mark", "hold", *names)
            if status != 0:
                self.fail(f"{', '.join(names)} cannot be put on hold: {(err or out).strip()}")

    # -- services, driver -------------------------------------------------------------------------------------------

    def serve(self) -> list[str]:
        """Enable the services and start them where the driver is loaded; return those that do not exist."""
        names = self.settings["services"]
        if not names:
            return []
        shown = self.run("systemctl", "show", "--property=Id,LoadState,UnitFileState,ActiveState", *names)[1]
        missing = []
        for block in shown.strip().split("\n\n"):
            unit = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            name = unit.get("Id", "")
            if unit.get("LoadState") in ("not-found", "masked"):
                missing.append(name)
                continue
            enable = unit.get("UnitFileState") == "disabled"
            start = bool(self.loaded()) and unit.get("ActiveState") not in ("active", "activating")
            for wanted, word in ((enable, "enable"), (start, "start")):
                if not wanted:
                    continue
                self.note("", f"{word} {name}")
                if self.module.check_mode:
                    continue
                status, out, err = self.run("systemctl", word, name)
                if status != 0:
                    self.fail(f"{name} does not {word}: {(err or out).strip()}; see journalctl -u {name} on the node")
        return missing

    def loaded(self) -> str:
        """Return the version of the loaded kernel module; empty where none is loaded."""
        name = self.kernel_module or "nvidia"
        return (self.read(f"/sys/module/{name}/version") or b"").decode().strip()

    def load(self) -> str:
        """Load the kernel module where none is loaded; return why the node has to be rebooted."""
        if not self.kernel_module:
            return ""
        wanted = self.settings["kernel_module_version"]
        loaded = self.loaded()
        if loaded and (loaded == wanted or loaded.startswith(f"{wanted}.") or not wanted):
            return ""
        if loaded:
            return f"{self.kernel_module} {loaded} is loaded, but {wanted} is installed"
        if os.path.isdir("/sys/module/nouveau"):
            return "nouveau holds the GPUs"
        if self.module.check_mode:
            return ""
        status, out, err = self.run("modprobe", self.kernel_module)
        if status != 0:
            words = " ".join((err or out).split()) or "modprobe gave no reason"
            return f"{self.kernel_module} cannot be loaded ({words})"
        self.note("", f"load {self.kernel_module}")
        return ""

    def check_loaded(self, reason: str) -> None:
        """Fail where the kernel module is still not the wanted one."""
        if self.params["loaded"] and reason:
            self.fail(f"after the reboot {reason}; look at dkms status and journalctl -k on the node (Secure Boot refuses modules whose key is not enrolled)")

    def bring(self) -> dict[str, t.Any]:
        """Bring the node to the wanted state and return what the module answers."""
        known = self.installed() if self.packages else {}
        if self.packages and self.heal(known) and not self.module.check_mode:
            known = self.installed()
        wrong = self.wrong(known)
        first = not os.path.exists(f"{PREFERENCES}/onprem-torch-{self.settings['name']}.pref")
        self.foreign_holds(known, wrong, first)
        undo = self.provide_repository()
        pins = [(package["name"], package["version"]) for package in self.packages if package["version"]]
        pins += [(" ".join(rule["packages"]), rule["version"]) for rule in self.settings["pins"]]
        if pins:
            path = f"{PREFERENCES}/onprem-torch-{self.settings['name']}.pref"
            old = self.read(path)
            if self.place(path, apt.preferences(pins).encode()):
                undo[path] = old
        for package in wrong:
            have = known[package["name"]].version if package["name"] in known else ""
            self.note(f"{package['name']} {have}" if have else "", f"{package['name']} {package['version']}".strip())
        if wrong and not self.module.check_mode:
            self.install(wrong, undo)
            known = self.installed()
            still = [f"{package['name']} {package['version']}" for package in self.wrong(known)]
            if still:
                self.fail(f"apt reported success, but {', '.join(still)} is not installed; look at apt-cache policy on the node")
        self.hold(known)
        for path, content in self.settings["files"].items():
            if self.place(path, content.encode()) and not self.module.check_mode:
                self.apply(path)
        reboot = self.load()
        self.check_loaded(reboot)
        missing = self.serve()
        after = self.installed() if self.packages and self.changed and not self.module.check_mode else known
        return {
            "changed": self.changed,
            "packages": {package["name"]: after[package["name"]].version if package["name"] in after else "" for package in self.packages},
            "held": [name for name in self.mine(after) if after[name].held],
            "removed": self.removed,
            "healed": self.healed,
            "reboot_reason": reboot,
            "missing_services": missing,
            "diff": {"before": "\n".join(self.before) + "\n", "after": "\n".join(self.after) + "\n"} if self.changed else {"before": "", "after": ""},
        }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "settings": {
                "type": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "repository": {"type": "dict", "default": {}},
                    "packages": {"type": "list", "elements": "dict", "default": []},
                    "pins": {"type": "list", "elements": "dict", "default": []},
                    "files": {"type": "dict", "default": {}},
                    "services": {"type": "list", "elements": "str", "default": []},
                    "kernel_module": {"type": "str", "default": ""},
                    "kernel_module_version": {"type": "str", "default": ""},
                },
            },
            "loaded": {"type": "bool", "default": False},
            "lock_timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    module.exit_json(**Set(module).bring())


if __name__ == "__main__":
    main()
