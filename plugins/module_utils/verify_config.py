# Copyright: Contributors to the onprem.torch project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The settings of a verification: checked before anything is launched, and what nodes and workers are told."""

from __future__ import annotations

import hashlib
import json
import random
import re
import typing as t
from dataclasses import asdict, dataclass

from ansible_collections.onprem.torch.plugins.module_utils import bandwidth, network, secret_texts, transport
from ansible_collections.onprem.torch.plugins.module_utils.problems import Problem
from ansible_collections.onprem.torch.plugins.module_utils.variables import kind_of

PREFIX = "nccl_verify_"
UNIT = "nccl-verify.service"
# Root's, with the programs; only the folder for the results belongs to the job's user.
FOLDER = "/run/nccl-verify"
RESULTS = f"{FOLDER}/result"
BACKENDS = ("auto", "nccl", "gloo")
PAIRWISE = ("auto", "always", "never")
# Ports that every node tries to listen on, one after the other, in the kernel's ephemeral range.
EPHEMERAL_CANDIDATES = 8
# Seconds beyond arrival and measurement for exchanging what was found, ending torch and writing the result.
SLACK_SECONDS = 60


@dataclass(frozen=True)
class Settings:
    """What is measured and how it is judged.

    Attributes:
        backend: nccl or gloo.
        size_min, size_max: bytes of the smallest and the largest message; size_max 0 leaves it to the worker.
        size_factor: each size is the one before times this.
        iterations, warmup: calls that are timed, and calls before them, for each size.
        dtype, operation: of the all-reduce.
        minimum: GB/s of bus bandwidth that the all-reduce must reach; None derives it from the hardware.
        pairwise: auto (on a shortfall, or where a figure cannot be judged), always or never.
        pair_size: bytes of a message between two ranks; 0 leaves it to the worker.
        correctness_repeats: repetitions of the exact check.
        timeout: seconds that the measurement may take.
        arrival_timeout: seconds that the nodes wait for each other.
        environment: what changes with its environment variables, whose values are secrets; empty for none.
    """

    backend: str = "gloo"
    size_min: int = 8
    size_max: int = 0
    size_factor: int = 2
    iterations: int = 20
    warmup: int = 1
    dtype: str = "float32"
    operation: str = "sum"
    minimum: float | None = None
    pairwise: str = "auto"
    pair_size: int = 0
    correctness_repeats: int = 3
    timeout: int = 300
    arrival_timeout: int = 30
    environment: str = ""

    def as_dict(self) -> dict[str, t.Any]:
        """Return the fields as plain data."""
        return asdict(self)


def problem(name: str, text: str, cure: str, host: str = "") -> Problem:
    """Return a problem with one of the variables."""
    return Problem(host, f"{PREFIX}{name}", text, cure)


def read(values: t.Mapping[str, t.Any], gpus: t.Mapping[str, int]) -> tuple[Settings, list[Problem]]:
    """Return the settings and what is wrong with them.

    Args:
        values: by variable without its prefix; what is missing has its default.
        gpus: number of usable GPUs by host.
    """
    problems: list[Problem] = []
    found: dict[str, t.Any] = {}

    def choice(name: str, allowed: t.Sequence[str], default: str) -> None:
        value = str(values.get(name) or default)
        found[name] = value if value in allowed else default
        if value not in allowed:
            text = f"{PREFIX}{name} is {value!r}, but one of {', '.join(allowed)} was expected"
            problems.append(problem(name, text, f"set one of them, such as {default}"))

    def whole(name: str, least: int, default: int, unit: str) -> None:
        value = values.get(name)
        value = default if value is None else value
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        found[name] = value if good else default
        if not good:
            text = f"{PREFIX}{name} is {value!r}, but a whole number of {unit} from {least} was expected"
            problems.append(problem(name, text, f"set it to {default} or so"))

    def size(name: str, default: int) -> None:
        value = values.get(name)
        found[name] = default
        if value not in (None, "", "auto"):
            try:
                found[name] = bandwidth.parse_size(t.cast("int | str", value))
            except bandwidth.SizeError as error:
                text, _semicolon, cure = str(error).replace(" is no size", ", which is no size").partition("; ")
                problems.append(problem(name, f"{PREFIX}{name} is {text}", cure))

    choice("backend", BACKENDS, "auto")
    choice("dtype", tuple(bandwidth.DTYPES), "float32")
    choice("operation", bandwidth.OPERATIONS, "sum")
    choice("pairwise", PAIRWISE, "auto")
    whole("size_factor", 2, 2, "times")
    whole("iterations", 1, 20, "calls")
    whole("warmup", 0, 1, "calls")
    whole("correctness_repeats", 0, 3, "repetitions")
    whole("timeout", 10, 300, "seconds")
    whole("arrival_timeout", 5, 30, "seconds")
    for name, default in (("size_min", 8), ("size_max", 0), ("pair_size", 0)):
        size(name, default)
    if not problems:
        try:
            bandwidth.sizes(found["size_min"], found["size_max"] or 1 << 31, found["size_factor"], found["dtype"])
        except bandwidth.SizeError as error:
            text, _semicolon, cure = re.sub(r"\b(size_(?:min|max|factor))\b", rf"{PREFIX}\1", str(error)).partition("; ")
            name = next(iter(re.findall(rf"{PREFIX}(\w+)", text)), "size_min")
            problems.append(problem(name, text, cure))
        if found["pair_size"] % 4:
            text = f"{PREFIX}pair_size is {found['pair_size']} bytes, but a multiple of 4 was expected"
            problems.append(problem("pair_size", text, f"set it to {found['pair_size'] // 4 * 4 or 4}"))
    minimum, wrong = least(values.get("minimum_gbytes_per_second", "auto"))
    problems += wrong
    environment = values.get("environment") or {}
    if not isinstance(environment, dict):
        text = f"{PREFIX}environment is {kind_of(environment)}, but a mapping of names to values was expected"
        problems.append(problem("environment", text, "write NAME: value lines"))
        environment = {}
    without = [host for host, count in gpus.items() if not count]
    if found["backend"] == "nccl":
        for host in without:
            text = f"{PREFIX}backend is nccl, but the node has no usable GPU"
            problems.append(problem("backend", text, "set it to auto or gloo, or see nvidia-smi there", host))
    if found["backend"] == "auto":
        found["backend"] = "gloo" if without else "nccl"
    return Settings(**found, minimum=minimum, environment=secret_texts.fingerprint(environment, "nccl_verify_environment")), problems


