# SPDX-License-Identifier: Apache-2.0
"""Recipe: a label for every step. The colours of an editor: what is each character of a Python source?

    pip install 'tidegate[cli]'
    python examples/recipe_tag.py

The sources are Python's own standard library (PSF licence), labelled by its `tokenize`, in pieces of ten lines, some of
which begin inside a string. A bidirectional GRU reads a piece, a linear layer labels every step. The test is on modules
not seen before; the baseline is each character's most frequent label. B pieces, T characters, K labels.
"""

from __future__ import annotations

import io
import keyword
import sysconfig
import tokenize
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from recipe_parts import fit, read_options
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import tidegate as tg
from tidegate.cli.pictures import TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

LABELS = ("space", "name", "keyword", "number", "string", "comment", "operator")
COLOURS = ("#868e96", "#212529", "#7048e8", "#e8590c", "#2b8a3e", "#adb5bd", "#0b7285")
KINDS = {tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.COMMENT: 5, tokenize.OP: 6}
NOTHING = -100  # the label of padding, which cross_entropy leaves out

Piece = tuple[Tensor, Tensor]  # codes and labels, (T,) each


class Tagger(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.gru = tg.GRU(32, hidden_size, bidirectional=True, batch_first=True)
        self.readout = nn.Linear(2 * hidden_size, len(LABELS))

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B, T, K)."""
        return self.readout(self.gru(self.embedding(codes), lengths=lengths)[0])


def pieces(path: Path) -> list[Piece]:
    source = path.read_text(encoding="utf-8").encode("ascii", "replace").decode()
    starts = [0, *accumulate(len(line) for line in io.StringIO(source))]
    labels = torch.zeros(len(source), dtype=torch.long)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = KINDS.get(token.type, 0)
        if token.type == tokenize.NAME:
            kind = 2 if keyword.iskeyword(token.string) else 1
        if kind:
            labels[starts[token.start[0] - 1] + token.start[1] : starts[token.end[0] - 1] + token.end[1]] = kind
    codes = torch.tensor(list(source.encode()), dtype=torch.long)
    cuts = starts[10::10]
    return [*zip(codes.tensor_split(cuts), labels.tensor_split(cuts), strict=True)]


def batch(part: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    codes, labels = zip(*part, strict=True)
    lengths = torch.tensor([len(row) for row in codes])
    return pad_sequence(codes, True), lengths, pad_sequence(labels, True, NOTHING)


def train(model: Tagger, part: list[Piece], epochs: int) -> None:
    def loss(rows: Tensor) -> Tensor:
        codes, lengths, labels = batch([part[k] for k in rows])
        scores = model(codes, lengths)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=NOTHING)

    list(fit(model, lambda: torch.randperm(len(part)).split(16), loss, epochs, -(-len(part) // 16), rate=5e-3))


def draw(right: Tensor, simple: Tensor, codes: Tensor, answers: Tensor, path: Path) -> None:
    figure, (left, text) = new_figure(12, 4.2, columns=2)
    bars = (0.2, "each character's commonest", simple, TORCH_COLOUR), (-0.2, "GRU", right, TIDEGATE_COLOUR)
    for offset, name, values, colour in bars:
        left.barh(np.arange(len(LABELS)) + offset, 100 * values.numpy(), height=0.38, color=colour, label=name)
    left.set(title="Test characters labelled right, %", yticks=range(len(LABELS)), yticklabels=LABELS, xlim=(0, 100))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    line, column = 0, 0
    for code, label in zip(codes.tolist(), answers.tolist(), strict=True):
        text.text(column, -line, chr(code).strip(), color=COLOURS[label], family="monospace", fontsize=8.5)
        line, column = (line + 1, 0) if chr(code) == "\n" else (line, column + 1)
    text.set(title="A test piece in the GRU's colours", xlim=(0, 80), ylim=(-10, 1))
    text.axis("off")
    print(save(figure, path))


def main(arguments: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Returns for each label the part of its test characters labelled right: by the GRU and by the baseline, (K,)."""
    options = read_options(__doc__, arguments, "fewer modules")
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    paths = [paths[k] for k in torch.randperm(len(paths))[:: 8 if options.quick else 2]]
    test = [piece for path in paths[::5] for piece in pieces(path) if len(piece[0])]
    learn = [piece for k, path in enumerate(paths) if k % 5 for piece in pieces(path) if len(piece[0])]
    train(model := Tagger(), learn, epochs=3)
    known, answer = (torch.cat(parts) for parts in zip(*learn, strict=True))
    counts = torch.bincount(known * len(LABELS) + answer, minlength=128 * len(LABELS)).view(128, -1)
    with torch.no_grad():
        answers = [model(piece[0][None], torch.tensor([len(piece[0])]))[0].argmax(-1) for piece in test]
    codes, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    right, simple = torch.cat(answers) == labels, counts.argmax(1)[codes] == labels
    print(f"{len(labels):,} characters; right: GRU {right.float().mean():.1%}, baseline {simple.float().mean():.1%}")
    parts = [torch.stack([hit[labels == k].float().mean() for k in range(len(LABELS))]) for hit in (right, simple)]
    with look():
        shown = max(range(len(test)), key=lambda k: len(set(answers[k].tolist())))
        draw(parts[0], parts[1], test[shown][0], answers[shown], options.folder / "tag.png")
    return parts[0], parts[1]


if __name__ == "__main__":
    main()
