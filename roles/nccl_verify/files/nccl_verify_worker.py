# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures all-reduce under torch.distributed.run, in the way of nccl-tests, and looks for the slow pair.

One file that needs torch and nothing else. By hand, beside nccl-tests, on a host with two GPUs:

    python -m torch.distributed.run --nproc-per-node=2 nccl_verify_worker.py --size-max=2G

Sizes are in bytes, times in seconds, bandwidths in GB/s (1e9 bytes per second). Rank 0 prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import os
import random
import statistics
import sys
import time
import traceback
import typing as t

DEFAULTS: dict[str, t.Any] = {
    "backend": "auto",
    "dtype": "float32",
    "operation": "sum",
    "size_min": 8,
    "size_max": 0,  # 0: 2 GiB on GPUs, 4 MiB on CPUs
    "size_factor": 2,
    "iterations": 20,
    "warmup": 1,
    "seconds_per_size": 5.0,
    "correctness_repeats": 3,
    "pairwise": "auto",
    "pair_size": 0,  # 0: 128 MiB on GPUs, 1 MiB on CPUs
    "pair_repeats": 5,
    "timeout": 60,
    "nvlink": {},  # NCCL's GB/s of a link by compute capability, and the share that must be reached
    "minimum": {},  # inside, wire, application: GB/s that are needed, where known
    "hosts": [],  # names by node rank, for a person
    "plant": {},  # for tests: {"rank": 1, "index": 12345, "where": "output"}
}
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1}
# Integers up to this are exact in the type (IEEE 754: 2 to the bits of the mantissa).
EXACT = {
    "float64": 2**53,
    "float32": 2**24,
    "float16": 2**11,
    "bfloat16": 2**8,
    "int64": 2**53,
    "int32": 2**31 - 1,
    "int8": 127,
    "uint8": 255,
}
CALLS_IN_GRAPH = 20
GRAPH_REPLAYS = 20
MATCHINGS = 4
CIRCLE_UP_TO = 64
SUSPECT = 0.75
# Further looks at pairs that seem slow, and the time for each of them.
CONFIRMATIONS = 2
CONFIRM_SECONDS = 4.0
# A pair is measured for this long at least: a few short messages would all fall into one moment in which a rank has no CPU.
PAIR_LEAST_SECONDS = 0.05
PAIR_SECONDS = 0.5
MOST_MESSAGES = 500


# Pure functions, tested without torch.


