# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the checks before the measurement mean, each failure as a sentence with host, peer and cure.

The nodes collect (roles/nccl_verify/files/nccl_verify_node.py), this module judges all their answers together.
"""

from __future__ import annotations

import collections
import typing as t

CLOCK_SECONDS = 5.0
SHM_BYTES = 1 << 30
PORTS = {"verifier": "nccl_verify_port", "master": "torchrun_master_port", "ephemeral": "an ephemeral port"}

# Everything that is looked at, for the table of checks. Those of the second list matter to GPUs only.
CHECKS = {
    "arrival": "every node arrived",
    "tcp": "TCP between all pairs: the verification's port, MASTER_PORT, an ephemeral port",
    "interface": "address on the training interface",
    "name": "host name does not resolve to loopback",
    "port": "ports are free",
    "torch": "torch, the same everywhere",
    "cuda": "CUDA, the same everywhere",
    "nccl": "NCCL, the same everywhere",
    "python": "Python, the same everywhere",
    "environment": "NCCL_* environment, the same everywhere",
    "clock": "clocks agree",
}
GPU_CHECKS = {
    "driver": "NVIDIA driver, the same everywhere",
    "memlock": "locked memory is not limited",
    "shm": "1 GiB free in /dev/shm",
    "fabric_manager": "fabric manager runs where there are NVSwitches",
    "gpu_processes": "no other process holds a GPU",
}


def finding(check: str, status: str, host: str, peer: str, sentence: str) -> dict[str, str]:
    """Return a finding; status is fail or warn."""
    return {"check": check, "status": status, "host": host, "peer": peer, "sentence": sentence}


def odd_ones(values: t.Mapping[str, t.Any]) -> tuple[t.Any, dict[str, t.Any]]:
    """Return the value that most hosts have, and the hosts that have another one.

    A tie goes to the value of the first host, so that two nodes give one odd one.
    """
    texts = {host: repr(value) for host, value in values.items()}
    counts = collections.Counter(texts.values())
    first = list(texts)
    best = max(counts, key=lambda text: (counts[text], -first.index(next(host for host in first if texts[host] == text))))
    usual = next(values[host] for host in first if texts[host] == best)
    return usual, {host: values[host] for host in first if texts[host] != best}


def missing(order: t.Sequence[str], reports: t.Mapping[str, t.Any]) -> list[str]:
    """Return the hosts whose process never answered."""
    return [host for host in order if not reports.get(host)]


def connections(reports: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[dict[str, str]]:
    """Return a finding for each port of a node that a peer could not reach, merged where all peers meet the same.

    A peer that never arrived is not blamed on the network: only hosts with a report count.
    """
    how: dict[tuple[str, str, str], list[str]] = {}
    ports: dict[tuple[str, str], int] = {}
    shown: dict[str, str] = {}
    for host, report in reports.items():
        address = report.get("facts", {}).get("interface_address", "")
        shown[host] = f"{address} ({host})" if address else host
        for entry in report.get("connections", []):
            if entry["result"] == "ok" or entry["peer"] not in reports:
                continue
            how.setdefault((entry["peer"], entry["port_kind"], entry["result"]), []).append(host)
            ports[(entry["peer"], entry["port_kind"])] = entry["port"]
    findings = []
    for (peer, kind, result), hosts in sorted(how.items()):
        port = ports[(peer, kind)]
        name = f"port {port} ({PORTS[kind]})"
        many = len(hosts) > 1 and len(hosts) == len(reports) - 1
        who = "all other nodes" if many else ", ".join(shown[host] for host in sorted(hosts))
        if result == "dropped":
            text = f"{peer} drops TCP from {who} to {name}; look for a firewall's drop rule on {peer} or between them"
        elif result == "refused":
            text = f"{peer} refuses TCP from {who} to {name} though it listens; look for a firewall's reject rule on {peer}"
        elif result == "unreachable":
            text = f"{peer} rejects TCP from {who} to {name} (a firewall), or there is no route; check firewall and routes of {peer}"
        elif result == "forbidden":
            text = f"{who} may not send to {peer} {name}; look at the firewall's output rules of {who}"
        elif result == "taken":
            text = f"something else than the verification answers on {peer} {name}; choose another port or end it"
        else:
            text = f"{who} could not connect to {peer} {name} ({result}); check the network between them"
        findings.append(finding("tcp", "fail", peer, "" if many else ", ".join(sorted(hosts)), text))
    return findings


def versions(reports: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[dict[str, str]]:
    """Return a finding for each host whose versions or NCCL_* environment differ from the others'."""
    findings = []
    names = {"torch": "torch", "cuda": "torch's CUDA", "nccl": "NCCL", "driver": "the NVIDIA driver", "python": "Python"}
    for key, name in names.items():
        values = {host: report.get("versions", {}).get(key, "") for host, report in reports.items()}
        usual, odd = odd_ones(values) if values else ("", {})
        for host, value in odd.items():
            text = f"{host} has {name} {value or '(none)'}, the others have {usual or '(none)'}; install the same version on {host}"
            findings.append(finding(key, "fail" if key in ("torch", "cuda", "nccl") else "warn", host, "", text))
    settings = {host: report.get("nccl_environment", {}) for host, report in reports.items()}
    keys = sorted({key for values in settings.values() for key in values})
    for key in keys:
        usual, odd = odd_ones({host: values.get(key) for host, values in settings.items()})
        for host, value in odd.items():
            # The reports hold no values, which may be secrets.
            has, others = ("no", "one") if value is None else ("a", "none") if usual is None else ("another", "the same")
            text = f"{host} has {has} {key}, the others have {others}"
            text = f"{text}; set it the same everywhere"
            findings.append(finding("environment", "warn", host, "", text))
    return findings


