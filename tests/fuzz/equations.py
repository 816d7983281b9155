# SPDX-License-Identifier: Apache-2.0
"""The oracle for what torch.nn lacks: each step written out in torch's operations, apart from anything of tidegate's.

Letters: T steps, B rows. A valid step t of row b has t < lengths[b]. A mark at t makes t the first step of a sequence:
in reverse, the state that leaves t does not reach t - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One layer's weights in one direction. `kind` is "RNN", "LSTM" or "GRU"."""

    kind: str
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    relu: bool
    reset_after: bool

    def step(self, x: Tensor, states: States) -> States:
        h = states[0]
        of_x = linear(x, self.w_ih, self.b_ih)
        if self.kind == "GRU":
            return (self._gru(of_x, h),)
        gates = of_x + linear(h, self.w_hh, self.b_hh)
        if self.kind == "RNN":
            return (gates.relu() if self.relu else gates.tanh(),)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if self.w_hr is None else linear(h, self.w_hr), c)

    def _gru(self, of_x: Tensor, h: Tensor) -> Tensor:
        x_r, x_z, x_n = of_x.chunk(3, -1)
        w_r, w_z, w_n = self.w_hh.chunk(3, 0)
        b_r, b_z, b_n = (None, None, None) if self.b_hh is None else self.b_hh.chunk(3, 0)
        r, z = (x_r + linear(h, w_r, b_r)).sigmoid(), (x_z + linear(h, w_z, b_z)).sigmoid()
        of_h = r * linear(h, w_n, b_n) if self.reset_after else linear(r * h, w_n, b_n)
        n = (x_n + of_h).tanh()
        return (1 - z) * n + z * h


def one_direction(
    cell: Cell, x: Tensor, states: States, lengths: Tensor, resets: Tensor, reverse: bool
) -> tuple[Tensor, States]:
    """x (T, B, I), states (B, size), lengths (B,), resets (T, B) -> output (T, B, P), final states."""
    steps = x.shape[0]
    outputs: list[Tensor] = [states[0].new_zeros(states[0].shape)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        valid = (t < lengths).unsqueeze(-1)
        before = t + 1 if reverse else t
        entering = states
        if before < steps:
            marked = (resets[before] & (before < lengths)).unsqueeze(-1)
            entering = tuple(state.masked_fill(marked, 0) for state in states)
        new = cell.step(x[t], entering)
        states = tuple(torch.where(valid, a, b) for a, b in zip(new, states, strict=True))
        outputs[t] = new[0].masked_fill(~valid, 0)
    return torch.stack(outputs) if steps else states[0].new_zeros((0, *states[0].shape)), states


def run(
    cells: list[Cell], x: Tensor, states: States, lengths: Tensor, resets: Tensor, bidirectional: bool, reverse: bool
) -> tuple[Tensor, States]:
    """All layers. x (T, B, I); states (L*D, B, size) each; `cells` layer by layer, the forward direction first."""
    valid = torch.arange(x.shape[0]).unsqueeze(-1) < lengths
    output = torch.where(valid.unsqueeze(-1), x, 0)  # what lies past a row's end may be NaN
    finals: list[States] = []
    directions = 1 + bidirectional
    for first in range(0, len(cells), directions):
        outputs: list[Tensor] = []
        for k in range(first, first + directions):
            backwards = reverse or k > first
            given = tuple(state[k] for state in states)
            result, last = one_direction(cells[k], output, given, lengths, resets, backwards)
            outputs.append(result)
            finals.append(last)
        output = torch.cat(outputs, -1)
    return output, tuple(torch.stack(column) for column in zip(*finals, strict=True))
