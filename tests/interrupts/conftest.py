# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two nodes without anything of ours on them."""
from __future__ import annotations

import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from cut import FOREVER, Cut


@pytest.fixture(scope="session")
def cut():
    made = Cut()
    made.lab("absent")  # what an earlier test run has left
    made.lab("present")
    made.target(FOREVER)
    yield made
    if not os.environ.get("INTERRUPTS_KEEP"):
        made.lab("absent")
