# SPDX-License-Identifier: Apache-2.0
"""What bounds a call on this machine: the arithmetic of its matrix products, or reading its weights step after step.

Both rates are measured here, by torch's own operators at the threads in use. A call that is far from the higher of the
two bounds is held up by something else: calls, barriers, the gates' functions. Beside them stands what no product can
exceed: the rate of the processor's multiply-adds alone, by tidegate's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tidegate.cli.bench.shapes import Case
from tidegate.cli.bench.timing import local_slice
from tidegate.kernels import cpu

_FMA_ROUNDS = 200_000  # about a millisecond

# A sum over a buffer that is expanded this often reads it as often in one call, which hides what the call costs.
_READS = 32
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Bound:
    """The higher of a call's two lower bounds: "gemm" or "read", and its share of the time that was measured."""

    name: str
    share: float


class Limits:
    """This machine's rates, each measured when it is first asked for."""

    def __init__(self) -> None:
        self.gemm_flops: dict[str, float] = {}
        self.fma_flops: dict[str, float | None] = {}
        self.read_bytes: dict[int, float] = {}

    def bound(self, case: Case, seconds: float) -> Bound:
        """Of one call that took `seconds`."""
        arithmetic = case.flops / self.gemm_rate(case.dtype)
        reading = case.weight_bytes / self.read_rate(case.reread_bytes)
        name, least = ("gemm", arithmetic) if arithmetic > reading else ("read", reading)
        return Bound(name, least / seconds)

    def fma_share(self, case: Case, seconds: float) -> float | None:
        """Of the multiply-adds that the processor could have done in `seconds`, those of one call's products."""
        rate = self.fma_rate(case.dtype)
        return None if rate is None else case.flops / rate / seconds

    def fma_rate(self, dtype: str) -> float | None:
        """Multiplications and additions of registers alone, in flop/s; None where the kernels are not installed."""
        if dtype not in self.fma_flops:
            if cpu.availability():
                self.fma_flops[dtype] = None
                return None
            like = torch.empty(0, dtype=getattr(torch, dtype))
            flops = cpu.operators().multiply_adds(like, _FMA_ROUNDS)
            seconds = _least_seconds(lambda: cpu.operators().multiply_adds(like, _FMA_ROUNDS))
            self.fma_flops[dtype] = flops / seconds
        return self.fma_flops[dtype]

    def gemm_rate(self, dtype: str) -> float:
        """The matrix product of two squares, in flop/s."""
        if dtype not in self.gemm_flops:
            size = 1024
            left, right = torch.randn(2, size, size).to(getattr(torch, dtype))
            self.gemm_flops[dtype] = 2 * size**3 / _least_seconds(lambda: torch.mm(left, right))
        return self.gemm_flops[dtype]

    def read_rate(self, size: int) -> float:
        """Bytes a second, reading a buffer of `size` bytes over and over: from the smallest cache that holds it."""
        if size not in self.read_bytes:
            elements = max(1, size // _FLOAT32_BYTES)
            repeated = torch.randn(elements).expand(_READS, elements)
            self.read_bytes[size] = _READS * elements * _FLOAT32_BYTES / _least_seconds(repeated.sum)
        return self.read_bytes[size]


def _least_seconds(call: Callable[[], object]) -> float:
    """The best of many short slices: a machine's rate is what it does when nothing disturbs it."""
    run = local_slice(call)
    run(0.03)
    return min(run(0.003) for _ in range(50))
