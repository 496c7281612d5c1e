# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a verification: everything that the nodes brought back, judged together. Pure functions."""

from __future__ import annotations

import time
import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import bandwidth, baseline, culprit, preflight, symptoms, transport, verdict
from ansible_collections.onprem.torch.plugins.module_utils.bandwidth import Expected, Gpu, Nic

FIGURES = ("inside", "wire", "application")
# Texts that a rank prints because another one has ended or is silent, so they name no cause of their own.
CONSEQUENCES = frozenset({"peer_gone", "gloo_timeout", "refused", "store_timeout", "watchdog"})
# What a judgement raises over a result of another shape.
NONSENSE = (AttributeError, TypeError, LookupError, ValueError, ArithmeticError, RecursionError)


def earlier(runs: t.Sequence[t.Mapping[str, t.Any]], name: str) -> baseline.Baseline:
    """Return the baseline of a figure: the runs that did not fail."""
    values = [run.get("figures", {}).get(name) for run in runs if run.get("verdict") != "fail"]
    return baseline.of([float(value) for value in values if value])


def minimum(verification: t.Mapping[str, t.Any], runs: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, float | None]:
    """Return the GB/s below which the worker measures pairs, as far as they are known before it starts."""
    demanded = verification["settings"]["minimum"]
    known: dict[str, float | None] = {name: earlier(runs, name).minimum for name in FIGURES}
    if demanded is not None:
        known["application"] = max(demanded, known["application"] or 0.0)
    return known


def assess(
    verification: t.Mapping[str, t.Any],
    answers: t.Mapping[str, t.Mapping[str, t.Any]],
    runs: t.Sequence[t.Mapping[str, t.Any]],
    now: float,
) -> dict[str, t.Any]:
    """Return the report.

    Args:
        verification: what was decided and configured.
        answers: what was collected from each host; C(error) where there is no result.
        runs: the earlier runs of this fingerprint.
        now: seconds since the epoch.
    """
    order = list(verification["order"])
    results = {host: dict(answers.get(host, {}).get("result") or {}) for host in order}
    reports = {host: result["preflight"] for host, result in results.items() if result.get("preflight")}
    backend = verification["settings"]["backend"]
    adapters = {host: nics(report) for host, report in reports.items()}
    rdma = {host for host, found in adapters.items() if any(nic.rdma for nic in found)}
    switched = {host for host, report in reports.items() if report.get("facts", {}).get("fabric_manager")}
    measured = next((result["measured"] for result in results.values() if result.get("measured")), {})
    gone = vanished(order, answers, results)
    checks = preflight.judge([host for host in order if host not in gone], reports, backend, rdma, switched)
    failures = [gone[host] for host in order if host in gone]
    failures += [entry["sentence"] for entry in checks if entry["status"] == "fail"]
    if not measured and not failures:
        failures += broken(order, answers, results)
    report: dict[str, t.Any] = {
        "version": 1,
        "time": now,
        "fingerprint": verification["fingerprint"],
        "settings": dict(verification["settings"]),
        "nodes": {host: dict(verification["nodes"][host]) for host in order},
        "order": order,
        "checks": checks,
        "checked": preflight.checked(checks, backend, bool(reports)),
        "versions": {host: report["versions"] for host, report in reports.items()},
        "answers": [],
        "culprits": [],
        "pairs": [],
        "inside_pairs": [],
        "figures": {},
        "warnings": [entry["sentence"] for entry in checks if entry["status"] == "warn"],
        "seconds": times(verification, results, now),
        "history": [{key: run.get(key) for key in ("time", "verdict", "figures", "headline")} for run in runs],
    }
    if measured:
        names = {entry["rank"]: (order[entry["node"]], entry["local"]) for entry in measured["ranks"]}
        report.update(figures_of(measured, names, order))
        report["transport"] = transports(results, names, rdma, failures)
        failures += wrong_results(measured, names)
        expected = expectations(measured, adapters, order)
        report["expected"] = {name: value.as_dict() for name, value in expected.items()}
        demanded = {"application": verification["settings"]["minimum"]}
        report["answers"] = [
            verdict.answer(name, report["figures"].get(name), expected[name], earlier(runs, name), demanded.get(name))
            for name in FIGURES
        ]
        found = accused(report, expected)
        report["culprits"] = [entry.as_dict() for entry in found]
    report["failures"] = failures
    report["verdict"] = verdict.overall(report["answers"], failures, report["culprits"])
    report["headline"] = headline(report)
    return report


