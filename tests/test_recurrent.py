# SPDX-License-Identifier: Apache-2.0
"""Recurrent over cells against the built-in layers of the same weights: every form, state, direction, mark."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from comparing import CELLS, assert_same, outcome, randn, refusal, tensors_in
from tolerances import assert_equal_f64
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence

import tidegate as tg
from tidegate.nn import over_time

T, B = 6, 4
LENGTHS = (3, 6, 0, 1)
RESETS = torch.zeros(T, B, dtype=torch.bool)
RESETS[[0, 2, 3, 5, 4, 1], [0, 0, 1, 1, 2, 3]] = True


class Stepping(torch.nn.Module):
    """Anybody's cell: ours, hidden from the fast way, with y_t beside the state."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell
        sizes = cell.state_sizes
        self.state_size = sizes if len(sizes) > 1 else sizes[0]

    def forward(self, x: Tensor, state: Any) -> Any:
        state = self.cell(x, state)
        return tensors_in(state)[0], state


def _cells(layer: Any, wrap: Any) -> list[Any]:
    """The layer's weights as cells, a pair a layer where it is bidirectional."""
    found = []
    for k in range(layer.num_layers):
        pair = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            input_size = getattr(layer, f"weight_ih_l{k}{suffix}").shape[1]
            cell = getattr(tg, f"{type(layer).__name__}Cell")(input_size, layer.hidden_size, dtype=torch.float64)
            for name, _ in list(cell.named_parameters()):
                setattr(cell, name, getattr(layer, f"{name}_l{k}{suffix}"))
            pair.append(wrap(cell))
        found.append(tuple(pair) if layer.bidirectional else pair[0])
    return found


def _places(layer: Any, hx: Any) -> Any:
    """A layer's (L*D, B, H) states in the places of cells."""
    rows = [tuple(part[k] for part in hx) if isinstance(hx, tuple) else hx[k] for k in range(len(tensors_in(hx)[0]))]
    return [tuple(rows[k : k + 2]) for k in range(0, len(rows), 2)] if layer.bidirectional else rows


def _stacked(places: Any, bidirectional: bool) -> list[Tensor]:
    """States in the places of cells as the layer's: h, for an LSTM also c."""
    flat = [tensors_in(state) for layer in places for state in (layer if bidirectional else (layer,))]
    return [torch.stack(column) for column in zip(*flat, strict=True)]


FORMS = {
    "padded": lambda x: (x, {}),
    "lengths": lambda x: (x, {"lengths": LENGTHS}),
    "resets": lambda x: (x, {"resets": RESETS}),
    "both": lambda x: (x, {"lengths": torch.tensor(LENGTHS, dtype=torch.int32), "resets": RESETS}),
    "packed": lambda x: (pack_sequence([x[:n, k] for k, n in enumerate((3, 6, 2, 1))], False), {}),
    "list": lambda x: ([x[:n, k] for k, n in enumerate(LENGTHS)], {}),
    "list, resets": lambda x: (
        [x[:n, k] for k, n in enumerate(LENGTHS)],
        {"resets": [RESETS[:n, k] for k, n in enumerate(LENGTHS)]},
    ),
    "nested": lambda x: (
        torch.nested.as_nested_tensor([x[:n, k] for k, n in enumerate((3, 6, 2, 1))], layout=torch.jagged),
        {},
    ),
}


