# SPDX-License-Identifier: Apache-2.0
"""The registered operators, and the one door to them: `recurrence(call)`.

Per cell, `torch.ops.tidegate.<cell>` runs one layer in one direction over a whole sequence and
`torch.ops.tidegate.<cell>_backward` is its gradient. Both are opaque to the compiler, never unrolled over T.
In plain eager mode the door calls the chosen backend itself; under torch.compile, export, torch.func and dispatch
modes it calls the operator, whose registrations say what each of those needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, _C
from torch._functorch.utils import enable_single_level_autograd_function
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tidegate import backends, reference
from tidegate.cells import CELLS, Call, Cell
from tidegate.checks import check, check_lengths
from tidegate.errors import UnsupportedError

_LIBRARY = torch.library.Library("tidegate", "DEF")
_SCHEMA_TYPES = {bool: "bool", str: "str"}


def recurrence(call: Call) -> tuple[Tensor, ...]:
    """Run one layer in one direction over a whole sequence.

    Returns:
        output (T, B, P), 0 past each row's length, and the final states.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a length is outside 0..T.
        UnsupportedError: the backend that the user named cannot run this call.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return _operator(call, backends.named())
    if _C._are_functorch_transforms_active():
        return _transformed(call)
    check(call)
    if forward_ad._current_level >= 0:
        return _forward_mode(call, backends.named())
    check_lengths(call.lengths, call.input.shape[0])
    if _observers:
        return _observed(call)
    backend = backends.select(call, backends.named())
    differentiates = torch.is_grad_enabled() and _any_requires_grad(call)
    if backend is backends.REFERENCE:
        return reference.forward(call)
    if differentiates:
        return _Recurrence.apply(call.cell, backend, *_arguments(call))[:-1]
    return backends.run_forward(backend, call, save=False)[:-1]


_observers: list[Callable[[Call], None]] = []


def observe(observer: Callable[[Call], None], run: Callable[[], Any]) -> None:
    """Run `run` with every call that reaches the door handed to `observer` and answered with zeros."""
    _observers.append(observer)
    try:
        with torch.no_grad():
            run()
    finally:
        _observers.pop()


def _observed(call: Call) -> tuple[Tensor, ...]:
    for observer in _observers:
        observer(call)
    return (call.input.new_zeros((call.input.shape[0], *call.states[0].shape)), *map(torch.zeros_like, call.states))


def _any_requires_grad(call: Call) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in call.tensors)


def _transformed(call: Call) -> tuple[Tensor, ...]:
    """Under torch.func: the operator, but for what torch batches better in plain operations than we call by call."""
    kinds = {interpreter.key() for interpreter in _C._functorch.get_interpreter_stack()}
    vmap, grad = _C._functorch.TransformType.Vmap, _C._functorch.TransformType.Grad
    weights = (weight for weight in call.weights.values() if weight is not None)
    per_example = vmap in kinds and (grad in kinds or any(map(_C._functorch.is_batchedtensor, weights)))
    if (per_example or not kinds <= {vmap, grad}) and backends.named() in ("", "reference"):
        check(call)
        return reference.forward(call)
    return _operator(call, backends.named())


def _forward_mode(call: Call, name: str) -> tuple[Tensor, ...]:
    if name not in ("", "reference"):
        raise UnsupportedError(f"{name}: forward-mode differentiation of {backends.describe(call)} runs on reference")
    return reference.forward(call)


def _operator(call: Call, name: str) -> tuple[Tensor, ...]:
    return _forward_operator(call.cell)(*_arguments(call), name, False)[:-1]


def _forward_operator(cell: Cell) -> Any:
    return getattr(torch.ops.tidegate, cell.name).default


def _backward_operator(cell: Cell) -> Any:
    return getattr(torch.ops.tidegate, cell.name + "_backward").default


def _arguments(call: Call) -> tuple[Any, ...]:
    return (*call.tensors, call.lengths, call.resets, call.reverse, *call.options.values())


def _arity(cell: Cell) -> int:
    """How many of the operator's arguments describe the call; of these, `_tensor_count` are differentiable."""
    return _tensor_count(cell) + 3 + len(cell.options)


def _tensor_count(cell: Cell) -> int:
    return 1 + len(cell.states) + len(cell.weights)


def _as_call(cell: Cell, arguments: Sequence[Any]) -> Call:
    states = 1 + len(cell.states)
    tensors = _tensor_count(cell)
    return Call(
        cell,
        arguments[0],
        tuple(arguments[1:states]),
        dict(zip(cell.weights, arguments[states:tensors], strict=True)),
        *arguments[tensors : tensors + 3],
        dict(zip(cell.options, arguments[tensors + 3 :], strict=True)),
    )


