# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs that are killed at chosen moments, one after the other on the same nodes. Run as root: pytest tests/interrupts"""
from __future__ import annotations

import os
import re
import shutil
import time

from cut import ROOT


def test_from_nothing_to_training_through_three_kills(cut):
    first = cut.nodes[0]

    # ansible-playbook dies while wheels are copied.
    process = cut.start()
    wheels = first.folder / "opt/onprem.torch/wheels"
    assert cut.when(process, lambda: wheels.is_dir() and len(list(wheels.iterdir())) > 2), process.communicate()[0][-3000:]
    cut.kill_play(process)
    assert not list(wheels.glob("torch-*.whl")), "it died too late to be in the middle"
    assert {entry["state"] for entry in cut.check().values()} == {"inactive"}

    # The module dies with uv in the middle of the installation. Each time into another folder, so that there is one.
    cut.quiet()
    cut.root = "/opt/second"
    process = cut.start()
    assert cut.when(process, lambda: cut.installs(first)), process.communicate()[0][-3000:]
    output = cut.kill_modules(process, [first])
    assert process.returncode != 0 and "Traceback" not in output, output
    assert re.search(r"cut1 .*(failed|unreachable)=1", output), output
    environments = first.folder / "opt/second/environments"
    assert list(environments.iterdir()) and not list(environments.glob("*/.onprem-torch.json")), "the environment claims to be whole"
    cut.check()

    # ansible-playbook dies while uv installs; uv goes on, and the next run waits for it.
    cut.quiet()
    cut.root = "/opt/third"
    process = cut.start()
    assert cut.when(process, lambda: cut.installs(first)), process.communicate()[0][-3000:]
    cut.kill_play(process)
    assert cut.installs(first), "the installation was to go on"
    cut.check()

    cut.converged()


def test_switch_that_is_killed_after_the_stop(cut):
    """The old release has stopped, the new one has not started: the worst moment for a job."""
    cut.round += 1
    process = cut.start()
    assert cut.when(process, lambda: "inactive" in cut.nodes[0].active()), process.communicate()[0][-3000:]
    cut.kill_play(process)
    cut.check()
    cut.converged()


def test_release_that_is_killed_while_it_is_staged(cut, tmp_path):
    # So much beside the script that unpacking it takes a while.
    shutil.copytree(ROOT / "tests/faults/project", tmp_path / "project")
    (tmp_path / "project/data.bin").write_bytes(os.urandom(64 << 20))
    cut.source = str(tmp_path / "project")
    releases = cut.nodes[1].folder / "var/lib/torchrun/train/releases"
    cut.round += 1
    process = cut.start()
    assert cut.when(process, lambda: list(releases.glob("*.partial"))), process.communicate()[0][-3000:]
    output = cut.kill_modules(process)
    assert process.returncode != 0 and "Traceback" not in output, output
    assert list(releases.glob("*.partial")), "it died too late to be in the middle"
    cut.check()
    cut.source = ""
    cut.converged()


def test_nothing_was_lost(cut):
    output = cut.run()
    assert "changed=0" in output and not any(f"changed={number}" in output for number in range(1, 9)), output
    cut.trains(time.time())
    cut.finish()
