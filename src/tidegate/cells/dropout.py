# SPDX-License-Identifier: Apache-2.0
"""Dropout with one mask for a whole sequence: of what the recurrent products read, and of the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from tidegate import cell as kinds
from tidegate.cells.parts import ReadyCell, gate_reads, product
from tidegate.cells.wrapper import Wrapper, read_probability, steps_of
from tidegate.nn import known_cells
from tidegate.nn.cells import RecurrentCell
from tidegate.nn.known_cells import TorchCell
from tidegate.nn.over_time import AnyCell, Nest


class RecurrentDropout(Wrapper):
    """A cell whose recurrent products read h times a mask, one mask for a sequence, a row and an entry.

        training: entries of the mask are 0 with probability p, else 1 / (1 - p);  eval: all are 1

    What the cell carries is not masked: a GRU's z h is of the whole h. Marks in `resets` begin no new mask.

    Source: Gal and Ghahramani 2016 (1512.05287); the meaning is that of Keras' `recurrent_dropout`: per_gate=True, with
    a mask for each gate's product, what its LSTM and GRU do since Keras 3.8, per_gate=False what its SimpleRNN does.
    The masks are drawn in the order of the cell's gates, torch.nn's in torch.nn's cells.

    Args:
        cell: one of tidegate.cells, tidegate's RNNCell, LSTMCell or GRUCell, or torch.nn's. Of any other cell the first
            tensor of the state is masked where the cell is given it, so also where it is carried.
        p: the probability that an entry is dropped.
        per_gate: a mask for each gate, where the cell's products can be reached.

    Parameters: the cell's, under `cell.`. The cell's own hooks do not run where its products are reached from here.

    Raises:
        ValueError: the cell has no recurrent product, or options under which it can't be reached.
        TypeError: the cell is a wrapper: those go around this one.
    """

    def __init__(self, cell: AnyCell, p: float, per_gate: bool = False) -> None:
        super().__init__(cell)
        self.p, self.per_gate = read_probability("p", p), per_gate
        if isinstance(self.cell, Wrapper):
            raise TypeError(
                f"cell: expected no wrapper, got {type(self.cell).__name__}; put it around RecurrentDropout"
            )
        gates = self._gates()
        if gates == 0:
            raise ValueError(f"cell: expected one with a recurrent product, got {type(self.cell).__name__}")
        if per_gate and gates is None:
            raise ValueError(f"per_gate: expected False, the products of a {type(self.cell).__name__} can't be reached")
        known = known_cells.as_known(self.cell)
        if known is not None and known.cell is kinds.GRU:
            options = {name: value for name, value in known._options().items() if name != "reset_after"}
            others = [name for name, value in options.items() if value != known.cell.options[name][1]]
            if others:
                raise ValueError(f"cell: expected a GRUCell without {', '.join(others)}")

    def extra_repr(self) -> str:
        return f"p={self.p:g}{', per_gate=True' if self.per_gate else ''}"

    def _gates(self) -> int | None:
        """How many the products have; None where they can't be reached."""
        if isinstance(self.cell, ReadyCell):
            return self.cell.reads
        known = known_cells.as_known(self.cell)
        return None if known is None else len(known.cell.gates)

    def _draw(self, inputs: Nest, state: Nest) -> Nest | None:
        if self.p == 0:
            return None
        h: Tensor = pytree.tree_leaves(state)[0]
        ones = h.new_ones((h.shape[0], self._gates() or 1, *h.shape[1:]) if self.per_gate else h.shape)
        return F.dropout(ones, self.p).expand(steps_of(inputs), *ones.shape)

    def _step(self, input: Nest, state: Nest, own: Nest | None, inner: Nest | None) -> Any:
        if own is None:
            return self._call(input, state, inner)
        leaves, structure = pytree.tree_flatten(state)
        h: Tensor = leaves[0]
        read = h.unsqueeze(1) * own if self.per_gate else h * own
        if isinstance(self.cell, ReadyCell):
            return self.cell(input, state, read)
        known = known_cells.as_known(self.cell)
        if known is None:
            return self._call(input, pytree.tree_unflatten([read, *leaves[1:]], structure), inner)
        return pytree.tree_unflatten(_step_of(known, input, leaves, read), structure)


class InputDropout(Wrapper):
    """A cell whose input is masked, one mask for a sequence, a row and an entry; of a nest the first tensor.

    Source: Gal and Ghahramani 2016 (1512.05287), with RecurrentDropout inside: their variational dropout. Keras' cells
    have it as `dropout`.

    Args:
        cell: any cell.
        p: the probability that an entry is dropped; the others are divided by 1 - p.

    Parameters: the cell's, under `cell.`.
    """

    def __init__(self, cell: AnyCell, p: float) -> None:
        super().__init__(cell)
        self.p = read_probability("p", p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def _draw(self, inputs: Nest, state: Nest) -> Nest | None:
        first: Tensor = pytree.tree_leaves(inputs)[0]
        return None if self.p == 0 else F.dropout(first.new_ones(first.shape[1:]), self.p).expand_as(first)

    def _step(self, input: Nest, state: Nest, own: Nest | None, inner: Nest | None) -> Any:
        if own is not None:
            leaves, structure = pytree.tree_flatten(input)
            input = pytree.tree_unflatten([leaves[0] * own, *leaves[1:]], structure)
        return self._call(input, state, inner)


def _step_of(cell: RecurrentCell | TorchCell, input: Tensor, states: list[Tensor], read: Tensor) -> tuple[Tensor, ...]:
    """A step of an RNN, LSTM or GRU whose recurrent products read `read`, (B, P) or (B, G, P)."""
    weights: dict[str, Any] = dict(zip(cell.cell.parameters, cell._weights(), strict=True))
    gates = len(cell.cell.gates)
    from_x = linear(input, weights["weight_ih"], weights["bias_ih"])
    if cell.cell is kinds.GRU:
        return (_gru(from_x, states[0], read, weights, cell._options()["reset_after"]),)
    # Their h is nowhere but in the product, which is in the input's part already.
    from_x = from_x + product(read, weights["weight_hh"], gates)
    return cell.cell.step(from_x, (torch.zeros_like(states[0]), *states[1:]), weights, cell._options())


def _gru(from_x: Tensor, h: Tensor, read: Tensor, weights: dict[str, Any], reset_after: bool) -> Tensor:
    r, z, n = from_x.chunk(3, -1)
    parts = zip(gate_reads(read, 3), weights["weight_hh"].chunk(3), strict=True)
    (read_r, w_r), (read_z, w_z), (read_n, w_n) = parts
    b_r, b_z, b_n = (None,) * 3 if weights["bias_hh"] is None else weights["bias_hh"].chunk(3)
    r = torch.sigmoid(r + linear(read_r, w_r, b_r))
    z = torch.sigmoid(z + linear(read_z, w_z, b_z))
    n = torch.tanh(n + (r * linear(read_n, w_n, b_n) if reset_after else linear(r * read_n, w_n, b_n)))
    return (1 - z) * n + z * h
