# SPDX-License-Identifier: Apache-2.0
"""Make japanese_vowels.npz from the two `.ts` files in which the `aeon` package carries the set.

    pip download --no-deps aeon==1.6.0
    unzip aeon-1.6.0-*.whl 'aeon/datasets/data/JapaneseVowels/*'
    python -m tidegate.data.make_japanese_vowels aeon/datasets/data/JapaneseVowels

A `.ts` file holds one utterance a line: channels separated by colons, frames by commas, the speaker last. The files
whose name contains `_eq_` are resampled to equal length; they are not read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tidegate.data import JAPANESE_VOWELS_FILE

NUM_CHANNELS = 12


def read_ts(path: Path) -> dict[str, np.ndarray]:
    """Read one `.ts` file.

    Returns:
        frames (sum of lengths, 12) float32, utterances one after another; lengths (utterances,) uint8;
        labels (utterances,) uint8, 0 for speaker 1.

    Raises:
        ValueError: an utterance lacks a channel, its channels differ in length, or a value is missing.
    """
    _, _, body = path.read_text(encoding="utf-8").partition("@data\n")
    utterances: list[np.ndarray] = []
    labels: list[int] = []
    for number, line in enumerate(filter(None, body.splitlines()), start=1):
        *channels, speaker = line.split(":")
        values = [np.array(channel.split(","), dtype=np.float32) for channel in channels]
        if len(values) != NUM_CHANNELS or len({len(channel) for channel in values}) != 1:
            raise ValueError(f"{path}: utterance {number}: expected {NUM_CHANNELS} channels of one length")
        utterance = np.stack(values, axis=1)  # (frames, 12)
        if not np.isfinite(utterance).all():
            raise ValueError(f"{path}: utterance {number}: a value is missing")
        utterances.append(utterance)
        labels.append(int(speaker) - 1)
    return {
        "frames": np.concatenate(utterances),
        "lengths": np.array([len(utterance) for utterance in utterances], dtype=np.uint8),
        "labels": np.array(labels, dtype=np.uint8),
    }


def main(folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        for name, array in read_ts(folder / f"JapaneseVowels_{part.upper()}.ts").items():
            arrays[f"{part}_{name}"] = array
    np.savez_compressed(JAPANESE_VOWELS_FILE, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{JAPANESE_VOWELS_FILE}: {JAPANESE_VOWELS_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tidegate.data.make_japanese_vowels FOLDER_OF_TS_FILES")
    main(Path(sys.argv[1]))
