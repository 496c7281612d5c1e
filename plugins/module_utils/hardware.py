# Copyright: Contributors to the onprem.torch project
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)
# SPDX-License-Identifier: Apache-2.0
"""Placeholder until the hardware reader lands."""

from __future__ import annotations

import typing as t


def collect(root: str = "/") -> dict[str, t.Any]:
    """Return no GPUs."""
    return {"gpus": [], "usable_gpus": []}
