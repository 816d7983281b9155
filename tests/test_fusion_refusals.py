# SPDX-License-Identifier: Apache-2.0
"""Cells that are not fused: what is said, the line that it names, and that the loop's results come."""

from __future__ import annotations

import random
from typing import Any

import needs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusing import B, Gate, H, T, randn, run
from torch import Tensor, nn

import tidegate as tg
from tidegate import fusion

pytestmark = needs.compiled_operators


def looks_at_values(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + h) if h.sum() > 0 else x + h


def draws(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + h) * torch.rand_like(h)


def drops(x: Tensor, h: Tensor) -> Tensor:
    return F.dropout(torch.tanh(x + h), 0.5)


def normalizes_the_batch(x: Tensor, h: Tensor) -> Tensor:
    return F.batch_norm(x + h, None, None, training=True)


def mixes(x: Tensor, h: Tensor) -> Tensor:
    return h + x - x.mean(0)


def shifts_rows(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(h.roll(1, 0) + x)


def pairs_rows(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh((h @ h.T) @ x)


def counts_rows(x: Tensor, h: Tensor) -> Tensor:
    return h * 0.1 + x / x.shape[0]


def branches_on_rows(x: Tensor, h: Tensor) -> Tensor:
    return h * 0.1 + x if x.shape[0] > 2 else h


def sorts(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(h + x).sort(-1)[0]


def changes_dtype(x: Tensor, h: Tensor) -> Tensor:
    return (h * 0.1 + x).float()


def changes_its_state(x: Tensor, h: Tensor) -> Tensor:
    h.mul_(0.5)
    return h + x


REFUSED = {
    looks_at_values: "looks at values",
    draws: "rand_like draws random numbers",
    drops: "draws random numbers",
    normalizes_the_batch: "native_batch_norm mixes the rows",
    mixes: "mean mixes the rows",
    shifts_rows: "how many rows there are",
    pairs_rows: "pairs rows with rows",
    counts_rows: "how many rows there are",
    branches_on_rows: "how many rows there are",
    sorts: "sort has no instruction",
    changes_dtype: "becomes one of",
}


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.__name__)
def test_a_refusal_names_the_operation_and_the_line(cell):
    with pytest.raises(tg.UnsupportedError, match=REFUSED[cell]) as raised:
        run(cell)
    assert f"test_fusion_refusals.py:{cell.__code__.co_firstlineno + 1}: return" in str(raised.value)


@pytest.mark.parametrize("cell", [*REFUSED, changes_its_state], ids=lambda cell: cell.__name__)
def test_what_is_refused_is_looped(cell):
    torch.manual_seed(1)
    x, h = randn(T, B, H), randn(B, H)
    torch.manual_seed(2)
    found = run(cell, h.clone(), x, fuse=None) if cell is not changes_dtype else None
    torch.manual_seed(2)
    expected = run(cell, h.clone(), x, fuse=False) if cell is not changes_dtype else None
    if found is not None and expected is not None:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Draws(nn.Module):
    def __init__(self, draw: Any, told_by: str) -> None:
        super().__init__()
        self.draw = draw
        setattr(self, told_by, H)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + h) * self.draw(h)


DRAWS = {
    "torch": torch.rand_like,
    "dropout": lambda h: F.dropout(torch.ones_like(h)),
    "a number of torch": lambda h: float(torch.rand(())),
    "Python": lambda h: random.random(),
    "NumPy": lambda h: float(np.random.rand()),
}


@pytest.mark.parametrize("told_by", ["state_size", "hidden_size"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_first_call_draws_what_the_loop_draws(draw, told_by):
    def drawn(fuse: bool | None, cell: nn.Module) -> list[Tensor]:
        x = randn(B, T, H)
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        y, _ = tg.dynamic_rnn(cell, x, fuse=fuse)
        return [y / torch.tanh(x), torch.rand(3), torch.tensor([random.random(), np.random.rand()])]

    torch.manual_seed(0)
    expected = drawn(False, Draws(draw, "state_size"))
    cell = Draws(draw, told_by)
    for _ in range(2):
        torch.manual_seed(0)
        for a, b in zip(drawn(None, cell), expected, strict=True):
            assert torch.equal(a, b)


def test_a_cell_that_changes_what_it_keeps():
    class Buffer(Gate):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.mask += 1
            return super().forward(x, h)

    cell = Buffer()
    before = cell.mask.clone()
    with pytest.raises(tg.UnsupportedError, match="changes a tensor that the cell keeps"):
        run(cell)
    assert torch.equal(cell.mask, before)


def test_a_cell_that_counts_its_steps_is_traced_once_and_looped():
    calls = []

    class Counts(Gate):
        steps = 0

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.steps += 1
            calls.append(type(x))
            return super().forward(x, h)

    cell = Counts()
    with pytest.raises(tg.UnsupportedError, match="sets attributes of its own"):
        run(cell)
    assert cell.steps == 0  # a trace leaves nothing behind
    traced = len(calls)
    run(cell, fuse=None)
    assert (cell.steps, len(calls)) == (T, traced + T)


@pytest.mark.parametrize("matters", [False, True])
def test_a_flag_that_is_set_once(matters):
    class Flagged(Gate):
        was_called = False

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            if matters and not self.was_called:
                x = 2 * x
            self.was_called = True
            return super().forward(x, h)

    x, h = randn(T, B, H), randn(B, H)
    cell = Flagged()
    reasons, _ = fusion.run(cell, x, h, None, None, None, False, False)
    assert reasons == (("the step sets attributes of its own, and then does something else",) if matters else ())
    cell.was_called = False
    expected = run(cell, h, x, fuse=False)
    cell.was_called = False
    for a, b in zip(run(cell, h, x, fuse=None), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert cell.was_called


def test_a_trace_leaves_a_functions_lists_as_they_were():
    seen: list[Tensor] = []

    def cell(x: Tensor, h: Tensor) -> Tensor:
        seen.append(x)
        return torch.tanh(x + h)

    run(cell, fuse=None)
    assert len(seen) == T


def test_wrong_result_structures_are_the_loops_error():
    with pytest.raises(ValueError, match=r"cell: expected \(y_t, state\) or state"):
        run(lambda x, h: (h, h, h), fuse=None)
