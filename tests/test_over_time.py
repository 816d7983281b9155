# SPDX-License-Identifier: Apache-2.0
"""A cell called at every step against the same cell run whole: lengths, resets and reverse mean the same; noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import CELLS, assert_same, outcome, randn, tensors_in, twins
from tolerances import assert_equal_f64
from torch import Tensor

from tidegate.nn import over_time

T, B = 6, 4
LENGTHS = torch.tensor([3, 6, 0, 1])
RESETS = torch.zeros(T, B, dtype=torch.bool)
RESETS[[0, 2, 3, 5, 4, 1], [0, 0, 1, 1, 2, 3]] = True


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("resets", [None, RESETS], ids=["", "resets"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
@pytest.mark.parametrize("kind", CELLS)
def test_step_by_step_equals_whole(kind, lengths, resets, reverse):
    _, cell = twins(kind, 3, 5)
    x = randn(T, B, 3)
    state: Any = (randn(B, 5, seed=7), randn(B, 5, seed=8)) if kind == "LSTMCell" else randn(B, 5, seed=7)
    inputs = {"x": x} | {f"state {k}": s for k, s in enumerate(tensors_in(state))}

    def run(fuse: bool | None) -> Any:
        return over_time.run(cell, x, state, lengths, resets, reverse, fuse=fuse)

    assert_same(outcome(cell, lambda: run(False), inputs), outcome(cell, lambda: run(None), inputs))


class Noisy(torch.nn.Module):
    """h' = h + x * noise, with one mask a step and one a sequence."""

    state_size = 3

    def draw_noise(self, inputs: Tensor, state: Tensor) -> Any:
        if not self.training:
            return None
        return {"step": torch.rand_like(inputs), "sequence": torch.rand_like(state).expand_as(inputs)}

    def forward(self, x: Tensor, state: Tensor, noise: Any = None) -> Tensor:
        return state + (x if noise is None else x * noise["step"] * noise["sequence"])


@pytest.mark.parametrize("reverse", [False, True])
def test_noise_is_drawn_once_before_the_loop(reverse):
    cell, x = Noisy(), randn(T, B, 3)
    torch.manual_seed(3)
    output, final = over_time.run(cell, x, torch.zeros(B, 3, dtype=x.dtype), reverse=reverse)
    torch.manual_seed(3)
    masked = x * torch.rand_like(x) * torch.rand_like(x[0])
    expected = masked.flip(0).cumsum(0).flip(0) if reverse else masked.cumsum(0)
    assert_equal_f64(output, expected)
    assert_equal_f64(final, masked.sum(0))
    output, _ = over_time.run(cell.eval(), x, torch.zeros(B, 3, dtype=x.dtype))
    assert_equal_f64(output, x.cumsum(0))


def test_noise_of_no_steps():
    output, _ = over_time.run(Noisy(), torch.zeros(0, B, 3), torch.zeros(B, 3))
    assert tuple(output.shape) == (0, B, 3)
