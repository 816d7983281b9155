# SPDX-License-Identifier: Apache-2.0
"""All states of all steps, of layers whose output has one of them alone: an LSTM's c_t.

The output of a cell with one state is that state. A cell with more runs as a loop whose output is all of them. Letters
as in layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tidegate.backends import find_faults as find_our_faults
from tidegate.call import UNBATCHED, Call, Layer, layer_by_layer
from tidegate.cell import Cell, Options, States
from tidegate.nn import over_time, segments


class _EveryState(torch.nn.Module):
    """A cell's step as a cell whose output is all its states."""

    def __init__(self, cell: Cell, options: Options, weights: dict[str, Any]) -> None:
        super().__init__()
        self.cell, self.options, self.present = cell, options, tuple(weights)
        for name, weight in weights.items():
            setattr(self, name, weight)

    def forward(self, input: Tensor, states: States) -> tuple[States, States]:
        weights = {name: getattr(self, name) for name in self.present}
        gates_x = self.cell.gates_x(input, weights)
        states = self.cell.step(gates_x, states, weights, self.options)
        return states, states


# Of each module its cells' steps: a step that is the same object is not traced again.
_STEPS: WeakKeyDictionary[torch.nn.Module, dict[int, _EveryState]] = WeakKeyDictionary()


def run(
    module: torch.nn.Module, call: Call, find_faults: Callable[[Call], None], every: int
) -> tuple[Tensor, Sequence[Tensor], tuple[Tensor, ...]]:
    """A call with all its states, recorded in segments of `every` steps; 0 to keep everything.

    Returns:
        output and final states, as `ops.run`, and of each state (T, L*D, B, size), unbatched (T, L*D, size): what every
        step left, 0 past a row's length.
    """
    find_faults(call)
    find_our_faults(call)
    found: list[tuple[Tensor, ...]] = []
    steps = _STEPS.setdefault(module, {})

    def run_layer(layer: Layer) -> tuple[Tensor, ...]:
        if len(layer.states) == 1:
            output, final = segments.run(layer.call(), every=every)
            found.append((output,))
            return output, final.squeeze(0)
        step = _step(steps, len(found), layer)
        marks = (layer.lengths, layer.resets, layer.reverse)
        everything, finals = over_time.run(step, layer.input, layer.states, *marks, every=every)
        found.append(everything)
        return (everything[0], *finals)

    output, *finals = layer_by_layer(call, run_layer)
    states = tuple(torch.stack(column, 1) for column in zip(*found, strict=True))
    if call.layout is UNBATCHED:
        states = tuple(state.squeeze(2) for state in states)
    return output, finals, states


def _step(steps: dict[int, _EveryState], k: int, layer: Layer) -> _EveryState:
    known = steps.get(k)
    same = known is not None and known.options == layer.options
    if not same or any(getattr(known, name) is not weight for name, weight in layer.weights.items()):
        steps[k] = _EveryState(layer.cell, layer.options, layer.weights)
    return steps[k]
