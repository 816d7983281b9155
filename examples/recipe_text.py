# SPDX-License-Identifier: Apache-2.0
"""Recipe: a language model of characters, trained by truncated backpropagation with the state carried on.

    pip install 'tidegate[cli]'
    python examples/recipe_text.py

The text is every second documentation string of Python's standard library (PSF licence), in random order. It is cut
into B rows that are read side by side, T of their V characters at a time: each piece starts from the state in which the
last one ended, but no gradient goes back there. The last tenth is for the test. The baseline is lzma, which has read
the same nine tenths before.
"""

from __future__ import annotations

import ast
import lzma
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from recipe_parts import fit, read_options
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

ROWS, STEPS = 32, 100


class Reader(nn.Module):
    def __init__(self, characters: int, hidden_size: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = tg.LSTM(64, hidden_size)
        self.readout = nn.Linear(hidden_size, characters)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores (T, B, V) of what follows each character of text (T, B), and the state after it."""
        output, state = self.lstm(self.embedding(text), state)
        return self.readout(output), state


def docstrings() -> list[str]:
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}.isdisjoint(path.parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    found[(ast.get_docstring(node) or "").encode("ascii", "ignore").decode()] = None
    return list(found)


def train(model: Reader, text: Tensor, epochs: int) -> Iterator[float]:
    """Yields after each epoch. The state goes on from piece to piece, its history is cut."""
    sides = tuple(part.view(ROWS, -1).T for part in (text[:-1], text[1:]))  # what is read and what follows, (T, B) each

    def loss(found: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        (_, target), scores = found
        return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())

    steps = -(-len(sides[0]) // STEPS)
    yield from fit(model, lambda: tg.tbptt(model, sides, STEPS), loss, epochs, steps, 6e-3, warm_up=0.1, clip=1.0)


@torch.no_grad()
def surprise(model: Reader, text: Tensor) -> Tensor:
    """Bits that each character but the first costs, after all that stand before it."""
    scores, _ = model(text[:-1, None], None)
    return nn.functional.cross_entropy(scores[:, 0], text[1:], reduction="none") / math.log(2)


@torch.inference_mode()
def write(model: Reader, start: Tensor, count: int, temperature: float = 0.6) -> list[int]:
    stream = model.lstm.stream()
    output, found = stream.steps(model.embedding(start))[-1], start.tolist()
    for _ in range(count):
        found.append(int((model.readout(output) / temperature).softmax(-1).multinomial(1)))
        output = stream.step(model.embedding(torch.tensor(found[-1])))
    return found


def main(arguments: list[str] | None = None) -> tuple[list[float], float]:
    """Returns the bits per character of the test text: after each epoch, and lzma's."""
    options = read_options(__doc__, arguments, "a fifth of that", epochs=5)
    pieces = docstrings()
    order = torch.randperm(len(pieces))[:: 10 if options.quick else 2]
    whole = "\n\n".join(pieces[k] for k in order)
    characters = sorted(set(whole))
    text = torch.tensor([characters.index(c) for c in whole])
    cut = len(text) * 9 // 10 // ROWS * ROWS + 1  # rows of equal length, and what follows the last
    size, whole_size = (len(lzma.compress(part.encode(), preset=9)) for part in (whole[:cut], whole))
    baseline = 8 * (whole_size - size) / (len(text) - cut)
    print(f"{len(text):,} characters, {len(characters)} different; lzma: {baseline:.2f} bits per character")

    model, curve = Reader(len(characters)), []
    for _ in train(model, text[:cut], options.epochs):
        costs = surprise(model, text[cut:])
        curve.append(costs.mean().item())
        print(f"epoch {len(curve)}: {curve[-1]:.2f} bits per character", flush=True)
    print("".join(characters[k] for k in write(model, torch.tensor([characters.index(c) for c in "Return "]), 300)))

    with look():
        figure, (left, right) = new_figure(12, 4.2, columns=2)
        epochs = range(1, len(curve) + 1)
        left.plot(epochs, curve, color=TIDEGATE_COLOUR, lw=2, marker="o", label="LSTM")
        left.axhline(baseline, color=TORCH_COLOUR, lw=2, label="lzma")
        left.set(title="Test text, bits per character", xlabel="epoch", ylim=(0, 1.1 * curve[0]), xticks=epochs)
        left.legend(loc="lower left")
        right.bar(range(50), costs[2000:2050].numpy(), color=TIDEGATE_COLOUR)
        right.set(title="Bits of each character", xticks=range(50))
        right.set_xticklabels([repr(characters[k])[1:-1] for k in text[cut + 2001 : cut + 2051]], fontsize=9)
        print(save(figure, options.folder / "text.png"))
    return curve, baseline


if __name__ == "__main__":
    main()
