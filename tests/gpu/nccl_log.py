# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""What NCCL's log of one node says."""
from __future__ import annotations

import re


def facts(text):
    """What NCCL's log of a node says: nodes, ranks, GPUs, transports."""
    inits = re.findall(r"rank (\d+) nranks (\d+) cudaDev (\d+) nvmlDev (\d+) busId ([0-9a-fA-F]+)", text)
    nodes = sorted(set(re.findall(r"nNodes (\d+)", text)))
    ways = sorted(set(re.findall(r" via (\S+)", text)))
    version = re.search(r"NCCL version (\S+)", text)
    return {"ranks": " ".join(sorted({entry[0] for entry in inits})), "GPUs": " ".join(sorted({entry[4] for entry in inits})),
            "nNodes": " ".join(nodes), "transports": " ".join(ways), "NCCL": version.group(1) if version else ""}
