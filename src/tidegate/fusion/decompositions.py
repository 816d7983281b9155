# SPDX-License-Identifier: Apache-2.0
"""What torch's composed operations are traced as."""

from __future__ import annotations

from functools import cache
from math import inf
from typing import Any

import torch
from torch import Tensor


@cache
def decompositions() -> dict[Any, Any]:
    """Of each operation that is none of the basic ones, a function of the same meaning in these."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    aten: Any = torch.ops.aten
    found: Any = dict(core_aten_decompositions())
    found |= get_decompositions([aten.linalg_vector_norm, aten.native_batch_norm])
    batch_norm, vector_norm = found[aten.native_batch_norm.default], found[aten.linalg_vector_norm.default]

    def batch_norm_of_kept_statistics(*given: Any) -> Any:
        is_training = given[5]
        return NotImplemented if is_training else batch_norm(*given)

    def norm(x: Tensor, order: float = 2, *dims: Any, **named: Any) -> Any:
        if order == 2:
            return _root(vector_norm(x * x, 1, *dims, **named))
        return vector_norm(x, order, *dims, **named) if order in (1, inf) else NotImplemented

    def deviation(*given: Any, **named: Any) -> Tensor:
        return _root(torch.var(*given, **named))

    found[aten.linalg_vector_norm.default] = norm
    found[aten.std.correction] = deviation
    found[aten.native_batch_norm.default] = batch_norm_of_kept_statistics
    found[aten.native_group_norm.default] = _group_norm
    # In front of the rows a stack would become a concatenation of rows; the others' gradients would be off at bounds.
    for kept in (aten.stack, aten.hardtanh, aten.hardsigmoid, aten.hardswish, aten.elu):
        found.pop(kept.default, None)
    return found


def _root(square: Tensor) -> Tensor:
    """Of a sum of squares: where that is 0 its gradient is 0, too, as torch has it for a norm and a deviation."""
    is_zero = square == 0
    return torch.where(is_zero, 0, torch.sqrt(torch.where(is_zero, 1, square)))


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, rest: int, groups: int, epsilon: float
) -> tuple[Tensor, ...]:
    grouped = x.reshape(n, groups, channels // groups * rest)
    result, *statistics = torch.native_layer_norm(grouped, grouped.shape[2:], None, None, epsilon)
    result = result.reshape(x.shape)
    of_channels = (channels, *(1,) * (x.dim() - 2))
    if weight is not None:
        result = result * weight.view(of_channels)
    if bias is not None:
        result = result + bias.view(of_channels)
    return result, *statistics
