# SPDX-License-Identifier: Apache-2.0
"""A tidegate layer in a LightningModule: fitted, checkpointed, loaded again.

    pip install lightning 'tidegate[cli]'
    python examples/train_lightning.py

The layer takes padded batches and `lengths=`, so no packing stands in `training_step`. More processes are a matter of
the Trainer's `devices` and `strategy`; an existing model's torch.nn layers, of `tg.accelerate(model)` in `__init__`.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tidegate as tg
from tidegate.cli.demo.training import standardised
from tidegate.data import LabelledSequences, japanese_vowels


class Speaker(pl.LightningModule):
    """Which of K speakers said it, from (N, T, C) frames and their (N,) lengths."""

    def __init__(self, channels: int, classes: int, hidden_size: int = 64, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = tg.GRU(channels, hidden_size, bidirectional=True, batch_first=True)
        self.readout = nn.Linear(2 * hidden_size, classes)

    def forward(self, padded: Tensor, lengths: Tensor) -> Tensor:
        _, h_n = self.layer(padded, lengths=lengths)
        return self.readout(torch.cat([h_n[0], h_n[1]], -1))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        padded, lengths, labels = batch
        loss = nn.functional.cross_entropy(self(padded, lengths), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        padded, lengths, labels = batch
        self.log("accuracy", (self(padded, lengths).argmax(-1) == labels).double().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


def batches(part: LabelledSequences, size: int, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(TensorDataset(part.padded, part.lengths, part.labels), size, shuffle=shuffle)


def main(arguments: list[str] | None = None) -> tuple[Speaker, pl.Trainer]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", default="out/lightning", help="where the checkpoint is written")
    options = parser.parse_args(arguments)
    pl.seed_everything(0, verbose=False)
    data = standardised(japanese_vowels())
    model = Speaker(data.num_channels, len(data.classes))
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        default_root_dir=options.folder,
        logger=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, batches(data.train, 54, shuffle=True))
    trainer.test(model, batches(data.test, 370, shuffle=False))
    place = f"{options.folder}/speaker.ckpt"
    trainer.save_checkpoint(place)
    return Speaker.load_from_checkpoint(place), trainer


if __name__ == "__main__":
    main()
