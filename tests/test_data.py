# SPDX-License-Identifier: Apache-2.0
"""The embedded set is the published one: its counts, lengths and class balance are UCI's."""

from __future__ import annotations

import pytest
import torch

from tidegate.data import LabelledSequences, japanese_vowels


@pytest.mark.parametrize(
    ("part", "per_speaker", "longest"),
    [("train", [30] * 9, 26), ("test", [31, 35, 88, 44, 29, 24, 40, 50, 29], 29)],
)
def test_japanese_vowels_has_the_published_counts(part: str, per_speaker: list[int], longest: int) -> None:
    sequences: LabelledSequences = getattr(japanese_vowels(), part)
    assert torch.bincount(sequences.labels).tolist() == per_speaker
    assert sequences.padded.shape == (sum(per_speaker), longest, 12)
    assert sequences.padded.dtype == torch.float32
    assert int(sequences.lengths.min()) == 7
    assert int(sequences.lengths.max()) == longest
    assert len(sequences) == sum(per_speaker)


def test_japanese_vowels_is_padded_with_zeros_and_only_past_the_lengths() -> None:
    dataset = japanese_vowels()
    for sequences in (dataset.train, dataset.test):
        steps = torch.arange(sequences.padded.shape[1])
        valid = steps < sequences.lengths[:, None]  # (N, T)
        assert torch.isfinite(sequences.padded).all()
        assert (sequences.padded[valid] != 0).any(-1).all()
        assert (sequences.padded[~valid] == 0).all()


def test_japanese_vowels_keeps_the_values_of_the_first_utterance() -> None:
    train = japanese_vowels().train
    assert int(train.lengths[0]) == 20
    torch.testing.assert_close(train.padded[0, 0, :3], torch.tensor([1.860936, -0.207383, 0.261557]))


def test_classes_name_the_speakers() -> None:
    dataset = japanese_vowels()
    assert dataset.classes == tuple(f"speaker {number}" for number in range(1, 10))
    assert dataset.num_channels == 12
