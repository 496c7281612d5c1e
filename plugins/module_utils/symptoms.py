# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Known failure texts of NCCL, gloo, CUDA and torch, each turned into one sentence with its cure."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass


@dataclass(frozen=True)
class Symptom:
    """A text that is known.

    Attributes:
        name: short name of the cause.
        pattern: what is looked for.
        sentence: what it means and what to do.
    """

    name: str
    pattern: re.Pattern[str]
    sentence: str


def known(name: str, pattern: str, sentence: str) -> Symptom:
    """Return a symptom; the pattern ignores case."""
    return Symptom(name, re.compile(pattern, re.IGNORECASE), sentence)


# Most specific first: one cause often prints several of these texts.
SYMPTOMS = (
    known(
        "versions_differ",
        r"mismatched NCCL version|NCCL version mismatch|Message truncated : received",
        "the nodes run different versions of NCCL; install the same torch and NCCL everywhere",
    ),
    known(
        "memlock",
        r"ibv_(reg_mr|create_cq|create_qp)\S* .{0,80}(Cannot allocate memory|error: 12)|locked memory limit",
        "RDMA memory cannot be locked; set LimitMEMLOCK=infinity in the unit (or raise memlock in limits.conf)",
    ),
    known(
        "roce_gid",
        r"ibv_modify_qp\S* .{0,80}(110|timed out)",
        "an RDMA connection could not be set up; check that every adapter has a RoCEv2 IPv4 GID (NCCL_IB_GID_INDEX) and its routes",
    ),
    known(
        "shm",
        r"failed to extend /dev/shm|No space left on device.*?/dev/shm|/dev/shm.*?No space left",
        "/dev/shm is full or too small; give it 1 GiB or more and remove what crashed jobs left there (nccl-*)",
    ),
    known(
        "fabric_manager",
        r"system not yet initialized|CUDA error:? 802|\b802\b.*initializ|multicast.{0,60}\b401\b",
        "the NVSwitch fabric is not up; start the service nvidia-fabricmanager in the driver's very version",
    ),
    known(
        "driver_old",
        r"CUDA driver version is insufficient|driver .{0,30}too old",
        "the NVIDIA driver is too old for this torch; install a newer driver or a torch for an older CUDA",
    ),
    known(
        "driver_mismatch",
        r"Driver/library version mismatch",
        "the driver's kernel module and its libraries differ; reboot the node so that the new module is loaded",
    ),
    known("no_gpu", r"No CUDA GPUs are available|no CUDA-capable device|Found no NVIDIA driver", "no GPU is usable; see nvidia-smi on the node"),
    known(
        "ecc",
        r"uncorrectable ECC error|Xid .{0,40}\b(48|63|64|74|79|94|95)\b|fallen off the bus",
        "a GPU reports a hardware error; look for Xid in the kernel's log (dmesg) and take the node out",
    ),
    known(
        "out_of_memory",
        r"CUDA out of memory|torch\.OutOfMemoryError",
        "a GPU has too little free memory; end what holds it (nvidia-smi) or lower nccl_verify_size_max",
    ),
    known(
        "port_in_use",
        r"EADDRINUSE|address already in use",
        "the verification's port is taken; choose another nccl_verify_port or end what listens there",
    ),
    known(
        "loopback_name",
        r"connectFullMesh failed.*?127\.0\.|remote=\[?127\.0\.|gaierror|Name or service not known",
        "a host name resolves to loopback or not at all; use IP addresses and set the interface (GLOO_SOCKET_IFNAME)",
    ),
    known(
        "no_interface",
        r"Unable to find address for: ?\S*|No interface found|no socket interface found|NET/Socket : No interface|Bootstrap : no socket interface",
        "the interface that was named does not exist or has no address; correct cluster_interface",
    ),
    known(
        "firewall",
        r"No route to host|socketPollConnect",
        "a firewall rejects connections between the nodes; trust the peers' addresses, since NCCL and gloo use ephemeral ports",
    ),
    known(
        "refused",
        r"Connection refused",
        "a node refused the connection; its process had ended or a firewall rejects the port",
    ),
    known(
        "store_timeout",
        r"client socket has timed out|timed out after .{0,40}waiting for|Timed out .{0,40}clients? (to )?join",
        "not all nodes joined the rendezvous in time; see which node's process did not start",
    ),
    known(
        "watchdog",
        r"Watchdog caught collective operation timeout",
        "a collective did not finish in time; one rank stopped or a link hangs, see the rank that did not log it",
    ),
    known(
        "peer_gone",
        r"Connection (closed|reset) by peer|Socket closed|Broken pipe|remote process exited|ncclRemoteError|ncclSystemError.*connection",
        "a peer's process ended in the middle; see that node's own error",
    ),
    known(
        "gloo_timeout",
        r"Timed out waiting \d+ms for (send|recv) operation|Application timeout caused pair closure",
        "a peer did not answer in time over gloo; its process stopped or the link between them drops packets",
    ),
    known("no_torch", r"No module named '?torch'?", "the Python has no torch; provision the nodes or set pytorch_environment"),
)


def recognise(texts: t.Iterable[str]) -> list[dict[str, str]]:
    """Return the known causes in some texts, the most telling first.

    Returns:
        ``{name, sentence, line}`` each, where ``line`` is the line that gave it away.
    """
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    found = []
    for symptom in SYMPTOMS:
        for line in lines:
            if symptom.pattern.search(line):
                found.append({"name": symptom.name, "sentence": symptom.sentence, "line": line[:300]})
                break
    return found
