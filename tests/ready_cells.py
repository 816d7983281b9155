# SPDX-License-Identifier: Apache-2.0
"""The ready cells in all their forms, with what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import randn

from tidegate import cells

I, H, B, T = 3, 4, 2, 5  # noqa: E741

CELLS: dict[str, Any] = {
    "LayerNormLSTM": lambda: cells.LayerNormLSTMCell(I, H),
    "LayerNormLSTM, together, carried": lambda: cells.LayerNormLSTMCell(I, H, False, together=True, carry_normed=True),
    "LayerNormLSTM, blocks": lambda: cells.LayerNormLSTMCell(I, H, blocks=2),
    "LayerNormGRU": lambda: cells.LayerNormGRUCell(I, H, True),
    "LayerNormGRU, blocks": lambda: cells.LayerNormGRUCell(I, H, blocks=2),
    "DreamerV3GRU": lambda: cells.DreamerV3GRUCell(I, H, projection_size=3, num_blocks=2, num_layers=2),
    "SLSTM": lambda: cells.SLSTMCell(I, H, 2),
    "MinGRU": lambda: cells.MinGRUCell(I, H),
    "MinGRU, signed": lambda: cells.MinGRUCell(I, H, positive=False),
    "MinLSTM": lambda: cells.MinLSTMCell(I, H),
    "MinLSTM, signed": lambda: cells.MinLSTMCell(I, H, positive=False),
    "LiGRU": lambda: cells.LiGRUCell(I, H),
    "LiGRU, bias": lambda: cells.LiGRUCell(I, H, norm=False),
    "MGU": lambda: cells.MGUCell(I, H),
    "IndRNN": lambda: cells.IndRNNCell(I, H),
    "IndRNN, tanh": lambda: cells.IndRNNCell(I, H, False, "tanh"),
    "GRUD": lambda: cells.GRUDCell(I, H, torch.tensor([0.5, -1.0, 2.0])),
    "CfC": lambda: cells.CfCCell(I, H, backbone_units=6),
    "CfC, no gate": lambda: cells.CfCCell(I, H, "no_gate", backbone_layers=0),
    "CfC, pure": lambda: cells.CfCCell(I, H, "pure", backbone_units=6, backbone_layers=2),
    "PeepholeLSTM": lambda: cells.PeepholeLSTMCell(I, H),
}
every_cell = pytest.mark.parametrize("name", CELLS)


def made(name: str) -> Any:
    """A cell whose parameters are all random: no gate, scale or shift is left at a value that hides it."""
    torch.manual_seed(0)
    cell = CELLS[name]().double()
    with torch.no_grad():
        for k, parameter in enumerate(cell.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=20 + k) * 0.7)
    return cell


def input_of(name: str, *shape: int, seed: int = 1) -> Any:
    x = randn(*shape, I, seed=seed)
    if name.startswith("GRUD"):
        mask = (randn(*shape, I, seed=seed + 7, grad=False) > 0).double()
        return x, mask, randn(*shape, I, seed=seed + 8, grad=False).abs()
    if name.startswith("CfC"):
        return x, randn(*shape, 1, seed=seed + 9).abs()
    return x


def state_of(cell: Any, seed: int = 5) -> Any:
    sizes = cell.state_size if isinstance(cell.state_size, tuple) else (cell.state_size,)
    states = tuple(randn(B, n, seed=seed + k) for k, n in enumerate(sizes))
    if isinstance(cell, cells.SLSTMCell):
        states = (*states[:2], states[2].detach().abs().requires_grad_(), states[3])
    return states if isinstance(cell.state_size, tuple) else states[0]
