# SPDX-License-Identifier: Apache-2.0
"""Cells that run whole over a sequence, on kernels of their own: tidegate's and torch.nn's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate import dispatch
from tidegate.call import Layer
from tidegate.cell import Cell, Options, States
from tidegate.nn.cells import GRUCell, LSTMCell, RecurrentCell, RNNCell, run_sequence

_OURS: dict[type, type[RecurrentCell]] = {
    RNNCell: RNNCell,
    LSTMCell: LSTMCell,
    GRUCell: GRUCell,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}


def add(cell: type[RecurrentCell]) -> None:
    """A class of cells of ours that runs whole over a sequence."""
    _OURS[cell] = cell


class TorchCell(NamedTuple):
    """One of torch.nn's cells, to be run as ours are.

    Attributes:
        cell: what it is.
        module: with the parameters; what else its owner keeps on it means nothing.
    """

    cell: Cell
    module: Any

    @property
    def input_size(self) -> int:
        return self.module.input_size

    def _weights(self) -> tuple[Tensor | None, ...]:
        names = self.cell.parameters.items()
        return tuple([getattr(self.module, name, None) if p.when in ("", "bias") else None for name, p in names])

    def _options(self) -> Options:
        options = {name: default for name, (_, default) in self.cell.options.items()}
        if "nonlinearity" in options:
            options["nonlinearity"] = self.module.nonlinearity
            if options["nonlinearity"] not in ("tanh", "relu"):
                raise RuntimeError(f"Unknown nonlinearity: {options['nonlinearity']}")
        return options

    def _sequence(
        self, input: Tensor, states: States, lengths: Tensor | None, resets: Tensor | None, reverse: bool
    ) -> tuple[Tensor, ...]:
        weights = dict(zip(self.cell.parameters, self._weights(), strict=True))
        return run_sequence(Layer(self.cell, input, states, weights, lengths, resets, reverse, self._options()))


def as_sequence(cell: Any) -> RecurrentCell | TorchCell | None:
    """The cell as one of ours that can run whole; None where a hook, a subclass or a user's code must see each step."""
    known = as_known(cell)
    if known is None or dispatch.has_module_hooks():
        return None
    if cell._forward_hooks or cell._forward_pre_hooks or cell._backward_hooks or cell._backward_pre_hooks:
        return None
    return known


def as_known(cell: object) -> RecurrentCell | TorchCell | None:
    """One of our cells or of torch.nn's; None for any other, and where its forward was replaced."""
    ours = _OURS.get(type(cell))
    if ours is None or "forward" in vars(cell):
        return None
    return cell if type(cell) is ours else TorchCell(ours.cell, cell)


def states_of_kind(cell: object) -> tuple[str, ...]:
    """The names of the states that a cell has by its type; () if that does not say it."""
    ours = cell if isinstance(cell, RecurrentCell) else _OURS.get(type(cell))
    return () if ours is None else tuple(ours.cell.states)
