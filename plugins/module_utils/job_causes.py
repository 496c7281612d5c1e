# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a job ended early: the earliest cause across all nodes, with the evidence and what it means."""

from __future__ import annotations

import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import job_state, symptoms

# The kernel writes its line some seconds before the job's processes are seen to fail, or as its consequence after it.
BEFORE_SECONDS, AFTER_SECONDS = 60.0, 15.0
# Causes of the supervisors that say that something happened, and not why. An event of the kernel explains them.
UNEXPLAINED = ("lost", "signal", "hang", "exit", "out of memory")
LIMIT = "torchrun_memory_max"
FULL_BYTES = 1 << 20
WORDS = {
    "xid": "the NVIDIA driver reports a GPU fault",
    "out of memory": "the kernel ended a process because the node's memory was used up",
    "memory limit": "the kernel ended a process because a limit of memory was reached",
    "disk": "a disk reports errors",
    "network": "a network link went down",
    "machine check": "the hardware reports an error",
}
CURES = {
    "xid": "look the number up in NVIDIA's list of Xid errors; where it comes back, drain the node (torchrun_node_out) and test its GPU",
    "out of memory": "lower what the job holds in memory (DataLoader workers, batch size) or end what else runs on the node",
    "memory limit": "raise torchrun_memory_max, or the limit of whatever the node itself runs in; or lower what the job holds in memory"
    " (DataLoader workers, batch size)",
    "disk": "replace or check the disk; dmesg on the node has more",
    "network": "check cable, switch port and adapter of the node",
    "machine check": "drain the node (torchrun_node_out) and test its memory and CPU",
    "full": "free some space, or set torchrun_checkpoint_dir to a larger file system",
    "lost": "see whether the node was switched off, rebooted or cut off from the network; it joins again by itself once it is back",
    "hang": "a worker stood still: see py-spy or the last lines of the rank; torchrun_hang_timeout ended it",
    "restart": "the node's unit was restarted, by hand or after a package update; the job goes on by itself",
    "shutdown": "the node was shut down or rebooted; the job goes on once it is back",
}


def known_state(infos: t.Mapping[str, t.Mapping[str, t.Any]]) -> tuple[str, dict[str, t.Any]]:
    """Return the host whose supervisor knows most, and what it knows: rank 0's history wins among the newest."""
    best: tuple[t.Any, ...] = ()
    found: tuple[str, dict[str, t.Any]] = ("", {})
    for host, info in infos.items():
        state = info.get("state") or {}
        if not state:
            continue
        cause = state.get("first_cause") or {}
        weight = (float(cause.get("time") or 0.0), "history" in state, int(state.get("generation") or 0))
        if not best or weight > best:
            best, found = weight, (host, state)
    return found


def event(host: str, source: str, kind: str, moment: float | None, text: str, rank: int | None = None) -> dict[str, t.Any]:
    """Return one piece of evidence."""
    return {"host": host, "source": source, "kind": kind, "time": moment, "text": text, "rank": rank}


def events(infos: t.Mapping[str, t.Mapping[str, t.Any]], since: float, until: float) -> list[dict[str, t.Any]]:
    """Return what the nodes' kernels and workers tell of a span of time, by time."""
    found = []
    for host, info in infos.items():
        evidence = info.get("evidence") or {}
        for entry in evidence.get("kernel") or []:
            found.append(event(host, "kernel", entry["kind"], entry["time"], entry["text"]))
        for report in evidence.get("errors") or []:
            found.append(event(host, "error.json", "error", report["time"], report["text"], report.get("rank")))
    return sorted((entry for entry in found if since <= entry["time"] <= until), key=lambda entry: entry["time"])


