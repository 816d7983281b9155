# SPDX-License-Identifier: Apache-2.0
"""Inputs that a cell takes by name, over time: the cell called by hand at each step. tests/peers has ncps' cells."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import tidegate as tg
from tidegate import dispatch

T, B, I, H = 7, 3, 4, 5  # noqa: E741  (I is input_size, in docstrings, too)


class Decay(torch.nn.Module):
    """Its state decays by the time that has passed."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.linear = torch.nn.Linear(input_size + hidden_size, hidden_size, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor, span: Tensor | float = 1.0, *, gain: Tensor | None = None) -> Tensor:
        new = torch.tanh(self.linear(torch.cat((x, h * torch.exp(torch.as_tensor(-span))), -1)))
        return new if gain is None else new * gain


def by_hand(cell: Any, x: Tensor, **named: Tensor) -> Tensor:
    h, outputs = x.new_zeros(x.shape[1], cell.hidden_size), []
    for t in range(len(x)):
        h = cell(x[t], h, **{name: value[t] for name, value in named.items()})
        outputs.append(h)
    return torch.stack(outputs)


def close(found: Tensor, expected: Tensor) -> None:
    """float64, sums in another order: 1e-15 seen."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.fixture
def given() -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    named = {"span": torch.rand(T, B, 1, dtype=torch.float64), "gain": torch.rand(T, B, H, dtype=torch.float64)}
    return x, {name: value.requires_grad_() for name, value in named.items()}


@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("names", [("span",), ("gain",), ("span", "gain")])
def test_results_and_gradients(given: Any, names: tuple[str, ...], every: int | None) -> None:
    x, named = given
    named = {name: named[name] for name in names}
    cell = Decay(I, H)
    expected = by_hand(cell, x, **named)
    wanted = [x, *named.values(), *cell.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), wanted)
    with tg.trace() as ran:
        output, last = tg.Recurrent(cell, checkpoint_every=every)(x, **named)
    assert {one.backend for one in ran} == {"fused"}
    close(output, expected)
    close(last, expected[-1])
    for found, gradient in zip(torch.autograd.grad(output.square().sum(), wanted), gradients, strict=True):
        close(found, gradient)
    output, _ = tg.dynamic_rnn(cell, x, time_major=True, fuse=True, **named)
    close(output, expected)
    swapped = {name: value.transpose(0, 1) for name, value in named.items()}
    output, _ = tg.dynamic_rnn(cell, x.transpose(0, 1), fuse=False, **swapped)
    close(output.transpose(0, 1), expected)


@torch.no_grad()
def test_every_form_of_input(given: Any) -> None:
    x, named = given
    cell, lengths = Decay(I, H), [7, 2, 4]
    expected = by_hand(cell, x, **named)
    layer = tg.Recurrent(cell)
    packed = {name: pack_padded_sequence(value, lengths, enforce_sorted=False) for name, value in named.items()}
    output, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), **packed)
    close(torch.nn.utils.rnn.pad_packed_sequence(output)[0][:2], expected[:2])
    rows = {name: [value[:n, b] for b, n in enumerate(lengths)] for name, value in named.items()}
    output, _ = layer([x[:n, b] for b, n in enumerate(lengths)], **rows)
    output_padded, _ = layer(x, lengths=lengths, **named)
    for b, n in enumerate(lengths):
        close(output[b], expected[:n, b])
        close(output_padded[:n, b], expected[:n, b])
    output, _ = layer(x[:, 0], **{name: value[:, 0] for name, value in named.items()})
    close(output, expected[:, 0])


@torch.no_grad()
def test_a_stack_and_its_stream(given: Any) -> None:
    """Each cell is given what it takes."""
    x, named = given
    first, ahead, back = Decay(I, H), tg.GRUCell(H, H, dtype=torch.float64), Decay(H, H)
    output, _ = tg.Recurrent([first, (ahead, back)])(x, **named)
    between = by_hand(first, x, **named)
    reverse = by_hand(back, between.flip(0), **{name: value.flip(0) for name, value in named.items()})
    close(output[..., H:], reverse.flip(0))

    layer = tg.Recurrent([first, ahead])
    expected, _ = layer(x, **named)
    stream = pickle.loads(pickle.dumps(layer.stream(B)))
    close(
        torch.stack([stream.step(x[t], **{name: value[t] for name, value in named.items()}) for t in range(T)]),
        expected,
    )
    close(layer.stream(B).steps(x, **named), expected)
    with pytest.raises(TypeError, match="dt: expected"):
        stream.step(x[0], dt=x[0])


def test_noise_and_names(given: Any) -> None:
    """A cell's noise comes where it came."""

    class Noisy(Decay):
        def draw_noise(self, inputs: Tensor, state: Tensor) -> Tensor | None:
            assert inputs.shape == (T, B, I)
            return torch.full((T, *state.shape), 0.5, dtype=state.dtype) if self.training else None

        def forward(self, x: Tensor, h: Tensor, noise: Tensor | None = None, span: Any = 1.0) -> Tensor:
            h = super().forward(x, h, span)
            return h if noise is None else h + noise

    x, named = given
    cell = Noisy(I, H)
    span = named["span"]
    output, _ = tg.Recurrent(cell)(x, span=span)
    h, outputs = x.new_zeros(B, H), []
    for t in range(T):
        h = cell(x[t], h, torch.full_like(h, 0.5), span[t])
        outputs.append(h)
    close(output, torch.stack(outputs))
    with pytest.raises(TypeError, match=r"noise: expected an input that a cell takes by this name; they take span"):
        tg.Recurrent(cell)(x, noise=span)


def test_compiled_and_copied(given: Any) -> None:
    x, named = given
    layer = tg.Recurrent(Decay(I, H))
    expected, _ = layer(x, **named)
    assert list(layer.state_dict()) == ["cells.0.linear.weight", "cells.0.linear.bias"]
    close(torch.compile(layer, fullgraph=dispatch.asked_of_modules, backend="eager")(x, **named)[0], expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(other(x, **named)[0], expected)


def test_refusals(given: Any) -> None:
    x, named = given
    layer = tg.Recurrent(Decay(I, H))
    with pytest.raises(TypeError, match=r"dt: expected an input that a cell takes by this name; they take span, gain"):
        layer(x, dt=named["span"])
    with pytest.raises(TypeError, match=r"dt: expected .*; they take x_t and the state alone"):
        tg.dynamic_rnn(tg.GRUCell(I, H, dtype=torch.float64), x, dt=named["span"])
    with pytest.raises(ValueError, match="span: expected a list of 3 sequences, as the input is, got Tensor"):
        layer([x[:, 0], x[:, 1], x[:, 2]], span=named["span"])
    with pytest.raises(ValueError, match=r"\(T, B, \.\.\.\) like the first tensor"):
        layer(x, span=named["span"][:-1])
    with pytest.raises(TypeError, match="got float"):
        layer(x, span=0.5)
