"""Train a small convolutional network on scikit-learn's handwritten digits with Lightning's Trainer, on GPUs or CPUs.

An ordinary Lightning script. Lightning finds MASTER_ADDR, MASTER_PORT, ranks and the world's size in the environment that
torch.distributed.run sets; the Trainer only has to be told the same number of nodes and processes. Every epoch writes a
checkpoint, and a new start goes on from the newest one. As Lightning expects, all nodes see one checkpoint folder.

    torchrun --nproc-per-node=2 train_lightning.py --epochs 30 --checkpoint-dir checkpoints
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HELD_OUT = 360  # of 1797 images, the same ones in every run


class Digits(lightning.LightningDataModule):
    """The images, split once by a fixed order."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Read and split the images."""
        data = load_digits()
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(7))
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16.0
        labels = torch.tensor(data.target, dtype=torch.long)[order]
        self.train = TensorDataset(images[HELD_OUT:], labels[HELD_OUT:])
        self.test = TensorDataset(images[:HELD_OUT], labels[:HELD_OUT])

    def train_dataloader(self) -> DataLoader:
        """Return the training images; Lightning gives each process its share."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Return the images held out."""
        return DataLoader(self.test, batch_size=HELD_OUT)


class Classifier(lightning.LightningModule):
    """A small convolutional network for 8 × 8 images."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _number: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _number: int) -> None:
        """Measure the share of images that are recognised."""
        images, labels = batch
        accuracy = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


class Tell(Callback):
    """One line for each epoch instead of a progress bar, which a journal cannot show."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say where training begins."""
        if trainer.is_global_zero:
            print(f"trains from epoch {trainer.current_epoch + 1}/{trainer.max_epochs} in {trainer.world_size} processes", flush=True)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say how an epoch went."""
        if trainer.is_global_zero:
            accuracy = float(trainer.callback_metrics.get("accuracy", 0.0))
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} accuracy {accuracy:.4f}", flush=True)


def main() -> None:
    """Train, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64, help="images per process and step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--num-nodes", type=int, default=int(os.environ.get("GROUP_WORLD_SIZE", "1")))
    parser.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), help="processes on a node")
    default = os.environ.get("TORCHRUN_CHECKPOINT_DIR", "checkpoints")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(default))
    options = parser.parse_args()

    lightning.seed_everything(7, verbose=False)
    keep = ModelCheckpoint(dirpath=options.checkpoint_dir, filename="{epoch:05d}", save_top_k=3, monitor="epoch", mode="max")
    trainer = lightning.Trainer(
        num_nodes=options.num_nodes,
        devices=options.devices,
        strategy="ddp",
        max_epochs=options.epochs,
        callbacks=[keep, Tell()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    newest = max(options.checkpoint_dir.glob("epoch=*.ckpt"), default=None)
    trainer.fit(Classifier(options.learning_rate), Digits(options.batch_size), ckpt_path=newest)
    if trainer.is_global_zero:
        print(f"finished: accuracy {float(trainer.callback_metrics['accuracy']):.4f} on {HELD_OUT} held-out images", flush=True)


if __name__ == "__main__":
    main()
