# SPDX-License-Identifier: Apache-2.0
"""Calls that torch's operators run and record: their own nodes, and one more where torch's gradient is the last.

cuDNN's operators cannot be differentiated twice, nor batched. A composite backend that refuses both stands for them.
All is float64; 1e-13 is the rounding of its sums, of tens of terms near 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparing import LAYERS, tensors_in
from torch import Tensor
from torch.autograd.function import once_differentiable

import tidegate as tg
from tidegate import backends, dispatch, gradients
from tidegate.call import Call
from tidegate.kernels import aten


class Once(torch.autograd.Function):
    """torch's operator with a gradient that can neither be differentiated nor batched, and that passes on undefined
    gradients as cuDNN's does."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
            ctx.results = aten.forward(call.with_tensors(ctx.leaves))
        ctx.set_materialize_grads(False)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pairs = [pair for pair in zip(ctx.results, grads, strict=True) if pair[1] is not None]
        if not pairs:
            return (None,) * (1 + len(ctx.leaves))
        assert not dispatch.is_batched()
        wanted = [leaf for leaf in ctx.leaves if leaf is not None]
        roots, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(roots, wanted, cotangents))
        return (None, *(None if leaf is None else next(found) for leaf in ctx.leaves))


def run_once(call: Call) -> Any:
    return Once.apply(call, *call.tensors)


def never(call: Any) -> bool:
    return False


LIKE_CUDNN = dataclasses.replace(backends.ATEN, composite=run_once, any_order=never)

FORMS = [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"bias": False}]


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(3, 4, dtype=torch.float64, **options)
    ours = getattr(tg, kind)(3, 4, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def loss_of(result: Any) -> Tensor:
    return torch.stack([tensor.sin().sum() for tensor in tensors_in(result)]).sum()


@pytest.fixture
def like_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BY_NAME, "aten", LIKE_CUDNN)


def first_and_second(module: Any, x: Tensor, then: Callable[[Any], None] = lambda module: None) -> list[Tensor]:
    """First and second derivatives; `then` happens between the forward and the first backward."""
    wanted = [x, *module.parameters()]
    loss = loss_of(module(x))
    then(module)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), wanted)
    return [*first, *second]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_first_gradient_is_torchs(kind: str, options: dict[str, Any], like_cudnn: None) -> None:
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(loss_of(theirs(x)), [x, *theirs.parameters()])
    with tg.backend("aten"):
        found = torch.autograd.grad(loss_of(ours(x)), [x, *ours.parameters()])
    assert_same([*found], [*expected])


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_of_a_gradient_where_torch_has_none(kind: str, options: dict[str, Any], like_cudnn: None) -> None:
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        assert_same(first_and_second(ours, x), first_and_second(theirs, x))


@pytest.mark.parametrize("kind", LAYERS)
def test_batched_gradients_where_torch_has_none(kind: str, like_cudnn: None) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def outputs(module: Any, x: Tensor) -> Tensor:
        return module(x)[0].sum((1, 2))

    with tg.backend("aten"):
        found: Any = torch.autograd.functional.jacobian(partial(outputs, ours), x, vectorize=True)
    expected: Any = torch.autograd.functional.jacobian(partial(outputs, theirs), x)
    assert_same([found], [expected])


def test_a_weight_that_changed_is_noticed_before_a_second_derivative(like_cudnn: None) -> None:
    _, ours = pair("GRU")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        loss = loss_of(ours(x))
        with torch.no_grad():
            ours.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)


def double_data(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 2


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_parameters_replaced_behind_autograds_back(kind: str, like_cudnn: None) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        assert_same(first_and_second(ours, x, double_data), first_and_second(theirs, x, double_data))


@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_cpu_the_nodes_are_torchs_own(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with tg.backend("aten"):
        output = ours(x)[0]
    assert type(output.grad_fn) is type(theirs(x)[0].grad_fn)
    assert gradients.HigherOrder.__name__ not in str(output.grad_fn)


def changed(cell: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(cell, name, value)
    return cell


BEYOND = {
    "clip": lambda: changed(tg.LSTMCell(3, 4), clip=0.1),
    "coupled": lambda: tg.LSTMCell(3, 4, coupled=True),
    "peepholes": lambda: tg.LSTMCell(3, 4, peepholes=True),
    "proj_size": lambda: tg.LSTMCell(3, 4, proj_size=2),
    "rnn clip": lambda: changed(tg.RNNCell(3, 4), clip=0.1),
    "gelu": lambda: tg.RNNCell(3, 4, activations="gelu"),
}


@pytest.mark.parametrize("make", BEYOND.values(), ids=BEYOND)
def test_a_recorded_step_that_torch_does_not_know_is_not_left_to_it(make: Callable[[], Any]) -> None:
    cell, x = make().double(), torch.randn(5, 3, dtype=torch.float64)
    found = tensors_in(cell(x))
    with tg.backend("reference"):
        for our, their in zip(found, tensors_in(cell(x)), strict=True):
            torch.testing.assert_close(our, their, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell"])
def test_a_recorded_step_is_torchs_as_a_trace_says(kind: str, options: dict[str, Any]) -> None:
    if kind == "LSTMCell" and "nonlinearity" in options:
        options = {}
    theirs, ours = pair(kind, **options)
    x = torch.randn(5, 3, dtype=torch.float64)
    with tg.trace() as ran:
        noted = tensors_in(ours(x))
    assert [each.backend for each in ran] == ["aten"]
    for our, note, their in zip(tensors_in(ours(x)), noted, tensors_in(theirs(x)), strict=True):
        assert torch.equal(our, their)
        assert torch.equal(note, their)
        assert type(our.grad_fn) is type(their.grad_fn)
    ours.requires_grad_(False)
    with tg.trace() as ran:
        ours(x)
    assert [each.backend for each in ran] == ["cpu"]
