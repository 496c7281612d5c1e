#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nspawn_host_root
short_description: Let lab nodes boot from this machine's own root file system
version_added: 0.1.0
description:
  - Makes a layer that lies above this machine's root file system in the nodes' overlays, out of a folder of Debian
    packages. Nodes then have systemd, SSH and their own settings, and below them all that this machine has, such as its
    driver and its PyTorch.
  - Finds this machine's GPUs, and the mounts with the driver and other paths that nodes have to see as well.
  - Lets this machine itself use programs of these packages that it lacks.
  - Needs no network and no systemd, changes no file of the machine outside O(state_dir), and installs nothing.
options:
  state:
    description: V(absent) removes the layer and what O(state_dir) was mounted with.
    type: str
    choices: [present, absent]
    default: present
  state_dir:
    description:
      - Folder of the lab. An overlay cannot have its upper folder below its lower one, so a tmpfs is mounted there where
        the folder lies on the root file system itself.
    type: path
    required: true
  packages:
    description: Folder with Debian packages, as C(make bundle) makes it.
    type: path
    default: ""
  paths:
    description: Paths of this machine that nodes must see, such as a Python environment.
    type: list
    elements: path
    default: []
  user:
    description: User whom the nodes get, who may use sudo without a password.
    type: str
    default: ops
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says whether the layer would be made.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Let the nodes boot from this machine's root file system
  onprem.torch.nspawn_host_root:
    state_dir: /run/lab
    packages: build/bundle/packages
    paths: [/opt/pytorch]
"""

RETURN = r"""
layers:
  description: Layers of the nodes' root file system, topmost first.
  returned: when present
  type: list
  elements: str
programs:
  description: Folder with the programs that this machine lacked.
  returned: when present
  type: str
binds:
  description: Mounts of this machine that the nodes get, read-only.
  returned: when present
  type: list
  elements: str
gpus:
  description: Device files of the GPUs, by number.
  returned: when present
  type: list
  elements: str
control_devices:
  description: Device files that every node with a GPU needs.
  returned: when present
  type: list
  elements: str
