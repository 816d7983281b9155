# SPDX-License-Identifier: Apache-2.0
"""Gradients that are differentiated again, or come many at once: by the reference, in operations that torch knows.

A kernel computes a first gradient of plain tensors and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tidegate import dispatch, reference
from tidegate.call import Call, Layer, Unit, layer_by_layer

Gradients = tuple["Tensor | None", ...]
U = TypeVar("U", bound=Unit)


def opens_gate(unit: Unit) -> bool:
    """An LSTM's step, (h', c', o): the node returns c' and o, from which h' is put together."""
    return isinstance(unit, Call) and unit.is_step and unit.cell.name == "lstm"


def by_reference(unit: Unit) -> tuple[Tensor, ...]:
    """The reference's results, in the form that the unit's node returns them."""
    if isinstance(unit, Layer):
        return reference.forward(unit)
    results = layer_by_layer(unit, reference.forward)
    if opens_gate(unit):
        return (*results, reference.output_gate(unit))
    return results


def detached(unit: U, needs: tuple[bool, ...]) -> tuple[U, list[Tensor]]:
    """A call or a layer on leaves of a graph of its own, and those of them that a gradient is needed of."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(unit.tensors, needs, strict=True)
    ]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need]
    return unit.with_tensors(leaves), wanted


def graph_gradients(
    outputs: Sequence[Tensor], wanted: list[Tensor], gradients: Gradients, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of the recorded `outputs` for the leaves in `wanted`, spread over the places that `needs` marks."""
    pairs = [
        (out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None and out.requires_grad
    ]
    if not pairs or not wanted:
        return (None,) * len(needs)
    roots, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, wanted, cotangents, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def recorded_again(unit: Unit, gradients: Gradients, needs: tuple[bool, ...]) -> Gradients:
    """The first gradients by the forward again, of the reference, in operations that torch can batch."""
    with dispatch.recording():
        recorded, wanted = detached(unit, needs)
        return graph_gradients(by_reference(recorded), wanted, gradients, needs)


class Gradient(torch.autograd.Function):
    """`apply(call or layer, first order, needs, *its tensors, *cotangents) -> gradients`, differentiable to any order.

    Where a gradient is not needed it returns None, or what `first order` gives there.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, unit: Unit, first_order: Callable[[], Gradients], needs: Sequence[bool], *inputs: Tensor | None
    ) -> Gradients:
        ctx.save_for_backward(*inputs, unit.lengths, unit.resets)
        ctx.unit, ctx.wanted = unit.with_tensors([None] * len(unit.tensors)), needs
        ctx.set_materialize_grads(False)
        return tuple(first_order())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, lengths, resets = ctx.saved_tensors
        count = len(ctx.unit.tensors)
        unit = ctx.unit._replace(lengths=lengths, resets=resets)
        wanted = [k for k, need in enumerate(ctx.wanted) if need and gradients[k] is not None]

        def differentiated(values: Sequence[Any]) -> tuple[Tensor, ...]:
            found = of_reference(unit.with_tensors(values[:count]), values[count:])
            return tuple(found[k] for k in wanted)

        found: list[Any] = [None] * len(inputs)
        if wanted:
            found = _pullback(differentiated, inputs, lambda _: tuple(gradients[k] for k in wanted))
        return (None, None, None, *found)


def of_reference(unit: Unit, cotangents: Sequence[Tensor | None]) -> list[Any]:
    """Gradients of `unit.tensors` through the reference, in torch.func's terms: they can be differentiated again."""

    def seeds(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(o) if c is None else c for o, c in zip(outputs, cotangents, strict=True))

    return _pullback(lambda tensors: by_reference(unit.with_tensors(tensors)), unit.tensors, seeds)


def _pullback(
    function: Callable[[Sequence[Any]], tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Callable[[tuple[Tensor, ...]], tuple[Any, ...]],
) -> list[Any]:
    """The gradients of `function(inputs)`, seeded by `cotangents(outputs)`, for every input that is not None."""
    places = [k for k, tensor in enumerate(inputs) if tensor is not None]

    def spread(values: Sequence[Any]) -> list[Any]:
        full: list[Any] = [None] * len(inputs)
        for k, value in zip(places, values, strict=True):
            full[k] = value
        return full

    def of_present(*primals: Tensor) -> tuple[Tensor, ...]:
        return function(spread(primals))

    vjp: Any = torch.func.vjp
    outputs, pull = vjp(of_present, *(inputs[k] for k in places))
    return spread(pull(cotangents(outputs)))


def aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The data that the tensors have now, whatever they are given as their `.data` later."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]


class _AsItWas(torch.autograd.Function):
    """`apply(tensor, then)`: the numbers of `then`, whose gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, then: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return then.view_as(then)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def as_it_was(tensor: Tensor, then: Tensor) -> Tensor:
    """A tensor with the data that it had when `then` was made its alias, whatever its `.data` is now."""
    if tensor is then or dispatch.same_data(tensor, then):
        return tensor
    found: Any = _AsItWas.apply(tensor, then)
    return found


def as_they_were(tensors: Sequence[Tensor | None], then: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        None if tensor is None or held is None else as_it_was(tensor, held)
        for tensor, held in zip(tensors, then, strict=True)
    ]
