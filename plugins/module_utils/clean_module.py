# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A module whose answer holds no control characters: names of files and the words of programs may be those of a job."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import hostile_input

# Characters of one text in an answer; the longest is a unit's difference.
MOST = 1 << 20


class CleanModule(AnsibleModule):
    """AnsibleModule, with all that it tells made printable."""

    def exit_json(self, **kwargs: t.Any) -> t.NoReturn:
        """End with an answer."""
        super().exit_json(**hostile_input.tidy(kwargs, MOST, lines=True))

    def fail_json(self, msg: str, **kwargs: t.Any) -> t.NoReturn:
        """End with a sentence."""
        super().fail_json(hostile_input.printable(str(msg), MOST, lines=True), **hostile_input.tidy(kwargs, MOST, lines=True))
