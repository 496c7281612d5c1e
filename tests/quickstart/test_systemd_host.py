# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab on a machine whose first process is systemd, as it is on most people's: nodes are services of that systemd."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from clone import NODES, Clone
from systemd_host import SystemdHost, nspawn
from test_quickstart import leftovers, wait


def test_nodes_reboot_lose_power_come_back_and_go(clone: Clone, tmp_path: Path):
    clone.run("make", "lab")
    clone.run("make", "clean")
    nodes = clone.folder / "inventories" / "lab" / ".state" / "nodes"
    units = {node: nspawn.unit_name(nspawn.machine_name(node, str(nodes))) for node in NODES}
    with SystemdHost(tmp_path, clone.folder) as host:
        host.run("make", "lab")
        assert host.units() == sorted(units.values())

        booted = clone.shell("lab1", "stat --format=%Z /proc/1")
        clone.shell("lab1", "systemctl reboot", check=False)
        wait(lambda: clone.shell("lab1", "stat --format=%Z /proc/1", check=False) not in ("", booted), 60, "the reboot of lab1")
        assert host.run("systemctl", "show", "--value", "--property=NRestarts", units["lab1"]).strip() == "1"

        state = nodes / "lab2"
        for pid in nspawn.processes(str(state / "root")):
            os.kill(pid, signal.SIGKILL)
        wait(lambda: host.units() == [units["lab1"]], 10, "the end of lab2's unit")
        assert "Reached target" in (state / "console.log").read_text(encoding="utf-8", errors="replace")
        host.run("make", "lab")
        assert clone.shell("lab2", "hostname") == "lab2" and host.units() == sorted(units.values())

        host.run("make", "clean")
        assert host.units() == [] and leftovers(clone) == []
        assert not (clone.folder / "inventories" / "lab" / ".state").exists()