"""

import glob
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import host_root, nspawn
from ansible_collections.onprem.torch.plugins.module_utils.node_facts import read_text

FORMAT = 1  # counts up when the layer's content changes with the same packages
# Asks the loader itself where the driver's libraries are.
PROBE = "import ctypes; ctypes.CDLL('libcuda.so.1'); ctypes.CDLL('libnvidia-ml.so.1'); print(open('/proc/self/maps').read())"
DRIVER_LIBRARIES = ("libcuda.so", "libnvidia-ml.so")
JOURNAL = "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n"


class HostRoot:
    """The layer above this machine's root file system."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.folder = os.path.join(self.params["state_dir"], "host")
        self.layer = os.path.join(self.folder, "layer")
        self.programs = os.path.join(self.folder, "bin")
        self.triplet = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"

    def packages(self) -> list[str]:
        """Return the package files."""
        found = sorted(glob.glob(os.path.join(self.params["packages"], "*.deb")))
        if not found:
            self.module.fail_json(
                msg=f"{self.params['packages'] or 'packages'} holds no Debian packages (*.deb), from which nodes get systemd and SSH; "
                "run make bundle on a machine with network, and set lab_bundle to its folder"
            )
        return found

    def driver_files(self) -> list[str]:
        """Return the real paths of the driver's libraries and of nvidia-smi; empty without a driver."""
        answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
        found = host_root.loaded_paths(answer.stdout, DRIVER_LIBRARIES) if answer.returncode == 0 else []
        program = shutil.which("nvidia-smi")
        return found + ([os.path.realpath(program)] if program and found else [])

    def needed_paths(self) -> list[str]:
        """Return the real paths that nodes must see: the driver, what was asked for, and Pythons behind environments."""
        paths = self.driver_files()
        for path in self.params["paths"]:
            if not os.path.exists(path):
                self.module.fail_json(msg=f"{path} does not exist on this machine, but nodes are to see it; correct lab_host_paths")
            python = os.path.join(path, "bin/python3")
            paths += [os.path.realpath(path), *([os.path.realpath(python)] if os.path.exists(python) else [])]
        return paths

    def wanted(self, packages: list[str]) -> str:
        """Return what tells one layer from another."""
        files = [[os.path.basename(path), os.path.getsize(path)] for path in packages]
        accounts = [read_text(f"/etc/{name}") for name in ("passwd", "group", "shadow")]
        recipe = [FORMAT, files, self.params["user"], self.driver_files(), accounts]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def mount(self) -> None:
        """Put the lab's folder on a file system of its own, where it lies on the root file system."""
        path = self.params["state_dir"]
        os.makedirs(path, exist_ok=True)
        if os.stat(path).st_dev != os.stat("/").st_dev:
            return
        returncode, _stdout, stderr = self.module.run_command(["mount", "-t", "tmpfs", "-o", "mode=0755,size=50%", "onprem-lab", path])
        if returncode != 0:
            self.module.fail_json(
                msg=f"no tmpfs can be mounted at {path}: {stderr.strip()}; set lab_state_dir to a folder on another file system"
            )

    def present(self) -> dict[str, object]:
        """Make the layer where it is missing. One that is made of something else stays: nodes may run on it."""
        packages = self.packages()
        self.layer = os.path.join(self.folder, f"layer-{self.wanted(packages)[:12]}")
        changed = not os.path.isdir(self.layer)
        if changed and not self.module.check_mode:
            self.mount()
            self.make(packages)
        gpus = host_root.gpu_files()
        return {
            "changed": changed,
            "layers": [self.layer, "/"],
            "programs": self.programs,
            "binds": host_root.binds(read_text("/proc/self/mountinfo"), self.needed_paths()),
            "gpus": gpus,
            "control_devices": [path for path in host_root.CONTROL_DEVICES if gpus and os.path.exists(path)],
        }

    def make(self, packages: list[str]) -> None:
        """Make the layer; it appears whole under its name or not at all."""
        final, self.layer = self.layer, f"{self.layer}.partial"
        shutil.rmtree(self.layer, ignore_errors=True)
        shutil.rmtree(self.programs, ignore_errors=True)
        for path in host_root.HIDDEN:
            os.makedirs(os.path.join(self.layer, path))
            os.setxattr(os.path.join(self.layer, path), "trusted.overlay.opaque", b"y")
        for path in packages:
            self.unpack(path)
        self.configure()
        self.link_driver()
        os.rename(self.layer, final)
        self.layer = final
        os.makedirs(self.programs)
        for name in host_root.PROGRAMS:
            program = host_root.program_in(self.layer, name)
            if program and not shutil.which(name):
                self.write(os.path.join(self.programs, name), host_root.wrapper(program, self.layer, self.triplet), 0o755)

    def unpack(self, package: str) -> None:
        """Unpack a package into the layer."""
        answer = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=False)
        if answer.returncode != 0:
            reason = answer.stderr.decode(errors="replace").strip()
            self.module.fail_json(msg=f"{package} cannot be unpacked: {reason}; make the bundle anew with make bundle")
        with tarfile.open(fileobj=io.BytesIO(answer.stdout)) as archive:
            members = {host_root.merged(member.name): member for member in archive.getmembers()}
            for name in host_root.wanted_members(list(members), lambda path: os.path.lexists(f"/{path}")):
                self.unpack_member(archive, members[name], os.path.join(self.layer, name))

    def unpack_member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        """Unpack a file, folder or link of a package."""
        if member.isdir():
            os.makedirs(path, exist_ok=True)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        if member.issym():
            os.symlink(member.linkname, path)
        elif member.islnk():
            os.link(os.path.join(self.layer, host_root.merged(member.linkname)), path)
        elif member.isfile():
            source = archive.extractfile(member)
            with open(path, "wb") as target:
                target.write(source.read() if source else b"")
            os.chmod(path, member.mode)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(path, mode)

    def configure(self) -> None:
        """Write accounts, units and settings that packages get from their installation scripts."""
        user = self.params["user"]
        etc = os.path.join(self.layer, "etc")
        made = host_root.accounts(read_text("/etc/passwd"), read_text("/etc/group"), read_text("/etc/shadow"), user)
        for name, text, mode in (("passwd", made.passwd, 0o644), ("group", made.group, 0o644), ("shadow", made.shadow, 0o600)):
            self.write(os.path.join(etc, name), text, mode)
        self.write(os.path.join(etc, "sudoers.d", user), f"{user} ALL=(ALL) NOPASSWD: ALL\n", 0o440)
        self.write(os.path.join(etc, "ssh/sshd_config"), host_root.SSHD)
        self.write(os.path.join(etc, "systemd/journald.conf.d/lab.conf"), JOURNAL)
        self.write(os.path.join(etc, "fstab"), "")
        for target, units in host_root.ENABLED.items():
            folder = os.path.join(etc, "systemd/system", target)
            os.makedirs(folder, exist_ok=True)
            for unit in units:
                if not os.path.lexists(os.path.join(folder, unit)):
                    os.symlink(f"/usr/lib/systemd/system/{unit}", os.path.join(folder, unit))
        for unit in nspawn.MASKED_UNITS:
            path = os.path.join(etc, "systemd/system", unit)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.lexists(path):
                os.symlink("/dev/null", path)
        if not os.path.exists("/usr/bin/python3"):
            os.makedirs(os.path.join(self.layer, "usr/bin"), exist_ok=True)
            os.symlink(os.path.realpath(sys.executable), os.path.join(self.layer, "usr/bin/python3"))

    def link_driver(self) -> None:
        """Let nodes find a driver that lies outside the folders in which the loader looks, without settings."""
        folders = (f"/usr/lib/{self.triplet}", f"/lib/{self.triplet}", "/usr/lib", "/lib", "/usr/lib64", "/lib64", "/usr/bin", "/bin")
        for path in self.driver_files():
            folder = os.path.dirname(path)
            if folder in folders:
                continue
            program = os.path.basename(path) == "nvidia-smi"
            target = os.path.join(self.layer, "usr/bin" if program else f"usr/lib/{self.triplet}")
            os.makedirs(target, exist_ok=True)
            for source in [path] if program else glob.glob(os.path.join(folder, "*.so*")):
                link = os.path.join(target, os.path.basename(source))
                if not os.path.lexists(link):
                    os.symlink(source, link)

    def absent(self) -> dict[str, object]:
        """Remove the layer and the tmpfs."""
        path = self.params["state_dir"]
        mounted = any(
            line.split(" - ")[-1].split()[:2] == ["tmpfs", "onprem-lab"] and line.split()[4] == os.path.realpath(path)
            for line in read_text("/proc/self/mountinfo").splitlines()
        )
        changed = mounted or os.path.isdir(self.folder)
        if changed and not self.module.check_mode:
            shutil.rmtree(self.folder, ignore_errors=True)
            if mounted:
                self.module.run_command(["umount", "--lazy", path], check_rc=True)
        return {"changed": changed}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "state_dir": {"type": "path", "required": True},
            "packages": {"type": "path", "default": ""},
            "paths": {"type": "list", "elements": "path", "default": []},
            "user": {"type": "str", "default": "ops"},
        },
        supports_check_mode=True,
    )
    if os.geteuid() != 0:
        module.fail_json(msg="root is needed to boot nodes; run the play as root or with sudo")
    module.exit_json(**getattr(HostRoot(module), module.params["state"])())


if __name__ == "__main__":
    main()
