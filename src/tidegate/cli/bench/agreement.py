# SPDX-License-Identifier: Apache-2.0
"""Whether a contender computes what torch.nn computes, asked before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# float32: hundreds of steps, summed in another order. float16 and bfloat16: rounded at every layer, and in another
# place than the oracle's. Wrong gates or weights are off by far more.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class BenchError(RuntimeError):
    """A contender's results are not torch.nn's: its time would mean nothing."""


def oracle_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which torch.nn computes what is expected: in bfloat16 it rounds between the operations of a step itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def find_difference(
    expected: Sequence[Tensor], found: Sequence[Any], dtype: torch.dtype, whose: str = "torch.nn"
) -> str | None:
    """What is wrong with `found`, computed in `dtype`, or None. `whose` the expected results are."""
    if len(expected) != len(found):
        return f"expected {len(expected)} results, got {len(found)}"
    allowed = TOLERANCES[dtype]
    for position, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        if wanted.numel() != got.numel():
            return f"result {position}: expected {tuple(wanted.shape)}, got {tuple(got.shape)}"
        apart = relative_difference(wanted, got.view(wanted.shape))
        if not apart <= allowed:  # NaN is no agreement either
            return f"result {position} is {apart:.1e} away from {whose}'s, more than {allowed:.0e}"
    return None


def relative_difference(wanted: Tensor, got: Tensor) -> float:
    """The largest absolute difference, in units of the largest value wanted where that is above 1; 0 of no elements."""
    if wanted.numel() == 0:
        return 0.0
    return float((wanted.double() - got.double()).abs().max()) / max(1.0, float(wanted.abs().max()))
