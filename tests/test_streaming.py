# SPDX-License-Identifier: Apache-2.0
"""A stream's steps are the layer's over the whole sequence: every layer, form, dtype and backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import needs
import pytest
import torch
from stream_layers import LAYERS, as_tuple, close, every_layer, unchanged
from torch.nn.utils import parametrizations

import tidegate as tg
from tidegate import backends
from tidegate.backends import backend
from tidegate.kernels import cpu

# The compiled operators' are the same to the bit, as the next test demands. Without them torch sums a step and a
# sequence in other orders: 2.2e-16 and 1.2e-7 apart, and in bfloat16 and float16 a rounding may fall elsewhere: a
# unit in the last place of numbers up to 2, as a relu's are.
FLOORS = {torch.float64: 1e-15, torch.float32: 2.5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@every_layer
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", FLOORS)
def test_steps_are_the_sequence(name: str, bias: bool, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](5, 7, 2, bias=bias, dtype=dtype)
    x = torch.randn(6, rows, 5, dtype=dtype)
    with torch.no_grad():
        expected, final = layer(x)
    stream = layer.stream(rows)
    close(torch.stack([stream.step(x_t) for x_t in x]), expected, FLOORS[dtype])
    for ours, theirs in zip(as_tuple(stream.state), as_tuple(final), strict=True):
        close(ours, theirs, FLOORS[dtype])


@needs.compiled_operators
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_steps_and_chunks_are_bit_for_bit_the_sequence(name: str, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](33, 65, 3, dtype=dtype)
    x = torch.randn(12, rows, 33, dtype=dtype)
    stream = layer.stream(rows)
    with torch.no_grad():
        expected, final = layer(x)
    steps = [stream.step(x_t) for x_t in x[:4]]
    assert torch.equal(torch.cat([torch.stack(steps), stream.steps(x[4:5]), stream.steps(x[5:])]), expected)
    for ours, theirs in zip(as_tuple(stream.state), as_tuple(final), strict=True):
        assert torch.equal(ours, theirs)


@needs.compiled_operators
@pytest.mark.parametrize("isa", needs.ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "hidden_size"), [(tg.GRU, 592), (tg.LSTM, 512), (tg.RNN, 1008)])
def test_large_layers_that_read_unlike_inputs(isa: str, dtype: torch.dtype, kind: Any, hidden_size: int) -> None:
    """Weights from so many units on stay as narrow as they are, of every layer or of none."""
    cpu.operators().use_isa(isa)
    torch.manual_seed(0)
    layer, x = kind(3, hidden_size, 2, dtype=dtype), torch.randn(4, 2, 3, dtype=dtype)
    stream = layer.stream(2)
    with torch.no_grad(), tg.backend("cpu"):
        expected, _ = layer(x)
    steps = torch.stack([stream.step(x_t) for x_t in x[:2]])
    close(torch.cat([steps, stream.steps(x[2:])]), expected, FLOORS[dtype])


@pytest.mark.parametrize("named", [pytest.param("cpu", marks=needs.compiled_operators), "aten", "reference"])
def test_every_backend_and_its_name(named: str) -> None:
    layer = tg.LSTM(5, 7, 2)
    x = torch.randn(6, 3, 5)
    with backend(named):
        stream, lone = layer.stream(3), layer.stream()
        expected = layer(x)[0].detach()
    assert stream.backend == named
    close(torch.stack([lone.step(x_t) for x_t in x[:, 0]]), expected[:, 0])
    assert f"backend={named}" in repr(stream)
    close(torch.cat([torch.stack([stream.step(x_t) for x_t in x[:2]]), stream.steps(x[2:])]), expected)


def test_backends_are_asked_when_the_stream_is_made_not_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tg.GRU(5, 7, 2).stream(1)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(backends, "select", refuse)
    stream.step(torch.randn(1, 5))
    monkeypatch.undo()
    layer = tg.GRU(5, 7, reset_after=False)
    with backend("aten"), pytest.raises(tg.UnsupportedError, match="named 'aten'"):
        layer.stream(1)


@pytest.mark.parametrize("make", [tg.RNNCell, tg.LSTMCell, tg.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(make: type, bias: bool) -> None:
    cell = make(5, 7, bias=bias)
    x = torch.randn(4, 3, 5)
    stream, state = cell.stream(3), None
    with torch.no_grad():
        for x_t in x:
            state = cell(x_t, state)
            close(stream.step(x_t), as_tuple(state)[0])
    assert [tuple(s.shape) for s in as_tuple(stream.state)] == [(3, 7)] * len(as_tuple(state))
    again = cell.stream(state=stream.state)
    assert torch.equal(again.step(x[0]), stream.step(x[0]))
    close(cell.stream(3).steps(x)[-1], as_tuple(state)[0])


@every_layer
def test_without_a_batch_dimension(name: str) -> None:
    layer = LAYERS[name](5, 7, 2)
    x = torch.randn(4, 5)
    with torch.no_grad():
        expected, final = layer(x)
    stream = layer.stream()
    close(torch.stack([stream.step(x_t) for x_t in x[:2]]), expected[:2])
    close(stream.steps(x[2:]), expected[2:])
    for ours, theirs in zip(as_tuple(stream.state), as_tuple(final), strict=True):
        close(ours, theirs)
    close(layer.stream(state=final).step(x[0]), stream.step(x[0]))
    with pytest.raises(ValueError, match="add_rows: this stream has one row"):
        stream.add_rows()


def test_batch_first_chunks() -> None:
    layer = tg.GRU(5, 7, batch_first=True)
    x = torch.randn(3, 4, 5)
    stream = layer.stream(3)
    output = stream.steps(x)
    close(output, layer(x)[0].detach())
    assert stream.steps(x[:, :0]).shape == (3, 0, 7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tg.LSTM(5, 7, 2, peepholes=True, cell_clip=0.2),
        lambda: tg.GRU(5, 7, activations=("hard_sigmoid", "tanh"), clip=0.5),
        lambda: tg.LSTMCell(5, 7, proj_size=7),
        lambda: tg.LSTMCell(5, 7, proj_size=3),
    ],
    ids=["peepholes", "activations", "square-projection", "projection"],
)
def test_what_is_beyond_torch(make: Callable[[], Any]) -> None:
    module = make()
    x, state = torch.randn(4, 3, 5), None
    stream = module.stream(3)
    with torch.no_grad():
        for x_t in x:
            layered = isinstance(module, torch.nn.RNNBase)
            output, state = module(x_t.unsqueeze(0), state) if layered else (None, module(x_t, state))
            close(stream.step(x_t), output[0] if layered else state[0])


def test_it_records_nothing_and_drops_nothing() -> None:
    layer = tg.GRU(5, 7, 2, dropout=0.5).train()
    x = torch.randn(1, 5)
    stream = layer.stream(1)
    output = stream.step(x)
    assert not output.requires_grad
    close(output, layer.eval()(x.unsqueeze(0))[0][0].detach())
    with pytest.raises(ValueError, match="records no gradient"):
        stream.step(x.requires_grad_())
    with torch.no_grad():
        stream.step(x)


def test_inference_mode_in_and_out() -> None:
    layer = tg.LSTM(5, 7, 2)
    x = torch.randn(6, 2, 5)
    expected = layer(x)[0].detach()
    with torch.inference_mode():
        stream = layer.stream(2)
        first = stream.step(x[0])
    outputs = [first.clone(), stream.step(x[1])]
    with torch.inference_mode():
        outputs.append(stream.step(x[2].clone()).clone())
        stream.state = stream.state
        stream.reset([])
    outputs.append(stream.step(x[3]))
    with torch.inference_mode():
        chunk = stream.steps(x[4:5])
    outputs += [chunk[0].clone(), stream.step(x[5])]
    close(torch.stack(outputs), expected)
    with backend("reference"), torch.inference_mode():
        stream = layer.stream(2)
        stream.step(x[0])
    stream.step(x[1])


def test_other_dtypes_than_the_parameters() -> None:
    layer = tg.GRU(5, 7)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    stream = layer.stream(2, dtype=torch.float64)
    expected = copy.deepcopy(layer).double()(x)[0].detach()
    close(torch.stack([stream.step(x_t) for x_t in x]), expected, FLOORS[torch.float64])
    assert stream.state.dtype == torch.float64


def test_rows_of_any_strides() -> None:
    layer = tg.GRU(5, 7)
    x = torch.randn(5, 2).t()
    assert torch.equal(layer.stream(2).step(x), layer.stream(2).step(x.contiguous()))
    stream = layer.stream(state=torch.randn(2, 7, 1).transpose(1, 2).transpose(0, 1))
    stream.step(x)
    state = torch.randn(7, 2, 1).transpose(0, 2)
    expected = layer.stream(2, state.contiguous()).step(x)
    with torch.inference_mode():
        state = torch.randn(7, 2, 1).copy_(state.transpose(0, 2)).transpose(0, 2)
        stream = layer.stream(2, state)
        assert torch.equal(stream.step(x), expected)
        stream.state = state
        assert torch.equal(stream.step(x), expected)


def test_the_weights_are_those_of_the_moment_until_refresh() -> None:
    layer = parametrizations.weight_norm(tg.GRU(5, 7), "weight_hh_l0")
    x = torch.randn(1, 5)
    stream, same = layer.stream(1), layer.stream(1)
    stream.step(x)
    same.step(x)
    twin = stream.clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert torch.equal(stream.step(x), same.step(x))
    state = stream.state
    stream.refresh()
    unchanged(stream, state, 1)
    with torch.no_grad():
        expected = layer(x.unsqueeze(0), state)[0][0]
    close(stream.step(x), expected)
    twin.step(x)
    assert not torch.allclose(twin.step(x), expected)
