# SPDX-License-Identifier: Apache-2.0
"""Recipe: a small model leaves Python. Who is speaking, answered after every frame by a few kilobytes of C.

    pip install 'tidegate[cli]'
    python examples/recipe_export.py            # a C compiler, cc, is needed as well

Japanese Vowels again (Kudo, Toyama and Shimbo 1999; CC BY 4.0, inside tidegate): nine speakers, 370 utterances to test.
A GRU that runs forward adds up what each frame says, as a device does that hears them come. It is exported with weights
of 32, 16 and 8 bits, compiled, and run over every utterance in C. N sequences, T steps, C channels, K classes.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch
from recipe_parts import fit, read_options
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save
from tidegate.data import LabelledSequences, japanese_vowels


class Listener(nn.Module):
    def __init__(self, channels: int, classes: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru, self.dropout = tg.GRU(channels, hidden_size, batch_first=True), nn.Dropout(0.5)
        self.readout = nn.Linear(hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """What each frame of x (N, T, C) says of the speaker, (N, T, K): scores to add up."""
        return self.readout(self.dropout(self.gru(x)[0]))


def train(model: Listener, data: LabelledSequences, epochs: int) -> None:
    def loss(rows: Tensor) -> Tensor:
        scores, lengths = model(data.padded[rows]), data.lengths[rows]
        ends = (lengths * (0.3 + 0.7 * torch.rand(len(rows)))).long()  # what was said so far
        heard = (torch.arange(scores.shape[1]) <= ends[:, None])[..., None]
        return nn.functional.cross_entropy((scores * heard).sum(1), data.labels[rows], label_smoothing=0.1)

    list(fit(model.train(), lambda: torch.randperm(270).view(9, 30), loss, epochs, steps=9, rate=1e-2))


class Result(NamedTuple):
    size: int  # bytes of weights
    us: float  # a frame
    right: float  # part of the answers
    apart: float  # from PyTorch's scores


def run_in_c(folder: Path, frames: Tensor, begins: Tensor, classes: int) -> tuple[Tensor, float]:
    """Compile an exported model. Returns its scores (N * T, K) of all utterances, and microseconds a frame."""
    library, scores, state = folder / "model.so", torch.empty(len(frames), classes), torch.empty(4096)
    subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", folder / "model.c", "-o", library], check=True)
    model = ctypes.CDLL(str(library.resolve()))
    given = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (state, frames, scores, begins)]
    model.model_reset(given[0])
    start = time.perf_counter()
    model.model_process(*given, len(frames))
    return scores, (time.perf_counter() - start) / len(frames) * 1e6


@torch.no_grad()
def run_in_torch(model: Listener, frames: Tensor, begins: Tensor) -> tuple[Tensor, float]:
    """The same of PyTorch, frame by frame as well."""
    scores, stream, start = list[Tensor](), model.gru.stream(batch_size=1), time.perf_counter()
    for frame, begin in zip(frames.split(1), begins.tolist(), strict=True):
        if begin:
            stream.reset()
        scores.append(model.readout(stream.step(frame)))
    return torch.cat(scores), (time.perf_counter() - start) / len(frames) * 1e6


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    """Returns what PyTorch and each kind of weights in C come to."""
    options = read_options(__doc__, arguments, "a few epochs", epochs=60)
    data = japanese_vowels()
    test, classes = data.test, len(data.classes)
    train(model := Listener(data.num_channels, classes), data.train, 10 if options.quick else options.epochs)

    frames = torch.cat([row[:n] for row, n in zip(test.padded, test.lengths, strict=True)])
    begins = torch.zeros(len(frames), dtype=torch.uint8).index_fill(0, test.lengths.cumsum(0) - test.lengths, 1)
    exact, us = run_in_torch(model.eval(), frames, begins)
    found, sums = dict[str, Result](), dict[str, list[Tensor]]()
    for name in ("PyTorch", "float32", "bfloat16", "int8"):
        scores, size = exact, sum(weight.nbytes for weight in model.parameters())
        if name != "PyTorch":
            folder = tg.export_c(model, frames[None], options.folder / f"export-{name}", weights=name, resets=True)
            scores, us = run_in_c(folder, frames, begins, classes)
            size = int((folder / "README.md").read_text().split("| weights |")[1].split()[0])
        sums[name] = [part.cumsum(0) for part in scores.split(test.lengths.tolist())]
        right = sum(int(part[-1].argmax() == k) for part, k in zip(sums[name], test.labels, strict=True)) / len(test)
        found[name] = Result(size, us, right, (scores - exact).abs().max().item())
        print(f"{name:9}{size:7,} bytes{us:7.1f} us a frame, {right:.1%} right, scores {found[name].apart:.0e} off")

    with look():
        figure, (left, right) = new_figure(12, 4.2, columns=2)
        for k, (name, one) in enumerate(found.items()):
            left.bar(name, one.size / 1024, color=TIDEGATE_COLOUR if k else TORCH_COLOUR)
            left.text(k, one.size / 1024 + 1, f"{one.right:.1%} right\n{one.us:.1f} us a frame", ha="center")
        left.set(title="KB of weights", ylim=(0, 75))
        for name, colour, style in (("PyTorch", TORCH_COLOUR, "-"), ("int8", TIDEGATE_COLOUR, "--")):
            sure = sums[name][0].softmax(-1)[:, test.labels[0]]
            right.plot(range(1, len(sure) + 1), sure.numpy(), style, color=colour, lw=2, label=name)
        right.set(title="One utterance: its speaker's probability", xlabel="frames heard", xticks=range(0, 20, 5))
        right.legend()
        print(save(figure, options.folder / "export.png"))
    return found


if __name__ == "__main__":
    main()
