# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The driver's kernel module and units for the module nvidia_packages: loaded and started, or why a reboot is needed."""

from __future__ import annotations

import os

from ansible_collections.onprem.torch.plugins.module_utils import apt_state, driver_state
from ansible_collections.onprem.torch.plugins.module_utils.packages_apt import Apt
from ansible_collections.onprem.torch.plugins.module_utils.packages_run import Run


class Driver:
    """The kernel module and the units of a driver."""

    def __init__(self, run: Run, apt: Apt) -> None:
        self.run = run
        self.apt = apt

    def reboot_reason(self) -> str:
        """Return why the node needs a reboot for the kernel module that is installed."""
        settings = self.run.settings
        mine = apt_state.family(self.apt.packages(), self.run.pins)
        asked = [name for name in driver_state.asking() if name in mine]
        found = driver_state.kernel(settings["kernel_module"])
        return driver_state.reboot_reason(settings["kernel_module"], settings["kernel_module_version"], settings["kernel_module_flavour"], found, asked)

    def load(self, name: str) -> str:
        """Load a kernel module and return why that does not work; a module that Secure Boot refuses is an error."""
        if os.path.isdir(f"/sys/module/{name.replace('-', '_')}") or self.run.check:
            return ""
        code, _out, err = self.run.module.run_command(["modprobe", name])
        refusal = driver_state.refusal(name, err) if code else ""
        if refusal:
            self.run.fail(refusal)
        if code:
            return f"the kernel module {name} cannot be loaded ({err.strip() or 'no reason was given'})"
        self.run.before[f"kernel module {name}"], self.run.after[f"kernel module {name}"] = "", "loaded\n"
        return ""

    def kernel(self) -> None:
        """Load the kernel modules, or say why a reboot is needed."""
        name = self.run.settings["kernel_module"]
        if not name:
            return
        reason = self.reboot_reason()
        # A container has its host's kernel.
        own = not driver_state.kernel(name).container and not self.run.check
        if reason and own:
            # The reboot has to find the module that it is for.
            _code, _out, err = self.run.module.run_command(["modprobe", "--dry-run", name])
            refusal = driver_state.refusal(name, err)
            if refusal:
                self.run.fail(refusal)
        if not reason and own:
            reason = self.load(name) or self.reboot_reason()
            for further in [] if reason else self.run.settings["modules"] or []:
                problem = self.load(further)
                if problem:
                    self.run.fail(f"{problem}; look at dmesg")
        self.run.result["reboot_reason"] = reason
        if self.run.params["loaded"] and reason:
            self.run.fail(f"{name} {self.run.settings['kernel_module_version']} does not run after the reboot ({reason}); look at dkms status and dmesg")

    def services(self) -> None:
        """Enable the units, and start them once the module runs; disable and stop the others."""
        disabled = self.run.settings["disabled"] or []
        units = [*(self.run.settings["services"] or []), *disabled]
        if not units:
            return
        code, out, _err = self.run.module.run_command(["systemctl", "show", "--property=Id,LoadState,UnitFileState,ActiveState", *units])
        if code:
            return  # no systemd answers, as in a chroot, so that there is nothing to enable
        module = self.run.settings["kernel_module"]
        runs = not module or os.path.isdir(f"/sys/module/{module}")
        for paragraph in out.split("\n\n"):
            fields = dict(line.partition("=")[::2] for line in paragraph.splitlines() if "=" in line)
            wanted = (self.run.settings["sizes"] or {}).get(fields.get("Id", ""))
            sized = not wanted or driver_state.gib(wanted["path"]) == wanted["gib"]
            words = driver_state.service_words(fields, runs and not self.run.result["reboot_reason"], sized)
            for word in driver_state.disabling_words(fields) if fields.get("Id") in disabled else words:
                self.run.before.setdefault(f"unit {fields['Id']}", "")
                self.run.after[f"unit {fields['Id']}"] = self.run.after.get(f"unit {fields['Id']}", "") + f"{word}\n"
                if self.run.check:
                    continue
                code, _out, err = self.run.module.run_command(["systemctl", word, fields["Id"]])
                if code:
                    self.run.fail(f"systemctl {word} {fields['Id']} failed ({err.strip()}); look at journalctl -u {fields['Id']}")
