# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""The clone that the tests of this folder share."""

from __future__ import annotations

import typing as t

import pytest
from clone import Clone


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Clone]:
    """Return the clone; its lab is gone afterwards, whatever happened."""
    made = Clone(tmp_path_factory.mktemp("newcomer"))
    made.make()
    made.lab_variables("lab_take_over: true\n")  # a killed run may have left the lab of an earlier clone
    yield made
    made.run("make", "clean", check=False)
