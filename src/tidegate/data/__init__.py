# SPDX-License-Identifier: Apache-2.0
"""Labelled sequences: the set that travels inside the package, and its form. NumPy is needed only when one is loaded.

Letters: N sequences, T the longest one's steps, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

JAPANESE_VOWELS_FILE = Path(__file__).with_name("japanese_vowels.npz")


@dataclass(frozen=True)
class LabelledSequences:
    """Sequences of different lengths, each with one label.

    Attributes:
        padded: (N, T, C) float32, zero past each sequence's length.
        lengths: (N,) int64, true lengths.
        labels: (N,) int64, positions in `Dataset.classes`.
    """

    padded: Tensor
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    @classmethod
    def from_list(cls, sequences: list[Tensor], labels: list[int]) -> LabelledSequences:
        """Pad `sequences`, each (steps, C)."""
        return cls(
            padded=pad_sequence(sequences, batch_first=True),
            lengths=torch.tensor([len(sequence) for sequence in sequences]),
            labels=torch.tensor(labels),
        )


@dataclass(frozen=True)
class Dataset:
    """A classification task over sequences: what it is called, the names of its classes, and its two parts."""

    name: str
    classes: tuple[str, ...]
    train: LabelledSequences
    test: LabelledSequences

    @property
    def num_channels(self) -> int:
        return self.train.padded.shape[-1]


def japanese_vowels() -> Dataset:
    """Nine speakers saying /ae/: 270 training and 370 test utterances of 7 to 29 frames with 12 LPC cepstra each.

    Source: Kudo, Toyama and Shimbo 1999, UCI Machine Learning Repository, CC BY 4.0; LICENSE.md beside this file.
    """
    import numpy as np

    parts: list[LabelledSequences] = []
    with np.load(JAPANESE_VOWELS_FILE) as arrays:
        for part in ("train", "test"):
            lengths: list[int] = arrays[f"{part}_lengths"].tolist()
            frames = torch.from_numpy(arrays[f"{part}_frames"])
            labels: list[int] = arrays[f"{part}_labels"].tolist()
            parts.append(LabelledSequences.from_list(list(frames.split(lengths)), labels))
    speakers = tuple(f"speaker {number}" for number in range(1, 10))
    return Dataset("Japanese Vowels", speakers, *parts)
