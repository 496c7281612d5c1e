# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a job does as a whole, from what its nodes tell, and as tables for a person."""

from __future__ import annotations

import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import hostile_input, job_folders, nvidia_text, supervisor_state


# What gives hosts their ranks.
ORDER = "in the inventory, or with torchrun_node_rank"


def decide(answers: t.Mapping[str, t.Mapping[str, t.Any]]) -> tuple[str, str]:
    """Return what has to be done to run the staged release everywhere, and a sentence.

    Args:
        answers: host → what torchrun_unit returned for state present.

    Returns:
        ``refuse`` (the nodes hold different sources), ``finished``, ``follow`` (it runs already), ``switch`` (something
        else runs and must be stopped first) or ``start``.
    """
    hashes: dict[str, list[str]] = {}
    for host, answer in answers.items():
        hashes.setdefault(str(answer.get("source_hash") or "none"), []).append(host)
    if len(hashes) > 1 or "none" in hashes:
        usual = max(hashes, key=lambda value: len(hashes[value]))
        odd = [
            f"{host} has {value[:12]}" for value, hosts in hashes.items() if value != usual or usual == "none" for host in hosts
        ]
        return "refuse", f"the nodes hold different sources: {', '.join(odd)}, the others {usual[:12]}; make them the same"
    if all(answer["finished"] and not answer["active"] for answer in answers.values()):
        return "finished", "this release has finished already; train anew with playbooks/restart.yml"
    active = [host for host, answer in answers.items() if answer["active"]]
    stale = [host for host in active if answers[host].get("switch")]
    if stale:
        return "switch", f"another release runs on {', '.join(stale)}: it writes a checkpoint, stops, and the new one resumes"
    if len(active) == len(answers):
        return "follow", "the job runs this release already"
    return "start", "the job is started"


def decide_rollback(infos: t.Mapping[str, t.Mapping[str, t.Any]], wanted: str = "") -> tuple[str, str, str]:
    """Return what has to be done to go back to an earlier release, a sentence, and the release.

    Args:
        infos: host → what torchrun_info found, in the order of the ranks.
        wanted: id of the release to go back to; empty for the one that ran before the newest.

    Returns:
        ``refuse``, ``follow`` (it runs already) or ``rollback``.
    """
    targets = {host: wanted or job_folders.previous(info.get("releases") or []) for host, info in infos.items()}
    without = [host for host, target in targets.items() if not target]
    if without:
        odd = unread({host: infos[host] for host in without})
        if odd:
            return "refuse", f"which releases have run is not known: {'; '.join(odd)}", ""
        return "refuse", f"no earlier release has run on {', '.join(without)}; deploy the old source with playbooks/train.yml", ""
    if len(set(targets.values())) > 1:
        each = ", ".join(f"{target} on {host}" for host, target in targets.items())
        return "refuse", f"the release before differs: {each}; name one with -e rollback_release=ID", ""
    release = next(iter(targets.values()))
    lost = [
        host
        for host, info in infos.items()
        if not any(start["kept"] for start in info.get("releases") or [] if start["release"] == release)
    ]
    if lost:
        known = sorted({start["release"] for host in lost for start in infos[host].get("releases") or [] if start["kept"]})
        text = f"the release {release} is not kept on {', '.join(lost)}; kept are {', '.join(known) or 'none'} (torchrun_keep_releases)"
        return "refuse", text, release
    elsewhere = [text for text in (other_folder(host, info, release) for host, info in infos.items()) if text]
    if elsewhere:
        text = f"the release {release} would go on from the checkpoints of another folder: {', '.join(elsewhere)}"
        return "refuse", f"{text}; deploy its source with playbooks/train.yml instead, which keeps the folder", release
    moved = [text for rank, (host, info) in enumerate(infos.items()) for text in other_place(host, rank, len(infos), info, release)]
    if moved:
        text = f"the cluster has changed since the release {release} ran: {', '.join(moved)}; put the hosts back into that order"
        return "refuse", f"{text} ({ORDER}), or deploy its source with playbooks/train.yml instead", release
    if all(info.get("release") == release and info.get("unit") in ("active", "activating") for info in infos.values()):
        return "follow", f"the job runs the release {release} already", release
    return "rollback", f"the job goes back to the release {release}: it writes a checkpoint, stops, and resumes with it", release


