# Copyright: Contributors to the onprem.torch project
# SPDX-License-Identifier: GPL-3.0-or-later
"""Training whose end tells whether every step was done exactly once.

Each step adds (step * sum of ranks) to the state through an all_reduce, so the final state is known beforehand: a step that
was lost or done twice shows. Checkpoints lie on each node (written atomically, the last three kept); a resume takes the
newest step that all nodes have. Knows nothing of the supervisor.
"""
import json
import os
import pathlib
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

PAUSE = float(os.environ.get("TRAIN_PAUSE", "0.05"))     # a step's computing
COMPUTE = int(os.environ.get("TRAIN_COMPUTE", "0"))     # products of matrices in a step, and their size
SIDE = int(os.environ.get("TRAIN_SIDE", "1"))
EVERY, SAY, KEEP = (10, 2, 3) if PAUSE else (1000, 100, 3)


def load(folder):
    """Steps and states of the checkpoints that can be read."""
    found = {}
    for path in folder.glob("step-*.json"):
        found[int(path.stem.split("-")[1])] = json.loads(path.read_text())["state"]
    return found


def save(folder, step, state):
    """Write a checkpoint in one piece; keep three."""
    partial = folder / ".partial"
    with partial.open("w") as file:
        file.write(json.dumps({"state": state, "weights": "x" * 4096}))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / f"step-{step:07}.json")
    for path in sorted(folder.glob("step-*.json"))[:-KEEP]:
        path.unlink()


def fail(_number, _frame):
    raise ValueError("bad sample")


@record
def main():
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    signal.signal(signal.SIGUSR1, fail)
    folder = pathlib.Path(os.environ["TORCHRUN_CHECKPOINT_DIR"])
    target = pathlib.Path(sys.argv[1])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    weights = torch.rand(SIDE, SIDE, device=device) / SIDE
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = load(folder)
    have = torch.zeros(KEEP, dtype=torch.int64, device=device)
    newest = sorted(mine)[-KEEP:]
    have[:len(newest)] = torch.tensor(newest, dtype=torch.int64, device=device)
    everyone = [torch.zeros_like(have) for _rank in range(world)]
    dist.all_gather(everyone, have)
    common = set.intersection(*(set(steps.tolist()) for steps in everyone)) - {0}
    step = max(common) if common else 0
    state = mine.get(step, 0)
    print(f"resumes from step {step} world {world}", flush=True)
    while True:
        # The target may be changed while the job runs; all ranks must see the same one.
        votes = torch.tensor([len(stopping), int(target.read_text()) if rank == 0 else 0], device=device)
        dist.all_reduce(votes)
        if step >= int(votes[1]):
            break
        part = torch.tensor([(rank + 1) * (step + 1)], device=device)
        for _product in range(COMPUTE):
            torch.mm(weights, weights)
        dist.all_reduce(part)
        step, state = step + 1, state + int(part)
        if PAUSE:
            time.sleep(PAUSE)
        if step % EVERY == 0 or int(votes[0]) or step >= int(votes[1]):
            if os.environ["LOCAL_RANK"] == "0":
                save(folder, step, state)
            if rank == 0:
                print(f"step {step} at {time.time():.3f}", flush=True)
        elif rank == 0 and step % SAY == 0:
            print(f"step {step} at {time.time():.3f}", flush=True)
        if int(votes[0]):
            print(f"stopped cleanly at step {step}", flush=True)
            break
    if step >= int(votes[1]):
        print(f"finished: step {step} state {state} expected {world * (world + 1) // 2 * step * (step + 1) // 2}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
