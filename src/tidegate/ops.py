# SPDX-License-Identifier: Apache-2.0
"""The one way from a module to a kernel, `run(call)`, and the registered operators that compilers and transforms see.

In plain eager mode `run` hands the whole call to the chosen backend. Under torch.compile, export, torch.func and
dispatch modes the call falls into layers, and each is one of `torch.ops.tidegate.<cell>`, with its gradient
`<cell>_backward`: opaque to the compiler, never unrolled over T. Their registrations say what each of those needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tidegate import backends, batching, dispatch, flops, gradients, reference, signature
from tidegate.call import Call, Layer, layer_by_layer
from tidegate.cell import CELLS, Cell
from tidegate.checks import check_layer, check_lengths
from tidegate.errors import UnsupportedError
from tidegate.higher_order import Gradient, of_reference
from tidegate.scope import scope

_LIBRARY = torch.library.Library("tidegate", "DEF")


def no_faults(call: Call) -> None:
    """For a caller that has nothing to say in words of its own."""


def run(call: Call, find_faults: Callable[[Call], None] = no_faults) -> Sequence[Tensor]:
    """Run a module's whole call.

    Args:
        find_faults: raises what its caller has to say against the arguments, in its own words. It is asked before what
            does not look for itself runs, and after a refusal.

    Returns:
        the output, 0 past each row's length, but of a step; and the final states. All as `call.layout` says.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a length is outside 0..T.
        UnsupportedError: the backend that the user named cannot run this call.
    """
    # The first look is enough nearly always.
    if (not dispatch.is_bare() or scope.observer is not None) and _is_special(call):
        find_faults(call)
        return _in_other_modes(call)
    chosen = backends.select(call, scope.named)
    if chosen.checks != "all" or call.between is not None:
        if not (chosen.checks and call.is_step):
            find_faults(call)
            backends.find_faults(call)
        if not chosen.takes_stacks:
            owned = chosen.composite is None and not torch.is_grad_enabled()
            return layer_by_layer(call, partial(_run_layer_on, chosen), owned)
        if call.between is not None:
            return layer_by_layer(call, _run_layer)
    try:
        # Of torch's operations, torch sees for itself whether there is something to record.
        if torch.is_grad_enabled() and (chosen.composite is not None or call.records()):
            return gradients.record(call, chosen)
        if scope.trace is not None or chosen.forward is None:
            return backends.run(chosen, call)
        return chosen.forward(call)
    except RuntimeError:
        # What checks for itself refuses at the first fault, in its own words: name them all, if it is one.
        find_faults(call)
        backends.find_faults(call)
        raise


def _run_layer(layer: Layer) -> tuple[Tensor, ...]:
    """One layer in plain eager mode, on the backend that fits it."""
    call = layer.call()
    chosen = backends.select(call, scope.named)
    if not chosen.takes_stacks:
        return _run_layer_on(chosen, layer)
    output, *finals = run(call)
    return (output, *(final.squeeze(0) for final in finals))


def _run_layer_on(chosen: backends.Backend, layer: Layer) -> tuple[Tensor, ...]:
    """One layer in plain eager mode on a backend that takes no stacks."""
    if chosen.composite is not None:
        return backends.run_composite(chosen, layer)
    if torch.is_grad_enabled() and _any_requires_grad(layer):
        return dispatch.apply_plain(gradients.Recurrence, layer, chosen, False, *layer.tensors)
    return backends.run_layer(chosen, layer, save=False)[:-1]


def _is_special(call: Call) -> bool:
    return not dispatch.is_plain() or scope.observer is not None or dispatch.has_tangents(call)


def _in_other_modes(call: Call) -> tuple[Tensor, ...]:
    """Under a compiler, a dispatch mode, torch.func, forward-mode differentiation, or an observer."""
    if scope.observer is not None:
        return scope.observer(call)
    if scope.decomposes:
        return layer_by_layer(call, reference.forward)
    if dispatch.is_traced():
        flops.offer()
        return layer_by_layer(call, _operator)
    backends.find_faults(call)
    _refuse_tangents(call)
    if dispatch.is_transformed():
        by_reference = dispatch.is_per_example(call.weights) and scope.named in ("", "reference")
        return layer_by_layer(call, reference.forward if by_reference else _operator)
    return layer_by_layer(call, _forward_mode)


def _operator(layer: Layer) -> tuple[Tensor, ...]:
    return signature.forward_operator(layer.cell)(
        *signature.arguments(layer), scope.named or backends.AUTOMATIC, False
    )[:-1]


def _forward_mode(layer: Layer, name: str | None = None) -> tuple[Tensor, ...]:
    name = scope.named if name is None else name
    _refuse_tangents(layer)
    if name not in ("", "reference"):
        raise UnsupportedError(f"{name}: forward-mode differentiation of {backends.describe(layer)} runs on reference")
    return reference.forward(layer)


def _refuse_tangents(call: Call | Layer) -> None:
    if call.cell.storage and dispatch.has_tangents(call):
        raise UnsupportedError(f"{backends.describe(call)}: its weights are stored for inference, not differentiated")


def _any_requires_grad(layer: Layer) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in layer.tensors)


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
            dispatch.register_fake(operator, shapes, _LIBRARY)
        flops.register(cell)
        torch.library.register_vmap(forward, batching.folded(cell), lib=_LIBRARY)
        torch.library.register_vmap(backward, batching.one_by_one(backward), lib=_LIBRARY)

    def forward(self, *arguments: object) -> tuple[Tensor, ...]:
        layer, (name, save) = signature.read(self.cell, arguments)
        check_layer(layer)
        check_lengths(layer.lengths, layer.input.shape[0])
        chosen = backends.select_for_operator(layer, name)
        return backends.run_layer(chosen, layer, save)

    def forward_shapes(self, *arguments: object) -> tuple[Tensor, ...]:
        layer, (name, save) = signature.read(self.cell, arguments)
        check_layer(layer)
        output = layer.input.new_empty((layer.input.shape[0], *layer.states[0].shape))
        shape: tuple[int, ...] = (0,)
        if save:
            shape = backends.saved_shape(backends.select_for_operator(layer, name), layer)
        return (output, *(state.new_empty(state.shape) for state in layer.states), layer.input.new_empty(shape))

    def forward_autograd(self, *arguments: object) -> tuple[Tensor, ...]:
        flops.offer()
        layer, (name, _) = signature.read(self.cell, arguments)
        if dispatch.has_tangents(layer):
            return (*_forward_mode(layer, backends.demanded(name)), layer.input.new_empty(0))
        if torch.is_grad_enabled() and _any_requires_grad(layer):
            check_layer(layer)
            # The backward must be the same backend's: a graph that has one fixes the backend when it is traced.
            chosen = backends.select_for_operator(layer, name)
            if chosen.composite is not None and dispatch.is_plain():
                return (*backends.run_composite_layer(chosen, layer), layer.input.new_empty(0))
            return dispatch.apply(gradients.Recurrence, layer, chosen, True, *layer.tensors)
        if dispatch.is_plain():
            return self.forward(*arguments)
        return dispatch.below_autograd(signature.forward_operator(self.cell), *arguments)

    def backward(self, *arguments: object) -> tuple[Tensor, ...]:
        layer, (name, output, saved, *cotangents, needs) = signature.read(self.cell, arguments)
        chosen = backends.select_for_operator(layer, name)
        found = backends.run_layer_backward(chosen, layer, output, saved, tuple(cotangents), tuple(needs))
        return self._every_gradient(layer, found, needs)

    def backward_shapes(self, *arguments: object) -> tuple[Tensor, ...]:
        layer, _ = signature.read(self.cell, arguments)
        return self._every_gradient(layer, (None,) * len(layer.tensors), arguments[-1])

    def backward_autograd(self, *arguments: object) -> tuple[Tensor, ...]:
        flops.offer()
        layer, (_, _, _, *cotangents, needs) = signature.read(self.cell, arguments)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if dispatch.any_tangent(tensors):
            return self._every_gradient(layer, of_reference(layer, cotangents), needs)
        operator = signature.backward_operator(self.cell)

        def first_order() -> tuple[Tensor, ...]:
            return self.backward(*arguments) if dispatch.is_plain() else dispatch.below_autograd(operator, *arguments)

        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return dispatch.apply(Gradient, layer, first_order, needs, *layer.tensors, *cotangents)
        return first_order()

    def _every_gradient(self, layer: Layer, found: Any, needs: Any) -> tuple[Tensor, ...]:
        """An operator returns tensors only: an empty one where none is needed, zeros where nothing flows."""
        everything: list[Tensor] = []
        for tensor, gradient, need in zip(layer.tensors, found, needs, strict=True):
            if tensor is None or not need:
                everything.append(layer.input.new_empty(0))
            else:
                everything.append(tensor.new_zeros(tensor.shape) if gradient is None else gradient)
        return tuple(everything)


def register(cell: Cell) -> None:
    """Give a cell its operators: from then on layers, cell modules and streams of it can be made.

    Raises:
        ValueError: there is a cell of this name.
    """
    if hasattr(torch.ops.tidegate, cell.name):
        raise ValueError(f"cell: expected a name that is free, got {cell.name!r}")
    _Operators(cell)


for _cell in CELLS:
    register(_cell)
