# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One run of the module nvidia_packages: what it was asked, what it changed, and what a failure puts back."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.onprem.torch.plugins.module_utils import invoker, node_lock, run_lease, secret_texts


class Run:
    """What was asked, what changed, and what is done where the run fails.

    Attributes:
        module: the module that runs.
        settings: the state that the node shall have.
        check: whether nothing is changed.
        before: what was there, by what it is.
        after: what is there in the end, by what it is.
        result: the answer.
        on_failure: what is called before a failure is told.
        asker: whoever waits for the answer; watched from the beginning, since whoever begins later does not see who has gone.
    """

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.settings: dict[str, t.Any] = module.params["settings"]
        self.check = module.check_mode
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        self.result: dict[str, t.Any] = {"installed": {}, "removed": [], "held": [], "healed": [], "reboot_reason": ""}
        self.on_failure: list[t.Callable[[], None]] = []
        self.asker = invoker.Invoker()

    @property
    def pins(self) -> list[dict[str, t.Any]]:
        """Return the versions of packages that may come along."""
        return self.settings["pins"] or []

    @property
    def credentials(self) -> dict[str, str]:
        """Return C(user:password) of repositories by URL."""
        return self.params.get("credentials") or {}

    @property
    def repository(self) -> dict[str, str]:
        """Return what is known of the repository; empty for the sources that the node has."""
        return {key: value for key, value in (self.settings["repository"] or {}).items() if value}

    def go_on(self) -> None:
        """End where nobody waits for the answer any more, or another run has the node: asked while waiting, and after it."""
        reason = self.asker.gone()
        try:
            if reason:
                raise node_lock.Gone(f"this run was given up ({reason})")
            run_lease.require(self.params.get("run") or {})
        except node_lock.Busy as error:
            self.fail(f"no package was changed any more: {error}")

    def fail(self, text: str) -> t.NoReturn:
        """End with one sentence; what was done for nothing is undone."""
        # Cleared first: undoing may fail, too.
        calls, self.on_failure = self.on_failure, []
        for call in calls:
            call()
        for userinfo in self.credentials.values():
            text = secret_texts.masked(text, secret_texts.of_userinfo(userinfo), secret_texts.HIDDEN)
        text = secret_texts.redacted(text)
        self.module.fail_json(msg=text, **self.result)

    def end(self) -> t.NoReturn:
        """End well, with the differences; a run that has lost the node meanwhile does not go on, such as to a reboot."""
        try:
            run_lease.require(self.params.get("run") or {})
        except node_lock.Busy as error:
            self.module.fail_json(msg=f"the packages are as they should be, but this run does not go on: {error}", **self.result)
        changed = {key for key in self.after if self.before.get(key, "") != self.after[key]}
        diff = [{"before_header": key, "after_header": key, "before": self.before.get(key, ""), "after": self.after[key]} for key in sorted(changed)]
        self.module.exit_json(changed=bool(changed), diff=diff, **self.result)
