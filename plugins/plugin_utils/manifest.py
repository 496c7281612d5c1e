# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The version manifest, read on the control node."""

from __future__ import annotations

import os
import typing as t

import yaml

PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "meta", "versions.yml")


def load(path: str = PATH) -> dict[str, t.Any]:
    """Return the manifest as plain data."""
    with open(path, encoding="utf-8") as stream:
        return dict(yaml.safe_load(stream))
