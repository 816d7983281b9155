# SPDX-License-Identifier: Apache-2.0
"""Under torch.autocast: torch.nn's result dtypes, and results near the float32 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tidegate as tg

MODULES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]


def pair(name: str) -> tuple[Any, Any, torch.Tensor]:
    modules = []
    for home in (torch.nn, tg):
        torch.manual_seed(0)
        modules.append(getattr(home, name)(8, 16))
    return *modules, torch.rand((3, 8) if name.endswith("Cell") else (5, 3, 8))


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_results_have_torch_nn_dtypes_and_values(name: str) -> None:
    theirs, ours, x = pair(name)
    exact = flat(ours(x))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = flat(theirs(x)), flat(ours(x))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    for ours_low, theirs_low, full in zip(found, expected, exact, strict=True):
        # Twice torch.nn's own error, and one rounding of values below 1 to bfloat16's 8 bits.
        bound = 2 * (theirs_low.float() - full).abs().max() + 2**-8
        assert (ours_low.float() - full).abs().max() <= bound


@pytest.mark.parametrize("name", MODULES)
def test_gradients_reach_the_float32_parameters(name: str) -> None:
    _, ours, x = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        flat(ours(x))[0].float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


def test_float64_is_left_alone() -> None:
    layer = tg.GRU(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(2, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
