# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a verification as one self-contained HTML page."""

from __future__ import annotations

import html
import typing as t


def render(report: t.Mapping[str, t.Any]) -> str:
    """Return the page."""
    return f"<!doctype html><meta charset=utf-8><title>Verification</title><p>{html.escape(report['headline'])}"
