# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations for torch.utils.flop_counter: those of the products, as for torch's own operators.

Letters: T time, B batch. Lengths are values, not shapes: every row counts with T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from tidegate import backends, dispatch, signature
from tidegate.cell import Cell

Shape = Sequence[int]
Formulas = dict[Any, Callable[..., int]]

_FORMULAS: Formulas = {}


def register(cell: Cell) -> None:
    """The formulas of a cell's two operators."""
    _FORMULAS[getattr(torch.ops.tidegate, cell.name)] = _forward(cell)
    _FORMULAS[getattr(torch.ops.tidegate, cell.name + "_backward")] = _backward(cell)


def offer() -> None:
    """Hand the formulas to those that count, now and later. To import the counter here would import Triton with it."""
    registries = dispatch.flop_registries()
    if registries:
        formulas = {**_FORMULAS, **_of_streams()}
        for registry in registries:
            registry.update(formulas)


@cache
def _of_streams() -> Formulas:
    return {target: formula for one in backends.BACKENDS for target, formula in one.flops().items()}


def _products(cell: Cell, weights: Sequence[Shape | None], rows: int) -> list[tuple[str, int]]:
    """Of each weight that multiplies, the letter of what it multiplies, and a product's operations for `rows` rows."""
    found: list[tuple[str, int]] = []
    for parameter, shape in zip(cell.parameters.values(), weights, strict=True):
        is_matrix = len(shape or ()) == 2
        found.append((parameter.shape[-1], 2 * rows * prod(shape or ()) if is_matrix else 0))
    return found


def _read(cell: Cell, arguments: Sequence[Any]) -> tuple[int, int, Sequence[Shape | None]]:
    """T, B and the weights' shapes."""
    first, end = 1 + len(cell.states), signature.tensor_count(cell)
    return arguments[0][0], arguments[0][1], arguments[first:end]


def _forward(cell: Cell) -> Callable[..., int]:
    def formula(*arguments: object, **_: object) -> int:
        steps, batch, weights = _read(cell, _shapes(arguments))
        return sum(count for _, count in _products(cell, weights, steps * batch))

    return formula


def _backward(cell: Cell) -> Callable[..., int]:
    def formula(*arguments: Any, **_: Any) -> int:
        steps, batch, weights = _read(cell, _shapes(arguments))
        needs, first = arguments[-1], 1 + len(cell.states)
        total = 0
        products = _products(cell, weights, batch)
        for (letter, count), need in zip(products, needs[first:], strict=True):
            through = steps
            if letter == "I":
                through = steps * needs[0]
            elif letter == cell.states["h"]:  # the first step's reaches h_0 alone
                through = steps - 1 + needs[1] if steps else 0
            total += count * (through + steps * need)
        return total

    return formula


def _shapes(arguments: Sequence[Any]) -> list[Any]:
    return [value.shape if isinstance(value, torch.Tensor) else value for value in arguments]
