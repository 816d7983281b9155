# SPDX-License-Identifier: Apache-2.0
"""The compiled operators below a stream refuse what would make a kernel read or write outside a tensor."""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
from torch import Tensor

import tidegate as tg
from tidegate.call import Layout
from tidegate.kernels import cpu

pytestmark = needs.compiled_operators


GRU, LSTM = 3, 2


REPLACES = 1 << 14  # the states


def form(kind: int, layout: Layout, layers: int = 1, projects: bool = False) -> int:
    return kind + (layout << 4) + (projects << 13) + (layers << 17)


def weights(kind: int = GRU, layers: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of layers with input_size 5 and hidden_size 7."""
    rows = (4 if kind == LSTM else 3) * 7
    sizes = [((rows, 5 if k == 0 else 7), (rows, 7), (rows,), (rows,)) for k in range(layers)]
    return [torch.zeros(size, dtype=dtype) for layer in sizes for size in layer]


def pack(kind: int, given: list[Tensor], layers: int = 1, projects: bool = False) -> Tensor:
    operator = cpu.operators().pack.default
    return operator(form(kind, Layout.UNBATCHED_STEP, layers, projects), *given[:4], given[4:] or None)


def step(packed: Tensor, x: Tensor, h: Tensor, c: Tensor | None = None, kind: int = GRU, layers: int = 1) -> Any:
    layout = Layout.STEP if x.dim() > 1 else Layout.UNBATCHED_STEP
    return cpu.operators().advance.default(form(kind, layout, layers) + REPLACES, packed, x, h, c)


def test_a_step_refuses_what_does_not_fit() -> None:
    h, c, x = torch.zeros(1, 2, 7), torch.zeros(1, 2, 7), torch.zeros(2, 5)
    gru, lstm, two = pack(GRU, weights()), pack(LSTM, weights(LSTM)), pack(GRU, weights(GRU, 2), 2)
    step(gru, x, h)
    step(lstm, x, h, c, LSTM)
    step(two, x, torch.zeros(2, 2, 7), None, GRU, 2)
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
        (gru, x, h, c),
        (gru, x.int(), h.int()),
        (gru, x, h, None, LSTM),
        (two, x, h),
        (gru, x, torch.zeros(2, 2, 7), None, GRU, 2),
        (lstm, x, h, c[:, :1], LSTM),
        (lstm, x, h, c.double(), LSTM),
    ]
    for number, case in enumerate(cases):
        with pytest.raises(RuntimeError, match="expected"):
            pytest.fail(f"case {number} was taken: {step(*case)}")


def test_no_header_is_trusted() -> None:
    """Whatever stands in the 64 bytes before the weights: refused, or no byte outside of them is read."""
    packed, h, x = pack(GRU, weights()), torch.zeros(1, 2, 7), torch.zeros(2, 5)
    for place in range(16):
        for value in (0, 1, -1, 2**31 - 1, -(2**31), 8, 6, 1 << 20):
            crafted = packed.clone()
            before = crafted.view(torch.int32)[place].item()
            crafted.view(torch.int32)[place] = value
            if value != before:
                with pytest.raises(RuntimeError, match="expected"):
                    pytest.fail(f"word {place} = {value} was taken: {step(crafted, x, h)}")


def test_pack_refuses_what_does_not_fit() -> None:
    good = weights()
    cases: list[tuple[Any, ...]] = [
        (5, good),
        (GRU, [*good, good[0]]),
        (GRU, good, 2),
        (GRU, [*good, torch.zeros(7, 7)], 1, True),
        (LSTM, good),
        (GRU, [good[0][:, :4].t(), *good[1:]]),
        (GRU, [good[0], good[1].double(), *good[2:]]),
        (GRU, [good[0], good[1][:, :6].contiguous(), *good[2:]]),
        (GRU, [good[0], good[1][0], *good[2:]]),
        (GRU, [*good[:3], good[3][:-1]]),
        (GRU, [tensor.int() for tensor in good]),
        (LSTM, [*weights(LSTM), torch.zeros(6, 7)], 1, True),
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
    cpu.operators().use_isa("avx512_bf16")  # which the environment may have ruled out
    try:
        with pytest.raises(RuntimeError, match="dtype"):
            step(pack(GRU, weights()), torch.zeros(2, 5).bfloat16(), torch.zeros(1, 2, 7).bfloat16())
    finally:
        cpu.operators().use_isa("")
