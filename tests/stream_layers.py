# SPDX-License-Identifier: Apache-2.0
"""What the tests of streams share: every layer that has a stream, and how their states are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tidegate as tg

LAYERS: dict[str, Callable[..., Any]] = {
    "rnn-tanh": lambda *sizes, **options: tg.RNN(*sizes, **options),
    "rnn-relu": lambda *sizes, **options: tg.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": lambda *sizes, **options: tg.LSTM(*sizes, **options),
    "lstm-proj": lambda *sizes, **options: tg.LSTM(*sizes, proj_size=3, **options),
    "gru": lambda *sizes, **options: tg.GRU(*sizes, **options),
    "gru-reset-before": lambda *sizes, **options: tg.GRU(*sizes, reset_after=False, **options),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def as_tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def close(a: Any, b: Any, floor: float = 2.5e-7) -> None:
    """By default float32 whose sums are taken in another order: 1.3e-7 apart at most, on every instruction set."""
    torch.testing.assert_close(a, b, rtol=0, atol=floor)


def unchanged(stream: tg.Stream, before: Any, rows: int) -> None:
    assert stream.rows == rows
    for now, then in zip(as_tuple(stream.state), as_tuple(before), strict=True):
        assert torch.equal(now, then)
