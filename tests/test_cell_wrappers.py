# SPDX-License-Identifier: Apache-2.0
"""Zoneout and dropout around cells: the masks, and what they do to a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparing import randn
from ready_cells import CELLS, B, H, I, T, input_of
from tolerances import assert_equal_f64
from torch import Tensor, sigmoid, tanh
from torch.utils.checkpoint import checkpoint

import tidegate as tg
from tidegate import cells


def _run(cell: Any, x: Tensor, seed: int = 1) -> tuple[Tensor, Any]:
    torch.manual_seed(seed)
    return tg.dynamic_rnn(cell, x, time_major=True)


def test_zoneout_is_written_out():
    """Masks drawn before the loop, one for h and one for c; y_t is the zoned h; the expectation in eval."""
    inner = tg.LSTMCell(I, H, dtype=torch.float64)
    cell, x = cells.Zoneout(inner, (0.3, 0.6)), randn(T, B, I)
    output, final = _run(cell, x)
    torch.manual_seed(1)
    keep_h, keep_c = (torch.bernoulli(torch.full((T, B, H), 1 - p)).bool() for p in (0.3, 0.6))
    h = c = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        new_h, new_c = inner(x[t], (h, c))
        h, c = torch.where(keep_h[t], new_h, h), torch.where(keep_c[t], new_c, c)
        assert_equal_f64(output[t], h)
    assert_equal_f64(final[1], c)
    output, _ = _run(cell.eval(), x)
    h = c = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        new_h, new_c = inner(x[t], (h, c))
        h, c = 0.7 * new_h + 0.3 * h, 0.4 * new_c + 0.6 * c
        assert_equal_f64(output[t], h)


def test_zoneout_of_one_rate_and_of_a_rate_too_few():
    cell, x = cells.Zoneout(tg.GRUCell(I, H), 1.0), torch.randn(T, B, I)
    assert _run(cell, x)[0].eq(0).all()
    assert _run(cell.eval(), x)[0].eq(0).all()
    plain = tg.GRUCell(I, H)
    torch.testing.assert_close(_run(cells.Zoneout(plain, 0.0), x)[0], _run(plain, x)[0])
    with pytest.raises(ValueError, match="p: expected 2, one for each of the cell's states, got 1"):
        _run(cells.Zoneout(tg.LSTMCell(I, H), [0.1]), x)
    with pytest.raises(ValueError, match=r"p: expected a probability in 0..1, got 2"):
        cells.Zoneout(plain, 2)


REACHED: dict[str, Any] = {
    name: make for name, make in CELLS.items() if not name.startswith("Min")
} | {
    "torch.nn.GRUCell": lambda: torch.nn.GRUCell(I, H),
    "torch.nn.LSTMCell": lambda: torch.nn.LSTMCell(I, H, bias=False),
    "tg.RNNCell": lambda: tg.RNNCell(I, H),
    "tg.LSTMCell": lambda: tg.LSTMCell(I, H, proj_size=2, peepholes=True),
    "tg.GRUCell, reset before": lambda: tg.GRUCell(I, H, reset_after=False),
}  # fmt: skip


@pytest.mark.parametrize("per_gate", [False, True], ids=["", "per gate"])
@pytest.mark.parametrize("name", REACHED)
def test_recurrent_dropout_of_nothing_and_of_all(name, per_gate):
    """p = 0 is the cell; masks of ones (the expectation at p near 0) give the cell's step by the other way, too; p = 1
    is the cell with its recurrent products cut."""
    torch.manual_seed(0)
    inner = REACHED[name]().double()
    x = input_of(name, T, B)
    expected, _ = tg.dynamic_rnn(inner, x, time_major=True)
    for p in (0.0, 1e-12):
        found, _ = tg.dynamic_rnn(cells.RecurrentDropout(inner, p, per_gate), x, time_major=True)
        assert_equal_f64(found, expected)
    cell = cells.RecurrentDropout(inner, 1.0, per_gate)
    found, _ = tg.dynamic_rnn(cell, x, time_major=True)
    if not name.startswith(("CfC", "DreamerV3")):  # whose h and x are in one product
        cut = copy.deepcopy(inner)
        with torch.no_grad():
            (cut.u if name.startswith("LiGRU") else cut.recurrent_kernel if name == "SLSTM" else cut.weight_hh).zero_()
        assert_equal_f64(found, tg.dynamic_rnn(cut, x, time_major=True)[0])
    assert not torch.allclose(found, expected)
    assert_equal_f64(tg.dynamic_rnn(cell.eval(), x, time_major=True)[0], expected)


@pytest.mark.parametrize("per_gate", [False, True], ids=["", "per gate"])
def test_recurrent_dropout_is_written_out(per_gate):
    """One mask for all steps; a GRU's z h is of the whole h."""
    inner = torch.nn.GRUCell(I, H, dtype=torch.float64)
    x = randn(T, B, I)
    output, _ = _run(cells.RecurrentDropout(inner, 0.5, per_gate), x)
    torch.manual_seed(1)
    ones = torch.ones(B, 3, H) if per_gate else torch.ones(B, H)
    mask = torch.nn.functional.dropout(ones.double(), 0.5)
    masks = mask.unbind(1) if per_gate else (mask,) * 3
    h = torch.zeros(B, H, dtype=torch.float64)
    w, b = inner.weight_hh.split(H), inner.bias_hh.split(H)
    for t in range(T):
        x_r, x_z, x_n = (x[t] @ inner.weight_ih.T + inner.bias_ih).split(H, -1)
        h_r, h_z, h_n = ((h * masks[k]) @ w[k].T + b[k] for k in range(3))
        z = sigmoid(x_z + h_z)
        h = (1 - z) * tanh(x_n + sigmoid(x_r + h_r) * h_n) + z * h
        assert_equal_f64(output[t], h)


