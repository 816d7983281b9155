# SPDX-License-Identifier: Apache-2.0
"""int8 and bfloat16 weights: the arithmetic, in torch's operations, that every backend of it has to give.

A matrix is quantized row by row, symmetrically: w = q s with s = max|w| / 127 and q in -127..127. What it multiplies is
quantized as it comes, with one scale for all its numbers: x = p t with t = max|x| / 127. Sums of q p are exact
integers; then y = (sum q p) (s t). Rounding is to nearest, halves to even. What is nowhere above 2^-100 counts as
zeros: 127 / max|x| would leave float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 127
SMALLEST = 2.0**-100


class Quantized(NamedTuple):
    """A matrix (..., rows, columns).

    Attributes:
        numbers: int8, of its shape.
        scales: float32 (..., rows); of a row of zeros 0.
    """

    numbers: Tensor
    scales: Tensor

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Quantized, ...]:
        """Its rows, the first dimension of a matrix, in parts, as a tensor's `split`."""
        assert dim == 0
        parts = zip(self.numbers.split(sizes), self.scales.split(sizes), strict=True)
        return tuple(Quantized(*part) for part in parts)


def quantize_rows(weight: Tensor) -> Quantized:
    """A matrix (..., rows, columns), each row with a scale of its own."""
    numbers, scales = _quantize(weight.float())
    return Quantized(numbers.to(torch.int8), scales)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1)
    factor = torch.where(largest > SMALLEST, LARGEST / largest, 0.0)
    return torch.round(x * factor.unsqueeze(-1)), largest / LARGEST


def product(x: Tensor, weight: Quantized) -> Tensor:
    """x (..., columns), each row quantized as it comes, by a matrix (rows, columns): float32 (..., rows)."""
    numbers, scale = _quantize(x.float())
    # Sums below 2^53 are exact in float64.
    sums = torch.matmul(numbers.double(), weight.numbers.double().t()).float()
    return sums * (weight.scales * scale.unsqueeze(-1))


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by a matrix (rows, columns) as it is stored: in x's dtype, in bfloat16 beside a float32 x, or int8."""
    if isinstance(weight, Quantized):
        y = product(x, weight)
        return y if bias is None else y + bias
    if x.dtype is torch.float32 and weight.dtype is torch.bfloat16:
        weight = weight.float()
    return F.linear(x, weight, bias)
