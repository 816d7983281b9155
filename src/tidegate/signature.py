# SPDX-License-Identifier: Apache-2.0
"""The operators' signatures, derived from what a cell is: `torch.ops.tidegate.<cell>` and `<cell>_backward`.

Arguments of both: input, states, weights, lengths, resets, reverse, options (these describe a `Layer`), backend; then
for the forward `save`, for the backward output, saved, grad_output, gradients of the final states, `needs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tidegate.call import Layer
from tidegate.cell import Cell

_SCHEMA_TYPES = {bool: "bool", str: "str", float: "float"}


def schemas(cell: Cell) -> tuple[str, str]:
    """The forward's and the backward's."""
    states = "".join(f"Tensor {state}_0, " for state in cell.states)
    weights = "".join(f"Tensor{'?' * bool(p.when)} {name}, " for name, p in cell.parameters.items())
    options = "".join(f"{_SCHEMA_TYPES[kind]} {name}, " for name, (kind, _) in cell.options.items())
    call = f"Tensor input, {states}{weights}Tensor? lengths, Tensor? resets, bool reverse, {options}str backend"
    finals = "".join(f"Tensor {state}_n, " for state in cell.states)
    gradients = "".join(f", Tensor? grad_{state}_n" for state in cell.states)
    forward = f"{cell.name}({call}, bool save) -> (Tensor output, {finals}Tensor saved)"
    extra = f"Tensor output, Tensor saved, Tensor? grad_output{gradients}, bool[] needs"
    returned = ", ".join(["Tensor"] * tensor_count(cell))
    return forward, f"{cell.name}_backward({call}, {extra}) -> ({returned})"


def forward_operator(cell: Cell) -> Any:
    return getattr(torch.ops.tidegate, cell.name).default


def backward_operator(cell: Cell) -> Any:
    return getattr(torch.ops.tidegate, cell.name + "_backward").default


def tensor_count(cell: Cell) -> int:
    """How many of the arguments, from the first, a gradient may be asked of."""
    return 1 + len(cell.states) + len(cell.parameters)


def arity(cell: Cell) -> int:
    """How many of the arguments, from the first, describe the layer."""
    return tensor_count(cell) + 3 + len(cell.options)


def arguments(layer: Layer) -> tuple[Any, ...]:
    """The arguments that describe `layer`."""
    # Written out: torch 2.10's compiler cannot follow a property of a NamedTuple that returns a tuple.
    tensors = (layer.input, *layer.states, *layer.weights.values())
    return (*tensors, layer.lengths, layer.resets, *constants(layer))


def constants(layer: Layer) -> tuple[Any, ...]:
    """Those of them that are no tensors."""
    return (layer.reverse, *layer.options.values())


def read(cell: Cell, values: Sequence[Any]) -> tuple[Layer, Sequence[Any]]:
    """The layer that an operator's arguments describe, and the arguments that follow: the inverse of `arguments`."""
    states, tensors, end = 1 + len(cell.states), tensor_count(cell), arity(cell)
    weights = dict(zip(cell.parameters, values[states:tensors], strict=True))
    options = dict(zip(cell.options, values[tensors + 3 : end], strict=True))
    lengths, resets, reverse = values[tensors : tensors + 3]
    return Layer(cell, values[0], tuple(values[1:states]), weights, lengths, resets, reverse, options), values[end:]