def test_recurrent_dropout_of_anybodys_cell():
    class Sum(torch.nn.Module):
        state_size = I

        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            return total + x

    x = randn(T, B, I)
    output, _ = _run(cells.RecurrentDropout(Sum(), 0.5), x)
    torch.manual_seed(1)
    mask = torch.nn.functional.dropout(torch.ones(B, I).double(), 0.5)
    total = torch.zeros(B, I).double()
    for t in range(T):
        total = total * mask + x[t]
        assert_equal_f64(output[t], total)
    with pytest.raises(ValueError, match="per_gate: expected False, the products of a Sum can't be reached"):
        cells.RecurrentDropout(Sum(), 0.5, per_gate=True)
    with pytest.raises(ValueError, match="cell: expected one with a recurrent product, got MinGRUCell"):
        cells.RecurrentDropout(cells.MinGRUCell(I, H), 0.5)
    with pytest.raises(TypeError, match="cell: expected no wrapper, got Zoneout; put it around RecurrentDropout"):
        cells.RecurrentDropout(cells.Zoneout(tg.GRUCell(I, H), 0.5), 0.5)
    with pytest.raises(ValueError, match="cell: expected a GRUCell without clip"):
        cells.RecurrentDropout(tg.GRUCell(I, H, clip=0.5), 0.5)


def test_input_dropout_and_residual():
    inner = tg.GRUCell(I, I, dtype=torch.float64)
    x = randn(T, B, I)
    output, state = _run(cells.Residual(cells.InputDropout(inner, 0.5)), x)
    torch.manual_seed(1)
    masked = x * torch.nn.functional.dropout(torch.ones(B, I).double(), 0.5)
    expected, final = tg.dynamic_rnn(inner, masked, time_major=True)
    assert_equal_f64(output, expected + x)
    assert_equal_f64(state, final)
    with pytest.raises(
        ValueError, match=r"cell: expected y_t of the input's shape, got \(2, 4\) for an input \(2, 3\)"
    ):
        _run(cells.Residual(tg.GRUCell(I, H)), torch.randn(T, B, I))


def _wrapped() -> Any:
    torch.manual_seed(0)
    inner = cells.RecurrentDropout(cells.LayerNormLSTMCell(I, I, dtype=torch.float64), 0.3, per_gate=True)
    return cells.Residual(cells.Zoneout(cells.InputDropout(inner, 0.2), 0.1))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_nest_of_wrappers(reverse):
    """A seed fixes the masks, and checkpointing sees them again; its stream and eval have none; gradients."""
    layer, x = tg.Recurrent(_wrapped(), reverse=reverse), randn(T, B, I)
    torch.manual_seed(1)
    first, _ = layer(x, lengths=[T, 2])
    assert not torch.equal(layer(x, lengths=[T, 2])[0], first)
    expected = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])
    torch.manual_seed(1)
    again = checkpoint(lambda x: layer(x, lengths=[T, 2])[0], x, use_reentrant=False)
    assert torch.equal(again, first)
    torch.randn(3)
    for a, b in zip(torch.autograd.grad(again.square().sum(), [x, *layer.parameters()]), expected, strict=True):
        assert torch.equal(a, b)
    if not reverse:
        streamed = torch.stack([layer.stream(B).step(x.detach()[0])])
        assert_equal_f64(streamed, layer.eval()(x[:1])[0])


@pytest.mark.parametrize("marks", [{}, {"lengths": torch.tensor([2, 1])}, {"resets": torch.eye(2).bool()}])
def test_compiled_whole(marks):
    """The graph draws the same noise."""
    layer, x = tg.Recurrent([_wrapped(), (tg.GRUCell(I, H).double(), torch.nn.LSTMCell(I, H).double())]), randn(2, B, I)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found, _ = compiled(x, **marks)
    torch.manual_seed(1)
    expected, _ = layer(x, **marks)
    assert_equal_f64(found, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (found, expected)), strict=True):
        assert_equal_f64(a, b)


def test_a_wrapper_called_outside_of_a_loop():
    """Draws for one step; without a state it begins at zeros."""
    cell, x = _wrapped(), randn(B, I)
    torch.manual_seed(1)
    found = cell(x)
    expected, final = _run(cell, x.unsqueeze(0))
    assert_equal_f64(found[0], expected[0])
    assert_equal_f64(found[1][1], final[1])


def test_a_wrapper_of_a_cell_that_tells_no_size():
    cell = cells.Zoneout(lambda x, h: h + x, 0.5)
    x = torch.randn(T, B, I)
    with pytest.raises(ValueError, match="initial_state: needed, because a Zoneout does not tell"):
        tg.dynamic_rnn(cell, x, time_major=True)
    output, _ = tg.dynamic_rnn(cell, x, initial_state=torch.zeros(B, I), time_major=True)
    assert output.shape == x.shape
    with pytest.raises(TypeError, match="cell: expected a cell, a module or function"):
        cells.Zoneout(3, 0.5)
