# SPDX-License-Identifier: Apache-2.0
"""What torch's composed operations are traced as."""

from __future__ import annotations

from functools import cache
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
    batch_norm = found[aten.native_batch_norm.default]

    def batch_norm_of_kept_statistics(*given: Any) -> Any:
        is_training = given[5]
        return NotImplemented if is_training else batch_norm(*given)

    found[aten.native_batch_norm.default] = batch_norm_of_kept_statistics
    found[aten.native_group_norm.default] = _group_norm
    # In front of the rows it would become a concatenation of rows.
    found.pop(aten.stack.default, None)
    return found


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