def problems_of(hosts: t.Sequence[t.Any]) -> list[Problem]:
    """Return what is wrong with the settings of a plan's hosts, so that the plan names it before anything is done."""
    values = {key[len(PREFIX) :]: value for key, value in hosts[0].variables.items() if key.startswith(PREFIX)}
    known = {host.name: host.node for host in hosts if host.node}
    gpus = {name: len((node.get("hardware") or {}).get("usable_gpus") or []) for name, node in known.items()}
    _settings, problems = read(values, gpus)
    interface = str(values.get("interface") or "")
    _ends, found = endpoints({name: node["interfaces"] for name, node in known.items()}, interface) if interface else ({}, [])
    return problems + found


def endpoints(
    interfaces: t.Mapping[str, t.Sequence[dict[str, t.Any]]], interface: str
) -> tuple[dict[str, network.Endpoint], list[Problem]]:
    """Return the address of every node on the interface that is asked for, and what is wrong with it."""
    chosen, found = network.choose(interfaces, {host: interface for host in interfaces})
    name = f"{PREFIX}interface"
    return chosen, [
        Problem(entry.host, name, entry.text.replace(network.INTERFACE, name), entry.cure.replace(network.INTERFACE, name))
        for entry in found
    ]


def least(value: t.Any) -> tuple[float | None, list[Problem]]:
    """Return the bus bandwidth that is demanded, None for auto, and what is wrong with it."""
    if value in (None, "", "auto"):
        return None, []
    name = "minimum_gbytes_per_second"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1e6:
        text = f"{PREFIX}{name} is {value!r}, but auto or a positive number of GB/s was expected"
        return None, [problem(name, text, "set auto to derive it from the hardware")]
    return number, []


def digest(value: t.Any, length: int = 12) -> str:
    """Return the first hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:length]


def fingerprint(cluster: str, settings: Settings) -> str:
    """Return what runs must share to be compared: the cluster's fingerprint and all settings that move the figures."""
    names = ("backend", "size_min", "size_max", "size_factor", "dtype", "operation", "pair_size", "environment")
    whole = settings.as_dict()
    return digest([cluster, {name: whole[name] or {} if name == "environment" else whole[name] for name in names}])


def deadline(settings: Settings) -> int:
    """Return the seconds after which the unit is ended, whatever it does."""
    return settings.arrival_timeout + settings.timeout + SLACK_SECONDS


def ephemeral(ranges: t.Iterable[t.Sequence[int]], taken: t.Collection[int], token: str) -> list[int]:
    """Return ports that lie in every node's ephemeral range, the same ones for the same token; empty where there are none."""
    limits = list(ranges)
    first, last = max(entry[0] for entry in limits), min(entry[1] for entry in limits)
    free = [port for port in range(first, last + 1) if port not in taken]
    return random.Random(token).sample(free, min(EPHEMERAL_CANDIDATES, len(free)))


def worker(settings: Settings, hosts: t.Sequence[str], minimum: t.Mapping[str, float | None]) -> dict[str, t.Any]:
    """Return the worker's configuration."""
    names = (
        "backend",
        "size_min",
        "size_max",
        "size_factor",
        "iterations",
        "warmup",
        "dtype",
        "operation",
        "pairwise",
        "pair_size",
        "correctness_repeats",
    )
    whole = settings.as_dict()
    return {
        **{name: whole[name] for name in names},
        "minimum": {name: value for name, value in minimum.items() if value is not None},
        # What the worker needs to derive the figure inside a node, since only it knows the GPU's NVLinks.
        "nvlink": {"speeds": bandwidth.NVLINK_GBYTES_PER_SECOND, "floor": bandwidth.FLOORS["nvlink"]},
        "hosts": list(hosts),
        "timeout": min(60, settings.timeout),
    }


def node(
    settings: Settings,
    token: str,
    members: t.Sequence[t.Mapping[str, t.Any]],
    ports: t.Mapping[str, t.Any],
    worker_config: t.Mapping[str, t.Any],
) -> dict[str, t.Any]:
    """Return the configuration of the program on the nodes; each node adds its own ``rank``, ``python`` and ``torchrun``.

    ``torchrun`` is how a node starts torch.distributed.run.

    Args:
        settings: the settings.
        token: what tells this run's connections from a stranger's.
        members: C(host), C(rank), C(address), C(interface) and C(nproc) of every node, by rank.
        ports: C(verifier), C(master) and the candidates C(ephemeral).
        worker_config: see ``worker``.
    """
    return {
        "token": token,
        "nodes": [dict(entry) for entry in members],
        "ports": dict(ports),
        "arrival_seconds": settings.arrival_timeout,
        "measure_seconds": settings.timeout,
        "keep": transport.KEEP_WORDS,
        "worker": dict(worker_config),
    }