def received(info: t.Any) -> dict[str, t.Any]:
    """Return what torchrun_info has found on a node, with a state in its shape and all texts printable.

    Args:
        info: its ``info``; nothing of it where the node did not answer.
    """
    if not isinstance(info, dict) or not info:
        return {"error": "no answer"}
    found = {key: hostile_input.tidy(value) for key, value in info.items() if key != "state"}
    state, odd = supervisor_state.checked(info.get("state"))
    return {**found, "state": state, "state_odd": str(found.get("state_odd") or "") or odd}


def other_folder(host: str, info: t.Mapping[str, t.Any], release: str) -> str:
    """Return how the folder of a release's checkpoints differs from that of the release that runs; empty where it does not."""
    folders = {start["release"]: start.get("checkpoints") or [] for start in info.get("releases") or []}
    then, now = folders.get(release) or [], folders.get(str(info.get("release"))) or []
    return f"{'/'.join(then)} where {'/'.join(now)} is now on {host}" if then and now and then != now else ""


def other_place(host: str, rank: int, nnodes: int, info: t.Mapping[str, t.Any], release: str) -> list[str]:
    """Return how the place that a host had with a release differs from the one that it has now.

    Host, rank and number of nodes are compared with the plan, since the unit on disk may not know yet that the inventory has
    changed; the address and port of rank 0 with that unit.
    """
    then = next((start.get("place") or {} for start in reversed(info.get("releases") or []) if start["release"] == release), {})
    unit = info.get("place") or {}
    now = {**{name: unit[name] for name in ("master-addr", "master-port") if name in unit}, "host": host, "node-rank": str(rank), "nnodes": str(nnodes)}
    return [f"{name} was {then[name]} and is {now[name]} on {host}" for name in sorted(now) if name in then and then[name] != now[name]]


def table(rows: t.Sequence[t.Sequence[t.Any]], header: t.Sequence[str]) -> list[str]:
    """Return the lines of a table: columns as wide as their longest cell."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]


def age(then: float, now: float) -> str:
    """Return how long ago a time was, as a person says it."""
    seconds = max(0, int(now - then))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    if seconds < 172800:
        return f"{seconds // 3600} h"
    return f"{seconds // 86400} d"


def plan_lines(plan: t.Mapping[str, t.Any]) -> list[str]:
    """Return the plan as a person reads it."""
    job = plan["job"]
    rows = [
        (
            node["rank"],
            host,
            node["address"],
            node["interface"],
            node["nproc"],
            gpus(node),
        )
        for host, node in plan["nodes"].items()
    ]
    lines = table(rows, ("RANK", "HOST", "ADDRESS", "INTERFACE", "PROCESSES", "DEVICES"))
    line = plan.get("cuda_version") or ""
    return [
        *lines,
        "",
        *table(nvidia_text.rows(plan), nvidia_text.HEADLINE),
        *([f"CUDA line {line}" if line != "cpu" else "no GPUs: torch for CPUs"] if line else []),
        *nvidia_text.package_lines(plan),
        *nvidia_text.advice_lines(plan),
        "",
        f"job {job['name']}: {job['world_size']} processes on {job['nnodes']} nodes, "
        f"MASTER_ADDR={job['master_addr']} MASTER_PORT={job['master_port']}",
        f"runs {' '.join([job['script'], *job['args']])} (release {job['release']})",
        f"checkpoints {job['checkpoint_dir']}/{job['checkpoint_glob']}, logs {job['log_dir']}",
    ]


def gpus(node: t.Mapping[str, t.Any]) -> str:
    """Return what a node computes on."""
    found = (node.get("hardware") or {}).get("usable_gpus") or []
    if not found:
        return "CPU"
    names = sorted({str(gpu.get("name") or gpu.get("generation") or "GPU") for gpu in found})
    used = f" ({node['devices']})" if node.get("devices") else ""
    return f"{len(found)} × {', '.join(names)}{used}"


def status_rows(infos: t.Mapping[str, t.Mapping[str, t.Any]], order: t.Sequence[str], now: float) -> list[tuple[t.Any, ...]]:
    """Return a row for each node, in the columns of STATUS_HEADER."""
    rows: list[tuple[t.Any, ...]] = []
    for rank, host in enumerate(order):
        info = infos.get(host) or {}
        if info.get("error"):
            rows.append((host, rank, "unreachable", "", "", "", short(info["error"]), "", "", "", ""))
            continue
        state = info.get("state") or {}
        checkpoint = info.get("checkpoint") or {}
        left = state.get("restarts_left")
        rows.append(
            (
                host,
                rank,
                "unknown" if info.get("state_odd") else unit_word(info["unit"], str(state.get("state") or "")),
                age(info["since"], now) if info.get("since") else "-",
                state.get("generation", "-"),
                "-" if left is None else left,
                short(info.get("step") or "-"),
                age(info["step_time"], now) if info.get("step_time") else "-",
                f"{checkpoint['name']} ({age(checkpoint['time'], now)})" if checkpoint else "-",
                gpu_holders(info),
                firewall_word(info.get("firewall")),
            )
        )
    return rows


def gpu_holders(info: t.Mapping[str, t.Any]) -> str:
    """Return who holds the memory of a node's GPUs: units, or processes outside every unit."""
    used: dict[str, int] = {}
    for process in info.get("gpus") or []:
        holder = process["unit"].removesuffix(".service") or f"{process['name']} (pid {process['pid']})"
        used[holder] = used.get(holder, 0) + (process["used_mib"] or 0)
    return ", ".join(f"{holder} {mib / 1024:.1f} GiB" for holder, mib in used.items()) or "-"


