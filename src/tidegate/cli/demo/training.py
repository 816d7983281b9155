# SPDX-License-Identifier: Apache-2.0
"""One classifier, written twice: with torch.nn and PackedSequence, and with tidegate and `lengths=`.

Letters: N sequences, T steps, C channels, H hidden_size, K classes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import tidegate
from tidegate.data import Dataset, LabelledSequences

LEARNING_RATE = 5e-3


class Classifier(nn.Module, ABC):
    """A bidirectional layer, and a linear readout of the final states of its two directions."""

    def __init__(self, layer: nn.Module, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(2 * hidden_size, num_classes)

    @abstractmethod
    def run_layer(self, padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """The layer's output and final states."""

    def forward(self, padded: Tensor, lengths: Tensor) -> Tensor:
        _, states = self.run_layer(padded, lengths)
        h_n = states[0] if isinstance(states, tuple) else states  # (2, N, H)
        return self.readout(torch.cat([h_n[0], h_n[1]], dim=-1))  # (N, K)


class TorchClassifier(Classifier):
    def run_layer(self, padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        return self.layer(pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False))


class TidegateClassifier(Classifier):
    def run_layer(self, padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        return self.layer(padded, lengths=lengths)


TORCH_LAYERS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
TIDEGATE_LAYERS = {"gru": tidegate.GRU, "lstm": tidegate.LSTM, "rnn": tidegate.RNN}


@dataclass
class Run:
    """One classifier's training: its model and what was measured, one number an epoch."""

    name: str
    model: Classifier
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list[float])
    accuracies: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])

    def train_epoch(self, train: LabelledSequences) -> None:
        """One full-batch step, timed from clearing the gradients to the new weights."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(train.padded, train.lengths), train.labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def evaluate(self, test: LabelledSequences) -> None:
        predictions = self.predict(test)
        self.accuracies.append((predictions == test.labels).double().mean().item())

    @torch.no_grad()
    def predict(self, sequences: LabelledSequences) -> Tensor:
        """The class of each sequence, (N,)."""
        return self.model(sequences.padded, sequences.lengths).argmax(-1)


def new_runs(dataset: Dataset, kind: str, hidden_size: int, seed: int) -> tuple[Run, Run]:
    """torch.nn's and tidegate's run, with the same initial weights because drawn from the same seed."""
    runs: list[Run] = []
    for name, layers, classifier in (
        ("torch.nn", TORCH_LAYERS, TorchClassifier),
        ("tidegate", TIDEGATE_LAYERS, TidegateClassifier),
    ):
        torch.manual_seed(seed)
        layer = layers[kind](dataset.num_channels, hidden_size, bidirectional=True, batch_first=True)
        model = classifier(layer, hidden_size, len(dataset.classes))
        runs.append(Run(name, model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)))
    return runs[0], runs[1]


def standardised(dataset: Dataset) -> Dataset:
    """Each channel shifted and scaled to mean 0 and deviation 1 over the training frames; padding stays 0."""
    train = dataset.train
    frames = train.padded[_valid(train)]  # (sum of lengths, C)
    mean, deviation = frames.mean(0), frames.std(0, unbiased=False)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))

    def scale(part: LabelledSequences) -> LabelledSequences:
        padded = torch.where(_valid(part)[..., None], (part.padded - mean) / deviation, 0.0)
        return LabelledSequences(padded, part.lengths, part.labels)

    return Dataset(dataset.name, dataset.classes, scale(train), scale(dataset.test))


def _valid(sequences: LabelledSequences) -> Tensor:
    return torch.arange(sequences.padded.shape[1]) < sequences.lengths[:, None]  # (N, T)


def train_side_by_side(runs: tuple[Run, Run], dataset: Dataset, epochs: int, on_epoch: Callable[[], None]) -> None:
    """Train both, epoch by epoch in turn, so that whatever else the machine does falls on both alike.

    Who goes first changes with every epoch: the second finds the data in the cache.
    """
    for epoch in range(epochs):
        for run in runs if epoch % 2 == 0 else runs[::-1]:
            run.train_epoch(dataset.train)
        for run in runs:
            run.evaluate(dataset.test)
        on_epoch()
