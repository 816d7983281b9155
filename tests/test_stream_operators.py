# SPDX-License-Identifier: Apache-2.0
"""The compiled operators below a stream refuse what would make a kernel read or write outside a tensor."""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
from torch import Tensor

import tidegate as tg
from tidegate.kernels import cpu

pytestmark = needs.compiled_operators


def weights(kind: int = 3, layers: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of layers with input_size 5 and hidden_size 7."""
    rows = (4 if kind == 2 else 3) * 7
    sizes = [((rows, 5 if k == 0 else 7), (rows, 7), (rows,), (rows,)) for k in range(layers)]
    return [torch.zeros(size, dtype=dtype) for layer in sizes for size in layer]


def test_a_step_refuses_what_does_not_fit() -> None:
    pack, step = cpu.operators().pack.default, cpu.operators().step.default
    h, c, x = torch.zeros(1, 2, 7), torch.zeros(1, 2, 7), torch.zeros(2, 5)
    gru, lstm, two = (
        pack(3, weights(), True, False),
        pack(2, weights(2), True, False),
        pack(3, weights(3, 2), True, False),
    )
    step(gru, x, h)
    step(lstm, x, h, c)
    step(two, x, torch.zeros(2, 2, 7))
    cases: list[tuple[Any, ...]] = [
        (gru[1:], x, h),
        (gru[:-1], x, h),
        (gru.view(1, -1), x, h),
        (gru.double(), x, h),
        (torch.zeros(0), x, h),
        (torch.zeros_like(gru), x, h),
        (gru, x[:1], h),
        (gru, x[0], h),
        (gru, x.unsqueeze(0), h),
        (gru, x.double(), h),
        (gru, x[:, :4], h),
        (gru, x, h[0]),
        (gru, x, h.double()),
        (gru, x, h[:, :, :6]),
        (gru, x, torch.zeros(2, 2, 7)),
        (gru, x, torch.zeros(2, 7, 1).permute(2, 0, 1).transpose(1, 2).contiguous()),
        (gru, x, h, c),
        (gru, x.half(), h.half()),
        (lstm, x, h),
        (lstm, x, h, c[:, :1]),
        (lstm, x, h, c.double()),
    ]
    for number, case in enumerate(cases):
        with pytest.raises(RuntimeError, match="expected"):
            pytest.fail(f"case {number} was taken: {step(*case)}")


def test_pack_refuses_what_does_not_fit() -> None:
    pack = cpu.operators().pack.default
    good = weights()
    cases: list[tuple[int, list[Tensor], bool, bool]] = [
        (5, good, True, False),
        (3, good[:3], True, False),
        (3, good, True, True),
        (2, good, True, False),
        (3, [good[0][:, :4].t(), *good[1:]], True, False),
        (3, [good[0], good[1].double(), *good[2:]], True, False),
        (3, [good[0], good[1][:, :6].contiguous(), *good[2:]], True, False),
        (3, [good[0], good[1][0], *good[2:]], True, False),
        (3, [*good[:3], good[3][:-1]], True, False),
        (3, [tensor.half() for tensor in good], True, False),
        (2, [*weights(2), torch.zeros(6, 7)], True, True),
    ]
    for number, case in enumerate(cases):
        with pytest.raises(RuntimeError, match="expected"):
            pytest.fail(f"case {number} was taken: {pack(*case)}")


@pytest.mark.parametrize(
    ("packed_for", "run_by", "dtype", "fits"),
    [
        pytest.param(*case, marks=needs.instruction_sets(*case[:2]))
        for case in (
            ("avx2", "baseline", torch.float32, False),
            ("avx512", "avx512_bf16", torch.float32, True),
            ("avx512", "avx512_bf16", torch.bfloat16, False),
            ("avx512_bf16", "avx512", torch.bfloat16, False),
        )
    ],
)
def test_weights_packed_for_another_instruction_set_are_refused(
    packed_for: str, run_by: str, dtype: torch.dtype, fits: bool
) -> None:
    operators = cpu.operators()
    try:
        operators.use_isa(packed_for)
        stream, x = tg.GRU(5, 7, dtype=dtype).stream(1), torch.zeros(1, 5, dtype=dtype)
        operators.use_isa(run_by)
        if fits:
            stream.step(x)
            return
        with pytest.raises(RuntimeError, match="instruction set"):
            stream.step(x)
        stream.refresh()
        stream.step(x)
    finally:
        operators.use_isa("")


@needs.instruction_sets("avx512_bf16")
def test_weights_packed_for_another_dtype_are_refused() -> None:
    packed = cpu.operators().pack.default(3, weights(), True, False)
    with pytest.raises(RuntimeError, match="dtype"):
        cpu.operators().step.default(packed, torch.zeros(2, 5).bfloat16(), torch.zeros(1, 2, 7).bfloat16())
