# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What NCCL says of its transports, from lines that it prints with NCCL_DEBUG=INFO.

The log of the measured run itself is read: NCCL prints these lines only while it sets connections up, so they cost the
measurement nothing, and a probe of its own could take other paths than the run did.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

# "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read", "… [send] via NET/IB/0/GDRDMA", "… via SHM/direct/direct"
CHANNEL = re.compile(
    r"Channel (?P<channel>\d+)(?:/\d+)? ?: (?P<source>\d+)\[[^\]]*\] -> (?P<target>\d+)\[[^\]]*\](?: \[(?:send|receive)\])? via (?P<via>\S+)"
)
NETWORK = re.compile(r"Using network (?P<name>\S+)")
INTERFACES = re.compile(r"NET/(?P<kind>IB|Socket) : Using (?P<list>.*)")
ONE_INTERFACE = re.compile(r"\[\d+\](?P<name>[^\s:/<]+)")
VERSION = re.compile(r"NCCL version (?P<version>[0-9.]+)")
BOOTSTRAP = re.compile(r"Bootstrap ?: Using (?:\[\d+\])?(?P<name>[^\s:<]+)")
NVLS = re.compile(r"NVLS multicast support is (?P<not>not )?available")
# Lines with one of these are brought back from the nodes: what this parser reads, and what a person who looks for a cause wants.
KEEP_WORDS = (" via ", "Using network", "NET/", "NCCL version", "Bootstrap", "NVLS", "WARN", "RAS ", "PXN", "GDR")


@dataclass
class Transports:
    """What one log, or several, say.

    Attributes:
        version: NCCL's version.
        network: name of the network plugin, such as IB or Socket.
        interfaces: interfaces or devices that it uses.
        bootstrap: interface of the bootstrap.
        nvls: whether NVLink SHARP is available; None where not said.
        pairs: (source rank, target rank) → kinds, such as P2P, SHM, IB/GDRDMA, IB, Socket.
        warnings: lines with WARN, shortened.
    """

    version: str = ""
    network: str = ""
    interfaces: list[str] = field(default_factory=list)
    bootstrap: str = ""
    nvls: bool | None = None
    pairs: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """Return how many pairs use each kind."""
        counts: dict[str, int] = {}
        for kinds in self.pairs.values():
            for kind in kinds:
                counts[kind] = counts.get(kind, 0) + 1
        return counts

    def as_dict(self) -> dict[str, t.Any]:
        """Return the fields as plain data."""
        return {
            "version": self.version,
            "network": self.network,
            "interfaces": self.interfaces,
            "bootstrap": self.bootstrap,
            "nvls": self.nvls,
            "kinds": self.kinds(),
            "pairs": [{"source": pair[0], "target": pair[1], "via": sorted(kinds)} for pair, kinds in sorted(self.pairs.items())],
            "warnings": self.warnings,
        }


def kind_of(via: str) -> str:
    """Return the kind of a transport as NCCL writes it: ``NET/IB/0/GDRDMA`` is ``IB/GDRDMA``, ``P2P/CUMEM`` is ``P2P``."""
    words = via.split("/")
    if words[0] == "NET":
        name = words[1].split("(")[0] if len(words) > 1 else "?"
        return f"{name}/GDRDMA" if "GDRDMA" in via else name
    return words[0]


def parse(lines: t.Iterable[str]) -> Transports:
    """Read lines of any number of ranks' logs; lines of other programs are passed over."""
    found = Transports()
    for line in lines:
        match = CHANNEL.search(line)
        if match:
            pair = (int(match["source"]), int(match["target"]))
            found.pairs.setdefault(pair, set()).add(kind_of(match["via"]))
            continue
        match = NETWORK.search(line)
        if match:
            found.network = match["name"]
        match = INTERFACES.search(line)
        if match:
            for entry in ONE_INTERFACE.finditer(match["list"]):
                if entry["name"] not in found.interfaces:
                    found.interfaces.append(entry["name"])
        match = VERSION.search(line)
        if match:
            found.version = match["version"]
        match = BOOTSTRAP.search(line)
        if match:
            found.bootstrap = match["name"]
        match = NVLS.search(line)
        if match:
            found.nvls = not match["not"]
        if " WARN " in line and len(found.warnings) < 20:
            text = line.split(" WARN ", 1)[1].strip()[:300]
            if text not in found.warnings:
                found.warnings.append(text)
    return found


def fell_back(found: Transports, node_of: t.Mapping[int, str], rdma: t.Collection[str]) -> str:
    """Return one sentence where pairs of nodes that both have InfiniBand or RoCE use sockets; empty where none does.

    Args:
        found: what the logs say.
        node_of: rank → host.
        rdma: hosts that have an RDMA port that is up.
    """
    wrong = []
    for (source, target), kinds in sorted(found.pairs.items()):
        ends = node_of.get(source, ""), node_of.get(target, "")
        if ends[0] != ends[1] and ends[0] in rdma and ends[1] in rdma and "Socket" in kinds:
            wrong.append(ends)
    if not wrong and found.network == "Socket" and len(rdma) > 1:
        wrong = [tuple(sorted(rdma)[:2])]  # type: ignore[list-item]
    if not wrong:
        return ""
    first, second = wrong[0]
    return (
        f"NCCL uses TCP sockets between {first} and {second} though both have an RDMA port that is up; "
        "see the lines NET/IB in the log (drivers, /dev/infiniband, memlock, NCCL_IB_DISABLE, NCCL_IB_HCA)"
    )
