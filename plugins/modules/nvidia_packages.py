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
  run:
    description: The run that this is done for, which must still hold the node; set by the action plugin.
    type: dict
    default: {}
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
      refuse_distribution:
        description: Keep the distribution's own packages of the pinned names away, which may have the same version.
        type: bool
        default: false
      files:
        description: Text by path of files that shall have it.
        type: dict
        default: {}
      absent_files:
        description: Paths of files that shall not be there.
        type: list
        elements: str
        default: []
      disabled:
        description: Units that shall neither be enabled nor run.
        type: list
        elements: str
        default: []
      services:
        description: Units that shall be enabled, and run once the kernel module does.
        type: list
        elements: str
        default: []
      sizes:
        description: >-
          File systems that a unit gives their size, by the unit: C(path) and C(gib). It is started again where one has another
          size, so that a changed unit counts at once, after an interruption too.
        type: dict
        default: {}
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
  credentials:
    description: C(user:password) of repositories by URL; set by the action plugin.
    type: dict
    default: {}
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
  action:
    description: The action plugin hands over the user and password of a repository, and tells for which run this is done.
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

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import apt_state, node_lock, run_lease
from ansible_collections.onprem.torch.plugins.module_utils.packages_apt import Apt
from ansible_collections.onprem.torch.plugins.module_utils.packages_driver import Driver
from ansible_collections.onprem.torch.plugins.module_utils.packages_files import Files
from ansible_collections.onprem.torch.plugins.module_utils.packages_install import Installation
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run
from ansible_collections.onprem.torch.plugins.module_utils.packages_source import Source


def pin(run: Run, apt: Apt, files: Files) -> None:
    """Let the pins be as they shall; what they named before and do not any more is released."""
    if not run.pins:
        return
    stale = apt_state.released(apt.packages(), run.pins, apt_state.own_pins(name=run.settings["name"]))
    for name in stale:
        run.before[f"hold {name}"], run.after[f"hold {name}"] = "held\n", ""
    if not run.check:
        apt.hold(stale, word="install")
        # Beside what the healing has released.
        apt.loose += stale
    text = apt_state.preferences(run.pins, run.settings["refuse_distribution"])
    files.put(f"/{apt_state.PREFERENCES.format(name=run.settings['name'])}", text)


def bring(run: Run) -> None:
    """Do it all, in the order in which it can be interrupted and done again."""
    if not os.path.exists(apt_state.STATUS):
        run.fail("this node has no dpkg, but Debian or Ubuntu was expected; set nvidia_driver_manage: false, cuda_toolkit: false")
    files = Files(run)
    apt = Apt(run)
    installation = Installation(run, apt, files)
    driver = Driver(run, apt)
    apt.heal()
    installation.foreign_holds()
    Source(run, files).put()
    pin(run, apt, files)
    for path, content in (run.settings["files"] or {}).items():
        files.put(path, content)
    for path in run.settings["absent_files"] or []:
        files.remove(path)
    installation.install()
    apt.holds()
    files.apply()
    driver.kernel()
    driver.services()
    run.end()


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
                    "refuse_distribution": {"type": "bool", "default": False},
                    "files": {"type": "dict", "default": {}},
                    "absent_files": {"type": "list", "elements": "str", "default": []},
                    "disabled": {"type": "list", "elements": "str", "default": []},
                    "services": {"type": "list", "elements": "str", "default": []},
                    "sizes": {"type": "dict", "default": {}},
                    "kernel_module": {"type": "str", "default": ""},
                    "kernel_module_version": {"type": "str", "default": ""},
                    "kernel_module_flavour": {"type": "str", "default": ""},
                    "modules": {"type": "list", "elements": "str", "default": []},
                },
            },
            "credentials": {"type": "dict", "default": {}, "no_log": True},
            "loaded": {"type": "bool", "default": False},
            "lock_timeout": {"type": "int", "default": 300},
            "run": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    os.umask(0o022)  # apt reads keys and sources as a user of its own
    try:
        with run_lease.at_work(module.params["run"]):
            bring(Run(module))
    except node_lock.Busy as error:
        module.fail_json(msg=f"no package was changed: {error}")


if __name__ == "__main__":
    main()
