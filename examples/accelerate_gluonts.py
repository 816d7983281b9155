# SPDX-License-Identifier: Apache-2.0
"""GluonTS's DeepAR forecaster, trained and asked with torch.nn's LSTM and with tidegate's, side by side.

    pip install 'gluonts[torch]'
    python examples/accelerate_gluonts.py

GluonTS builds the network itself, inside `estimator.train`; a Lightning callback reaches it there. The data are hourly
series with a daily and a weekly season, made here.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.deepar import DeepAREstimator

import tidegate as tg

HOURS = 24


class Accelerate(pl.Callback):
    """For any Lightning trainer: what is trained is accelerated first."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        tg.accelerate(pl_module)


@dataclass
class Run:
    """One way of doing it: what it learnt, and seconds of each round."""

    name: str
    callbacks: list[pl.Callback]
    losses: list[float] = field(default_factory=list[float])
    predictor: Any = None
    forecasts: Any = None
    training: list[float] = field(default_factory=list[float])
    prediction: list[float] = field(default_factory=list[float])


class Losses(pl.Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def hourly_series(count: int, weeks: int = 4) -> ListDataset:
    draw = np.random.default_rng(0)
    hours = np.arange(weeks * 7 * HOURS)
    series = [
        10 + 3 * np.sin(2 * np.pi * (hours + phase) / HOURS) + np.sin(2 * np.pi * hours / (7 * HOURS)) + noise
        for phase, noise in zip(draw.uniform(0, HOURS, count), draw.normal(0, 0.3, (count, hours.size)), strict=True)
    ]
    return ListDataset([{"start": "2024-01-01", "target": values} for values in series], freq="h")


def train(run: Run, data: ListDataset, options: argparse.Namespace) -> None:
    pl.seed_everything(0, verbose=False)
    run.losses.clear()
    with tempfile.TemporaryDirectory() as folder:
        estimator = DeepAREstimator(
            freq="h",
            prediction_length=HOURS,
            context_length=options.context,
            hidden_size=options.hidden,
            num_batches_per_epoch=options.batches,
            trainer_kwargs={
                "max_epochs": options.epochs,
                "accelerator": "cpu",
                "callbacks": [*run.callbacks, Losses(run.losses)],
                "default_root_dir": folder,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        )
        start = time.perf_counter()
        run.predictor = estimator.train(data)
        run.training.append(time.perf_counter() - start)


def predict(run: Run, data: ListDataset) -> None:
    torch.manual_seed(0)
    start = time.perf_counter()
    run.forecasts = np.stack([forecast.samples for forecast in run.predictor.predict(data)])  # (series, samples, hours)
    run.prediction.append(time.perf_counter() - start)


def compare(options: argparse.Namespace) -> tuple[Run, Run]:
    data = hourly_series(options.series)
    runs = Run("torch.nn", []), Run("tidegate", [Accelerate()])
    for number in range(options.rounds):
        for run in runs[:: 1 if number % 2 == 0 else -1]:
            train(run, data, options)
            predict(run, data)
    return runs


def main(arguments: list[str] | None = None) -> tuple[Run, Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=40, help="DeepAR's default is 40")
    parser.add_argument("--context", type=int, default=7 * HOURS, help="hours that the forecast is conditioned on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=10, help="batches of 32 windows an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|gluonts")

    torch_run, tidegate_run = runs = compare(options)
    print(tg.report(tidegate_run.predictor.prediction_net))
    apart = np.abs(np.subtract(torch_run.losses, tidegate_run.losses)).max()
    print(f"training loss    {torch_run.losses[-1]:.5f}, {tidegate_run.losses[-1]:.5f}; {apart:.0e} apart in any epoch")
    apart = np.abs(torch_run.forecasts - tidegate_run.forecasts)
    print(f"forecast samples {apart.max():.0e} apart at most, median {np.median(apart):.0e}, of {apart.size}")
    for what in ("training", "prediction"):
        seconds = [median(getattr(run, what)) for run in runs]
        print(f"{what:16} {seconds[0]:.2f} s, {seconds[1]:.2f} s: {seconds[0] / seconds[1]:.2f}x")
    return runs


if __name__ == "__main__":
    main()
