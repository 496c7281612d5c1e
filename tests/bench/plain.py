# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""torchrun by hand on the nodes of tests/faults, without unit and supervisor: the other side of the comparisons."""
from __future__ import annotations

import pathlib
import re
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))
from job import FOREVER, Job
from machines import Hall

STATIC = "--node-rank={rank} --master-addr={first} --master-port=29500"
C10D = "--rdzv-backend=c10d --rdzv-endpoint={first}:29500 --rdzv-id={run} --local-addr={address}"


class Plain:
    """One run of torchrun on every node, as a transient unit without restarts."""

    def __init__(self, job: Job, rendezvous: str, restarts: int, environment: dict[str, str] | None = None) -> None:
        settings = {"GLOO_SOCKET_IFNAME": "host0", "NCCL_SOCKET_IFNAME": "=host0", "PYTHONUNBUFFERED": "1", **(environment or {})}
        words = " ".join(f"--setenv={key}={value}" for key, value in settings.items())
        self.job, self.unit, self.since = job, f"plain-{int(time.time())}", time.time()
        python = re.search(r"-- \\\s*(\S+)", job.machines[0].shell(f"systemctl cat {job.unit}")).group(1)
        for rank, machine in enumerate(job.machines):
            place = rendezvous.format(rank=rank, first=job.machines[0].address, address=machine.address, run=self.unit)
            machine.shell(
                f"mkdir -p /var/tmp/{self.unit} && chown torchrun: /var/tmp/{self.unit} && "
                f"systemd-run --quiet --collect --unit={self.unit} --uid=torchrun --working-directory=/var/tmp/{self.unit} "
                f"--property=LimitMEMLOCK=infinity --setenv=TORCHRUN_CHECKPOINT_DIR=/var/tmp/{self.unit} "
                f"{words} {python} -m torch.distributed.run --nnodes={len(job.machines)} --nproc-per-node={job.hall.place.workers} {place} "
                f"--max-restarts={restarts} {job.root}/current/source/train.py /var/lib/torchrun/target")

    def steps(self, since):
        """(step, time) after a moment, whichever node has rank 0."""
        found = []
        for machine in self.job.machines:
            text = machine.shell(f"journalctl --quiet --no-pager --output=cat --unit={self.unit} --since=@{since - 1:.6f}",
                                 check=False)
            found += [(int(step), float(moment)) for step, moment in re.findall(r"step (\d+) at ([\d.]+)", text)]
        return sorted(item for item in found if item[1] > since)

    def stop(self):
        for machine in self.job.machines:
            machine.shell(f"systemctl kill --signal=KILL {self.unit}; systemctl stop {self.unit}; rm -rf /var/tmp/{self.unit}",
                          check=False)


def open_job() -> Job:
    """The nodes with the job deployed, and stopped."""
    job = Job(Hall())
    job.hall.power_on()
    job.deploy()
    stop(job)
    job.target(FOREVER)
    return job


def stop(job: Job) -> None:
    """Stop on one node, which stops all."""
    job.machines[0].shell(f"systemctl stop {job.unit}")
    job.wait(lambda: not {"active", "deactivating", "activating"} & set(job.units()), 60, "the stop")
