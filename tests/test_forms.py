# SPDX-License-Identifier: Apache-2.0
"""The forms a batch comes in: packed, list, nested; each gives the same form back, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import BACKENDS, LAYERS, assert_same, outcome, randn, state_for, tensors_in, twins
from tolerances import assert_equal_f64
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

import tidegate as tg

LENGTHS = (3, 7, 1, 5)


def _rows(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [randn(length, 3, seed=k) for k, length in enumerate(lengths)]


def _nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_unsorted_with_a_state(kind, backend):
    theirs, ours = twins(kind, 3, 5, num_layers=2, bidirectional=True)
    rows, hx = _rows(), state_for(ours, 4)
    inputs = {f"row {k}": row for k, row in enumerate(rows)} | {f"hx {k}": h for k, h in enumerate(tensors_in(hx))}

    def run(layer: Any) -> Any:
        return layer(pack_sequence(rows, enforce_sorted=False), hx)

    with tg.backend(backend):
        assert_same(outcome(ours, lambda: run(ours), inputs), outcome(theirs, lambda: run(theirs), inputs))
        output, _ = run(ours)
    expected, _ = run(theirs)
    assert isinstance(output, PackedSequence)
    for ours_part, theirs_part in zip(output[1:], expected[1:], strict=True):
        assert torch.equal(ours_part, theirs_part)


def test_packed_sorted_keeps_no_indices():
    theirs, ours = twins("GRU", 3, 5)
    packed = pack_padded_sequence(randn(7, 2, 3), torch.tensor([7, 2]))
    output, _ = ours(packed)
    expected, _ = theirs(packed)
    assert output.sorted_indices is None
    assert output.unsorted_indices is None
    assert torch.equal(output.batch_sizes, expected.batch_sizes)
    assert_equal_f64(output.data, expected.data)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_list_gives_a_list(kind, batch_first):
    """A row of no steps among them: an empty output, and the initial state."""
    _, layer = twins(kind, 3, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    rows, hx = _rows((3, 0, 7)), state_for(layer, 3)
    output, state = layer(rows, hx)
    assert isinstance(output, list)
    assert [tuple(row.shape) for row in output] == [(3, 10), (0, 10), (7, 10)]
    padded = pad_sequence(rows, batch_first)
    expected, expected_state = layer(padded, hx, lengths=torch.tensor([3, 0, 7]))
    for k, row in enumerate(output):
        assert_equal_f64(row, (expected if batch_first else expected.transpose(0, 1))[k, : len(row)])
    for final, wanted, initial in zip(*map(tensors_in, (state, expected_state, hx)), strict=True):
        assert_equal_f64(final, wanted)
        assert_equal_f64(final[:, 1], initial[:, 1])


def test_list_of_nothing_but_empty_rows():
    _, layer = twins("LSTM", 3, 5)
    hx = state_for(layer, 2)
    output, state = layer(_rows((0, 0)), hx)
    assert [tuple(row.shape) for row in output] == [(0, 5), (0, 5)]
    for final, initial in zip(tensors_in(state), tensors_in(hx), strict=True):
        assert_equal_f64(final, initial)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_nested_gives_a_nested_tensor(kind, batch_first):
    _, layer = twins(kind, 3, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    rows, hx = _rows(), state_for(layer, 4)
    nested = _nested(rows)
    output, state = layer(nested, hx)
    assert output.layout == torch.jagged
    assert torch.equal(output.offsets(), nested.offsets())
    as_list, list_state = layer(rows, hx)
    for a, b in zip(output.unbind(), as_list, strict=True):
        assert_equal_f64(a, b)
    for a, b in zip(tensors_in(state), tensors_in(list_state), strict=True):
        assert_equal_f64(a, b)
    # The output can meet the input in an operation: one raggedness, not two equal ones.
    assert torch.nn.functional.linear(output, torch.ones(3, 10, dtype=torch.float64)).add(nested).is_nested


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_masks(kind, bidirectional, batch_first, backend):
    options = {"num_layers": 3, "dropout": 0.4, "bidirectional": bidirectional, "batch_first": batch_first}
    theirs, ours = twins(kind, 3, 5, **options)
    rows, hx = _rows(), state_for(ours, 4)
    inputs = {f"row {k}": row for k, row in enumerate(rows)} | {f"hx {k}": h for k, h in enumerate(tensors_in(hx))}
    forms = {
        "padded": lambda: pad_sequence(rows, batch_first),
        "packed": lambda: pack_sequence(rows, enforce_sorted=False),
    }

    def run(layer: Any, form: str) -> Any:
        torch.manual_seed(11)
        return layer(forms[form](), hx)

    for form in forms:
        expected = outcome(theirs, lambda form=form: run(theirs, form), inputs)
        with tg.backend(backend):
            assert_same(outcome(ours, lambda form=form: run(ours, form), inputs), expected)
        ours.eval()
        evaluated = outcome(ours, lambda form=form: run(ours, form), inputs)
        ours.train()
        assert not torch.allclose(evaluated["output 0"], expected["output 0"]), "the masks were not there"


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_of_everything(kind):
    """p = 1: the second layer sees zeros alone, as in torch.nn."""
    theirs, ours = twins(kind, 3, 5, num_layers=2, dropout=1.0)
    x = randn(4, 2, 3)
    assert_same(outcome(ours, lambda: ours(x), {"x": x}), outcome(theirs, lambda: theirs(x), {"x": x}))


def test_lengths_equal_packing_and_unpacking():
    """What `lengths` replaces: pack, run, pad again, at torch.nn's own total_length."""
    theirs, ours = twins("LSTM", 3, 5, num_layers=2, bidirectional=True, batch_first=True)
    rows = _rows()
    x = pad_sequence(rows, True)
    packed, expected_state = theirs(pack_padded_sequence(x, torch.tensor(LENGTHS), True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(packed, True, total_length=7)
    output, state = ours(x, lengths=torch.tensor(LENGTHS))
    assert_equal_f64(output, expected)
    for a, b in zip(tensors_in(state), tensors_in(expected_state), strict=True):
        assert_equal_f64(a, b)
