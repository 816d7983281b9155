# SPDX-License-Identifier: Apache-2.0
"""The operators' batching rules for vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tidegate import signature
from tidegate.cell import Cell

Rule = Callable[..., tuple[tuple[Tensor, ...], tuple["int | None", ...]]]


def one_by_one(operator: Any) -> Rule:
    """Run the operator on each example."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        def example(k: int) -> tuple[Any, ...]:
            pairs = zip(arguments, in_dims, strict=True)
            return operator(*(value.select(dim, k) if isinstance(dim, int) else value for value, dim in pairs))

        results = zip(*(example(k) for k in range(info.batch_size)), strict=True)
        stacked = tuple(torch.stack(column) for column in results)
        return stacked, (0,) * len(stacked)

    return rule


def folded(cell: Cell) -> Rule:
    """Fold the examples of the forward into its batch where the weights are common to them; else one by one."""
    operator = signature.forward_operator(cell)
    first_weight, count = 1 + len(cell.states), signature.tensor_count(cell)
    # Where B stands: input (T, B, I), states (B, .), lengths (B,), resets (T, B).
    batch_dims = {0: 1, **dict.fromkeys(range(1, first_weight), 0), count: 0, count + 1: 1}
    result_dims = (1,) + (0,) * len(cell.states)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        if arguments[-1] or any(dim is not None for dim in in_dims[first_weight:count]):
            return one_by_one(operator)(info, in_dims, *arguments)
        values = list(arguments)
        for place, batch_dim in batch_dims.items():
            if arguments[place] is not None:
                values[place] = _fold(arguments[place], in_dims[place], batch_dim, info.batch_size)
        *outputs, saved = operator(*values)
        pairs = zip(outputs, result_dims, strict=True)
        examples = tuple(output.unflatten(dim, (info.batch_size, -1)) for output, dim in pairs)
        return (*examples, saved), (*result_dims, None)

    return rule


def _fold(tensor: Tensor, vmap_dim: int | None, batch_dim: int, size: int) -> Tensor:
    front = tensor.expand(size, *tensor.shape) if vmap_dim is None else tensor.movedim(vmap_dim, 0)
    return front.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)
