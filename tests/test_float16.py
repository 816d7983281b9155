# SPDX-License-Identifier: Apache-2.0
"""float16 in the compiled kernels, beside what every dtype's tests say: its conversions on each instruction set."""

from __future__ import annotations

from collections.abc import Generator

import needs
import pytest
import torch
from torch import Tensor

import tidegate as tg
from tidegate.kernels import cpu

pytestmark = [needs.compiled_operators, pytest.mark.usefixtures("poisoned_buffers")]


@pytest.fixture(params=needs.ISAS)
def _isa(request: pytest.FixtureRequest) -> Generator[None]:
    cpu.operators().use_isa(request.param)
    yield
    cpu.operators().use_isa("")


def every_float16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("hyperbolic", [False, True], ids=["sigmoid", "tanh"])
def test_every_number_is_read_and_rounded(hyperbolic: bool) -> None:
    x = every_float16()
    found = cpu.operators().activate(x, hyperbolic)
    exact = (torch.tanh if hyperbolic else torch.sigmoid)(x.double())
    assert torch.equal(found.isnan(), x.isnan())
    numbers = ~x.isnan()
    unit = exact.abs().clamp(min=2**-14).log2().floor().exp2() * 2**-10
    error = ((found.double() - exact) / unit).abs()[numbers].max().item()
    assert error <= 0.5 + 4 * 2**-13  # half a unit, and what float32's own error is of one


@pytest.mark.usefixtures("_isa")
def test_sums_are_rounded_to_nearest_even() -> None:
    """By an RNN's relu of x + b: through denormals, halves of a unit and past the largest."""
    generator = torch.Generator().manual_seed(0)
    halves = every_float16()
    x = halves[halves.isfinite()]
    b = x[torch.randperm(x.numel(), generator=generator)]
    near = torch.randint(0, 2**15 - 2**10, (2**12,), generator=generator).to(torch.int16).view(torch.float16)
    ulps = near.float() * 2**-11  # half a unit, which falls to the even one
    x, b = torch.cat([x, near, torch.full((99,), 65504.0).half()]), torch.cat([b, ulps.half(), torch.arange(99).half()])
    cell = tg.RNNCell(2, 1, bias=False, nonlinearity="relu", dtype=torch.float16)
    with torch.no_grad(), tg.backend("cpu"):
        cell.weight_ih.fill_(1)
        found = cell(torch.stack([x, b], 1)).squeeze(1)
    assert torch.equal(found, (x.float() + b.float()).relu().half())
    assert found.isinf().any()
    assert ((found > 0) & (found < torch.finfo(torch.float16).smallest_normal)).any()