def full_disks(infos: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[dict[str, t.Any]]:
    """Return the file systems that are full or read-only now."""
    found = []
    for host, info in infos.items():
        for place in (info.get("evidence") or {}).get("room") or []:
            if place["read_only"]:
                found.append(event(host, "disk", "disk", None, f"{place['path']} is mounted read-only"))
            elif place["free_bytes"] < FULL_BYTES:
                found.append(event(host, "disk", "full", None, f"{place['path']} has {place['free_bytes'] // 1024} KiB free"))
            elif place["free_inodes"] == 0:
                found.append(event(host, "disk", "full", None, f"{place['path']} has no inode left"))
    return found


def explain(infos: t.Mapping[str, t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
    """Return the earliest cause of the last early end, the evidence, and what to do.

    Args:
        infos: host → what torchrun_info found with ``evidence``; ``{"error": …}`` for a host that does not answer.

    Returns:
        ``sentence`` (one for people), ``cause`` (an event or None), ``evidence`` (all events of that time), ``meaning``
        (sentences with cures), ``now`` (the job's state), ``odd`` (states that no supervisor has written), ``unread`` (looks
        that brought no answer), ``unreachable`` and ``history`` (earlier causes, oldest first).
    """
    host, state = known_state(infos)
    unreachable = {name: str(info["error"]) for name, info in infos.items() if info.get("error")}
    told = state.get("first_cause") or {}
    odd = job_state.odd_states(infos)
    now = str(state.get("text") or "") or "; ".join(odd) or "no supervisor has written a state yet"
    disks = full_disks(infos)
    result: dict[str, t.Any] = {
        "state": str(state.get("state") or "unknown"),
        "now": now,
        "told_by": host,
        "cause": None,
        "evidence": disks,
        "meaning": [],
        "odd": odd,
        "unread": job_state.unread(infos),
        "unreachable": unreachable,
        "history": list(state.get("history") or []),
    }
    if not told:
        known = not odd or state.get("text")
        result["sentence"] = f"{'nothing has ended the job early' if known else 'whether anything has ended the job early is not known'}: {now}"
        return result
    moment, told_text = told.get("time"), str(told.get("text") or told.get("error") or told.get("reason") or "no text")
    around = events(infos, moment - BEFORE_SECONDS, moment + AFTER_SECONDS) if moment else []
    told_kind = str(told.get("reason"))
    cause = event(str(told.get("host") or "an unknown node"), "supervisor", told_kind, moment, told_text, told.get("rank"))
    deeper = [entry for entry in around if entry["source"] == "kernel" and told.get("reason") in UNEXPLAINED]
    # What a worker itself says is the cause unless the kernel has ended it: then its kernel's line is.
    own = [entry for entry in deeper if entry["host"] == told.get("host")] or [entry for entry in deeper if entry["time"] <= moment + 1]
    first = own[0] if own else None
    # Of a limit of the job's own, the supervisor tells more than the kernel: how much it is, and where it is set.
    if first and not (first["kind"] == "memory limit" and LIMIT in cause["text"]):
        cause = {**first, "text": f"{WORDS[first['kind']]}: {first['text']}"}
    result["cause"] = cause
    result["evidence"] = [event(str(told.get("host") or "an unknown node"), "supervisor", told_kind, moment, told_text)] + around + disks
    result["meaning"] = meaning(result["evidence"], cause)
    where = "" if cause["text"].startswith(cause["host"]) else f"{cause['host']}: "
    result["sentence"] = f"first on {where}{cause['text']}"
    return result


def meaning(evidence: t.Sequence[t.Mapping[str, t.Any]], cause: t.Mapping[str, t.Any]) -> list[str]:
    """Return what known texts and kinds mean, the cause's first."""
    found = []
    for entry in [cause, *evidence]:
        limited = entry["kind"] == "out of memory" and LIMIT in str(entry["text"])
        kind = "memory limit" if limited else entry["kind"]
        if kind in CURES:
            found.append(CURES[kind])
    if "No space left" in str(cause["text"]):
        found.insert(0, CURES["full"])
    # The texts of the others mostly tell of the consequences.
    for texts in ([str(cause["text"])], [str(entry["text"]) for entry in evidence]):
        if not found:
            found += [known["sentence"] for known in symptoms.recognise(texts)]
    return list(dict.fromkeys(found))[:4]


def clock(moment: float | None) -> str:
    """Return a time of day for a person."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) if moment else " " * 19


def lines(job: str, found: t.Mapping[str, t.Any]) -> list[str]:
    """Return the explanation as a person reads it."""
    text = [f"job {job}: {found['sentence']}", f"  now          {found['now']}"]
    text += [f"  what to do   {sentence}" for sentence in found["meaning"]]
    if found["evidence"]:
        text.append("  evidence")
    text += [f"    {clock(entry['time'])}  {entry['host']}  {entry['source']}: {entry['text']}" for entry in found["evidence"][:20]]
    text += [f"    {'':19}  {host}  does not answer: {error}" for host, error in found["unreachable"].items()]
    text += [f"    {'':19}  {sentence}" for sentence in [*found["odd"], *found["unread"]]]
    earlier = found["history"][:-1]
    if earlier:
        text.append("  earlier")
    text += [f"    {clock(cause.get('time'))}  generation {cause.get('generation')}: {cause.get('text')}" for cause in earlier[-10:]]
    return text
