# SPDX-License-Identifier: Apache-2.0
"""Gradients of every order, forward mode, and torch.func over the layers, on every backend that can run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import RUNNABLE, VARIANTS, make_call, run_layer
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import tidegate as tg
from tidegate import backends

KINDS: dict[str, Callable[..., Any]] = {
    "rnn": tg.RNN,
    "lstm": tg.LSTM,
    "gru": tg.GRU,
    "gru-reset-before": lambda *sizes, **options: tg.GRU(*sizes, reset_after=False, **options),
}
FORMS = [(False, False, False), (True, True, False), (True, True, True), (False, True, True)]


def make_layer(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return KINDS[kind](3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)


def make_input(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def losses(layer: Any, *extra: Any) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda weights, x: functional_call(layer, weights, (x, *extra))[0].square().sum()


def plain_parameters(layer: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("name", backends.BY_NAME)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("lengths", "resets", "reverse"), FORMS)
def test_gradcheck_of_first_and_second_order(
    name: str, variant: str, lengths: bool, resets: bool, reverse: bool
) -> None:
    # bias=False would leave the biases' gradients unchecked; relu's kinks are not near these seeds.
    call = make_call(variant, 4, 3, 2, 3, lengths=lengths, resets=resets, reverse=reverse, requires_grad=True)
    tensors = [tensor for tensor in call.tensors if tensor is not None]
    places = [k for k, tensor in enumerate(call.tensors) if tensor is not None]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = [None] * len(call.tensors)
        for place, value in zip(places, values, strict=True):
            full[place] = value
        return run_layer(call.with_tensors(full))

    expected = contextlib.nullcontext()
    if backends.BY_NAME[name].unsupported_reasons(call.call()):
        expected = pytest.raises(tg.UnsupportedError, match=name)
    with expected, tg.backend(name):
        assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_third_order(kind: str) -> None:
    def third(name: str | None) -> Tensor:
        layer, x = make_layer(kind), make_input(3, 2, 3).requires_grad_()
        with tg.backend(name):
            found = layer(x)[0].square().sum()
            for _ in range(3):
                (found,) = torch.autograd.grad(found, x, create_graph=True)
                found = found.square().sum()
        return found.detach()

    torch.testing.assert_close(third(None), third("reference"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_with_the_graph_kept(kind: str) -> None:
    layer, x = make_layer(kind), make_input(3, 2, 3).requires_grad_()
    loss = layer(x)[0].square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind: str) -> None:
    layer, x = make_layer(kind), make_input(4, 2, 3)

    def run(data: Tensor) -> Tensor:
        return layer(data)[0]

    assert torch.autograd.gradcheck(run, x.requires_grad_(), fast_mode=True, check_forward_ad=True)
    tangent = make_input(4, 2, 3, seed=2)
    _, found = jvp(run, (x.detach(),), (tangent,))
    step = 1e-6
    with torch.no_grad():
        expected = (run(x + step * tangent) - run(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-7, atol=1e-9)


def test_forward_mode_never_leaves_a_named_backend_in_silence() -> None:
    layer = make_layer("gru")
    x = make_input(4, 2, 3)
    with tg.backend("aten"), pytest.raises(tg.UnsupportedError, match="forward-mode"):
        jvp(lambda data: layer(data)[0], (x,), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad_is_autograd(kind: str) -> None:
    layer, x = make_layer(kind), make_input(4, 2, 3)
    found = grad(losses(layer))(plain_parameters(layer), x)
    layer(x)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, *RUNNABLE])
def test_per_sample_gradients(kind: str, name: str | None) -> None:
    if kind == "gru-reset-before" and name == "aten":
        with pytest.raises(tg.UnsupportedError):
            _per_sample(kind, name)
        return
    found, expected = _per_sample(kind, name)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-12, atol=1e-14)


def _per_sample(kind: str, name: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    layer, examples = make_layer(kind), make_input(5, 4, 2, 3)
    weights = plain_parameters(layer)
    with tg.backend(name):
        found = vmap(grad(losses(layer)), (None, 0))(weights, examples)
    single = [grad(losses(layer))(weights, example) for example in examples]
    return found, {parameter: torch.stack([one[parameter] for one in single]) for parameter in weights}


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_inputs_and_over_weights(kind: str) -> None:
    layer, examples = make_layer(kind), make_input(5, 4, 2, 3)
    found = vmap(lambda x: layer(x)[0])(examples)
    torch.testing.assert_close(found, torch.stack([layer(x)[0] for x in examples]), rtol=1e-12, atol=1e-14)

    ensemble = [plain_parameters(make_layer(kind, seed)) for seed in range(3)]
    stacked = {name: torch.stack([weights[name] for weights in ensemble]) for name in ensemble[0]}
    found = vmap(lambda weights: functional_call(layer, weights, (examples[0],))[0])(stacked)
    expected = torch.stack([functional_call(layer, weights, (examples[0],))[0] for weights in ensemble])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_in_three_ways(kind: str) -> None:
    layer, x = make_layer(kind), make_input(3, 1, 3)

    def loss(data: Tensor) -> Tensor:
        return layer(data)[0].square().sum()

    by_functional = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), by_functional, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(jacrev(jacrev(loss))(x), by_functional, rtol=1e-11, atol=1e-13)


def test_double_backward_of_a_float32_lstm() -> None:
    """oneDNN's LSTM has no second derivative; ours has, whichever backend ran the forward."""
    torch.manual_seed(0)
    layer = tg.LSTM(3, 4)
    x = torch.rand(5, 2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    found = torch.autograd.grad(first.square().sum(), layer.parameters())
    double, wide = layer.double(), x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(double(wide)[0].square().sum(), wide, create_graph=True)
    for ours, exact in zip(found, torch.autograd.grad(first.square().sum(), double.parameters()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
