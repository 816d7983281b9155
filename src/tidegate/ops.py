# SPDX-License-Identifier: Apache-2.0
"""The registered operators, and the one door to them: `recurrence(call)`.

Per cell, `torch.ops.tidegate.<cell>` runs one layer in one direction over a whole sequence and
`torch.ops.tidegate.<cell>_backward` is its gradient. Both are opaque to the compiler, never unrolled over T.
In plain eager mode the door calls the chosen backend itself; under torch.compile, export, torch.func and dispatch
modes it calls the operator, whose registrations say what each of those needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tidegate import backends, batching, dispatch, gradients, reference, signature
from tidegate.cells import CELLS, Call, Cell
from tidegate.checks import check, check_lengths
from tidegate.errors import UnsupportedError

_LIBRARY = torch.library.Library("tidegate", "DEF")


def recurrence(call: Call) -> tuple[Tensor, ...]:
    """Run one layer in one direction over a whole sequence.

    Returns:
        output (T, B, P), 0 past each row's length, and the final states.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a length is outside 0..T.
        UnsupportedError: the backend that the user named cannot run this call.
    """
    if not dispatch.is_plain() or dispatch.is_forward_mode() or _observers:
        return _in_other_modes(call)
    backend = backends.select(call, backends.named())
    if not backend.checks:
        check(call)
        check_lengths(call.lengths, call.input.shape[0])
    if backend is backends.REFERENCE:
        return reference.forward(call)
    if torch.is_grad_enabled() and _any_requires_grad(call):
        return dispatch.apply_plain(gradients.Recurrence, call, backend, False, *call.tensors)
    return backends.run_forward(backend, call, save=False)[:-1]


def short_way() -> backends.ShortWay | None:
    """What to ask first, where nothing traces, transforms or recasts a call."""
    if not dispatch.is_bare() or _observers:
        return None
    return gradients.short_way() if torch.is_grad_enabled() else backends.short().short


def _in_other_modes(call: Call) -> tuple[Tensor, ...]:
    """Under a compiler, a dispatch mode, torch.func, forward-mode differentiation, or `observe`."""
    if dispatch.is_traced():
        return _operator(call)
    check(call)
    if dispatch.is_transformed():
        by_reference = dispatch.is_per_example(call.weights.values()) and backends.named() in ("", "reference")
        return reference.forward(call) if by_reference else _operator(call)
    check_lengths(call.lengths, call.input.shape[0])
    return _observed(call) if _observers else _forward_mode(call, backends.named())


def observe(observer: Callable[[Call], None], run: Callable[[], Any]) -> None:
    """Run `run` with every call that reaches the door handed to `observer` and answered with zeros."""
    _observers.append(observer)
    try:
        with torch.no_grad():
            run()
    finally:
        _observers.pop()


_observers: list[Callable[[Call], None]] = []


def _observed(call: Call) -> tuple[Tensor, ...]:
    for observer in _observers:
        observer(call)
    return (call.input.new_zeros((call.input.shape[0], *call.states[0].shape)), *map(torch.zeros_like, call.states))


def _operator(call: Call) -> tuple[Tensor, ...]:
    return signature.forward_operator(call.cell)(
        *signature.arguments(call), backends.named() or backends.AUTOMATIC, False
    )[:-1]


def _any_requires_grad(call: Call) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in call.tensors)


def _forward_mode(call: Call, name: str) -> tuple[Tensor, ...]:
    if name not in ("", "reference"):
        raise UnsupportedError(f"{name}: forward-mode differentiation of {backends.describe(call)} runs on reference")
    return reference.forward(call)


class _Operators:
    """One cell's two operators: what they do on real tensors, on shapes alone, and at the Autograd key."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        for schema in signature.schemas(cell):
            _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        forward, backward = signature.forward_operator(cell), signature.backward_operator(cell)
        for operator, run, shapes, autograd in (
            (forward, self.forward, self.forward_shapes, self.forward_autograd),
            (backward, self.backward, self.backward_shapes, self.backward_autograd),
        ):
            _LIBRARY.impl(operator, run, "CompositeExplicitAutograd")
            _LIBRARY.impl(operator, autograd, "Autograd")
            torch.library.register_fake(operator, shapes, lib=_LIBRARY)
        torch.library.register_vmap(forward, batching.folded(cell), lib=_LIBRARY)
        torch.library.register_vmap(backward, batching.one_by_one(backward), lib=_LIBRARY)

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, (name, save) = signature.read(self.cell, arguments)
        check(call)
        check_lengths(call.lengths, call.input.shape[0])
        return backends.run_forward(backends.select(call, name), call, save)

    def forward_shapes(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, (name, save) = signature.read(self.cell, arguments)
        check(call)
        output = call.input.new_empty((call.input.shape[0], *call.states[0].shape))
        saved = call.input.new_empty(backends.select(call, name).saved_shape(call) if save else (0,))
        return (output, *(state.new_empty(state.shape) for state in call.states), saved)

    def forward_autograd(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, (name, _) = signature.read(self.cell, arguments)
        if dispatch.is_forward_mode():
            return (*_forward_mode(call, backends.demanded(name)), call.input.new_empty(0))
        if torch.is_grad_enabled() and _any_requires_grad(call):
            check(call)
            # The backward must be the same backend's: a graph that has one fixes the backend when it is traced.
            backend = backends.select(call, name)
            return dispatch.apply(gradients.Recurrence, call, backend, True, *call.tensors)
        if dispatch.is_plain():
            return self.forward(*arguments)
        return dispatch.below_autograd(signature.forward_operator(self.cell), *arguments)

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, (name, output, saved, grad_output, *grad_states, needs) = signature.read(self.cell, arguments)
        backend = backends.select(call, name)
        found = backends.run_backward(backend, call, output, saved, grad_output, tuple(grad_states), tuple(needs))
        return self._every_gradient(call, found, needs)

    def backward_shapes(self, *arguments: Any) -> tuple[Tensor, ...]:
        call, _ = signature.read(self.cell, arguments)
        return self._every_gradient(call, (None,) * len(call.tensors), arguments[-1])

    def backward_autograd(self, *arguments: Any) -> tuple[Tensor, ...]:
        if dispatch.is_forward_mode():
            call, (_, _, _, *cotangents, needs) = signature.read(self.cell, arguments)
            return self._every_gradient(call, gradients.of_reference(call, cotangents), needs)
        tensors = (argument for argument in arguments if isinstance(argument, Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return dispatch.apply(gradients.Gradient, self.cell, *arguments)
        if dispatch.is_plain():
            return self.backward(*arguments)
        return dispatch.below_autograd(signature.backward_operator(self.cell), *arguments)

    def _every_gradient(self, call: Call, found: Any, needs: Any) -> tuple[Tensor, ...]:
        """An operator returns tensors only: an empty one where none is needed, zeros where nothing flows."""
        everything: list[Tensor] = []
        for tensor, gradient, need in zip(call.tensors, found, needs, strict=True):
            if tensor is None or not need:
                everything.append(call.input.new_empty(0))
            else:
                everything.append(tensor.new_zeros(tensor.shape) if gradient is None else gradient)
        return tuple(everything)


for _cell in CELLS:
    _Operators(_cell)
