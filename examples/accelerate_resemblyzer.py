# SPDX-License-Identifier: Apache-2.0
"""Resemblyzer's speaker encoder, with the trained weights that its wheel contains, before and after `accelerate`.

    pip install 'tidegate[cli]' librosa webrtcvad-wheels
    pip install --no-deps resemblyzer      # its own dependency, webrtcvad, needs a C compiler and pkg_resources
    python examples/accelerate_resemblyzer.py [recording.wav ...]

Without recordings, two made-up voices speak: pulse trains through formant filters.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from dataclasses import dataclass

import librosa
import numpy as np
import torch
from scipy.signal import lfilter

import tidegate as tg
from tidegate.cli.bench.timing import Effort, interleave, local_slice

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Please import `binary_dilation`", category=DeprecationWarning)
    from resemblyzer import VoiceEncoder, preprocess_wav

RATE = 16000
VOWELS = ((700, 1200, 2600), (300, 2300, 3000), (350, 800, 2400))  # a, i, u: formants in Hz


@dataclass(frozen=True)
class Result:
    """One utterance.

    Attributes:
        apart: the largest difference between the two embeddings, whose length is 1.
        seconds: of torch.nn's and of tidegate's `embed_utterance`, spectrogram included.
        lstm_seconds: of the network alone.
    """

    embedding: np.ndarray
    apart: float
    seconds: tuple[float, float]
    lstm_seconds: tuple[float, float]


def voice(pitch: float, stretch: float, seconds: float) -> np.ndarray:
    """A voice of `pitch` Hz whose vowels' formants are `stretch` times the usual ones."""
    draw = np.random.default_rng(int(pitch))
    pieces: list[np.ndarray] = []
    for number in range(round(seconds * 4)):  # four syllables a second
        phase = np.cumsum(np.full(RATE // 4, pitch * (1 + 0.1 * draw.standard_normal()) / RATE))
        sound = np.diff(np.floor(phase), prepend=0.0) + 0.01 * draw.standard_normal(phase.size)
        for formant in VOWELS[number % 3]:
            radius, angle = np.exp(-np.pi * 100 / RATE), 2 * np.pi * formant * stretch / RATE
            sound = lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], sound)
        pieces.append(sound * np.hanning(sound.size))
    wave = np.concatenate(pieces)
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def compare(theirs: VoiceEncoder, ours: VoiceEncoder, wave: np.ndarray, effort: Effort) -> Result:
    expected, found = theirs.embed_utterance(wave), ours.embed_utterance(wave)
    wave_slices, _ = theirs.compute_partial_slices(len(wave), 1.3, 0.75)
    partials = torch.rand(len(wave_slices), 160, 40)

    @torch.no_grad()
    def network(encoder: VoiceEncoder) -> torch.Tensor:
        return encoder(partials)

    slices = {
        "theirs": local_slice(lambda: theirs.embed_utterance(wave)),
        "ours": local_slice(lambda: ours.embed_utterance(wave)),
        "their network": local_slice(lambda: network(theirs)),
        "our network": local_slice(lambda: network(ours)),
    }
    seconds = interleave(slices, effort)
    apart = float(np.abs(expected - found).max())
    whole, alone = (seconds["theirs"], seconds["ours"]), (seconds["their network"], seconds["our network"])
    return Result(found, apart, whole, alone)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="*", help="audio files")
    parser.add_argument("--seconds", type=float, default=10.0, help="that the made-up voices speak")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.recordings:
        waves = {name: preprocess_wav(librosa.load(name, sr=RATE)[0]) for name in options.recordings}
    else:
        waves = {"low voice": voice(110, 1.0, options.seconds), "high voice": voice(210, 1.18, options.seconds)}

    theirs = VoiceEncoder("cpu", verbose=False)
    ours = tg.accelerate(copy.deepcopy(theirs))
    print(tg.report(ours))
    results: list[Result] = []
    for name, wave in waves.items():
        result = compare(theirs, ours, wave, Effort(options.rounds, 0.0))
        results.append(result)
        for what, seconds in (("utterance", result.seconds), ("network alone", result.lstm_seconds)):
            before, after = seconds
            print(f"{name}, {len(wave) / RATE:.1f} s: {what} {before * 1e3:.1f} ms, {after * 1e3:.1f} ms", end="; ")
            print(f"{before / after:.2f}x")
        print(f"{name}: embeddings {result.apart:.0e} apart")
    return results


if __name__ == "__main__":
    main()
