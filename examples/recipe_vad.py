# SPDX-License-Identifier: Apache-2.0
"""Recipe: streaming voice activity with Silero VAD's trained weights, equal to the package's own output.

    pip install 'tidegate[cli]' silero-vad
    pip install --no-deps pyannote.audio    # for its recording: 30 seconds of two people, and who spoke when
    python examples/recipe_vad.py

Silero VAD (MIT) says every 32 ms how likely it is that somebody speaks: a spectrum, four convolutions, an LSTM of 128
units, a readout. Its wheel holds the weights; here are thirty lines around a `tg.LSTM`, which runs a whole recording in
one call, or as a stream, frame by frame, as from a microphone. Letters: T frames of 512 samples.
"""

from __future__ import annotations

import argparse
import wave
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from silero_vad import load_silero_vad
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import INK, TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

RATE, FRAME, CONTEXT = 16000, 512, 64
SAMPLE = Path(distribution("pyannote.audio").locate_file("pyannote/audio/sample/sample.wav"))


class VoiceActivity(nn.Module):
    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = tg.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)
        weights = theirs.state_dict().values()  # in this order, of a model for 16 kHz
        self.load_state_dict(dict(zip(self.state_dict(), weights, strict=True)))

    def features(self, frames: Tensor) -> Tensor:
        """(T, 128) of frames (T, 64 + 512): each begins with the end of the one before."""
        real, imaginary = self.stft_conv(nn.functional.pad(frames[:, None], (0, 64), mode="reflect")).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        return x.squeeze(-1)

    def probability(self, hidden: Tensor) -> Tensor:
        return self.final_conv(hidden.relu()[..., None]).sigmoid().flatten()

    def forward(self, frames: Tensor) -> Tensor:
        """A whole recording in one call: (T,)."""
        return self.probability(self.lstm(self.features(frames))[0])


@torch.inference_mode()
def streamed(model: VoiceActivity, samples: Tensor) -> Tensor:
    """The same, as samples arrive."""
    stream, context, found = model.lstm.stream(), torch.zeros(CONTEXT), []
    for frame in samples.split(FRAME):
        frame = torch.cat([context, frame])
        found.append(model.probability(stream.step(model.features(frame[None])[0])[None]))
        context = frame[-CONTEXT:]
    return torch.cat(found)


def recording() -> tuple[Tensor, Tensor]:
    """Samples (512 * T,) and whether somebody speaks in the middle of each frame, (T,)."""
    with wave.open(str(SAMPLE)) as file:
        samples = torch.from_numpy(np.frombuffer(file.readframes(-1), np.int16) / np.float32(32768))
    samples = samples[: len(samples) // FRAME * FRAME]
    seconds = (torch.arange(len(samples) // FRAME) + 0.5) * FRAME / RATE
    spoken = torch.zeros(len(seconds), dtype=torch.bool)
    for line in SAMPLE.with_suffix(".rttm").read_text().splitlines():
        start, duration = map(float, line.split()[3:5])
        spoken |= (seconds >= start) & (seconds < start + duration)
    return samples, spoken


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns how far from the package's output ours is at most, and the part of the frames labelled right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/recipes"))
    options = parser.parse_args(arguments)
    samples, spoken = recording()
    theirs = load_silero_vad()
    model = VoiceActivity(theirs._model)
    frames = nn.functional.pad(samples, (CONTEXT, 0)).unfold(0, CONTEXT + FRAME, FRAME)  # (T, 576)
    expected = torch.cat([theirs(frame, RATE)[0] for frame in samples.split(FRAME)])
    found = {"one call": model(frames), "stream": streamed(model, samples)}
    apart = max((probability - expected).abs().max().item() for probability in found.values())
    right = ((found["stream"] > 0.5) == spoken).double().mean().item()
    loudness = samples.view(-1, FRAME).square().mean(1)
    by_loudness = max(((loudness > level) == spoken).double().mean().item() for level in loudness)
    print(f"one call and stream: {apart:.0e} from silero-vad at most, over {len(expected)} frames")
    print(f"frames labelled right {right:.1%}; by the best of all thresholds on loudness {by_loudness:.1%}", end="; ")
    print(f"by always saying 'speech' {spoken.double().mean():.1%}")

    with look():
        figure, (axis,) = new_figure(12, 3.6)
        seconds = (torch.arange(len(spoken)) + 0.5) * FRAME / RATE
        axis.plot(torch.arange(len(samples)) / RATE, samples / (2 * samples.abs().max()) - 0.6, color="#adb5bd", lw=0.3)
        shade = {"color": TORCH_COLOUR, "alpha": 0.15, "lw": 0, "step": "mid", "label": "somebody speaks"}
        axis.fill_between(seconds, 0, 1, where=spoken.numpy(), **shade)
        axis.plot(seconds, expected, color=INK, lw=2.5, label="silero-vad")
        axis.plot(seconds, found["stream"], color=TIDEGATE_COLOUR, lw=1, label="tidegate's stream")
        axis.set(title="How likely it is that somebody speaks", xlabel="seconds", xlim=(0, 30), yticks=(0, 0.5, 1))
        axis.legend(loc="upper left")
        print(save(figure, options.folder / "vad.png"))
    return apart, right


if __name__ == "__main__":
    main()
