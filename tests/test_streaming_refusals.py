# SPDX-License-Identifier: Apache-2.0
"""What a stream refuses, by which words, and that its state is then what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stream_layers import unchanged

import tidegate as tg
from tidegate.backends import backend
from tidegate.cell import Cell


def test_wrong_ways_to_make_one() -> None:
    layer = tg.GRU(5, 7)
    with pytest.raises(ValueError, match="batch_size: expected an integer"):
        layer.stream(-1)
    with pytest.raises(ValueError, match=r"state: expected h .* = \(1, 2, 7\), got \(1, 3, 7\)"):
        layer.stream(2, torch.zeros(1, 3, 7))
    with pytest.raises(ValueError, match=r"state: expected h of torch\.float32"):
        layer.stream(2, torch.zeros(1, 2, 7, dtype=torch.float64))


def test_bidirectional_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="reverse direction begins at a sequence's last step"):
        tg.GRU(5, 7, bidirectional=True).stream(1)


WRONG: dict[str, tuple[Callable[[tg.Stream], Any], str]] = {
    "rows": (
        lambda s: s.step(torch.randn(2, 5)),
        r"input: expected \(batch_size, input_size\) = \(3, 5\), got \(2, 5\)",
    ),
    "features": (lambda s: s.step(torch.randn(3, 4)), r"input: expected .*, got \(3, 4\)"),
    "rank": (lambda s: s.step(torch.randn(5)), r"input: expected .*, got \(5,\)"),
    "dtype": (lambda s: s.step(torch.randn(3, 5).double()), r"input: .*float32, got torch\.float64"),
    "device": (lambda s: s.step(torch.empty(3, 5, device="meta")), "input: .*device cpu, got meta"),
    "kind": (lambda s: s.step([1.0]), "input: expected a tensor .*, got list"),
    "chunk": (lambda s: s.steps(torch.randn(3, 5)), "input: expected a tensor .*, got 2 dimensions"),
    "chunk-rows": (lambda s: s.steps(torch.randn(4, 2, 5)), r"input: expected .* = \(4, 3, 5\), got \(4, 2, 5\)"),
    "chunk-dtype": (lambda s: s.steps(torch.randn(4, 3, 5).double()), r"input: .*got torch\.float64"),
    "state-count": (lambda s: setattr(s, "state", torch.randn(2, 3, 7)), r"state: expected \(h, c\), got Tensor"),
    "state-rows": (
        lambda s: setattr(s, "state", (torch.randn(2, 3, 7), torch.randn(2, 2, 7))),
        r"state: expected c .* = \(2, 3, 7\), got \(2, 2, 7\)",
    ),
    "state-dtype": (
        lambda s: setattr(s, "state", (torch.randn(2, 3, 7), torch.randn(2, 3, 7).double())),
        r"state: expected c of torch\.float32, got torch\.float64",
    ),
    "state-rank": (lambda s: setattr(s, "state", (torch.randn(3, 7),) * 2), "state: expected a tensor of 3 dimensions"),
    "added-rows": (
        lambda s: s.add_rows((torch.randn(2, 2, 7), torch.randn(2, 1, 7))),
        r"rows: expected c .* = \(2, 2, 7\), got \(2, 1, 7\)",
    ),
    "added-negative": (lambda s: s.add_rows(-1), "rows: expected how many to add"),
    "reset-row": (lambda s: s.reset(3), r"rows: expected numbers in 0\.\.2, got 3"),
    "removed-row": (lambda s: s.remove_rows([0, -1]), r"rows: expected numbers in 0\.\.2, got -1"),
    "removed-mask": (lambda s: s.remove_rows(torch.tensor([True])), "rows: expected integers, or a bool mask"),
    "removed-float": (lambda s: s.remove_rows([0.5]), "rows: expected integers"),
    "loaded": (lambda s: s.load(tg.GRU(5, 7, 2).stream(3).save()), "source: expected cell 'lstm', got 'gru'"),
    "loaded-form": (lambda s: s.load(tg.LSTM(5, 7, 2).stream().save()), "source: expected batched True, got False"),
    "loaded-sizes": (lambda s: s.load(tg.LSTM(5, 7).stream(3).save()), r"source: expected h .* = \(2, 3, 7\)"),
    "loaded-other": (lambda s: s.load({"a": 1}), "source: expected format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_leave_the_state_alone(case: str) -> None:
    act, message = WRONG[case]
    stream = tg.LSTM(5, 7, 2).stream(3)
    stream.step(torch.randn(3, 5))
    before = stream.state
    with pytest.raises(ValueError, match=message):
        act(stream)
    unchanged(stream, before, 3)
    stream.step(torch.randn(3, 5))


def test_refresh_refuses_other_sizes() -> None:
    layer = tg.GRU(5, 7)
    stream = layer.stream(1)
    layer.weight_ih_l0 = torch.nn.Parameter(torch.randn(21, 6))
    with pytest.raises(ValueError, match="refresh: expected input of 5"):
        stream.refresh()
    stream.step(torch.randn(1, 5))


def test_a_failure_in_mid_step_leaves_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend("reference"):
        stream = tg.LSTM(5, 7, 3).stream(2)
    stream.step(torch.randn(2, 5))
    before, count = stream.state, 0
    product = Cell.gates_x

    def fail_at_the_last_layer(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("planted")
        return product(*arguments, **options)

    monkeypatch.setattr(Cell, "gates_x", fail_at_the_last_layer)
    for act in (lambda: stream.step(torch.randn(2, 5)), lambda: stream.steps(torch.randn(4, 2, 5))):
        count = 0
        with pytest.raises(RuntimeError, match="planted"):
            act()
        unchanged(stream, before, 2)