def firewall_word(state: t.Mapping[str, t.Any] | None) -> str:
    """Return whether the rules of the role firewall are in place, as the role's own look has found."""
    if not state:
        return "-"
    return "intact" if state.get("intact") else short(str(state.get("text") or "changed"))


def short(line: str) -> str:
    """Return a step line without its rank, short enough for a column."""
    text = line.partition("] ")[2] if line.startswith("[rank ") else line
    return text if len(text) <= 60 else text[:59] + "…"


def unit_word(unit: str, state: str) -> str:
    """Return one word for what the unit does: the supervisor knows better than systemd why it runs or has ended."""
    if unit == "active":
        return state or "active"
    if unit == "inactive" and state in ("done", "stopped"):
        return "finished" if state == "done" else "stopped"
    return unit


STATUS_HEADER = (
    "HOST",
    "RANK",
    "STATE",
    "SINCE",
    "GENERATION",
    "RESTARTS LEFT",
    "LAST STEP",
    "STEP AGE",
    "NEWEST CHECKPOINT",
    "GPU MEMORY",
    "FIREWALL",
)


def status_lines(job: str, infos: t.Mapping[str, t.Mapping[str, t.Any]], order: t.Sequence[str]) -> list[str]:
    """Return the job's status as a table."""
    texts = [str((info.get("state") or {}).get("text") or "") for info in (infos.get(host) or {} for host in order)]
    unknown = "what it does is not known" if odd_states(infos) else "no supervisor has written a state yet"
    headline = next((text for text in texts if text), unknown)
    rows = table(status_rows(infos, order, time.time()), STATUS_HEADER)
    return [f"job {job}: {headline}", *rows, *odd_states(infos), *unread(infos), *firewall_lines(infos, order)]


def odd_states(infos: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[str]:
    """Return a line for each node whose state.json is not what a supervisor writes."""
    return [f"{host}: {info['state_odd']}" for host, info in infos.items() if info.get("state_odd")]


def unread(infos: t.Mapping[str, t.Mapping[str, t.Any]]) -> list[str]:
    """Return a line for each look that brought no answer, such as one at a file system that is gone."""
    return [f"{host}: {sentence}" for host, info in infos.items() for sentence in info.get("unread") or []]


def firewall(answer: t.Mapping[str, t.Any]) -> dict[str, t.Any] | None:
    """Return what the status keeps of the firewall module's answer to state verified; None without an answer.

    A firewall that the module refuses to handle is not intact either: its sentences are the differences then.
    """
    differences = answer.get("problems") or answer.get("differences")
    if differences is None:
        return None
    return {
        "intact": not differences,
        "text": "differs" if differences else "",
        "backend": str(answer.get("backend") or ""),
        "differences": list(differences),
    }


def firewall_lines(infos: t.Mapping[str, t.Mapping[str, t.Any]], order: t.Sequence[str]) -> list[str]:
    """Return a line for each node whose firewall is not as the role left it: what differs, and the cure."""
    found = {host: (infos.get(host) or {}).get("firewall") or {} for host in order}
    return [
        f"{host}: its firewall does not hold what it should ({' '.join(entry['differences'])[:300]}); run train.yml or provision.yml"
        for host, entry in found.items()
        if entry.get("differences")
    ]
