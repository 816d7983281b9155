# SPDX-License-Identifier: Apache-2.0
"""The operators' gradients: the forward's by the backend that ran it, the backward's by the reference's equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate import backends, dispatch, reference, signature
from tidegate.cells import Call, Cell, Form


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
        else:
            *inputs, output, saved = ctx.saved_tensors
            found = _found(ctx, inputs, output, saved, gradients)
        return (None, None, None, *found)


def _found(
    ctx: Any, inputs: Sequence[Tensor | None], output: Tensor, saved: Tensor, gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of a call's tensors, by the backend that ran it; by the operator if they are recorded in turn.

    Args:
        inputs: the call's tensors, lengths and resets.
    """
    if not dispatch.is_plain() or torch.is_grad_enabled():
        rest = (ctx.backend.name, output, saved, *gradients, list(ctx.needs))
        found = signature.backward_operator(ctx.cell)(*inputs, *ctx.constants, *rest)
        return tuple(grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
    call, _ = signature.read(ctx.cell, (*inputs, *ctx.constants))
    grad_output, *grad_states = gradients
    return backends.run_backward(
        ctx.backend, call, output, saved, grad_output, tuple(grad_states), ctx.needs, _is_ours(ctx, saved)
    )


def _is_ours(ctx: Any, saved: Tensor) -> bool:
    """Nobody sees it again: it is what the forward made, not what a hook unpacked, and the graph is used up."""
    return saved.data_ptr() == ctx.kept_at and not dispatch.keeps_graph()


def short_way() -> backends.ShortWay | None:
    """The short way of a call that is recorded."""
    return _SHORT_WAY if backends.short().recorded_forward else None


def _short_step(
    cell: Cell, options: Any, input: Tensor, states: Sequence[Any], weights: Sequence[Any]
) -> Sequence[Tensor]:
    return _recorded(cell, options, None, input, states, weights)[1:]


def _short_layers(
    cell: Cell, options: Any, input: Tensor, states: Sequence[Any], weights: Sequence[Any], form: Form
) -> Sequence[Tensor]:
    """One layer and direction after another, each recorded by itself."""
    if form.layers == 1 and not form.bidirectional:
        return _recorded(cell, options, form, input, states, weights)
    directions = 1 + form.bidirectional
    count = form.layers * directions
    each = len(weights) // count
    if len(weights) % count or any(not isinstance(state, Tensor) or state.shape[:1] != (count,) for state in states):
        return ()
    swaps = form.batch_first and input.dim() == 3
    if swaps:
        input = input.transpose(0, 1)
    finals: list[Sequence[Tensor]] = []
    for layer in range(form.layers):
        outputs: list[Tensor] = []
        for k in range(layer * directions, (layer + 1) * directions):
            one = Form(1, False, form.reverse or k % directions == 1, False, form.lengths)
            initial = [state[k : k + 1] for state in states]
            results = _recorded(cell, options, one, input, initial, weights[k * each : (k + 1) * each])
            if not results:
                return ()
            outputs.append(results[0])
            finals.append(results[1:])
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return (input.transpose(0, 1) if swaps else input, *map(torch.cat, zip(*finals, strict=True)))


def _recorded(
    cell: Cell, options: Any, form: Form | None, input: Tensor, states: Sequence[Any], weights: Sequence[Any]
) -> Sequence[Tensor]:
    """Output and new states, or nothing."""
    if len(states) not in (0, len(cell.states)):
        return ()
    h, c = (*states, None, None)[:2]
    for state in states:
        if not isinstance(state, Tensor) or state.numel() == 0:
            return ()
    if len(weights) == 2:
        weights = (*weights, None, None)
    if len(weights) != 4:
        return ()
    return dispatch.apply_plain(ShortRecurrence, cell, options, form, input, h, c, *weights)


_SHORT_WAY = backends.ShortWay(_short_step, _short_layers)


class ShortRecurrence(torch.autograd.Function):
    """`apply(*Backend.recorded_forward's arguments) -> (output, *new states)`, nothing where that answers nothing."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, cell: Cell, options: Any, form: Form | None, input: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        backend = backends.short()
        assert backend.recorded_forward is not None
        results = backend.recorded_forward(cell, options, form, input, *tensors)
        if not results:
            return ()
        count = len(cell.states)
        saved, *zeros = results[count + 1 :]
        states = zeros or tensors[:count]
        ctx.save_for_backward(input, *states, *tensors[2:], form and form.lengths, results[0], saved)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.backend, ctx.form = cell, backend, form
        ctx.constants = (form is not None and form.reverse, *options)
        ctx.kept_at = None if dispatch.has_saved_tensor_hooks() else saved.data_ptr()
        ctx.absent = (None,) * (len(cell.weights) - 4)
        needs_input, *needs = ctx.needs_input_grad[3:]
        ctx.needs = (needs_input, *needs[:count], *needs[2:], *(False for _ in ctx.absent))
        return tuple(results[: count + 1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, lengths, output, saved = ctx.saved_tensors
        count = len(ctx.cell.states)
        found = ()
        if dispatch.is_plain() and not torch.is_grad_enabled():
            ours = _is_ours(ctx, saved)
            form = ctx.form if lengths is None else ctx.form._replace(lengths=lengths)  # checked for changes since
            arguments = (ctx.cell, ctx.constants[1:], form, tensors, output, saved, gradients, ctx.needs, ours)
            found = ctx.backend.recorded_backward(*arguments)
        if not found:
            found = ShortRecurrence._backward_of_call(ctx, gradients)
        return (None, None, None, *found[: 1 + count], *(None,) * (2 - count), *found[1 + count : 5 + count])

    @staticmethod
    def _backward_of_call(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """By way of the `Call` that it was."""
        input, *tensors, lengths, output, saved = ctx.saved_tensors
        count = len(ctx.cell.states)
        states, weights = tensors[:count], tensors[count:]
        hidden_size = output.shape[-1]
        grad_output, *grad_states = gradients
        in_rows = [None if grad is None else grad.reshape(-1, hidden_size) for grad in grad_states]
        inputs = (
            _in_steps(input, ctx.form),
            *(state.view(-1, hidden_size) for state in states),
            *weights,
            *ctx.absent,
            lengths,
            None,
        )
        of_output = None if grad_output is None else _in_steps(grad_output, ctx.form)
        of_input, *found = _found(ctx, inputs, _in_steps(output, ctx.form), saved, (of_output, *in_rows))
        if of_input is not None:
            swaps = ctx.form is not None and ctx.form.batch_first and input.dim() == 3
            of_input = of_input.transpose(0, 1) if swaps else of_input.view(input.shape)
        of_states = (None if grad is None else grad.view(like.shape) for grad, like in zip(found, states, strict=False))
        return (of_input, *of_states, *found[count:])


def _in_steps(tensor: Tensor, form: Form | None) -> Tensor:
    """Of the form's dimensions, or a cell's, as (T, B, .)."""
    if form is None:
        return tensor.reshape(1, -1, tensor.shape[-1])
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor.transpose(0, 1) if form.batch_first else tensor


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
