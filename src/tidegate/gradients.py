# SPDX-License-Identifier: Apache-2.0
"""The operators' gradients: the forward's by the backend that ran it, the backward's by the reference's equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate import backends, dispatch, reference, signature
from tidegate.cells import Call, Cell


class Recurrence(torch.autograd.Function):
    """`apply(call, backend, returns_saved, *call.tensors) -> (output, *final states[, saved])`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, call: Call, backend: backends.Backend, returns_saved: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.needs = ctx.needs_input_grad[3:]
        ctx.graph = ctx.kept_at = None
        if not dispatch.is_plain():
            operator = signature.forward_operator(call.cell)
            results = dispatch.below_autograd(operator, *signature.arguments(call), backend.name, True)
        elif backend.composite is not None:
            # torch's operators keep what they need in a graph of their own, which one backward uses up.
            with dispatch.recording():
                recorded, wanted = backends.detached(call, ctx.needs)
                outputs = backend.composite(recorded)
            ctx.graph = (outputs, wanted)
            results = (*(output.detach() for output in outputs), call.input.new_empty(0))
        else:
            results = backends.run_forward(backend, call, save=True)
            if not returns_saved and not dispatch.has_saved_tensor_hooks():
                ctx.kept_at = results[-1].data_ptr()
        ctx.save_for_backward(*tensors, call.lengths, call.resets, results[0], results[-1])
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.backend, ctx.constants = call.cell, backend, signature.constants(call)
        if not returns_saved:
            return results[:-1]
        ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        graph: Any = ctx.graph
        ctx.graph = None
        gradients = gradients[: 1 + len(ctx.cell.states)]
        if graph is not None and not torch.is_grad_enabled():
            outputs, wanted = graph
            found = backends.graph_gradients(outputs, wanted, gradients, ctx.needs)
        elif dispatch.is_plain() and not torch.is_grad_enabled():
            *inputs, output, saved = ctx.saved_tensors
            call, _ = signature.read(ctx.cell, (*inputs, *ctx.constants))
            # Nobody sees it again: it is what the forward made, not what a hook unpacked, and the graph is used up.
            overwrite = saved.data_ptr() == ctx.kept_at and not dispatch.keeps_graph()
            grad_output, *grad_states = gradients
            found = backends.run_backward(
                ctx.backend, call, output, saved, grad_output, tuple(grad_states), ctx.needs, overwrite
            )
        else:
            *inputs, output, saved = ctx.saved_tensors
            rest = (ctx.backend.name, output, saved, *gradients, list(ctx.needs))
            found = signature.backward_operator(ctx.cell)(*inputs, *ctx.constants, *rest)
            found = tuple(grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
        return (None, None, None, *found)


class Gradient(torch.autograd.Function):
    """`apply(cell, *arguments of the backward operator) -> gradients`, differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, *arguments: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*(argument for argument in arguments if isinstance(argument, Tensor)))
        ctx.cell = cell
        ctx.constants = [None if isinstance(argument, Tensor) else (argument,) for argument in arguments]
        ctx.set_materialize_grads(False)
        operator = signature.backward_operator(cell)
        return operator(*arguments) if dispatch.is_plain() else dispatch.below_autograd(operator, *arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        call, rest = signature.read(ctx.cell, arguments)
        cotangents, needs = rest[3:-1], rest[-1]
        wanted = [k for k, need in enumerate(needs) if need and gradients[k] is not None]
        inputs = [*call.tensors, *cotangents]

        def differentiated(values: Sequence[Any]) -> tuple[Tensor, ...]:
            replaced = call.with_tensors(values[: len(call.tensors)])
            found = of_reference(replaced, values[len(call.tensors) :])
            return tuple(found[k] for k in wanted)

        found: list[Any] = [None] * len(inputs)
        if wanted:
            found = pullback(differentiated, inputs, lambda _: tuple(gradients[k] for k in wanted))
        count, first = len(call.tensors), len(arguments) - len(cotangents) - 1
        return (None, *found[:count], *(None,) * (first - count), *found[count:], None)


def of_reference(call: Call, cotangents: Sequence[Tensor | None]) -> list[Any]:
    """Gradients of `call.tensors` through the reference, in torch.func's terms: they can be differentiated again."""

    def seeds(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(o) if c is None else c for o, c in zip(outputs, cotangents, strict=True))

    return pullback(lambda tensors: reference.forward(call.with_tensors(tensors)), call.tensors, seeds)


def pullback(
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
