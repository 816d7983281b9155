# SPDX-License-Identifier: Apache-2.0
"""Calls for the tests to make: any cell, any sizes, seeded."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tidegate import backends, ops
from tidegate import cell as kinds
from tidegate.call import Layer
from tidegate.cell import Cell

# The backends that can run here: all three but on a machine without a compiler.
RUNNABLE = [name for name, backend in backends.BY_NAME.items() if not backend.availability()]

VARIANTS: dict[str, tuple[Cell, dict[str, Any], bool]] = {
    "rnn-tanh": (kinds.RNN, {"nonlinearity": "tanh"}, False),
    "rnn-relu": (kinds.RNN, {"nonlinearity": "relu"}, False),
    "lstm": (kinds.LSTM, {}, False),
    "lstm-proj": (kinds.LSTM, {}, True),
    "gru": (kinds.GRU, {"reset_after": True}, False),
    "gru-reset-before": (kinds.GRU, {"reset_after": False}, False),
}


def make_call(
    variant: str,
    steps: int = 5,
    batch: int = 3,
    input_size: int = 4,
    hidden_size: int = 6,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    lengths: bool = False,
    resets: bool = False,
    reverse: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
) -> Layer:
    """A layer of one of VARIANTS with random tensors; lengths include 0 and T where there is room for both."""
    cell, options, projected = VARIANTS[variant]
    generator = torch.Generator().manual_seed(seed)
    proj = max(1, hidden_size // 2) if projected else hidden_size
    rows = len(cell.gates) * hidden_size

    def tensor(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        return values.to(dtype).requires_grad_(requires_grad)

    weights: dict[str, Tensor | None] = {"weight_ih": tensor(rows, input_size), "weight_hh": tensor(rows, proj)}
    weights |= {name: tensor(rows) if bias else None for name in ("bias_ih", "bias_hh")}
    if cell is kinds.LSTM:
        weights["weight_hr"] = tensor(proj, hidden_size) if projected else None
        weights["weight_peephole"] = None
    sizes = {"h": proj, "c": hidden_size}
    states = tuple(tensor(batch, sizes[state]) for state in cell.states)
    valid = torch.tensor(list(itertools.islice(itertools.cycle((steps, 0, max(steps - 1, 0), steps // 2)), batch)))
    marks = torch.rand(steps, batch, generator=generator) < 0.3
    return Layer(
        cell,
        tensor(steps, batch, input_size),
        states,
        weights,
        valid.to(torch.int64) if lengths else None,
        marks if resets else None,
        reverse,
        {**cell.default_options, **options},
    )


def run_layer(layer: Layer) -> tuple[Tensor, ...]:
    """One layer as a module's call: output (T, B, P) and the final states, (B, size) each."""
    output, *finals = ops.run(layer.call())
    return (output, *(final.squeeze(0) for final in finals))
