# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The user that a job runs as: a system account, since logind removes the shared memory of ordinary users at logout."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import safe_files


def lost(module: t.Any, name: str) -> None:
    """End the module: a user of a directory that does not answer must not be made again, as another one of the same name.

    Args:
        module: the AnsibleModule.
        name: name of the user.
    """
    text = f"the user {name} was there when the node was looked at and cannot be found now"
    module.fail_json(msg=f"{text}; look at the node's name service (sssd, nscd, nsswitch.conf), and run the play again when it answers")


def make(module: t.Any, name: str, home: str) -> safe_files.Account:
    """Make the user, or end the module with a sentence.

    Args:
        module: the AnsibleModule.
        name: name of the user.
        home: its home, which is not made.
    """
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", "--home-dir", home, name]
    _returncode, _stdout, stderr = module.run_command(command)
    found = safe_files.account(name)
    if found is None:
        module.fail_json(msg=f"the user {name} cannot be created: {stderr.strip()}; set torchrun_user to one that exists")
    return t.cast(safe_files.Account, found)