def circle(players: t.Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the rounds in which everyone meets everyone once (circle method; an odd one rests in turn)."""
    seats: list[int | None] = list(players)
    if len(seats) % 2:
        seats.append(None)
    rounds = []
    for _turn in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]))
        rounds.append([(first, second) for first, second in pairs if first is not None and second is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def matchings(players: t.Sequence[int], rounds: int, seed: int = 1) -> list[list[tuple[int, int]]]:
    """Return rounds of random pairs in which everyone (but an odd one) meets somebody."""
    generator = random.Random(seed)
    found = []
    for _turn in range(rounds):
        order = list(players)
        generator.shuffle(order)
        found.append([(order[index], order[index + 1]) for index in range(0, len(order) - 1, 2)])
    return found


def rounds_of(players: t.Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return the schedule of a league: everyone with everyone up to 64, beyond that four random matchings."""
    if len(players) < 2:
        return []
    return circle(players) if len(players) <= CIRCLE_UP_TO else matchings(players, MATCHINGS)


def suspects(values: dict[tuple[int, int], float], leagues: t.Sequence[t.Sequence[int]]) -> list[tuple[int, int]]:
    """Return the pairs that are worth a second look before anybody is accused, in a fixed order.

    The best pairs of a device that looks slow decide whether it is slow; then the slow pairs of devices that do not.
    """
    found: list[tuple[int, int]] = []
    for league in leagues:
        members = set(league)
        pairs: dict[tuple[int, int], float] = {}
        for (source, target), value in values.items():
            if source in members and target in members:
                pair = (min(source, target), max(source, target))
                pairs[pair] = min(pairs.get(pair, value), value)
        if not pairs:
            continue
        best: dict[int, float] = {}
        for pair, value in pairs.items():
            for rank in pair:
                best[rank] = max(best.get(rank, 0.0), value)
        reference = statistics.median(best.values())
        slow = sorted(rank for rank, value in best.items() if value < SUSPECT * reference)
        champion = max(sorted(best), key=lambda rank: best[rank])
        for rank in slow:
            mine = sorted((pair for pair in pairs if rank in pair), key=lambda pair: (-pairs[pair], pair))[:3]
            met = (min(rank, champion), max(rank, champion))
            found += [*mine, *([met] if rank != champion and met not in mine else [])]
        found += sorted(
            pair
            for pair, value in pairs.items()
            if pair[0] not in slow and pair[1] not in slow and value < SUSPECT * min(best[pair[0]], best[pair[1]])
        )
    return list(dict.fromkeys(found))


def affordable(pairs: t.Sequence[tuple[int, int]], seconds: dict[tuple[int, int], float], budget: float) -> list[tuple[int, int]]:
    """Return the pairs that fit into a time, when each rank meets its partners one after the other."""
    clock: dict[int, float] = {}
    chosen = []
    for pair in pairs:
        end = max(clock.get(pair[0], 0.0), clock.get(pair[1], 0.0)) + seconds.get(pair, 0.0)
        if end <= budget or not chosen:
            chosen.append(pair)
            clock[pair[0]] = clock[pair[1]] = end
    return chosen


def weights(ranks: int, dtype: str, operation: str, repeat: int) -> tuple[list[int], int]:
    """Return the integer that each rank contributes and the number of different positions, so that results are exact.

    Element ``i`` of rank ``r`` is ``weights[r] * ((i + repeat) % positions + 1)``. Where a sum over all ranks is not
    exact in the type, a window of ranks contributes and the others give zero; the window moves with each repeat.
    """
    limit = EXACT[dtype]
    positions = 61 if limit >= 2**20 else 7 if limit > 200 else 3
    room = limit // positions
    values = [rank % 13 + 1 for rank in range(ranks)]
    if operation != "sum" or sum(values) <= room:
        return values, positions
    window = max(1, room // 13)
    start = repeat * window % ranks
    return [value if (rank - start) % ranks < window else 0 for rank, value in enumerate(values)], positions


def combined(values: t.Sequence[int], operation: str) -> int:
    """Return the weight that the result must have."""
    return {"sum": sum, "max": max, "min": min}[operation](values)


def plateau(rows: t.Sequence[dict[str, t.Any]]) -> float:
    """Return the bus bandwidth at the plateau: the median of the sizes within 3 % of the best."""
    best = max(row["busbw"] for row in rows)
    return statistics.median(row["busbw"] for row in rows if row["busbw"] >= 0.97 * best)


def nvlink_minimum(ranks: t.Sequence[dict[str, t.Any]], nvlink: dict[str, t.Any]) -> float | None:
    """Return the bus bandwidth that the NVLinks of the ranks' GPUs must give; None where they have none or do not tell."""
    gpus = [entry.get("gpu") or {} for entry in ranks]
    links = min((gpu.get("nvlinks") or 0) for gpu in gpus)
    if not nvlink or not links:
        return None
    capability = min(gpu["capability"] for gpu in gpus)
    each = next((value for first, last, value in nvlink["speeds"] if first <= capability <= last), 0.0)
    return links * each * nvlink["floor"] or None


def size_of(text: str) -> int:
    """Return bytes of 8, 64K, 128M or 4G."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1:].upper() in units else int(text)


def bus_factor(ranks: int) -> float:
    """Return busbw / algbw of an all-reduce (nccl-tests, doc/PERFORMANCE.md)."""
    return 2 * (ranks - 1) / ranks if ranks > 1 else 1.0


# NVML, for what torch does not tell.


def nvml_facts(uuid: str) -> dict[str, t.Any]:
    """Return active NVLinks and the PCIe link (NVML, nvml.h) of the GPU with a UUID; empty where NVML does not tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return {}
        value = ctypes.c_uint()
        links = 0
        for link in range(36):  # nvml.h: NVML_NVLINK_MAX_LINKS is 18 up to sm90; more later
            if nvml.nvmlDeviceGetNvLinkState(handle, ctypes.c_uint(link), ctypes.byref(value)):
                break
            links += int(value.value == 1)
        found: dict[str, t.Any] = {"nvlinks": links}
        if not nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle, ctypes.byref(value)):
            found["pcie_speed"] = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}.get(value.value, 0.0)
        if not nvml.nvmlDeviceGetMaxPcieLinkWidth(handle, ctypes.byref(value)):
            found["pcie_width"] = value.value
        return found
    except (OSError, AttributeError):
        return {}


