"""Results of a verification as the nodes would bring them back, for the tests of its report."""

from __future__ import annotations

import typing as t

from ansible_collections.onprem.torch.plugins.module_utils import verify_config

IB = {"name": "mlx5_0", "rdma": True, "mbits": 400_000.0, "pcie_speed": 32.0, "pcie_width": 16}
VIRTUAL = {"name": "host0", "rdma": False, "mbits": 0.0, "pcie_speed": 0.0, "pcie_width": 0}
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": 90, "nvlinks": 18, "pci": "0000:19:00"}


class Run:
    """A verification of some nodes, healthy until a test changes it."""

    def __init__(self, nodes: int = 8, nproc: int = 1, gpu: dict[str, t.Any] | None = None, nic: dict[str, t.Any] | None = None, **settings: t.Any):
        self.order = [f"n{index}" for index in range(nodes)]
        self.nproc, self.gpu, self.nic = nproc, gpu, nic or VIRTUAL
        self.settings = verify_config.Settings(backend="nccl" if gpu else "gloo", **settings)
        self.speed = 1.0
        self.bus = 1.0
        self.slow: dict[str, float] = {}
        self.slow_links: dict[tuple[str, str], float] = {}
        self.results = {host: self.result(host, rank) for rank, host in enumerate(self.order)}
        self.answers: dict[str, dict[str, t.Any]] = {host: {} for host in self.order}

    def result(self, host: str, rank: int) -> dict[str, t.Any]:
        """Return what a healthy node writes."""
        others = [name for name in self.order if name != host]
        return {
            "host": host,
            "rank": rank,
            "outcome": "measured",
            "lost": "",
            "preflight_seconds": 0.6,
            "preflight": {
                "facts": {
                    "interface": "host0",
                    "interface_address": f"198.18.0.{rank + 11}",
                    "memlock_bytes": -1,
                    "shm_free_bytes": 2**31,
                    "nics": [self.nic],
                },
                "versions": {"torch": "2.13.0", "nccl": "2.28.9" if self.gpu else "", "cuda": "", "driver": "", "python": "3.11.2"},
                "nccl_environment": {},
                "connections": [
                    {"peer": peer, "port_kind": kind, "port": 29600, "result": "ok"} for peer in others for kind in ("verifier", "ephemeral")
                ],
                "clock_offsets": {peer: 0.0 for peer in others},
                "problems": [],
            },
        }

    def rate(self, source: str, target: str) -> float:
        """Return the GB/s from one node to another."""
        return min(self.speed, self.slow.get(source, self.speed), self.slow.get(target, self.speed), self.slow_links.get((source, target), 1e9))

    def measured(self) -> dict[str, t.Any]:
        """Return what rank 0 measured."""
        ranks = [
            {"rank": node * self.nproc + local, "node": node, "local": local, "torch": "2.13.0", "nccl": "2.28.9", "pid": 7, "gpu": self.gpu}
            for node in range(len(self.order))
            for local in range(self.nproc)
        ]
        if not self.gpu:
            for entry in ranks:
                entry.pop("gpu")
        world = len(ranks)
        factor = 2 * (world - 1) / world if world > 1 else 1.0
        sizes = [1 << power for power in range(3, 25, 3)]
        pairs = [
            {
                "source": source * self.nproc + local,
                "target": target * self.nproc + local,
                "gbytes_per_second": self.rate(self.order[source], self.order[target]) / self.nproc,
                "median_gbytes_per_second": self.rate(self.order[source], self.order[target]) / self.nproc,
            }
            for source in range(len(self.order))
            for target in range(len(self.order))
            for local in range(self.nproc)
            if source != target
        ]
        ring = [self.rate(host, self.order[(index + 1) % len(self.order)]) for index, host in enumerate(self.order)]
        return {
            "backend": self.settings.backend,
            "world_size": world,
            "nnodes": len(self.order),
            "dtype": "float32",
            "operation": "sum",
            "ranks": ranks,
            "rows": [
                {"size": size, "seconds": size / 1e9 / self.bus * factor + 1e-5, "iterations": 20, "nwrong": 0} for size in sizes
            ],
            "latency": {"size": 8, "seconds": 1e-4, "graph_seconds": 9e-6 if self.gpu else None},
            "correctness": {"size": 1 << 22, "repeats": 3, "nwrong": 0, "wrong": []},
            "inside": [{"node": node, "size": 1 << 22, "gbytes_per_second": 350.0} for node in range(len(self.order)) if self.nproc > 1],
            "wire": [{"node": node, "size": 1 << 20, "gbytes_per_second": value} for node, value in enumerate(ring) if len(self.order) > 1],
            "pairs": {"size": 1 << 20, "rounds": len(self.order) - 1, "confirmed": 0, "seconds": 1.0, "pairs": pairs},
            "inside_pairs": {},
            "seconds": 3.0,
            "started": 1.0,
        }

    def verification(self) -> dict[str, t.Any]:
        """Return what was decided."""
        nodes = {
            host: {
                "host": host,
                "rank": rank,
                "nproc": self.nproc,
                "python": "/usr/bin/python3",
                "devices": None,
                "interface": "host0",
                "address": f"198.18.0.{rank + 11}",
            }
            for rank, host in enumerate(self.order)
        }
        return {"order": self.order, "nodes": nodes, "settings": self.settings.as_dict(), "fingerprint": "abc", "started": 990.0}

    def collected(self, measured: bool = True) -> dict[str, dict[str, t.Any]]:
        """Return the answers of all hosts."""
        answers = {host: {"result": self.results[host], **self.answers[host]} for host in self.order}
        if measured:
            answers[self.order[0]]["result"] = {**self.results[self.order[0]], "measured": self.measured()}
        return answers
