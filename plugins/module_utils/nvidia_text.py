# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of NVIDIA's stack and torch as a person reads it: what is installed where."""

from __future__ import annotations

import typing as t

ACTIONS = {"none": "-", "keep": "{version} kept", "check": "{version} not managed", "install": "{version} {kernel_modules}"}


def driver_word(driver: t.Mapping[str, t.Any]) -> str:
    """Return what becomes of a node's driver."""
    word = ACTIONS[driver.get("action") or "none"].format_map({"version": "", "kernel_modules": "", **driver}).strip()
    if driver.get("gpudirect"):
        word += f", {driver['gpudirect']}"
    return f"{word}, reboot {driver['reboot'].split(',')[0]}" if driver.get("reboot_expected") else word


def fabric_word(driver: t.Mapping[str, t.Any]) -> str:
    """Return which fabric manager runs."""
    if not driver.get("fabric_manager"):
        return "-"
    named = [entry for entry in (driver.get("settings") or {}).get("packages") or [] if entry["name"].startswith("nvidia-fabricmanager")]
    return named[0]["version"].rstrip("*-") if named else "there"


def version_word(part: t.Mapping[str, t.Any]) -> str:
    """Return the version that a role installs."""
    packages = (part.get("settings") or {}).get("packages") or []
    return packages[0]["version"].rstrip("*-") if packages else "-"


def torch_word(torch: t.Mapping[str, t.Any]) -> str:
    """Return where torch comes from and which one."""
    if torch["source"] == "existing":
        return f"existing {torch['environment']}"
    if torch["source"] == "distribution":
        return "distribution's package"
    return f"{torch.get('version') or 'newest'} from {'lock' if torch.get('lock') else torch['source']}"


def rows(plan: t.Mapping[str, t.Any]) -> list[tuple[str, ...]]:
    """Return a row for each node: host, driver, fabric manager, toolkit, NCCL library, torch."""
    found = []
    for host, node in plan["nodes"].items():
        stack = node.get("nvidia") or {}
        driver = stack.get("driver") or {}
        parts = [version_word(stack.get(role) or {}) for role in ("cuda", "nccl")]
        found.append((host, driver_word(driver), fabric_word(driver), *parts, torch_word(node["pytorch"])))
    return found


HEADLINE = ("HOST", "DRIVER", "FABRIC MANAGER", "TOOLKIT", "LIBNCCL2", "TORCH")


def package_lines(plan: t.Mapping[str, t.Any]) -> list[str]:
    """Return what is installed from apt, a line for all nodes that get the same."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for host, node in plan["nodes"].items():
        stack = node.get("nvidia") or {}
        words = []
        for role in ("driver", "cuda", "nccl"):
            for entry in ((stack.get(role) or {}).get("settings") or {}).get("packages") or []:
                words.append(f"{entry['name']}={entry['version']}" if entry["version"] else entry["name"])
        if words:
            groups.setdefault(tuple(words), []).append(host)
    return [f"installs on {', '.join(hosts)}: {' '.join(words)}" for words, hosts in groups.items()]


def advice_lines(plan: t.Mapping[str, t.Any]) -> list[str]:
    """Return the advice, a line for all nodes that it is for."""
    groups: dict[str, list[str]] = {}
    for host, node in plan["nodes"].items():
        for text in (node.get("nvidia") or {}).get("advice") or []:
            groups.setdefault(text, []).append(host)
    return [f"advice for {', '.join(hosts)}: {text}" for text, hosts in groups.items()]
