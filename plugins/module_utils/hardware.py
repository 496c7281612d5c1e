# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Placeholder until the hardware reader lands."""

from __future__ import annotations

import typing as t


def collect(root: str = "/") -> dict[str, t.Any]:
    """Return no GPUs."""
    return {"gpus": [], "usable_gpus": []}
