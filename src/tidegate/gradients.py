# SPDX-License-Identifier: Apache-2.0
"""The gradients of recurrent calls: the first by the backend that ran the forward, others by `higher_order`.

What a call keeps for its backward belongs to its node alone and is not among autograd's saved tensors, so that nobody
sees it change when the backward writes over it. Only where saved-tensor hooks must see everything, for activation
checkpointing or offloading, and under torch's compiler and functional transforms, is it saved openly; then it is never
written over.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate import backends, dispatch, signature
from tidegate.backends import Backend
from tidegate.call import Call, Layer, Unit
from tidegate.higher_order import Gradient, Gradients, aliases, as_they_were, opens_gate, recorded_again

_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: {name} of "
    "tidegate's {cell}, a tensor of shape {shape}, is at version {now}; expected version {then} instead."
)


def record(call: Call, chosen: Backend) -> tuple[Tensor, ...]:
    """Run a call on a backend that takes stacks: as one autograd node, or as torch's operators record themselves."""
    if chosen.composite is not None:
        return backends.run_composite(chosen, call)
    results = dispatch.apply_plain(Recurrence, call, chosen, False, *call.tensors)
    if opens_gate(call):
        # h' depends on c', as a hook on c' must see: h' = o tanh(c').
        c, o = results
        return o * c.tanh(), c
    return results


class _Kept(NamedTuple):
    """What a node keeps for itself.

    Attributes:
        unit: the call or layer on the caller's own tensors, for a gradient of the gradient.
        read: the same on the data that they had, whatever a tensor is given as its `.data` later.
        versions: of the tensors at the places that `_places_read` names.
        output: for a backend that reads it; else None.
        saved: what the forward left.
    """

    unit: Unit
    read: Unit
    versions: list[int]
    output: Tensor | None
    saved: tuple[Tensor, ...]