def nics(report: t.Mapping[str, t.Any]) -> list[Nic]:
    """Return the adapters that carry the training: the RDMA ports that are up, else the training interface."""
    found = [Nic(**entry) for entry in report.get("facts", {}).get("nics", [])]
    fast = [nic for nic in found if nic.rdma]
    return fast or found


def times(verification: t.Mapping[str, t.Any], results: t.Mapping[str, t.Mapping[str, t.Any]], now: float) -> dict[str, t.Any]:
    """Return where the time went, in seconds."""
    checks = [result["preflight_seconds"] for result in results.values() if "preflight_seconds" in result]
    found: dict[str, t.Any] = {"all": now - float(verification.get("started") or now), "checks": max(checks, default=None)}
    for result in results.values():
        measured = result.get("measured")
        if measured:
            found["measurement"] = measured["seconds"]
            found["tournament"] = (measured["pairs"] or {}).get("seconds", 0.0) + (measured["inside_pairs"] or {}).get("seconds", 0.0)
    return found


def sound(order: t.Sequence[str], answers: t.Mapping[str, t.Mapping[str, t.Any]], judged: t.Callable[[t.Mapping[str, t.Any]], t.Any]) -> t.Any:
    """Return what comes of the answers, with results that no verifier writes taken for missing ones.

    Results are written as the job's user, which may write anything. One that makes the judgement impossible is found by leaving
    it out.

    Args:
        order: all hosts.
        answers: what was collected from each host.
        judged: makes the report and all that shows it.
    """
    try:
        return judged(answers)
    except NONSENSE as error:
        reason = f"its result is not what a verifier writes ({type(error).__name__})"
    for host in order:
        try:
            return judged({**answers, host: {"error": reason}})
        except NONSENSE:
            continue
    return judged({host: {"error": reason} for host in order})


def vanished(
    order: t.Sequence[str], answers: t.Mapping[str, t.Mapping[str, t.Any]], results: t.Mapping[str, t.Mapping[str, t.Any]]
) -> dict[str, str]:
    """Return a sentence for each host that left no result."""
    missing = [host for host in order if not results[host]]
    noticed: dict[str, list[str]] = {}
    for host, result in results.items():
        if result.get("lost"):
            noticed.setdefault(result["lost"], []).append(host)
    found = {}
    for host in missing:
        answer = answers.get(host) or {}
        if answer.get("unreachable_node"):
            when = "during the measurement" if noticed.get(host) else "before or during the measurement"
            text = f"{host} went away {when} and cannot be reached by SSH; look at its power and network"
        else:
            lines = [line for line in str(answer.get("journal") or "").splitlines() if line.strip()]
            reason = answer.get("error") or (lines[-1].strip() if lines else "its unit ended without a word")
            text = f"{host} left no result: {str(reason)[:200]}; see journalctl -u nccl-verify there"
        found[host] = text
    return found


def broken(
    order: t.Sequence[str], answers: t.Mapping[str, t.Mapping[str, t.Any]], results: t.Mapping[str, t.Mapping[str, t.Any]]
) -> list[str]:
    """Return why there is no measurement though the checks found nothing: the first cause, not its consequences."""
    causes: list[tuple[int, float, str]] = []
    for host in order:
        result = results[host]
        for error in result.get("errors") or []:
            text = str(error.get("text") or error.get("type"))
            known = symptoms.recognise([text])
            weak = 1 if known and known[0]["name"] in CONSEQUENCES else 0
            meaning = f"{known[0]['sentence']} ({shortened(text)})" if known else shortened(text)
            causes.append((weak, float(error.get("time") or 0.0), f"{host}, rank {error['rank']}, {error['stage']}: {meaning}"))
        if not result.get("errors") and result.get("outcome") == "failed":
            known = symptoms.recognise([str(result.get("log") or "")])
            lines = [line.strip() for line in str(result.get("log") or "").splitlines() if line.strip()]
            last = known[0]["sentence"] if known else shortened(lines[-1] if lines else f"exit status {result.get('returncode')}")
            causes.append((2, 0.0, f"{host}: {last}"))
    lost = sorted({result["lost"] for result in results.values() if result.get("lost") and result.get("lost_reason") in ("silent", "closed")})
    silent = [f"{host} gave no more signs of life during the measurement; look at its power and network" for host in lost]
    if causes and min(causes)[0] == 0:
        return [min(causes)[2]]
    if silent:
        return silent
    late = [host for host in order if results[host].get("outcome") == "timeout"]
    if late:
        stages = sorted({str(stage) for host in late for stage in (results[host].get("stages") or {}).values()})
        where = f" (last stage: {', '.join(stages[:2])})" if stages else ""
        return [f"the measurement did not end in time on {', '.join(late)}{where}; raise nccl_verify_timeout or lower nccl_verify_size_max"]
    if causes:
        return [min(causes)[2]]
    return ["the nodes did not measure, and none of them says why; see the JSON report"]