@pytest.mark.parametrize("wrap", [lambda cell: cell, Stepping], ids=["whole", "step by step"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_equals_the_layer(kind, form, direction, batch_first, wrap):
    torch.manual_seed(0)
    options = {"reverse": direction == "reverse"}
    layer = getattr(tg, kind)(
        3, 5, 2, batch_first=batch_first, bidirectional=direction == "both", dtype=torch.float64, **options
    )
    made = tg.Recurrent(_cells(layer, wrap), batch_first=batch_first, **options)
    rows = 4 if direction == "both" else 2
    h, c = randn(rows, B, 5, seed=7), randn(rows, B, 5, seed=8)
    x = randn(T, B, 3)

    def given() -> Any:
        input, marks = FORMS[form](x)
        if batch_first and isinstance(input, Tensor) and not input.is_nested:
            return input.transpose(0, 1), {name: m.t() if name == "resets" else m for name, m in marks.items()}
        return input, marks

    hx: Any = (h, c) if kind == "LSTM" else h

    def run(ours: bool) -> Any:
        input, marks = given()
        if not ours:
            return layer(input, hx, **marks)
        output, final = made(input, _places(layer, hx), **marks)
        return output, tuple(_stacked(final, layer.bidirectional))

    inputs = {"x": x, "h": h} | ({"c": c} if kind == "LSTM" else {})
    assert_same(outcome(layer, lambda: run(True), inputs), outcome(layer, lambda: run(False), inputs))
    input, marks = given()
    ours, theirs = made(input, **marks)[0], layer(input, **marks)[0]
    assert type(ours) is type(theirs)
    for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=True):
        assert_equal_f64(a, b)


@pytest.mark.parametrize("kind", CELLS)
def test_one_cell_has_its_own_state(kind):
    """Unbatched, too."""
    torch.manual_seed(0)
    cell = getattr(torch.nn, kind)(3, 5, dtype=torch.float64)
    layer, x = tg.Recurrent(cell), randn(T, 3)
    output, state = layer(x)
    batched, batched_state = layer(x.unsqueeze(1))
    assert_equal_f64(output, batched.squeeze(1))
    assert isinstance(state, tuple) == (kind == "LSTMCell")
    for one, many in zip(tensors_in(state), tensors_in(batched_state), strict=True):
        assert_equal_f64(one, many.squeeze(0))
    resets = torch.zeros(T, dtype=torch.bool)
    resets[3] = True
    output, _ = layer(x, state, resets=resets)
    assert_equal_f64(output[3:], layer(x[3:])[0])
    _, reversed_state = tg.Recurrent((cell, cell))(x)
    assert len(reversed_state) == 2


def test_names():
    layer = tg.Recurrent([tg.GRUCell(3, 5), (tg.GRUCell(5, 4), tg.LSTMCell(5, 2))])
    names = list(layer.state_dict())
    assert names[0] == "cells.0.weight_ih"
    assert names[4] == "cells.1.0.weight_ih"
    assert names[8] == "cells.1.1.weight_ih"
    output, (h, (h_1, (h_2, c_2))) = layer(torch.randn(T, B, 3))
    assert output.shape == (T, B, 6)
    assert [tuple(s.shape) for s in (h, h_1, h_2, c_2)] == [(B, 5), (B, 4), (B, 2), (B, 2)]
    assert "batch_first=True, dropout=0.5" in repr(
        tg.Recurrent([torch.nn.GRUCell(3, 3)] * 2, batch_first=True, dropout=0.5)
    )


def test_a_function_and_nested_input():
    """(x, mask) in every form that has lengths of its own, and a nest of outputs."""
    rows = [(randn(n, 3, seed=n), randn(n, seed=n + 50)) for n in (3, 6, 1)]

    def decay(inputs: Any, h: Tensor) -> Any:
        x, gap = inputs
        h = h * torch.exp(-gap.abs()).unsqueeze(-1) + x
        return {"h": h, "gap": gap}, h

    decay.state_size = 3
    layer = tg.Recurrent(decay, batch_first=True)
    as_list, state = layer(rows)
    padded = tuple(pad_sequence(list(column), True) for column in zip(*rows, strict=True))
    output, padded_state = layer(padded, lengths=[3, 6, 1])
    assert_equal_f64(state, padded_state)
    for k, (x, _) in enumerate(rows):
        assert_equal_f64(as_list["h"][k], output["h"][k, : len(x)])
        alone, alone_state = layer(rows[k])
        assert_equal_f64(alone["h"], as_list["h"][k])
        assert_equal_f64(alone_state, state[k])
    packed = tuple(pack_sequence(list(column), False) for column in zip(*rows, strict=True))
    output, packed_state = layer(packed)
    assert isinstance(output["h"], PackedSequence)
    assert_equal_f64(packed_state, state)
    nested = tuple(torch.nested.as_nested_tensor(list(c), layout=torch.jagged) for c in zip(*rows, strict=True))
    output, nested_state = layer(nested)
    assert output["gap"].is_nested
    assert_equal_f64(nested_state, state)


def test_dropout_between_layers_and_residual():
    """As written out: the sum takes the input before dropout; the first layer's sizes do not agree."""
    torch.manual_seed(0)
    cells = [tg.GRUCell(3, 5, dtype=torch.float64), *(tg.GRUCell(5, 5, dtype=torch.float64) for _ in range(2))]
    layer = tg.Recurrent(cells, dropout=0.5, residual=True)
    x = randn(T, B, 3)
    torch.manual_seed(1)
    output, _ = layer(x)
    torch.manual_seed(1)
    data = tg.Recurrent(cells[0])(x)[0]
    for cell in cells[1:]:
        data = tg.Recurrent(cell)(torch.nn.functional.dropout(data, 0.5))[0] + data
    assert_equal_f64(output, data)
    layer.eval()
    assert not torch.allclose(layer(x)[0], output)


def test_residual_past_a_length_is_zero():
    layer = tg.Recurrent([tg.GRUCell(3, 3, dtype=torch.float64)] * 2, residual=True)
    x = randn(T, B, 3, grad=False)
    for k, n in enumerate(LENGTHS):
        x[n:, k] = float("nan")
    x.requires_grad_()
    output, _ = layer(x, lengths=LENGTHS)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    for k, n in enumerate(LENGTHS):
        assert output[n:, k].eq(0).all()
        assert gradient[n:, k].eq(0).all()
    assert output.isfinite().all()


@pytest.mark.parametrize("cell", [tg.LSTMCell(3, 5), Stepping(tg.LSTMCell(3, 5))], ids=["ours", "anybody's"])
def test_nothing(cell):
    layer = tg.Recurrent(cell, batch_first=True)
    state = (torch.randn(B, 5), torch.randn(B, 5))
    output, final = layer(torch.zeros(B, 0, 3), state)
    assert output.shape == (B, 0, 5)
    assert all(map(torch.equal, final, state))
    output, final = layer(torch.zeros(0, T, 3))
    assert output.shape == (0, T, 5)
    assert [tuple(s.shape) for s in final] == [(0, 5)] * 2
    assert [tuple(o.shape) for o in layer([torch.zeros(0, 3)])[0]] == [(0, 5)]


def test_copies_and_pickles():
    layer = tg.Recurrent([tg.GRUCell(3, 5), (torch.nn.LSTMCell(5, 2), tg.GRUCell(5, 4))], dropout=0.1).eval()
    x = torch.randn(T, B, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])
        assert repr(other) == repr(layer)


