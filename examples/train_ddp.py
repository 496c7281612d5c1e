"""Distributed data-parallel training on scikit-learn's handwritten digits, on GPUs or CPUs.

An ordinary script for torch.distributed.run: it reads RANK, WORLD_SIZE and LOCAL_RANK and knows nothing of what launched
it. It writes a checkpoint every epoch, resumes from the newest one, and at SIGTERM writes one and ends.

    torchrun --nproc-per-node=2 train_ddp.py --epochs 30 --checkpoint-dir checkpoints
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

HELD_OUT = 360  # of 1797 images, the same ones in every run


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64, help="images per process and step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait after each epoch, to watch or disturb a run")
    default = os.environ.get("TORCHRUN_CHECKPOINT_DIR", "checkpoints")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(default))
    return parser.parse_args()


def digits(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images (n × 1 × 8 × 8, 0 to 1) and labels, then those held out."""
    data = load_digits()
    order = numpy.random.default_rng(seed).permutation(len(data.images))
    images = torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target[order], dtype=torch.long)
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


def network() -> nn.Module:
    """Return a small convolutional network for 8 × 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the latest epoch."""
    return max(folder.glob("epoch-*.pt"), default=None)


def save(folder: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write a checkpoint whole or not at all, and keep the last three."""
    path = folder / f"epoch-{epoch:05d}.pt"
    partial = folder / f".{path.name}.{os.getpid()}"
    with partial.open("wb") as stream:
        torch.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    for old in sorted(folder.glob("epoch-*.pt"))[:-3]:
        old.unlink()
    return path


@record
def main() -> None:
    """Train, and tell what came of it."""
    options = arguments()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    asked_to_stop = torch.zeros(1, device=device)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.fill_(1))
    dist.init_process_group("nccl" if gpu else "gloo")
    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = (tensor.to(device) for tensor in digits(options.seed))
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)

    # Rank 0 writes and reads checkpoints, so that they need no shared folder; the others get its state.
    options.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    path = newest(options.checkpoint_dir) if rank == 0 else None
    state = torch.load(path, map_location=device, weights_only=True) if path else None
    shared = [state]
    dist.broadcast_object_list(shared, src=0, device=device)
    first = 0
    if shared[0]:
        model.load_state_dict(shared[0]["model"])
        optimizer.load_state_dict(shared[0]["optimizer"])
        first = shared[0]["epoch"] + 1
        if rank == 0:
            print(f"resumed after epoch {first}/{options.epochs} from {path}", flush=True)
    parallel = DistributedDataParallel(model, device_ids=[local_rank] if gpu else None)
    accuracy, rate = 0.0, 0.0
    for epoch in range(first, options.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed + epoch))
        mine = order[: len(order) // world * world][rank::world].to(device)
        parallel.train()
        began, loss = time.perf_counter(), torch.zeros((), device=device)
        for start in range(0, len(mine), options.batch_size):
            batch = mine[start : start + options.batch_size]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(parallel(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        value = loss.item()
        rate = len(mine) * world / (time.perf_counter() - began)
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
        if rank == 0:
            path = save(options.checkpoint_dir, epoch, model, optimizer)
            text = f"epoch {epoch + 1}/{options.epochs} loss {value:.4f} accuracy {accuracy:.4f} {rate:.0f} images/s"
            print(text, flush=True)
        time.sleep(options.pause)
        # All ranks stop after the same epoch, whichever was asked first.
        dist.all_reduce(asked_to_stop)
        if asked_to_stop.item() > 0:
            if rank == 0:
                print(f"stopped on request after epoch {epoch + 1}/{options.epochs}, checkpoint {path}", flush=True)
            break
    else:
        if rank == 0:
            if first >= options.epochs:
                model.eval()
                with torch.no_grad():
                    accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
            print(f"finished: accuracy {accuracy:.4f} on {HELD_OUT} held-out images, {rate:.0f} images/s, checkpoint {path}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