def shortened(text: str) -> str:
    """Return a text as one line of a length that a person reads."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def figures_of(measured: t.Mapping[str, t.Any], names: t.Mapping[int, tuple[str, int]], order: t.Sequence[str]) -> dict[str, t.Any]:
    """Return the figures of a measurement in the report's own words."""
    world = measured["world_size"]
    rows = [
        bandwidth.nccl_tests_row(row["size"], measured["dtype"], measured["operation"], row["seconds"], world, row["nwrong"], row["iterations"])
        for row in measured["rows"]
    ]
    size, value = bandwidth.plateau([(row["size"], row["in_place"]["bus_bw"]) for row in rows])
    inside = {order[entry["node"]]: entry["gbytes_per_second"] for entry in measured["inside"]}
    wire = {order[entry["node"]]: entry["gbytes_per_second"] for entry in measured["wire"]}

    def named(pairs: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
        return [
            {
                "source": names[entry["source"]][0],
                "source_device": names[entry["source"]][1],
                "target": names[entry["target"]][0],
                "target_device": names[entry["target"]][1],
                "gbytes_per_second": entry["gbytes_per_second"],
                "median_gbytes_per_second": entry["median_gbytes_per_second"],
            }
            for entry in (pairs or {}).get("pairs", [])
        ]

    return {
        "nccl_tests": nccl_tests(measured, rows, names),
        "plateau": {"size": size, "gbytes_per_second": value},
        "latency": measured["latency"],
        "correctness": correctness(measured, names),
        "inside": inside,
        "wire": wire,
        "figures": {
            "inside": min(inside.values(), default=None),
            "wire": min(wire.values(), default=None),
            # One process has nobody to exchange with: its all-reduce copies nothing, whatever the clock says of it.
            "application": value if world > 1 else None,
        },
        "pairs": named(measured["pairs"]),
        "inside_pairs": named(measured["inside_pairs"]),
        "tournament": {
            key: (measured["pairs"] or measured["inside_pairs"] or {}).get(key) for key in ("size", "rounds", "confirmed", "seconds")
        },
        "ranks": measured["ranks"],
    }


def nccl_tests(
    measured: t.Mapping[str, t.Any], rows: t.Sequence[t.Mapping[str, t.Any]], names: t.Mapping[int, tuple[str, int]]
) -> dict[str, t.Any]:
    """Return the rows as the JSON of nccl-tests (version 3, src/util.cu)."""
    ranks = measured["ranks"]
    values = [row["in_place"]["bus_bw"] for row in rows]
    wrong = sum(row["in_place"]["nwrong"] or 0 for row in rows)
    return {
        "version": 3,
        "start_time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(measured.get("started") or 0.0)),
        "args": ["nccl_verify_worker.py"],
        "env": [],
        "nccl_version": ranks[0]["nccl"],
        "config": {
            "nthreads": 1,
            "ngpus": 1,
            "minimum_bytes": rows[0]["size"],
            "maximum_bytes": rows[-1]["size"],
            "devices": [
                {
                    "rank": entry["rank"],
                    "group": 0,
                    "pid": entry["pid"],
                    "hostname": names[entry["rank"]][0],
                    "device": entry["local"],
                    "device_hex": (entry.get("gpu") or {}).get("pci", ""),
                    "device_info": (entry.get("gpu") or {}).get("name", "CPU"),
                }
                for entry in ranks
            ],
        },
        "results": list(rows),
        "out_of_bounds": {"count": wrong, "okay": wrong == 0},
        "average_bus_bandwidth": {"bandwidth": sum(values) / len(values), "okay": "unchecked"},
    }


def correctness(measured: t.Mapping[str, t.Any], names: t.Mapping[int, tuple[str, int]]) -> dict[str, t.Any]:
    """Return the exact check's result with hosts in place of ranks alone."""
    found = dict(measured["correctness"])
    found["wrong"] = [{**entry, "host": names[entry["rank"]][0], "device": names[entry["rank"]][1]} for entry in found["wrong"]]
    return found


def wrong_results(measured: t.Mapping[str, t.Any], names: t.Mapping[int, tuple[str, int]]) -> list[str]:
    """Return sentences for results that were not exact: one for each rank, with its first wrong element."""
    sentences = []
    seen = set()
    for entry in measured["correctness"]["wrong"]:
        rank = entry["rank"]
        if rank in seen:
            continue
        seen.add(rank)
        times_wrong = sum(1 for other in measured["correctness"]["wrong"] if other["rank"] == rank)
        host, device = names[rank]
        sentences.append(
            f"{host} (device {device}, rank {rank}) got a wrong sum in {times_wrong} of {measured['correctness']['repeats']} repetitions: "
            f"{entry['nwrong']} elements, the first at index {entry['index']} (chunk {entry['chunk']}): {entry['got']:g} in place of "
            f"{entry['expected']:g}; take the node out and look for ECC errors"
        )
    rows = [row["size"] for row in measured["rows"] if row["nwrong"]]
    if rows and not sentences:
        sentences.append(f"wrong sums at {', '.join(map(str, rows[:5]))} bytes that the repeated check did not see again; run it again")
    return sentences


def transports(
    results: t.Mapping[str, t.Mapping[str, t.Any]],
    names: t.Mapping[int, tuple[str, int]],
    rdma: t.Collection[str],
    failures: list[str],
) -> dict[str, t.Any]:
    """Return how the ranks reach each other; a fall-back to sockets where RDMA exists is added to the failures."""
    lines = [line for result in results.values() for line in result.get("nccl_log") or []]
    found = transport.parse(lines)
    sentence = transport.fell_back(found, {rank: name[0] for rank, name in names.items()}, rdma) if lines else ""
    if sentence:
        failures.append(sentence)
    return found.as_dict() if lines else {}


def expectations(
    measured: t.Mapping[str, t.Any], adapters: t.Mapping[str, t.Sequence[Nic]], order: t.Sequence[str]
) -> dict[str, Expected]:
    """Return what the hardware should reach: for each figure, the node that limits it."""
    gpus: dict[str, list[Gpu]] = {host: [] for host in order}
    for entry in measured["ranks"]:
        told = entry.get("gpu")
        gpus[order[entry["node"]]].append(
            Gpu(told["name"], told["capability"], told.get("nvlinks"), told.get("pcie_speed", 0.0), told.get("pcie_width", 0))
            if told
            else Gpu("CPU")
        )
    local = max(len(found) for found in gpus.values())
    many = [found for found in gpus.values() if len(found) > 1]
    if measured["backend"] != "nccl":
        inside = Expected(None, None, "unknown: nothing says how fast processes of one node should exchange over gloo")
        inside = inside if many else Expected(None, None, "one process per node: nothing to measure inside a node")
    else:
        inside = slowest([bandwidth.inside_node(found) for found in many]) if many else bandwidth.inside_node([])
    if len(order) < 2:
        application = inside if many else Expected(None, None, "one process: nobody to exchange with")
        return {"inside": inside, "wire": Expected(None, None, "one node: no wire"), "application": application}
    wire = slowest([bandwidth.wire(adapters.get(host, [])) for host in order])
    return {"inside": inside, "wire": wire, "application": bandwidth.application(inside, wire, len(order), local)}


def slowest(values: t.Sequence[Expected]) -> Expected:
    """Return the least of some expected figures; one that is unknown makes the whole unknown."""
    return next((value for value in values if value.value is None), None) or min(values, key=lambda value: value.value or 0.0)


def accused(report: t.Mapping[str, t.Any], expected: t.Mapping[str, Expected]) -> list[culprit.Culprit]:
    """Return what is slow among the pairs that were measured, between the nodes and inside them."""
    pairs = report["pairs"]
    rails = len({entry["source_device"] for entry in pairs}) or 1
    needed = expected["wire"].minimum
    found = culprit.solve(
        [culprit.Sample(entry["source"], entry["target"], entry["source_device"], entry["gbytes_per_second"]) for entry in pairs],
        needed / rails if needed and expected["wire"].blocks else None,
        culprit.UNKNOWN_TOLERANCE if expected["wire"].value is None else culprit.TOLERANCE,
    )
    passed = any(entry["name"] == "inside" and entry["status"] == "pass" for entry in report["answers"])
    tolerance = culprit.UNKNOWN_TOLERANCE if expected["inside"].value is None else culprit.TOLERANCE
    for host in report["order"]:
        here = [entry for entry in report["inside_pairs"] if entry["source"] == host]
        found += inside_culprits(host, here, tolerance, passed)
    return found


def inside_culprits(
    host: str, pairs: t.Sequence[t.Mapping[str, t.Any]], tolerance: float, passed: bool
) -> list[culprit.Culprit]:
    """Return the slow devices and links inside one node.

    Where the node passed, pairs that differ by their wiring, such as bridges between some of its devices, are as they should be.
    """
    samples = [
        culprit.Sample(
            f"device {entry['source_device']} of {host}", f"device {entry['target_device']} of {host}", 0, entry["gbytes_per_second"]
        )
        for entry in pairs
    ]
    found = []
    for entry in culprit.solve(samples, tolerance=tolerance):
        if entry.kind in ("network", "block"):
            if not passed:
                found.append(devices_apart(host, [sample.gbytes_per_second for sample in samples]))
            continue
        text = entry.evidence
        if entry.kind == "link":
            ends = f"{entry.host} sends {culprit.figure(entry.measured)} to {entry.peer}"
            text = f"{ends}, while {culprit.figure(entry.expected)} is reached between devices of that node"
        device = int(entry.host.split()[1])
        kind = "device" if entry.kind == "node" else entry.kind
        found.append(culprit.Culprit(kind, host, device, entry.peer, entry.measured, entry.expected, text))
    return found


def devices_apart(host: str, speeds: t.Sequence[float]) -> culprit.Culprit:
    """Return what is said where the speeds between a node's devices differ in a way that no device and no link explains."""
    low, high = min(speeds), max(speeds)
    text = (
        f"the devices of {host} reach each other with {culprit.figure(low)} to {culprit.figure(high)}, which no single device or link "
        "explains; look at nvidia-smi topo -m for bridges and sockets, and at what else runs there"
    )
    return culprit.Culprit("network", host, None, None, low, high, text)


def headline(report: t.Mapping[str, t.Any]) -> str:
    """Return the verdict as one sentence."""
    settings = report["settings"]
    count = sum(node["nproc"] for node in report["nodes"].values())
    what = f"{len(report['order'])} node{'s' if len(report['order']) > 1 else ''}, {count} rank{'s' if count > 1 else ''}, {settings['backend']}"
    if report["failures"]:
        return f"{what}: {report['failures'][0]}"
    bad = [entry["sentence"] for status in ("fail", "warn") for entry in report["answers"] if entry["status"] == status]
    if report["verdict"] == "fail" and report["culprits"]:
        return f"{what}: {report['culprits'][0]['evidence']}"
    if report["verdict"] == "fail":
        return f"{what}: {bad[0]}"
    if report["culprits"]:
        return f"{what}: works, but {report['culprits'][0]['evidence']}"
    if bad:
        return f"{what}: {bad[0]}"
    if all(entry["status"] == "none" for entry in report["answers"]):
        return f"{what}: works; one process has nobody to exchange with, so there was nothing to judge"
    if report["verdict"] == "warn":
        return f"{what}: works; whether it is as fast as it should be is unknown, since the hardware is unknown"
    return f"{what}: as fast as its hardware should be"