class Bench:
    """The measurement on one rank."""

    def __init__(self, config: dict[str, t.Any], folder: str) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        self.config, self.folder = config, folder
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local, self.node = int(os.environ["LOCAL_RANK"]), int(os.environ.get("GROUP_RANK", "0"))
        backend = config["backend"]
        if backend == "auto":
            backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.backend = backend
        self.gpu = backend == "nccl"
        if self.gpu and not torch.cuda.is_available():
            raise RuntimeError("the backend nccl was asked for, but torch sees no GPU here; use gloo or look at nvidia-smi")
        if self.gpu:
            torch.cuda.set_device(self.local)
        else:
            torch.set_num_threads(1)
        self.device = torch.device("cuda", self.local) if self.gpu else torch.device("cpu")
        self.dtype = getattr(torch, config["dtype"])
        self.width = SIZES[config["dtype"]]
        self.operation = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[config["operation"]]
        self.size_max = config["size_max"] or (2 << 30 if self.gpu else 4 << 20)
        self.stage("joining the rendezvous")
        arguments: dict[str, t.Any] = {"device_id": self.device} if self.gpu else {}
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=config["timeout"]), **arguments)
        self.stage("exchanging what the ranks are")
        self.ranks = self.gather(self.facts())
        self.nodes = sorted({entry["node"] for entry in self.ranks})
        self.here = [entry["rank"] for entry in self.ranks if entry["node"] == self.node]
        self.rails = [
            [entry["rank"] for entry in self.ranks if entry["local"] == rail]
            for rail in range(max(entry["local"] for entry in self.ranks) + 1)
        ]
        self.buffer = torch.ones(max(self.size_max, self.width) // self.width, dtype=self.dtype, device=self.device)

    def stage(self, text: str) -> None:
        """Leave a note of what is being done, for whoever finds this process hanging."""
        self.now = text
        if self.folder:
            with open(os.path.join(self.folder, f"stage-{self.rank}"), "w", encoding="utf-8") as stream:
                stream.write(text)

    def facts(self) -> dict[str, t.Any]:
        """Return what this rank is and runs."""
        torch = self.torch
        found: dict[str, t.Any] = {
            "rank": self.rank,
            "node": self.node,
            "local": self.local,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "nccl": "",
            "pid": os.getpid(),
        }
        if self.gpu:
            properties = torch.cuda.get_device_properties(self.local)
            found["nccl"] = ".".join(str(number) for number in torch.cuda.nccl.version())
            found["gpu"] = {
                "name": properties.name,
                "capability": properties.major * 10 + properties.minor,
                "memory": properties.total_memory,
                "pci": f"{getattr(properties, 'pci_domain_id', 0):04x}:{getattr(properties, 'pci_bus_id', 0):02x}:00",
                **nvml_facts(f"GPU-{properties.uuid}"),
            }
        return found

    def gather(self, value: t.Any) -> list[t.Any]:
        """Return every rank's value (plain data), by rank. torch's all_gather_object needs numpy, which may not be there."""
        torch = self.torch
        data = json.dumps(value).encode()
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _rank in range(self.world)]
        self.dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device=self.device))
        counts = [int(length.item()) for length in lengths]
        padded = torch.zeros(max(counts), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        texts = [torch.zeros(max(counts), dtype=torch.uint8, device=self.device) for _rank in range(self.world)]
        self.dist.all_gather(texts, padded.to(self.device))
        return [json.loads(bytes(text[:count].tolist())) for text, count in zip(texts, counts)]

    def sync(self) -> None:
        """Wait for the GPU."""
        if self.gpu:
            self.torch.cuda.synchronize()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.dist.barrier(device_ids=[self.local] if self.gpu else None)
        self.sync()

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        tensor = self.torch.tensor([value], dtype=self.torch.float64, device=self.device)
        self.dist.all_reduce(tensor, op=self.dist.ReduceOp.MAX)
        return float(tensor.item())

    def mean(self, value: float) -> float:
        """Return the mean of all ranks' values."""
        tensor = self.torch.tensor([value], dtype=self.torch.float64, device=self.device)
        self.dist.all_reduce(tensor)
        return float(tensor.item()) / self.world

    def timed(self, call: t.Callable[[], t.Any], times: int) -> float:
        """Return the wall seconds of one call: barrier, N calls back to back, wait; the mean over ranks (as nccl-tests)."""
        self.barrier()
        start = time.perf_counter()
        for _turn in range(times):
            call()
        self.sync()
        return self.mean((time.perf_counter() - start) / times)

    def slice(self, size: int) -> t.Any:
        """Return the first bytes of the buffer."""
        return self.buffer[: max(1, size // self.width)]

    # All-reduce

    def sweep(self, sizes: t.Sequence[int]) -> list[dict[str, t.Any]]:
        """Measure all sizes; warm every one first."""
        rows = []
        for size in sizes:
            self.stage(f"all-reduce of {size} bytes, warm-up")
            tensor = self.slice(size)
            call = functools.partial(self.dist.all_reduce, tensor, op=self.operation)
            for _turn in range(self.config["warmup"]):
                call()
            wrong = self.check(tensor, 0)["nwrong"] if self.config["correctness_repeats"] else None
            tensor.fill_(1)
            self.barrier()
            start = time.perf_counter()
            call()
            self.sync()
            once = self.largest(time.perf_counter() - start)
            times = max(1, min(self.config["iterations"], int(self.config["seconds_per_size"] / max(once, 1e-9))))
            self.stage(f"all-reduce of {size} bytes, {times} times")
            rows.append({"size": size, "seconds": self.timed(call, times), "iterations": times, "nwrong": wrong})
            tensor.fill_(1)
        return rows

    def latency(self) -> dict[str, t.Any]:
        """Measure the smallest message; on GPUs also from a CUDA graph, without the cost of launching from Python."""
        self.stage("latency")
        size = max(8, self.width)
        tensor = self.torch.zeros(size // self.width, dtype=self.dtype, device=self.device)
        call = functools.partial(self.dist.all_reduce, tensor, op=self.operation)
        for _turn in range(5):
            call()
        times = 200 if self.gpu else max(5, self.config["iterations"])
        result: dict[str, t.Any] = {"size": size, "seconds": self.timed(call, times), "graph_seconds": None}
        if self.gpu:
            graph = self.torch.cuda.CUDAGraph()
            # The watchdog's thread asks for events meanwhile, which only a capture of this thread alone permits.
            with self.torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _turn in range(CALLS_IN_GRAPH):
                    call()
            for _turn in range(3):
                graph.replay()
            result["graph_seconds"] = self.timed(graph.replay, GRAPH_REPLAYS) / CALLS_IN_GRAPH
            result["calls_in_graph"] = CALLS_IN_GRAPH
            self.sync()
            del graph
        return result

    # Correctness

    def pattern(self, tensor: t.Any, weight: int, positions: int, repeat: int) -> t.Iterator[tuple[t.Any, t.Any]]:
        """Yield parts of a tensor, each with the values that belong there."""
        step = 1 << 24
        for start in range(0, tensor.numel(), step):
            part = tensor[start : start + step]
            index = self.torch.arange(start + repeat, start + repeat + part.numel(), device=self.device)
            yield part, ((index % positions + 1) * weight).to(self.dtype)

    def check(self, tensor: t.Any, repeat: int) -> dict[str, t.Any]:
        """Reduce a known pattern and compare every element exactly; return the wrong elements of all ranks."""
        name, operation = self.config["dtype"], self.config["operation"]
        values, positions = weights(self.world, name, operation, repeat)
        for part, expected in self.pattern(tensor, values[self.rank], positions, repeat):
            part.copy_(expected)
        plant = self.config["plant"]
        hit = plant and plant["rank"] == self.rank and plant["index"] < tensor.numel()
        if hit and plant.get("where") == "input":
            tensor[plant["index"]] += 1
        self.dist.all_reduce(tensor, op=self.operation)
        self.sync()
        if hit and plant.get("where", "output") == "output":
            tensor[plant["index"]] += 1
        wrong, first, got, wanted, offset = 0, -1, 0.0, 0.0, 0
        for part, expected in self.pattern(tensor, combined(values, operation), positions, repeat):
            differs = part != expected
            number = int(differs.sum().item())
            if number and first < 0:
                index = int(differs.nonzero()[0].item())
                first, got, wanted = offset + index, float(part[index].item()), float(expected[index].item())
            wrong += number
            offset += part.numel()
        total = self.torch.tensor([wrong], dtype=self.torch.int64, device=self.device)
        self.dist.all_reduce(total)
        found: dict[str, t.Any] = {"nwrong": int(total.item()), "wrong": []}
        if found["nwrong"]:
            entries = self.gather({"rank": self.rank, "nwrong": wrong, "index": first, "got": got, "expected": wanted})
            for entry in entries:
                if entry["nwrong"]:
                    # A ring hands each rank one chunk to finish: the chunk tells who finished it.
                    entry["chunk"] = entry["index"] * self.world // tensor.numel()
                    entry["repeat"] = repeat
                    found["wrong"].append(entry)
        return found

    def correctness(self, size: int) -> dict[str, t.Any]:
        """Repeat the check at a large size: a fault that comes and goes is found by repeating only."""
        found: dict[str, t.Any] = {"size": size, "repeats": self.config["correctness_repeats"], "nwrong": 0, "wrong": []}
        for repeat in range(self.config["correctness_repeats"]):
            self.stage(f"correctness, repetition {repeat + 1}")
            result = self.check(self.slice(size), repeat)
            found["nwrong"] += result["nwrong"]
            found["wrong"] += result["wrong"]
        return found

    # Inside the node and on the wire

    def inside(self, size: int) -> list[dict[str, t.Any]]:
        """Measure an all-reduce inside each node, in all nodes at once; empty where no node has two devices."""
        if all(len([entry for entry in self.ranks if entry["node"] == node]) < 2 for node in self.nodes):
            return []
        self.stage("all-reduce inside each node")
        mine = None
        for node in self.nodes:
            members = [entry["rank"] for entry in self.ranks if entry["node"] == node]
            group = self.dist.new_group(members)
            mine = group if node == self.node else mine
        tensor = self.slice(size)
        if len(self.here) > 1:
            self.dist.all_reduce(tensor, group=mine)
        tensor.fill_(1)
        times = max(1, min(self.config["iterations"], 10))
        self.barrier()
        start = time.perf_counter()
        if len(self.here) > 1:
            for _turn in range(times):
                self.dist.all_reduce(tensor, group=mine)
            self.sync()
        seconds = (time.perf_counter() - start) / times
        self.barrier()
        found = []
        for node, spent in enumerate_nodes(self.ranks, self.gather(seconds)):
            if len(spent) > 1:
                value = size / 1e9 / statistics.mean(spent) * bus_factor(len(spent))
                found.append({"node": node, "size": size, "gbytes_per_second": value})
        return found

    def wire(self, size: int) -> list[dict[str, t.Any]]:
        """Send from each node to the next, on all rails at once: pairs alone cannot show contention."""
        if len(self.nodes) < 2:
            return []
        self.stage("ring between the nodes")
        league = self.rails[self.local]
        seat = league.index(self.rank)
        after, before = league[(seat + 1) % len(league)], league[seat - 1]
        send, receive = self.pair_buffers(size)
        best = None
        for turn in range(4):
            self.barrier()
            start = time.perf_counter()
            if len(league) > 1:
                operations = [self.dist.P2POp(self.dist.isend, send, after), self.dist.P2POp(self.dist.irecv, receive, before)]
                for request in self.dist.batch_isend_irecv(operations):
                    request.wait()
                self.sync()
            seconds = time.perf_counter() - start
            if turn:
                best = min(best or seconds, seconds)
        self.barrier()
        rates = self.gather(size / 1e9 / t.cast(float, best) if len(league) > 1 else 0.0)
        return [{"node": node, "size": size, "gbytes_per_second": sum(values)} for node, values in enumerate_nodes(self.ranks, rates)]

    def pair_buffers(self, size: int) -> tuple[t.Any, t.Any]:
        """Return what is sent and where it is received."""
        if not hasattr(self, "pair_send") or self.pair_send.numel() * 4 != size:
            self.pair_send = self.torch.ones(size // 4, dtype=self.torch.float32, device=self.device)
            self.pair_receive = self.torch.ones(size // 4, dtype=self.torch.float32, device=self.device)
        return self.pair_send, self.pair_receive

    def one_way(self, source: int, target: int, size: int) -> dict[str, t.Any] | None:
        """Time messages from one rank to another, each answered by a word; the sender returns the result."""
        send, receive = self.pair_buffers(size)
        word = self.torch.zeros(1, dtype=self.torch.int64, device=self.device)
        if self.rank != source:
            count = 1
            while count:
                for _turn in range(count):
                    self.dist.recv(receive, source)
                    self.dist.send(word, source)
                self.dist.recv(word, source)
                count = int(word.item())
            return None
        first = self.message(send, word, target)  # warms up, and tells how many more are affordable
        measured: list[float] = []
        count = max(1, min(self.config["pair_repeats"], int(PAIR_SECONDS / max(first, 1e-9))))
        while count:
            word.fill_(count)
            self.dist.send(word, target)
            measured += [self.message(send, word, target) for _turn in range(count)]
            lacking = PAIR_LEAST_SECONDS - sum(measured)
            count = min(MOST_MESSAGES, int(lacking / min(measured)) + 1) if lacking > 0 and len(measured) < MOST_MESSAGES else 0
        word.fill_(0)
        self.dist.send(word, target)
        return {
            "source": source,
            "target": target,
            "seconds": min(measured),
            "median_seconds": statistics.median(measured),
            "spent": first + sum(measured),
            "size": size,
        }

    def message(self, send: t.Any, word: t.Any, target: int) -> float:
        """Send a message, wait for the answer and return the seconds."""
        start = time.perf_counter()
        self.dist.send(send, target)
        self.dist.recv(word, target)
        self.sync()
        return time.perf_counter() - start

    def meet(self, pair: tuple[int, int], size: int) -> list[dict[str, t.Any]]:
        """Measure a pair in both directions, where this rank belongs to it."""
        if self.rank not in pair:
            return []
        both = [self.one_way(pair[0], pair[1], size), self.one_way(pair[1], pair[0], size)]
        return [entry for entry in both if entry]

    def tournament(self, leagues: t.Sequence[t.Sequence[int]], size: int, name: str) -> dict[str, t.Any]:
        """Let the members of each league meet, all leagues at once, then look again at the pairs that seem slow."""
        started = time.perf_counter()
        schedules = [rounds_of(league) for league in leagues]
        results: list[dict[str, t.Any]] = []
        total = max((len(schedule) for schedule in schedules), default=0)
        for number in range(total):
            self.stage(f"{name}, round {number + 1} of {total}")
            self.barrier()
            for schedule in schedules:
                if number < len(schedule):
                    for pair in schedule[number]:
                        results += self.meet(pair, size)
        self.stage(f"{name}, gathering")
        everything = [entry for entries in self.gather(results) for entry in entries]
        confirmed = 0
        for look in range(CONFIRMATIONS):
            values: dict[tuple[int, int], float] = {}
            cost: dict[tuple[int, int], float] = {}
            for entry in everything:
                way = (entry["source"], entry["target"])
                values[way] = max(values.get(way, 0.0), entry["size"] / 1e9 / entry["seconds"])
                pair = (min(way), max(way))
                cost[pair] = max(cost.get(pair, 0.0), 2 * entry["spent"])
            again = affordable(suspects(values, leagues), cost, CONFIRM_SECONDS)
            if not again:
                break
            self.stage(f"{name}, look {look + 2} at {len(again)} pairs")
            confirmed += len(again)
            results = []
            for pair in again:
                results += self.meet(pair, size)
            self.barrier()
            everything += [entry for entries in self.gather(results) for entry in entries]
        best: dict[tuple[int, int], dict[str, t.Any]] = {}
        for entry in everything:
            key = (entry["source"], entry["target"])
            if key not in best or entry["seconds"] < best[key]["seconds"]:
                best[key] = entry
        pairs = [
            {
                "source": source,
                "target": target,
                "gbytes_per_second": entry["size"] / 1e9 / entry["seconds"],
                "median_gbytes_per_second": entry["size"] / 1e9 / entry["median_seconds"],
            }
            for (source, target), entry in sorted(best.items())
        ]
        return {
            "size": size,
            "rounds": total,
            "confirmed": confirmed,
            "seconds": time.perf_counter() - started,
            "pairs": pairs,
        }

    def run(self) -> dict[str, t.Any]:
        """Do everything and return the result, the same on all ranks."""
        config = self.config
        began, started = time.perf_counter(), time.time()
        sizes = []
        size = config["size_min"]
        while size <= self.size_max:
            sizes.append(size)
            size *= config["size_factor"]
        rows = self.sweep(sizes)
        factor = bus_factor(self.world)
        for row in rows:
            row["algbw"] = row["size"] / 1e9 / row["seconds"]
            row["busbw"] = row["algbw"] * factor
        latency = self.latency()
        correctness = self.correctness(min(sizes[-1], 256 << 20))
        inside = self.inside(sizes[-1])
        pair_size = config["pair_size"] or (128 << 20 if self.gpu else 1 << 20)
        wire = self.wire(pair_size)
        measured = {
            "application": plateau(rows),
            "inside": min((entry["gbytes_per_second"] for entry in inside), default=None),
            "wire": min((entry["gbytes_per_second"] for entry in wire), default=None),
        }
        between, within = {}, {}
        if self.wanted(measured, "wire" if len(self.nodes) > 1 else ""):
            between = self.tournament(self.rails, pair_size, "pairs of nodes")
        if self.wanted(measured, "inside" if inside or len(self.nodes) == 1 else ""):
            leagues = [[entry["rank"] for entry in self.ranks if entry["node"] == node] for node in self.nodes]
            within = self.tournament([league for league in leagues if len(league) > 1], pair_size, "pairs inside the nodes")
        self.stage("done")
        self.barrier()
        return {
            "backend": self.backend,
            "world_size": self.world,
            "nnodes": len(self.nodes),
            "dtype": config["dtype"],
            "operation": config["operation"],
            "ranks": self.ranks,
            "rows": rows,
            "latency": latency,
            "correctness": correctness,
            "inside": inside,
            "wire": wire,
            "measured": measured,
            "started": started,
            "pairs": between,
            "inside_pairs": within,
            "seconds": time.perf_counter() - began,
        }

    def wanted(self, measured: dict[str, t.Any], name: str) -> bool:
        """Return whether pairs are to be measured: always, never, or when a figure is short or cannot be judged."""
        if not name or self.config["pairwise"] == "never":
            return False
        if self.config["pairwise"] == "always":
            return True
        minimum = dict(self.config["minimum"])
        if "inside" not in minimum and len(self.here) > 1:
            minimum["inside"] = nvlink_minimum(self.ranks, self.config["nvlink"])
        short = 0.0
        for figure in (name, "application"):
            value, needed = measured[figure], minimum.get(figure)
            if value is not None and (needed is None if figure == name else False):
                short = 1.0
            if value is not None and needed is not None and value < needed:
                short = 1.0
        return self.largest(short) > 0  # all ranks must agree, and their clocks may differ in the last digit

    def close(self) -> None:
        """Leave the process group."""
        self.dist.destroy_process_group()


def enumerate_nodes(ranks: t.Sequence[dict[str, t.Any]], values: t.Sequence[t.Any]) -> list[tuple[int, list[t.Any]]]:
    """Return the values of each node's ranks."""
    nodes: dict[int, list[t.Any]] = {}
    for entry, value in zip(ranks, values):
        nodes.setdefault(entry["node"], []).append(value)
    return sorted(nodes.items())


def table(result: dict[str, t.Any]) -> list[str]:
    """Return the lines that a person reads."""
    lines = [
        f"# {result['backend']}, {result['world_size']} ranks on {result['nnodes']} nodes, torch {result['ranks'][0]['torch']}, "
        f"NCCL {result['ranks'][0]['nccl'] or '-'}",
        f"# {'size':>12} {'count':>12} {'time us':>11} {'algbw GB/s':>11} {'busbw GB/s':>11} {'#wrong':>7}   (in place)",
    ]
    width = SIZES[result["dtype"]]
    for row in result["rows"]:
        wrong = "N/A" if row["nwrong"] is None else row["nwrong"]
        lines.append(
            f"  {row['size']:>12} {row['size'] // width:>12} {row['seconds'] * 1e6:>11.2f} {row['algbw']:>11.3f} "
            f"{row['busbw']:>11.3f} {wrong:>7}"
        )
    latency = result["latency"]
    graph = f", {latency['graph_seconds'] * 1e6:.2f} us from a CUDA graph" if latency["graph_seconds"] else ""
    lines.append(f"# latency at {latency['size']} bytes: {latency['seconds'] * 1e6:.2f} us{graph}")
    for name in ("inside", "wire"):
        for entry in result[name]:
            lines.append(f"# {name}, node {entry['node']}: {entry['gbytes_per_second']:.3f} GB/s")
    for entry in [*(result["pairs"] or {}).get("pairs", []), *(result["inside_pairs"] or {}).get("pairs", [])]:
        lines.append(f"# {entry['source']} -> {entry['target']}: {entry['gbytes_per_second']:.3f} GB/s")
    lines.append(f"# wrong elements in {result['correctness']['repeats']} repetitions: {result['correctness']['nwrong']}")
    return lines


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="all-reduce as nccl-tests measures it, and the slow pair")
    parser.add_argument("--config", default="", help="JSON file with these settings")
    parser.add_argument("--folder", default="", help="where stage, errors and result.json go")
    parser.add_argument("--json", default="", help="file for rank 0's result")
    for name, value in DEFAULTS.items():
        if isinstance(value, (int, float, str)):
            kind: t.Any = size_of if name in ("size_min", "size_max", "pair_size") else type(value)
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    return parser.parse_args()


def main() -> int:
    """Measure; rank 0 prints and writes."""
    options = arguments()
    config = dict(DEFAULTS)
    if options.config:
        with open(options.config, encoding="utf-8") as stream:
            config.update({name: value for name, value in json.load(stream).items() if name in DEFAULTS})
    config.update({name: value for name, value in vars(options).items() if name in DEFAULTS and value is not None})
    bench = None
    try:
        bench = Bench(config, options.folder)
        result = bench.run()
        if bench.rank == 0:
            print("\n".join(table(result)), flush=True)
            target = options.json or (os.path.join(options.folder, "measured.json") if options.folder else "")
            if target:
                with open(f"{target}.partial", "w", encoding="utf-8") as stream:
                    json.dump(result, stream)
                os.rename(f"{target}.partial", target)
        bench.close()
        return 0
    except Exception as error:
        if options.folder:
            rank = os.environ.get("RANK", "0")
            entry = {
                "rank": int(rank),
                "time": time.time(),
                "stage": bench.now if bench else read(os.path.join(options.folder, f"stage-{rank}")) or "starting",
                "type": type(error).__name__,
                "text": str(error)[:4000],
            }
            with open(os.path.join(options.folder, f"error-{rank}.json"), "w", encoding="utf-8") as stream:
                json.dump(entry, stream)
        traceback.print_exc()
        sys.stderr.flush()
        # A hanging communicator must not keep a failed rank alive.
        os._exit(1)


def read(path: str) -> str:
    """Return a file's text, or nothing."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
