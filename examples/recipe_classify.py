# SPDX-License-Identifier: Apache-2.0
"""Recipe: who is speaking? One label for a sequence of any length, from padded batches and `lengths=`.

    pip install 'tidegate[cli]'
    python examples/recipe_classify.py

Japanese Vowels (Kudo, Toyama and Shimbo 1999; CC BY 4.0, inside tidegate): nine speakers, 270 utterances to train on
and 370 to test, of 7 to 29 frames with 12 cepstral coefficients. A bidirectional GRU's last valid states and the mean
of its valid outputs go to a linear layer. With shorter `lengths` the same model answers after the first few frames.

Letters: N sequences, T steps, C channels, K classes.
"""

from __future__ import annotations

import torch
from recipe_parts import read_options
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.pictures import TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save
from tidegate.data import LabelledSequences, japanese_vowels


class Speaker(nn.Module):
    def __init__(self, channels: int, classes: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru = tg.GRU(channels, hidden_size, bidirectional=True, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.readout = nn.Linear(4 * hidden_size, classes)

    def forward(self, padded: Tensor, lengths: Tensor) -> Tensor:
        """Scores (N, K) of padded (N, T, C)."""
        output, h_n = self.gru(padded, lengths=lengths)
        mean = output.sum(1) / lengths[:, None]  # outputs past a row's length are 0
        return self.readout(self.dropout(torch.cat([h_n[0], h_n[1], mean], -1)))


def train(model: Speaker, data: LabelledSequences, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(54):
            lengths = data.lengths[rows]
            cut = (lengths * (0.5 + 0.5 * torch.rand(len(rows)))).ceil().long()  # now and then only the beginning
            optimizer.zero_grad()
            scores = model(data.padded[rows, : int(cut.max())], cut)
            nn.functional.cross_entropy(scores, data.labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Speaker, data: LabelledSequences, frames: int = 99) -> float:
    """Of the answers after at most `frames` frames."""
    scores = model(data.padded, data.lengths.clamp(max=frames))
    return (scores.argmax(-1) == data.labels).double().mean().item()


def nearest_mean(train: LabelledSequences, test: LabelledSequences, frames: int = 99) -> float:
    """The baseline: the speaker whose utterances' mean frame is nearest to this utterance's."""
    heard, whole = test.lengths.clamp(max=frames), train.padded.sum(1) / train.lengths[:, None]
    centres = torch.stack([whole[train.labels == k].mean(0) for k in range(int(train.labels.max()) + 1)])
    valid = torch.arange(test.padded.shape[1]) < heard[:, None]  # (N, T)
    means = (test.padded * valid[..., None]).sum(1) / heard[:, None]
    return (torch.cdist(means, centres).argmin(-1) == test.labels).double().mean().item()


def standardised(part: LabelledSequences, mean: Tensor, deviation: Tensor) -> LabelledSequences:
    valid = torch.arange(part.padded.shape[1]) < part.lengths[:, None]
    return LabelledSequences(valid[..., None] * (part.padded - mean) / deviation, part.lengths, part.labels)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the test accuracy of the GRU and of the baseline."""
    options = read_options(__doc__, arguments, "a few epochs")

    data = japanese_vowels()
    frames = torch.cat([row[:n] for row, n in zip(data.train.padded, data.train.lengths, strict=True)])
    learn, test = (standardised(part, frames.mean(0), frames.std(0)) for part in (data.train, data.test))
    model = Speaker(data.num_channels, len(data.classes))
    train(model, learn, epochs=8 if options.quick else 100)
    result = accuracy(model, test), nearest_mean(learn, test)
    print(f"test accuracy: GRU {result[0]:.1%}, nearest mean {result[1]:.1%}")

    with look(), torch.no_grad():
        figure, (left, right) = new_figure(12, 4.6, columns=2)
        answers = model(test.padded, test.lengths).argmax(-1)
        confusion = torch.zeros(9, 9).index_put_((test.labels, answers), torch.tensor(1.0), accumulate=True)
        left.imshow((confusion / confusion.sum(1, keepdim=True)).numpy(), cmap="GnBu", vmin=0, vmax=1)
        left.set(title="Test utterances", xlabel="answer", ylabel="speaker", xticks=range(9), yticks=range(9))
        left.set(xticklabels=range(1, 10), yticklabels=range(1, 10))
        left.grid(False)
        for i, j in confusion.nonzero().tolist():
            left.text(j, i, f"{confusion[i, j]:.0f}", ha="center", va="center", color="white" if i == j else "black")
        heard = range(1, 30)
        for name, colour, curve in (
            ("GRU", TIDEGATE_COLOUR, [accuracy(model, test, k) for k in heard]),
            ("nearest mean", TORCH_COLOUR, [nearest_mean(learn, test, k) for k in heard]),
        ):
            right.plot(heard, [100 * value for value in curve], color=colour, lw=2, label=name)
        right.set(title="Test accuracy, %, by frames heard", xlabel="frames heard at most", ylim=(0, 102))
        right.legend(loc="lower right")
        print(save(figure, options.folder / "classify.png"))
    return result


if __name__ == "__main__":
    main()