class Recurrence(torch.autograd.Function):
    """`apply(call or layer, backend, as_operator, *its tensors) -> (output, *final states[, saved])`.

    As an operator, at the Autograd key, it takes a layer and returns what was saved, too.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, unit: Unit, chosen: Backend, as_operator: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.needs = ctx.needs_input_grad[3:]
        ctx.chosen, ctx.as_operator, ctx.kept = chosen, as_operator, None
        ctx.opens_gate = opens_gate(unit)
        ctx.set_materialize_grads(False)
        if not dispatch.is_plain():
            assert isinstance(unit, Layer)
            operator = signature.forward_operator(unit.cell)
            results = dispatch.below_autograd(operator, *signature.arguments(unit), chosen.name, True)
        elif isinstance(unit, Layer):
            results = backends.run_layer(chosen, unit, save=True)
        else:
            results = backends.run_forward(chosen, unit, save=True)
        # A call leaves a tensor for each of its layers.
        count = unit.layers if isinstance(unit, Call) else 1
        output, saved = results[0], tuple(results[len(results) - count :])
        if as_operator or dispatch.has_saved_tensor_hooks():
            ctx.save_for_backward(*tensors, unit.lengths, unit.resets, output, *saved)
            ctx.count = count
            ctx.unit = unit.with_tensors([None] * len(tensors))._replace(lengths=None, resets=None)
        else:
            ctx.kept = _keep(unit, ctx.needs, output, saved)
        if not as_operator:
            return tuple(results[ctx.opens_gate : len(results) - count])
        ctx.mark_non_differentiable(*saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        keeps_graph = dispatch.keeps_graph()
        kept = ctx.kept
        is_first_order = not torch.is_grad_enabled()
        if not keeps_graph:
            ctx.kept = None
        if ctx.as_operator:
            gradients = gradients[:-1]
        elif ctx.opens_gate:
            gradients = (None, *gradients)
        if kept is None:
            unit, output, saved = _unpacked(ctx)
        else:
            unit, output, saved = kept.unit, kept.output, kept.saved
        if ctx.as_operator and not (dispatch.is_plain() and is_first_order):
            assert isinstance(unit, Layer)
            rest = (ctx.chosen.name, output, *saved, *gradients, list(ctx.needs))
            found = signature.backward_operator(unit.cell)(*signature.arguments(unit), *rest)
            found = tuple(grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
        else:
            read = unit
            if kept is not None:
                _check_versions(kept, ctx.needs)
                read = kept.read
            overwrite = kept is not None and not keeps_graph
            first_order = partial(_first_order, ctx.chosen, read, output, saved, gradients, ctx.needs, overwrite)
            if is_first_order:
                found = first_order()
            else:
                then = as_they_were(unit.tensors, read.tensors)
                found = dispatch.apply_plain(Gradient, unit, first_order, ctx.needs, *then, *gradients)
        return (None, None, None, *found)


@cache
def _places_read(states: int, count: int, directions: int, needs: tuple[bool, ...]) -> tuple[int, ...]:
    """Of a unit's tensors, the places of those that the first gradient reads.

    Args:
        directions: of a call, whose states are among what the forward left, and whose input is read for its own
            weights' gradient alone; 0 for a layer.
    """
    first = 1 + states
    weights = [k for k in range(first, len(needs)) if (k - first) % count not in (2, 3)]  # biases are not read
    if not directions:
        return (*range(first), *weights)
    bottom = range(first, min(len(needs), first + directions * count), count)
    checked = [k for k in weights if needs[0] or k not in bottom]  # the input's gradient alone reads those
    return (*(0,) * any(needs[k] for k in bottom), *checked)


def _places(unit: Unit, needs: tuple[bool, ...]) -> tuple[int, ...]:
    directions = unit.directions() if isinstance(unit, Call) else 0
    return _places_read(len(unit.cell.states), len(unit.cell.parameters), directions, needs)


def _keep(unit: Unit, needs: tuple[bool, ...], output: Tensor, saved: tuple[Tensor, ...]) -> _Kept:
    tensors = unit.tensors
    versions = [version_of(tensors[k]) for k in _places(unit, needs)]
    read = unit.with_tensors(aliases(tensors))
    # Of the output an alias: whoever holds the output holds this node.
    return _Kept(unit, read, versions, output.detach() if isinstance(unit, Layer) else None, saved)


def version_of(tensor: Tensor | None) -> int:
    """Of its data; one made in inference mode has none."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _check_versions(kept: _Kept, needs: tuple[bool, ...]) -> None:
    """Raise, as torch does, if what the first gradient reads was changed in place."""
    tensors, cell = kept.unit.tensors, kept.unit.cell
    for k, version in zip(_places(kept.unit, needs), kept.versions, strict=True):
        changed = tensors[k]
        now = version_of(changed)
        if changed is not None and now != version:
            names = ["input", *(f"{state}_0" for state in cell.states), *cell.parameters]
            first = len(names) - len(cell.parameters)
            name = names[k if k < first else first + (k - first) % len(cell.parameters)]
            shape = tuple(changed.shape)
            raise RuntimeError(_CHANGED.format(name=name, cell=cell.name, shape=shape, now=now, then=version))


def _unpacked(ctx: Any) -> tuple[Unit, Tensor, tuple[Tensor, ...]]:
    """What was saved openly: the unit on its tensors, the output, and what the forward left."""
    everything = ctx.saved_tensors
    if not hasattr(ctx, "unit"):
        raise RuntimeError(dispatch.USED_UP)
    *tensors, lengths, resets, output = everything[: len(everything) - ctx.count]
    unit = ctx.unit.with_tensors(tensors)._replace(lengths=lengths, resets=resets)
    return unit, output, everything[len(everything) - ctx.count :]


def _first_order(
    chosen: Backend,
    unit: Unit,
    output: Tensor | None,
    saved: tuple[Tensor, ...],
    gradients: Gradients,
    needs: tuple[bool, ...],
    overwrite: bool,
) -> Gradients:
    """The gradients of `unit.tensors`, None where not needed."""
    if dispatch.is_batched():
        return recorded_again(unit, gradients, needs)
    if isinstance(unit, Layer):
        assert output is not None
        return backends.run_layer_backward(chosen, unit, output, saved[0], gradients, needs)
    return backends.run_backward(chosen, unit, saved, gradients, needs, overwrite)
