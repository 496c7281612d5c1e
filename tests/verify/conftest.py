# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Eight booted and provisioned nodes for all tests; what was measured is printed at the end."""
from __future__ import annotations

import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from lab import Lab, Verification

ROWS = []


@pytest.fixture(scope="session")
def booted():
    """The nodes; VERIFY_KEEP=1 leaves them running afterwards."""
    made = Lab()
    made.power_on()
    made.heal()
    made.playbook("provision")
    yield made
    if not os.environ.get("VERIFY_KEEP"):
        made.close()


@pytest.fixture
def lab(booted):
    """Healthy nodes; after each test nothing of the verification may be left on any of them."""
    yield booted
    booted.power_on()
    booted.heal()
    left = {node.name: node.left() for node in booted.nodes if node.left()}
    assert not left, f"the verification left something behind: {left}"


@pytest.fixture
def verify(lab, request):
    """Run the verification, and note how long it took."""
    def once(*options, **more):
        found = Verification(lab, *options, **more)
        spent = found.report.get("seconds", {})
        ROWS.append((request.node.name, found.seconds, spent.get("checks") or 0.0, spent.get("measurement") or 0.0,
                     spent.get("tournament") or 0.0, found.report.get("verdict", "-")))
        return found
    return once


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("verification of eight nodes")
        terminalreporter.write_line(f"{'test':60} {'whole':>7} {'checks':>7} {'measure':>8} {'pairs':>6}  verdict   (seconds)")
        for name, whole, checks, measured, pairs, verdict in ROWS:
            terminalreporter.write_line(f"{name:60} {whole:7.1f} {checks:7.1f} {measured:8.1f} {pairs:6.1f}  {verdict}")
