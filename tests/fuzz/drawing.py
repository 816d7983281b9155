# SPDX-License-Identifier: Apache-2.0
"""One drawn case: a layer, its input in some form, what is asked of it, and under what circumstances."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from needs import ISAS
from torch import Tensor

SIZES = (1, 1, 2, 3, 5, 7, 8, 11, 13, 16, 17, 19, 31, 32, 33, 47, 64, 67)
FORMS = ("padded", "padded", "padded", "unbatched", "packed", "packed sorted", "list", "nested", "cell", "stream")
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("plain", "plain", "transposed", "sliced", "expanded", "offset")


@dataclass(frozen=True)
class Case:
    """Attributes:
    kind, options: of the layer.
    scale: of its weights, times torch.nn's.
    lengths: of each row; of "padded" and "unbatched" forms only if `has_lengths`.
    strides: how x, states and arriving gradients lie in memory.
    needs: what a gradient is asked of: "x", "states", "weights", "biases"; none runs without gradients.
    arrives: at which results a gradient arrives: "output", "h", "c".
    mode: without gradients, "no_grad" or "inference_mode".
    again: the backward is run twice.
    """

    kind: str
    options: dict[str, Any]
    dtype: torch.dtype
    form: str
    steps: int
    lengths: tuple[int, ...]
    has_lengths: bool
    has_resets: bool
    has_state: bool
    scale: float
    strides: str
    needs: frozenset[str]
    arrives: frozenset[str]
    mode: str
    again: bool
    backend: str | None
    isa: str
    threads: int
    poisoned: bool
    seed: int

    @property
    def is_torchs(self) -> bool:
        """Whether torch.nn can do it."""
        ours = self.has_resets or self.options.get("reverse") or not self.options.get("reset_after", True)
        return not ours and bool(self.lengths) and min(self.lengths) > 0


def draw(seed: int, number: int) -> Case:
    r = random.Random(f"{seed}/{number}")
    kind, form = r.choice(("RNN", "LSTM", "GRU")), r.choice(FORMS)
    small = r.random() < 0.7  # many small ones, some that fill several blocks and threads
    sizes = SIZES[:9] if small else SIZES
    hidden_size = r.choice(sizes)
    options: dict[str, Any] = {
        "input_size": r.choice(sizes),
        "hidden_size": hidden_size,
        "num_layers": r.choice((1, 1, 1, 2, 3)),
        "bias": r.random() < 0.8,
        "batch_first": r.random() < 0.4,
        "bidirectional": r.random() < 0.35,
    }
    if form == "cell":
        options |= {"num_layers": 1, "batch_first": False}
    if form in ("cell", "stream"):
        options["bidirectional"] = False
    dtype = r.choice(DTYPES)
    if kind == "LSTM" and hidden_size > 1 and r.random() < 0.3:
        options["proj_size"] = r.randrange(1, hidden_size)
    if kind == "RNN" and r.random() < 0.4:
        options["nonlinearity"] = "relu"
    if kind == "GRU" and r.random() < 0.4:
        options["reset_after"] = False
    if not options["bidirectional"] and form not in ("cell", "stream") and r.random() < 0.25:
        options["reverse"] = True
    steps = r.choice((1, 1, 2, 3, 4, 5, 7, 9, 13) if small else (1, 2, 3, 7, 16, 29))
    batch = 1 if form == "unbatched" else r.choice((1, 1, 2, 3, 4, 5, 8, 9) if small else (1, 2, 7, 9, 16, 17, 33))
    has_lengths = form not in ("padded", "unbatched", "cell", "stream") or (form == "padded" and r.random() < 0.4)
    least = 1 if form.startswith("packed") or r.random() < 0.5 else 0
    lengths = [r.randint(least, steps) if has_lengths else steps for _ in range(batch)]
    if form != "padded" and has_lengths:
        lengths[r.randrange(batch)] = steps
    if form == "packed sorted":
        lengths.sort(reverse=True)
    parts = ["x", "states", "weights", "biases"]
    needs = frozenset(part for part in parts if r.random() < 0.75) if r.random() < 0.75 else frozenset()
    needs = frozenset() if form == "stream" else needs
    results = ["output", "h", *(["c"] if kind == "LSTM" else [])]
    arrives = frozenset(part for part in results if r.random() < 0.7) or frozenset({r.choice(results)})
    return Case(
        kind, options, dtype, form, steps, tuple(lengths), has_lengths,
        has_resets=form in ("padded", "unbatched", "list") and r.random() < 0.35,
        has_state=r.random() < 0.6,
        # A relu's state grows with its weights, beyond what float16 can hold.
        scale=r.choice((0.1, 1.0, 1.0, 1.0 if "nonlinearity" in options else 2.0)),
        strides=r.choice(STRIDES),
        needs=needs,
        arrives=arrives,
        mode=r.choice(("no_grad", "inference_mode")),
        again=r.random() < 0.15,
        backend=r.choice((None, None, None, None, None, None, "aten", "reference")),
        isa=r.choice(ISAS or ["none"]),
        threads=r.choice((1, 1, 2, 3)),
        poisoned=r.random() < 0.5,
        seed=r.randrange(2**31),
    )  # fmt: skip


def laid_out(values: Tensor, strides: str) -> Tensor:
    """The same numbers on other strides."""
    if strides == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "sliced":
        return torch.stack([values, torch.full_like(values, torch.nan)], -1)[..., 0]
    if strides == "offset":
        room = torch.full((values.numel() + 3,), torch.nan, dtype=values.dtype)
        room[3:] = values.flatten()
        return room[3:].view(values.shape)
    if strides == "expanded" and values.dim() > 1 and values.shape[0]:
        return values[:1].expand(values.shape)
    return values
