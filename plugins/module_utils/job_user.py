# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The user that a job runs as: a system account, since logind removes the shared memory of ordinary users at logout."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import safe_files


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