def local(host: str, report: t.Mapping[str, t.Any], backend: str, rdma: bool, nvswitch: bool) -> list[dict[str, str]]:
    """Return the findings of one node about itself."""
    found = []
    facts = report.get("facts", {})
    if not facts.get("interface_address"):
        text = f"{host} has no address on {facts.get('interface')}; correct cluster_interface"
        found.append(finding("interface", "fail", host, "", text))
    loopback = [address for address in facts.get("name_addresses", []) if address.startswith("127.") or address == "::1"]
    if loopback:
        text = f"the name of {host} resolves to {loopback[0]} on itself; the job uses addresses, other programs may not"
        found.append(finding("name", "note", host, "", text))
    memlock = facts.get("memlock_bytes")
    if memlock is not None and memlock != -1 and backend == "nccl":
        text = f"{host} may lock only {memlock} bytes of memory in the unit; set LimitMEMLOCK=infinity and let the host allow it"
        found.append(finding("memlock", "fail" if rdma else "warn", host, "", text))
    shm = facts.get("shm_free_bytes")
    if shm is not None and shm < SHM_BYTES and backend == "nccl":
        text = f"{host} has {shm / 2**20:.0f} MiB free in /dev/shm, NCCL wants 1 GiB; enlarge it or remove what crashed jobs left"
        found.append(finding("shm", "warn", host, "", text))
    if nvswitch and facts.get("fabric_manager", "active") != "active":
        text = f"nvidia-fabricmanager is {facts.get('fabric_manager')} on {host}, but its GPUs are joined by NVSwitches; start it"
        found.append(finding("fabric_manager", "fail", host, "", text))
    for entry in facts.get("gpu_processes", []):
        text = f"a process (pid {entry['pid']}, {entry['name']}) already holds a GPU of {host}; end it for a true figure"
        found.append(finding("gpu_processes", "warn", host, "", text))
    for entry in report.get("problems", []):
        found.append(finding(entry["check"], "fail", host, "", f"{host}: {entry['text']}"))
    return found


def clocks(reports: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[dict[str, str]]:
    """Return a finding for each host whose clock is far from the others'."""
    offsets: dict[str, list[float]] = {}
    # Of two clocks nobody can tell which is wrong: the first host's counts.
    views = list(reports.items())[: 1 if len(reports) == 2 else None]
    for _host, report in views:
        for peer, seconds in report.get("clock_offsets", {}).items():
            offsets.setdefault(peer, []).append(seconds)
    found = []
    for host, seconds in sorted(offsets.items()):
        ordered = sorted(seconds)
        middle = ordered[len(ordered) // 2]
        if abs(middle) > CLOCK_SECONDS:
            text = f"the clock of {host} is {abs(middle):.0f} s {'ahead' if middle > 0 else 'behind'}; synchronise it (chrony)"
            found.append(finding("clock", "warn", host, "", text))
    return found


def checked(found: t.Sequence[t.Mapping[str, str]], backend: str, arrived: bool) -> list[dict[str, t.Any]]:
    """Return every check with its worst status and the sentences of its findings.

    Args:
        found: the findings.
        backend: nccl or gloo.
        arrived: whether any node got so far that it could check; else all but the arrival is "not reached".
    """
    titles = {**CHECKS, **(GPU_CHECKS if backend == "nccl" else {})}
    rows = []
    for name, title in titles.items():
        mine = [entry for entry in found if entry["check"] == name]
        worst = next((status for status in ("fail", "warn", "note") for entry in mine if entry["status"] == status), "ok")
        worst = "not reached" if worst == "ok" and name != "arrival" and not arrived else worst
        rows.append({"check": name, "title": title, "status": worst, "sentences": [entry["sentence"] for entry in mine]})
    return rows


def judge(
    order: t.Sequence[str],
    reports: t.Mapping[str, t.Mapping[str, t.Any]],
    backend: str,
    rdma: t.Collection[str] = (),
    nvswitch: t.Collection[str] = (),
) -> list[dict[str, str]]:
    """Return every finding, failures first.

    Args:
        order: hosts in rank order.
        reports: host → what its node program found; hosts that never answered are absent or empty.
        backend: nccl or gloo.
        rdma: hosts with an RDMA port that is up.
        nvswitch: hosts whose GPUs are joined by NVSwitches.
    """
    present = {host: reports[host] for host in order if reports.get(host)}
    found = []
    for host in missing(order, reports):
        found.append(finding("arrival", "fail", host, "", f"{host} never arrived; look at its power, network and SSH"))
    for host, report in present.items():
        found += local(host, report, backend, host in rdma, host in nvswitch)
    found += connections(present)
    if present:
        found += versions(present) + clocks(present)
    return sorted(found, key=lambda entry: ("fail", "warn", "note").index(entry["status"]))