def test_torchs_cells_are_accelerated_inside():
    layer = tg.Recurrent(torch.nn.GRUCell(3, 5))
    x = torch.randn(T, B, 3)
    expected = layer(x)[0]
    tg.accelerate(layer)
    assert type(layer.cells[0]) is tg.GRUCell
    torch.testing.assert_close(layer(x)[0], expected)


def _sum(x: Tensor, total: Tensor) -> Tensor:
    return total + x


GRU, X = tg.GRUCell(3, 5), torch.zeros(T, B, 3)
CONSTRUCTIONS = [
    (lambda: tg.Recurrent([]), ValueError, "cells: expected at least one cell, got an empty list"),
    (lambda: tg.Recurrent(tg.GRUCell), TypeError, "cells: expected a cell, a module or function of (x_t, state), got the class GRUCell"),  # noqa: E501
    (lambda: tg.Recurrent([GRU, 3]), TypeError, "cells[1]: expected a cell, a module or function of (x_t, state), got int"),  # noqa: E501
    (lambda: tg.Recurrent(tg.GRU(3, 5)), TypeError, "cells: expected a cell, got the layer GRU, which needs no Recurrent"),  # noqa: E501
    (lambda: tg.Recurrent([(GRU, GRU, GRU)]), ValueError, "cells[0]: expected a pair (forward, reverse), got 3 cells; a stack is a list"),  # noqa: E501
    (lambda: tg.Recurrent((GRU, GRU), reverse=True), ValueError, "reverse: expected False with a pair of cells, which runs both ways already"),  # noqa: E501
    (lambda: tg.Recurrent(GRU, dropout=2), ValueError, "dropout: expected a probability in 0..1, got 2"),
    (lambda: tg.Recurrent(GRU, batch_first=1), TypeError, "batch_first should be of type bool, got: int"),
]  # fmt: skip
CALLS = [
    (GRU, (torch.zeros(T, B, 4),), {}, ValueError, "input: expected 3 dimensions and input_size = 3 features, got shape (6, 4, 4)"),  # noqa: E501
    ([GRU, GRU], (X,), {}, ValueError, "input of cells[1]: expected 3 dimensions and input_size = 3 features, got shape (6, 4, 5)"),  # noqa: E501
    (_sum, (X,), {}, ValueError, "hx: needed, because a Function does not tell its state's size; pass hx, or give the cell a state_size"),  # noqa: E501
    ([_sum], (X, torch.zeros(2)), {}, ValueError, "hx: expected a list of 1 states, one for each of cells, got Tensor"),
    ([_sum], (X, [torch.zeros(3, 3)]), {}, ValueError, "hx[0]: expected (B, ...) = (4, ...), got (3, 3)"),
    ((_sum, _sum), (X, torch.zeros(B, 3)), {}, ValueError, "hx: expected a pair of states (forward, reverse), got Tensor"),  # noqa: E501
    (GRU, (X[0, 0],), {}, ValueError, "input: expected a batch of at least 3 dimensions, or (T, I), got 1 dimensions"),
    (GRU, (3,), {}, TypeError, "input: expected Tensors, PackedSequences or a list of Tensors, got int"),
    (_sum, ((X, X[:2]),), {}, ValueError, "input: expected (T, B, ...) like the first tensor, (6, 4), got (2, 4, 3)"),
    (GRU, (X,), {"lengths": [1]}, ValueError, "lengths: expected one per row, (B,) = (4,), got (1,)"),
    (GRU, (X,), {"lengths": [9] * B}, ValueError, "lengths: expected values in 0..T = 0..6, got 9"),
    (GRU, (X,), {"resets": RESETS[:2]}, ValueError, "resets: expected (T, B) = (6, 4), got (2, 4)"),
    (GRU, (X[:, 0],), {"lengths": [1]}, ValueError, "lengths: expected None but with a padded batch (3-D input); this input has its own lengths"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTIONS)
def test_construction_errors(make, error, message):
    assert refusal(make) == (error, message)


@pytest.mark.parametrize(("cells", "arguments", "marks", "error", "message"), CALLS)
def test_call_errors(cells, arguments, marks, error, message):
    assert refusal(lambda: tg.Recurrent(cells)(*arguments, **marks)) == (error, message)


def test_residual_without_a_layer_that_agrees():
    with pytest.raises(ValueError, match="residual: expected a layer whose output has its input's shape, got none"):
        tg.Recurrent(GRU, residual=True)(X)


# Streams


def _made() -> tg.Recurrent:
    torch.manual_seed(0)
    cells = [tg.GRUCell(3, 5), Stepping(tg.LSTMCell(5, 5)), torch.nn.GRUCell(5, 4)]
    return tg.Recurrent([cell.double() for cell in cells], residual=True, dropout=0.3)


def test_a_stream_is_the_sequence():
    layer, x = _made(), randn(T, B, 3, grad=False)
    stream = layer.stream(B)
    chunked = layer.stream(B)
    steps = torch.stack([stream.step(x_t) for x_t in x])
    chunks = torch.cat([chunked.steps(x[:2]), chunked.steps(x[2:2]), chunked.steps(x[2:])])
    expected, final = layer.eval()(x)
    assert_equal_f64(steps, expected)
    assert_equal_f64(chunks, expected)
    assert not steps.requires_grad
    for found in (stream.state, chunked.state):
        for a, b in zip(tensors_in(found), tensors_in(final), strict=True):
            assert_equal_f64(a, b)
    later = layer.stream(state=final)
    assert later.rows == B
    assert_equal_f64(later.step(x[0]), stream.step(x[0]))


def test_a_stream_without_a_batch_dimension():
    layer, x = _made().eval(), randn(T, 3, grad=False)
    stream = layer.stream()
    expected, final = layer(x)
    assert_equal_f64(torch.stack([stream.step(x_t) for x_t in x[:3]]), expected[:3])
    assert_equal_f64(stream.steps(x[3:]), expected[3:])
    assert_equal_f64(layer.stream(state=final).step(x[0]), stream.step(x[0]))
    with pytest.raises(ValueError, match="add_rows: this stream has one row"):
        stream.add_rows()


def test_sessions_come_and_go():
    layer, x = _made().eval(), randn(T, B, 3, grad=False)
    stream = layer.stream(2)
    stream.step(x[0, :2])
    assert stream.add_rows(2) == range(2, 4)
    stream.step(x[1])
    stream.reset([0])
    stream.remove_rows([1])
    found = stream.step(x[2, [0, 2, 3]])
    assert_equal_f64(found[0], layer(x[2:3, 0])[0][0])
    assert_equal_f64(found[1:], layer(x[1:3, 2:])[0][1])
    stream.reset()
    assert all(s.eq(0).all() for s in tensors_in(stream.state))
    assert stream.rows == 3


def test_streams_are_copied_saved_pickled_and_refreshed():
    layer, x = _made().eval(), randn(T, B, 3, grad=False)
    stream = layer.stream(B)
    stream.steps(x[:2])
    other = layer.stream(1)
    other.load(stream.save())
    buffer = io.BytesIO()
    stream.save(buffer)
    buffer.seek(0)
    filed = layer.stream(2)
    filed.load(buffer)
    many = [stream.clone(), copy.copy(stream), copy.deepcopy(stream), pickle.loads(pickle.dumps(stream)), other, filed]
    expected = stream.step(x[2])
    for one in many:
        assert_equal_f64(one.step(x[2]), expected)
    with torch.no_grad():
        layer.cells[0].weight_ih.zero_()
    before = stream.clone()
    assert_equal_f64(before.step(x[3]), stream.step(x[3]))
    stream.refresh()
    assert not torch.equal(before.step(x[4]), stream.step(x[4]))
    assert repr(stream) == "RecurrentStream(GRUCell, Stepping, GRUCell, rows=4, torch.float64, cpu)"


def test_a_failed_step_changes_nothing():
    stream, x = _made().stream(B), randn(T, B, 3, grad=False)
    stream.step(x[0])
    before = stream.state
    for call in (
        lambda: stream.step(x[0, :2]),
        lambda: stream.step(x[0].float()),
        lambda: stream.step(x[0].requires_grad_()),
        lambda: stream.step("x"),
        lambda: setattr(stream, "state", before[:2]),
        lambda: stream.load({"format": 1}),
        lambda: stream.remove_rows(9),
        lambda: stream.add_rows(-1),
    ):
        with pytest.raises(ValueError, match=r"\w+: "):
            call()
    for a, b in zip(tensors_in(stream.state), tensors_in(before), strict=True):
        assert torch.equal(a, b)


def test_no_stream_in_reverse():
    for layer in (tg.Recurrent(GRU, reverse=True), tg.Recurrent((GRU, GRU))):
        with pytest.raises(ValueError, match="stream: expected"):
            layer.stream()
    with pytest.raises(ValueError, match="state: needed, because a Function does not tell"):
        tg.Recurrent(_sum).stream()


class Dropping(torch.nn.Module):
    state_size = 3

    def draw_noise(self, inputs: Tensor, state: Tensor) -> Tensor | None:
        return torch.zeros_like(inputs) if self.training else None

    def forward(self, x: Tensor, state: Tensor, noise: Tensor | None = None) -> Tensor:
        return state + (x if noise is None else x * noise)


def test_a_stream_has_no_noise():
    layer, x = tg.Recurrent(Dropping()), randn(T, B, 3, grad=False)
    assert isinstance(layer.cells[0], over_time.DrawsNoise)
    assert layer(x)[0].eq(0).all()
    assert_equal_f64(layer.stream(B, dtype=torch.float64).steps(x), x.cumsum(0))
    assert layer.training


def test_a_stream_of_a_replaced_weight():
    """A plain tensor with a history in the parameter's place, as weight dropping leaves it."""
    cell = torch.nn.GRUCell(3, 5)
    raw = cell.weight_hh
    del cell.weight_hh
    cell.weight_hh = torch.nn.functional.dropout(raw, 0.5)
    layer, x = tg.Recurrent(cell), torch.randn(T, B, 3)
    torch.testing.assert_close(layer.stream(B).steps(x), layer(x)[0].detach())
