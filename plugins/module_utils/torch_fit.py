# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether an installed torch fits the node's GPUs and driver."""

from __future__ import annotations

import re
import typing as t


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's numbers, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def has_code(built: t.Sequence[str], architecture: str) -> bool:
    """Return whether code of some architectures runs on a GPU.

    ``sm_80`` runs on GPUs of its major version from its minor one on, ``sm_90a`` on its own only, and ``compute_80``,
    which the driver compiles, on all newer ones (CUDA C++ Programming Guide, "Application Compatibility").
    """
    level = int(architecture[3:])
    for entry in built:
        match = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", entry)
        if not match:
            continue
        kind, found, special = match.group(1), int(match.group(2)), match.group(3)
        if special and found == level and kind == "sm":
            return True
        if not special and kind == "sm" and found // 10 == level // 10 and found <= level:
            return True
        if not special and kind == "compute" and found <= level:
            return True
    return False


def problem(
    versions: t.Mapping[str, t.Any],
    gpus: t.Sequence[t.Mapping[str, str]],
    driver: str,
    cuda: str = "",
    oldest_drivers: t.Optional[t.Mapping[str, str]] = None,
) -> str:
    """Return why a torch cannot work on a node's GPUs, as a sentence with its cure; empty where it can.

    Args:
        versions: C(torch), C(cuda), C(nccl) (None for a build without it) and C(architectures) of the installed torch; what
            is missing is not known.
        gpus: name and architecture (C(sm_90)) of each kind of GPU; empty for a node without.
        driver: version of the driver that runs; empty where none does.
        cuda: the CUDA version that it must be built for; empty for any.
        oldest_drivers: the oldest driver for each major version of CUDA.
    """
    if not gpus:
        return ""
    torch = f"torch {versions.get('torch')}"
    built = versions.get("cuda")
    if built == "":
        return f"{torch} is a build for CPUs, but the node has {gpus[0]['name']}; correct pytorch_index_url or pytorch_environment"
    if built is None:
        return ""
    if "nccl" in versions and versions["nccl"] is None:
        return f"{torch} is built without NCCL, through which GPUs talk to each other; install a build from pytorch.org or PyPI"
    if cuda and cuda != "cpu" and numbers(built)[:2] != numbers(cuda)[:2]:
        cure = f"set cuda_version: '{built}', or a pytorch_version that exists for {cuda}"
        return f"{torch} is built for CUDA {built}, but cuda_version is {cuda}; {cure}"
    oldest = (oldest_drivers or {}).get(built.split(".", maxsplit=1)[0], "")
    if driver and oldest and numbers(driver) < numbers(oldest):
        text = f"{torch} is built for CUDA {built}, which needs the driver {oldest} or newer, but {driver} runs"
        return f"{text}; upgrade the driver, or take a torch for an older CUDA (cuda_version or pytorch_environment)"
    architectures = versions.get("architectures") or []
    for gpu in gpus:
        if architectures and re.fullmatch(r"sm_\d+", gpu["architecture"]) and not has_code(architectures, gpu["architecture"]):
            return (
                f"{torch} has no code for {gpu['name']} ({gpu['architecture']}), only for {', '.join(architectures)}; "
                "set a cuda_version or pytorch_version that supports it"
            )
    return ""
