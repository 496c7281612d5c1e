#!/usr/bin/python
# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: nspawn_base
short_description: Build the root file system that lab nodes share
version_added: 0.1.0
description:
  - Builds a small Debian root file system with mmdebstrap, once for a distribution and set of packages.
  - It appears whole under its final name or not at all.
options:
  distribution:
    description: The distribution.
    type: str
    choices: [debian-12, debian-13]
    default: debian-12
  packages:
    description: Packages beyond the base system.
    type: list
    elements: str
    default: []
  mirror:
    description: Mirror to fetch from. Empty for mmdebstrap's choice.
    type: str
    default: ""
  user:
    description: User who may use sudo without a password.
    type: str
    default: ops
  cache_dir:
    description: Folder that keeps root file systems.
    type: path
    required: true
author:
  - The onprem.torch maintainers (@onprem-torch)
attributes:
  check_mode:
    description: Says whether it would be built.
    support: full
  diff_mode:
    description: Shows no difference.
    support: none
"""

EXAMPLES = r"""
- name: Build the root file system of the nodes
  onprem.torch.nspawn_base:
    distribution: debian-12
    packages: [systemd, openssh-server]
    cache_dir: /var/cache/onprem.torch
"""

RETURN = r"""
path:
  description: Folder of the root file system.
  returned: always
  type: str
"""

import fcntl
import hashlib
import json
import os
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import nspawn

SUITES = {"debian-12": "bookworm", "debian-13": "trixie"}
FORMAT = 1  # counts up when the hook below changes


def hook(user: str) -> str:
    """Return the shell commands that finish the root file system; the folder is the first argument."""
    masks = " ".join(nspawn.MASKED_UNITS)
    return "; ".join(
        [
            "set -e",
            f'chroot "$1" useradd --create-home --shell /bin/bash {user}',
            f'echo "{user} ALL=(ALL) NOPASSWD: ALL" >"$1/etc/sudoers.d/{user}"',
            f'chmod 0440 "$1/etc/sudoers.d/{user}"',
            'chroot "$1" systemctl enable systemd-networkd.service ssh.service',
            f'chroot "$1" systemctl mask {masks}',
            'rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/machine-id "$1"/etc/hostname',
            'printf "PermitRootLogin no\\nPasswordAuthentication no\\nUseDNS no\\nHostKey /etc/ssh/ssh_host_ed25519_key\\n"'
            ' >"$1/etc/ssh/sshd_config.d/lab.conf"',
            'mkdir -p "$1/etc/systemd/journald.conf.d"',
            'printf "[Journal]\\nStorage=persistent\\nRateLimitIntervalSec=0\\n" >"$1/etc/systemd/journald.conf.d/lab.conf"',
        ]
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "distribution": {"type": "str", "choices": sorted(SUITES), "default": "debian-12"},
            "packages": {"type": "list", "elements": "str", "default": []},
            "mirror": {"type": "str", "default": ""},
            "user": {"type": "str", "default": "ops"},
            "cache_dir": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    recipe = [FORMAT, params["distribution"], sorted(params["packages"]), params["mirror"], hook(params["user"])]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    path = os.path.join(params["cache_dir"], f"{params['distribution']}-{digest}")
    if os.path.isdir(path):
        module.exit_json(changed=False, path=path)
    if module.check_mode:
        module.exit_json(changed=True, path=path)
    os.makedirs(params["cache_dir"], exist_ok=True)
    with open(f"{path}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(path):  # another run has built it while this one waited
            module.exit_json(changed=False, path=path)
        partial = f"{path}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(params['packages'])}"]
        command += [f"--customize-hook={hook(params['user'])}", SUITES[params["distribution"]], partial]
        if params["mirror"]:
            command.append(params["mirror"])
        returncode, _stdout, stderr = module.run_command(command)
        if returncode != 0:
            shutil.rmtree(partial, ignore_errors=True)
            reason = [line for line in stderr.splitlines() if line.startswith(("E:", "W:"))] or stderr.splitlines()
            module.fail_json(
                msg=f"the root file system of {params['distribution']} cannot be built: {' '.join(reason[-3:])}; "
                "check that the Debian mirror can be reached, or set lab_mirror"
            )
        os.rename(partial, path)
    module.exit_json(changed=True, path=path)


if __name__ == "__main__":
    main()
