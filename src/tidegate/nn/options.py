# SPDX-License-Identifier: Apache-2.0
"""What the layers and cells take beyond torch.nn's arguments: a cell's options, and whose initialization."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate import activations
from tidegate.cells import CELLS, Cell, Options
from tidegate.nn import initialization

# The values of a cell's options, of the module that has them: quicker than one by one.
_values = {cell.name: operator.attrgetter(*cell.options) for cell in CELLS}


class Extended(torch.nn.Module):
    """A module that keeps its cell's options as attributes of the options' names.

    The class attributes are torch.nn's meanings: a module that was pickled before an option existed has them.
    """

    cell: Cell
    clip: float = 0.0
    init: str = "torch"

    def _options(self) -> Options:
        return {name: getattr(self, name) for name in self.cell.options}

    def _weight(self, name: str) -> Any:
        """The tensor of this name as it is now; a parametrization, pruning or tying may have put another there."""
        parameters = self._parameters  # looked up first: a module's own attribute access costs as much as a small step
        return parameters[name] if name in parameters else getattr(self, name)

    def _call_shortly(
        self, run: Callable[..., Sequence[Tensor]], input: Tensor, states: Any, names: Sequence[str], *rest: Any
    ) -> Sequence[Tensor]:
        """`run`, of `backends.ShortWay`, on the tensors of these names."""
        if states is None:
            states = ()
        elif isinstance(states, tuple) != (len(self.cell.states) > 1):
            return ()
        elif not isinstance(states, tuple):
            states = (states,)
        found = self._parameters
        weights = [found[name] if name in found else getattr(self, name, None) for name in names]
        return run(self.cell, _values[self.cell.name](self), input, states, weights, *rest)

    def _extended_repr(self) -> str:
        """The options that are not torch.nn's, as the constructor takes them."""
        shown = ""
        for name, (_, default) in self.cell.options.items():
            value = getattr(self, name)
            if value not in (default, "relu"):
                shown += f", {'activations' if name == 'nonlinearity' else name}={value!r}"
        return shown


def read_activations(cell: Cell, value: Any) -> str:
    """The `activations` option from a text or a sequence of names; None for the cell's own."""
    if value is None:
        return cell.options["activations"][1]
    try:
        return activations.normal(value, cell.activations)
    except ValueError as error:
        raise ValueError(f"activations: {error}") from None


def read_nonlinearity(value: Any) -> str:
    """An RNN's one activation by `activations`; `nonlinearity` keeps to torch.nn's two."""
    try:
        return activations.normal(value, ("nonlinearity",))
    except ValueError as error:
        raise ValueError(f"activations: {error}") from None


def read_clip(name: str, value: Any) -> float:
    """A clip option: None or 0 for none."""
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a positive number, or None, got {value!r}")
    return float(value)


def read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def read_init(value: str) -> str:
    if value not in initialization.SCHEMES:
        raise ValueError(f"init: expected one of {', '.join(initialization.SCHEMES)}, got {value!r}")
    return value
