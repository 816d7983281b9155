# SPDX-License-Identifier: Apache-2.0
"""What lengths and resets mean, in both directions, outputs, states and gradients: float64, on every backend."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from comparing import LAYERS, assert_same, outcome, randn, state_for, tensors_in, twins
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_equal_f64
from torch import Tensor

import tidegate as tg
from tidegate import sequences

T, B, IN, H = 7, 4, 3, 5
EXAMPLES = settings(deadline=None, max_examples=15)
NAN = float("nan")


def _layer(kind: str, **options: Any) -> Any:
    """A layer with all that has a direction or an order: two layers, two directions, a projection."""
    if kind == "LSTM":
        options.setdefault("proj_size", 2)
    options = {"num_layers": 2, "bidirectional": True, **options}
    if kind == "GRU before":
        torch.manual_seed(0)
        return tg.GRU(IN, H, reset_after=False, dtype=torch.float64, **options)
    return twins(kind, IN, H, **options)[1]


KINDS = (*LAYERS, "GRU before")
lengths_of_rows = st.lists(st.integers(0, T), min_size=B, max_size=B)


def _rows(state: Any, index: Any) -> Any:
    """The same rows of every tensor of a state."""
    return tuple(part[:, index] for part in state) if isinstance(state, tuple) else state[:, index]


def _gradients(module: Any, outputs: Any, cotangents: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    wanted = [*inputs, *module.parameters()]
    total = sum((o * c).sum() for o, c in zip(tensors_in(outputs), cotangents, strict=True))
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def _assert_all(ours: list[Tensor], expected: list[Tensor]) -> None:
    for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_equal_f64(a, b, f"tensor {k}")


@pytest.fixture(params=("default", "reference"))
def backend(request):
    with tg.backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(lengths=lengths_of_rows, seed=st.integers(0, 9))
def test_rows_of_any_length_equal_rows_one_by_one(kind, lengths, seed):
    layer, x = _layer(kind), randn(T, B, IN, seed=seed)
    hx = state_for(layer, B, seed=seed + 50)
    output, state = layer(x, hx, lengths=torch.tensor(lengths))
    cotangents = [randn(*t.shape, seed=k, grad=False) for k, t in enumerate(tensors_in((output, state)))]
    leaves = [x, *tensors_in(hx)]
    gradients = _gradients(layer, (output, state), cotangents, leaves)
    expected = [torch.zeros_like(leaf) for leaf in (*leaves, *layer.parameters())]
    for b, length in enumerate(lengths):
        assert output[length:, b].eq(0).all()
        if length == 0:
            for final, initial in zip(tensors_in(state), tensors_in(hx), strict=True):
                assert_equal_f64(final[:, b], initial[:, b], "a row of length 0 keeps its state")
            for k, cotangent in enumerate(cotangents[1:], 1):
                expected[k][:, b] += cotangent[:, b]
            continue
        row, row_state = layer(x[:length, b], _rows(hx, b))
        _assert_all([output[:length, b], *tensors_in(_rows(state, b))], tensors_in((row, row_state)))
        row_cotangents = [cotangents[0][:length, b], *(c[:, b] for c in cotangents[1:])]
        alone = _gradients(layer, (row, row_state), row_cotangents, leaves)
        expected = [sum_ + part for sum_, part in zip(expected, alone, strict=True)]
    _assert_all(gradients, expected)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(cut=st.integers(1, T - 1), lengths=lengths_of_rows)
def test_cut_anywhere_and_carry_the_state(kind, cut, lengths):
    layer, x = _layer(kind, bidirectional=False), randn(T, B, IN)
    lengths = torch.tensor(lengths)
    hx = state_for(layer, B)
    inputs = {"x": x} | {f"hx {k}": h for k, h in enumerate(tensors_in(hx))}

    def in_two() -> Any:
        first, state = layer(x[:cut], hx, lengths=lengths.clamp(max=cut))
        second, state = layer(x[cut:], state, lengths=(lengths - cut).clamp(min=0))
        return torch.cat((first, second)), state

    assert_same(outcome(layer, in_two, inputs), outcome(layer, lambda: layer(x, hx, lengths=lengths), inputs))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", LAYERS)
def test_permuting_rows_permutes_results(kind):
    layer, x, lengths = _layer(kind), randn(T, B, IN), torch.tensor([3, 7, 0, 5])
    hx, order = state_for(layer, B), torch.tensor([2, 0, 3, 1])
    output, state = layer(x, hx, lengths=lengths)
    permuted, permuted_state = layer(x[:, order], _rows(hx, order), lengths=lengths[order])
    _assert_all(tensors_in((permuted, permuted_state)), tensors_in((output[:, order], _rows(state, order))))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_padding_never_matters_not_even_nan(kind, batch_first):
    layer = _layer(kind, batch_first=batch_first)
    lengths = [3, 6, 0, 5]
    x, hx = randn(T, B, IN, grad=False), state_for(layer, B)
    results = []
    for filler, extra in ((0.0, 0), (NAN, 0), (float("inf"), 0), (NAN, 4)):
        padded = torch.cat((x, torch.zeros(extra, B, IN, dtype=x.dtype)))
        for b, length in enumerate(lengths):
            padded[length:, b] = filler
        leaf = (padded.transpose(0, 1) if batch_first else padded).clone().requires_grad_()
        output, state = layer(leaf, hx, lengths=lengths)
        timed, total = (output.transpose(0, 1) if batch_first else output), T
        assert timed[total:].eq(0).all()
        cotangents = [randn(*t.shape, seed=k, grad=False) for k, t in enumerate(tensors_in((timed[:total], state)))]
        gradients = _gradients(layer, (timed[:total], state), cotangents, [leaf])
        dx = gradients[0].transpose(0, 1) if batch_first else gradients[0]
        for b, length in enumerate(lengths):
            assert dx[length:, b].eq(0).all(), "a gradient reached the padding"
        results.append([timed[:total], *tensors_in(state), dx[:total], *gradients[1:]])
    for result in results[1:]:
        _assert_all(result, results[0])


def _segments(marks: list[bool]) -> list[slice]:
    """The runs of steps that marks cut one row into."""
    starts = sorted({0, *(t for t, mark in enumerate(marks) if mark)})
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(marks)], strict=True)]


def _run_in_segments(layer: Any, x: Tensor, hx: Tensor, marks: list[bool], reverse: bool) -> tuple[Tensor, Any]:
    """One row of a single-layer, single-direction `layer`, each segment by itself, states carried where none starts."""
    pieces, state = {}, hx
    segments = _segments(marks)
    for piece in reversed(segments) if reverse else segments:
        is_first = piece is segments[-1 if reverse else 0]
        # Forward a mark at 0 also drops the initial state; in reverse nothing lies beyond the last step.
        fresh = (not reverse and marks[0]) if is_first else True
        zeros = tuple(torch.zeros_like(h) for h in state) if isinstance(state, tuple) else torch.zeros_like(state)
        steps = x[piece].flip(0) if reverse else x[piece]
        output, state = layer(steps, zeros if fresh else state)
        pieces[piece.start] = output.flip(0) if reverse else output
    return torch.cat([pieces[piece.start] for piece in segments]), state


def _one_direction(layer: Any, suffix: str, hidden: Any) -> Any:
    """A forward layer that shares one direction's parameters of a single bidirectional layer."""
    options = {"reset_after": False} if getattr(layer, "reset_after", True) is False else {}
    single = type(layer)(IN, H, proj_size=layer.proj_size, dtype=torch.float64) if hidden else None
    single = single or type(layer)(IN, H, dtype=torch.float64, **options)
    for name in list(dict(single.named_parameters())):
        setattr(single, name, getattr(layer, name + suffix))
    return single


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(marks=st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=2, max_size=2), lengths=st.data())
def test_resets_equal_separate_runs(kind, marks, lengths):
    layer = _layer(kind, num_layers=1)
    rows = [lengths.draw(st.integers(1, T)) for _ in marks] if lengths.draw(st.booleans()) else [T, T]
    given_lengths = None if rows == [T, T] else torch.tensor(rows)
    x, hx, resets = randn(T, 2, IN), state_for(layer, 2), torch.tensor(marks).T
    inputs = {"x": x} | {f"hx {k}": h for k, h in enumerate(tensors_in(hx))}
    directions = [_one_direction(layer, suffix, kind == "LSTM") for suffix in ("", "_reverse")]

    def separately() -> Any:
        outputs, finals = [], []
        for b, length in enumerate(rows):
            sides = []
            for d, single in enumerate(directions):
                state = tuple(h[d : d + 1, b] for h in tensors_in(hx))
                state = state if len(state) > 1 else state[0]
                sides.append(_run_in_segments(single, x[:length, b], state, marks[b][:length], d == 1))
            output = torch.cat([output for output, _ in sides], -1)
            outputs.append(torch.cat((output, output.new_zeros(T - length, output.shape[1]))))
            finals.append([torch.cat(pair) for pair in zip(*(tensors_in(s) for _, s in sides), strict=True)])
        return torch.stack(outputs, 1), [torch.stack(column, 1) for column in zip(*finals, strict=True)]

    found = outcome(layer, lambda: layer(x, hx, lengths=given_lengths, resets=resets), inputs)
    assert_same(found, outcome(layer, separately, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_cross_a_reset(kind):
    """Two layers, two directions: what is before the mark and what is after never hear of each other."""
    layer, x, mark = _layer(kind), randn(T, 1, IN), 4
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[mark] = True
    output, _ = layer(x, resets=resets)
    (before,) = torch.autograd.grad(output[:mark].sum(), x, retain_graph=True)
    (after,) = torch.autograd.grad(output[mark:].sum(), x)
    assert before[mark:].eq(0).all()
    assert before[:mark].ne(0).any(-1).all()
    assert after[:mark].eq(0).all()
    assert after[mark:].ne(0).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_marks_on_padding_mean_nothing(kind):
    layer, x, lengths = _layer(kind), randn(T, B, IN), torch.tensor([3, 6, 0, 5])
    marks = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.4
    valid = torch.arange(T).unsqueeze(-1) < lengths
    hx = state_for(layer, B)
    everywhere = layer(x, hx, lengths=lengths, resets=marks | ~valid)
    _assert_all(tensors_in(everywhere), tensors_in(layer(x, hx, lengths=lengths, resets=marks & valid)))


@pytest.mark.parametrize("form", ["batch_first", "unbatched", "list"])
@pytest.mark.parametrize("kind", LAYERS)
def test_resets_in_every_form(kind, form):
    layer, x = _layer(kind), randn(T, B, IN, grad=False)
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(5)) < 0.3
    output, state = layer(x, resets=resets)
    if form == "batch_first":
        layer.batch_first = True
        found, found_state = layer(x.transpose(0, 1), resets=resets.T)
        _assert_all(tensors_in((found, found_state)), tensors_in((output.transpose(0, 1), state)))
    elif form == "unbatched":
        found, found_state = layer(x[:, 1], resets=resets[:, 1])
        _assert_all(tensors_in((found, found_state)), tensors_in((output[:, 1], _rows(state, 1))))
    else:
        found, found_state = layer(list(x.unbind(1)), resets=list(resets.unbind(1)))
        _assert_all(tensors_in((found, found_state)), tensors_in((list(output.unbind(1)), state)))


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype_of_lengths(dtype):
    layer, x = _layer("GRU"), randn(T, B, IN, grad=False)
    expected = tensors_in(layer(x, lengths=[3, 7, 0, 5]))
    lengths = torch.tensor([3, 7, 0, 5]).to(dtype)
    _assert_all(tensors_in(layer(x, lengths=lengths)), expected)
    assert lengths.dtype == dtype


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_nan_stays_in_its_row(kind):
    layer, x = _layer(kind), randn(T, B, IN, grad=False)
    poisoned = x.clone()
    poisoned[2, 1] = NAN
    for arguments in ({}, {"lengths": [7, 5, 0, 6]}):
        output, state = layer(x, **arguments)
        found, found_state = layer(poisoned, **arguments)
        others = [0, 2, 3]
        _assert_all(
            tensors_in((found[:, others], _rows(found_state, others))),
            tensors_in((output[:, others], _rows(state, others))),
        )
        assert found[2, 1].isnan().any()


@pytest.mark.parametrize("name", [None, "aten", "reference"])
def test_no_index_lands_on_a_default_device(name) -> None:
    """Whatever torch.set_default_device says, indices and lengths are made where the data is."""
    torch.manual_seed(0)
    layer, cell = tg.GRU(3, 4, 2, bidirectional=True), tg.LSTMCell(3, 4)
    rows = [torch.randn(5, 3), torch.randn(2, 3)]
    packed = torch.nn.utils.rnn.pack_sequence(rows)
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    padded = torch.nn.utils.rnn.pad_sequence(rows)
    zeros = (torch.zeros(2, 4), torch.zeros(2, 4))
    first = tg.GRU(3, 4).stream(2)

    def run() -> list[torch.Tensor]:
        stream = first.clone()
        stream.reset(0)
        stream.reset([True, False])
        stream.add_rows(1)
        stream.remove_rows(2)
        return [
            layer(packed)[0].data,
            layer(rows)[0][1],
            layer(nested)[0].values(),
            layer(padded, lengths=[5, 2])[0],
            tg.dynamic_rnn(cell, padded, [5, 2], zeros, time_major=True)[0],
            tg.dynamic_rnn(lambda x, h: torch.tanh(x.sum(-1, keepdim=True) + h), padded, [5, 2], zeros[0], True)[0],
            stream.step(padded[0]),
        ]

    with tg.backend(name):
        right = run()
        with torch.device("meta"):
            found = run()
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("sizes", [[3, 5, 2], [4], [0, 0], [0, 2]])
def test_a_nested_tensor_is_padded_to_its_longest_row_and_no_further(sizes: list[int]) -> None:
    rows = [torch.randn(size, 3) for size in sizes]
    made_of_rows = torch.nested.nested_tensor(rows, layout=torch.jagged)
    unknowing = torch.nested.nested_tensor_from_jagged(made_of_rows.values(), made_of_rows.offsets())
    layer = tg.GRU(3, 3)
    for nested in (made_of_rows, unknowing):
        assert sequences.from_nested(nested).data.shape == (max(sizes), len(sizes), 3)
        output = layer(nested)[0]
        assert torch.nested.to_padded_tensor(output, 0.0).shape == (len(sizes), max(sizes), 3)
        for one, row in zip(output.unbind(), rows, strict=True):
            if len(row):
                torch.testing.assert_close(one, layer(row)[0])