def _schemas(cell: Cell) -> tuple[str, str]:
    states = "".join(f"Tensor {state}_0, " for state in cell.states)
    weights = "".join(f"Tensor{'?' * (name in cell.optional_weights)} {name}, " for name in cell.weights)
    options = "".join(f"{_SCHEMA_TYPES[kind]} {name}, " for name, (kind, _) in cell.options.items())
    call = f"Tensor input, {states}{weights}Tensor? lengths, Tensor? resets, bool reverse, {options}str backend"
    finals = "".join(f"Tensor {state}_n, " for state in cell.states)
    gradients = "".join(f", Tensor? grad_{state}_n" for state in cell.states)
    forward = f"{cell.name}({call}, bool save) -> (Tensor output, {finals}Tensor saved)"
    inner = f"Tensor output, Tensor saved, Tensor? grad_output{gradients}, bool[] needs"
    returned = ", ".join(["Tensor"] * _tensor_count(cell))
    return forward, f"{cell.name}_backward({call}, {inner}) -> ({returned})"


class _Recurrence(torch.autograd.Function):
    """The operator's gradient; a gradient of that one is `_Gradient`."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, backend: backends.Backend, *arguments: Any) -> tuple[Tensor, ...]:
        call = _as_call(cell, arguments)
        ctx.needs = tuple(ctx.needs_input_grad[2 : 2 + _tensor_count(cell)])
        ctx.graph = None
        if not _is_plain():
            with _C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(_C._are_functorch_transforms_active()):
                results = _forward_operator(cell)(*arguments, backend.name, True)
        elif backend.composite is not None:
            # torch's operators keep what they need in a graph of their own, which one backward uses up.
            with torch.enable_grad():
                recorded, wanted = backends.detached(call, ctx.needs)
                outputs = backend.composite(recorded)
            ctx.graph = (outputs, wanted)
            results = (*(output.detach() for output in outputs), call.input.new_empty(0))
        else:
            results = backends.run_forward(backend, call, save=True)
        ctx.save_for_backward(*call.tensors, call.lengths, call.resets, results[0], results[-1])
        ctx.mark_non_differentiable(results[-1])
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.backend, ctx.constants = cell, backend, arguments[_tensor_count(cell) + 2 :]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        graph, ctx.graph = ctx.graph, None
        gradients = gradients[:-1]
        if graph is not None and not torch.is_grad_enabled():
            found = backends.graph_gradients(*graph, gradients, ctx.needs)
        else:
            *inputs, output, saved = ctx.saved_tensors
            arguments = (*inputs, *ctx.constants, ctx.backend.name, output, saved, *gradients, list(ctx.needs))
            found = _backward_operator(ctx.cell)(*arguments)
            found = tuple(grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
        return (None, None, *found, *(None,) * (2 + len(ctx.constants)))


class _Gradient(torch.autograd.Function):
    """The backward operator, whose own gradient comes from the reference's equations, to any order."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, *arguments: Any) -> tuple[Tensor, ...]:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.cell = cell
        ctx.constants = [None if isinstance(argument, Tensor) else (argument,) for argument in arguments]
        ctx.set_materialize_grads(False)
        with _C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(_C._are_functorch_transforms_active()):
            return _backward_operator(cell)(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        count, first = _tensor_count(ctx.cell), _arity(ctx.cell) + 3
        inputs, cotangents = arguments[:count], arguments[first:-1]
        places = [k for k, tensor in enumerate([*inputs, *cotangents]) if tensor is not None]
        wanted = [k for k, need in enumerate(arguments[-1]) if need and gradients[k] is not None]

        def gradient(*primals: Tensor) -> tuple[Tensor, ...]:
            everything: list[Any] = [None] * (count + len(cotangents))
            for place, primal in zip(places, primals, strict=True):
                everything[place] = primal
            call = _as_call(ctx.cell, [*everything[:count], *arguments[count : _arity(ctx.cell)]])
            found = _reference_gradients(call, everything[count:])
            return tuple(found[k] for k in wanted)

        found: list[Any] = [None] * len(arguments)
        if wanted:
            _, pullback = torch.func.vjp(gradient, *([*inputs, *cotangents][k] for k in places))
            for place, grad in zip(places, pullback(tuple(gradients[k] for k in wanted)), strict=True):
                found[place if place < count else place - count + first] = grad
        return (None, *found)


def _reference_gradients(call: Call, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of `Call.tensors` through the reference, in torch.func's terms, so that they can be differentiated."""
    present = [k for k, tensor in enumerate(call.tensors) if tensor is not None]

    def run(*primals: Tensor) -> tuple[Tensor, ...]:
        tensors: list[Any] = [None] * len(call.tensors)
        for k, primal in zip(present, primals, strict=True):
            tensors[k] = primal
        return reference.forward(call.with_tensors(tensors))

    outputs, pullback = torch.func.vjp(run, *(call.tensors[k] for k in present))
    seeds = (torch.zeros_like(o) if c is None else c for o, c in zip(outputs, cotangents, strict=True))
    found: list[Any] = [None] * len(call.tensors)
    for k, grad in zip(present, pullback(tuple(seeds)), strict=True):
        found[k] = grad
    return tuple(found)


def _is_plain() -> bool:
    """Real tensors, no transform: what the backends can be handed."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return not _C._are_functorch_transforms_active()


def _register(cell: Cell) -> None:
    for schema in _schemas(cell):
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    forward, backward = _forward_operator(cell), _backward_operator(cell)
    arity, count = _arity(cell), _tensor_count(cell)

    def run_forward(*arguments: Any) -> tuple[Tensor, ...]:
        call = _as_call(cell, arguments[:arity])
        check(call)
        check_lengths(call.lengths, call.input.shape[0])
        return backends.run_forward(backends.select(call, arguments[arity]), call, arguments[arity + 1])

    def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
        call = _as_call(cell, arguments[:arity])
        name, output, saved, grad_output, *grad_states, needs = arguments[arity:]
        backend = backends.select(call, name)
        found = backends.run_backward(backend, call, output, saved, grad_output, tuple(grad_states), tuple(needs))
        return tuple(
            call.input.new_empty(0)
            if tensor is None or not need
            else torch.zeros_like(tensor)
            if grad is None
            else grad
            for grad, tensor, need in zip(found, call.tensors, needs, strict=True)
        )

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        call = _as_call(cell, arguments[:arity])
        check(call)
        output = call.input.new_empty((call.input.shape[0], *call.states[0].shape))
        name, save = arguments[arity:]
        shape = backends.select(call, name).saved_shape(call) if save else (0,)
        return (output, *(state.new_empty(state.shape) for state in call.states), call.input.new_empty(shape))

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        call, needs = _as_call(cell, arguments[:arity]), arguments[-1]
        return tuple(
            call.input.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
            for tensor, need in zip(call.tensors, needs, strict=True)
        )

    def autograd_forward(*arguments: Any) -> tuple[Tensor, ...]:
        call, name = _as_call(cell, arguments[:arity]), arguments[arity]
        if forward_ad._current_level >= 0:
            return (*_forward_mode(call, name), call.input.new_empty(0))
        if torch.is_grad_enabled() and _any_requires_grad(call):
            check(call)
            # The backward must be the same backend's, so a graph that has one fixes the backend when it is traced.
            with enable_single_level_autograd_function():
                return _apply(_Recurrence, cell, backends.select(call, name), *arguments[:arity])
        if _is_plain():
            return run_forward(*arguments)
        with _C._AutoDispatchBelowAutograd():
            return forward(*arguments)

    def autograd_backward(*arguments: Any) -> tuple[Tensor, ...]:
        if forward_ad._current_level >= 0:
            call, cotangents = _as_call(cell, arguments[:arity]), arguments[arity + 3 : -1]
            return tuple(
                call.input.new_empty(0) if grad is None or not need else grad
                for grad, need in zip(_reference_gradients(call, cotangents), arguments[-1], strict=True)
            )
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            with enable_single_level_autograd_function():
                return _apply(_Gradient, cell, *arguments)
        if _is_plain():
            return run_backward(*arguments)
        with _C._AutoDispatchBelowAutograd():
            return backward(*arguments)

    for operator, run, fake, autograd in (
        (forward, run_forward, fake_forward, autograd_forward),
        (backward, run_backward, fake_backward, autograd_backward),
    ):
        _LIBRARY.impl(operator, run, "CompositeExplicitAutograd")
        _LIBRARY.impl(operator, autograd, "Autograd")
        torch.library.register_fake(operator, fake, lib=_LIBRARY)
    torch.library.register_vmap(forward, _batched_forward(cell, forward, count), lib=_LIBRARY)
    torch.library.register_vmap(backward, _one_by_one(backward), lib=_LIBRARY)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` at the Autograd key, where one level of torch.func's stack is being run, like any operator's."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _one_by_one(operator: Any) -> Callable[..., Any]:
    """A batching rule that runs the operator on each example."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = [
            operator(*(a if dim is None else a.select(dim, k) for a, dim in zip(arguments, in_dims, strict=True)))
            for k in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _batched_forward(cell: Cell, operator: Any, count: int) -> Callable[..., Any]:
    """A batching rule that folds the examples into the batch where the weights are common to them."""
    first_weight = 1 + len(cell.states)
    # Where B stands: input (T, B, I), states (B, .), lengths (B,), resets (T, B).
    batch_dims = {0: 1, **{k: 0 for k in range(1, first_weight)}, count: 0, count + 1: 1}
    loop = _one_by_one(operator)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        save = arguments[-1]
        if save or any(dim is not None for dim in in_dims[first_weight:count]):
            return loop(info, in_dims, *arguments)
        folded = list(arguments)
        for place, batch_dim in batch_dims.items():
            if arguments[place] is not None:
                folded[place] = _folded(arguments[place], in_dims[place], batch_dim, info.batch_size)
        *outputs, saved = operator(*folded)
        dims = (1,) + (0,) * len(cell.states)
        unfolded = (output.unflatten(dim, (info.batch_size, -1)) for output, dim in zip(outputs, dims, strict=True))
        return (*unfolded, saved), (*dims, None)

    return rule


def _folded(tensor: Tensor, vmap_dim: int | None, batch_dim: int, size: int) -> Tensor:
    if vmap_dim is None:
        front = tensor.unsqueeze(0).expand(size, *tensor.shape)
    else:
        front = tensor.movedim(vmap_dim, 0)
    return front.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)


for _cell in CELLS:
    _register(_cell)
