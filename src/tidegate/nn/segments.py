# SPDX-License-Identifier: Apache-2.0
"""Long sequences in less memory: a recorded sequence is run in segments, of which the entering states alone are kept;
the backward runs each again when it comes to it.

The sum of what is kept and of one segment is least near a segment's length of sqrt(T); Chen et al. 2016 (1604.06174).
Letters: T steps, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from tidegate import dispatch, ops
from tidegate.backends import backend
from tidegate.backends import find_faults as find_our_faults
from tidegate.call import REVERSE, Call, Layer, layer_by_layer
from tidegate.errors import UnsupportedError
from tidegate.higher_order import Gradients, as_it_was, detached, graph_gradients
from tidegate.nn.unchanged import Before, Unchanged
from tidegate.scope import scope

Nest: TypeAlias = Any  # a tensor, or any nest of tuples, lists and dicts of tensors


class Marks(NamedTuple):
    """What there is to know of a sequence's rows: lengths (B,) and resets (T, B), as in `Call`, or None."""

    lengths: Tensor | None
    resets: Tensor | None


def read_every(value: object) -> int:
    """The argument `checkpoint_every`: 0 for None.

    Raises:
        ValueError: it is no number of steps.
    """
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"checkpoint_every: expected a number of steps, or 0 or None for none, got {value!r}")
    return value


def run(call: Call, find_faults: Callable[[Call], None] = ops.no_faults, *, every: int) -> Sequence[Tensor]:
    """`ops.run`, in segments of `every` steps if it is recorded. Layers that run one way share their segments; where
    two directions or dropout need a layer's whole output, each layer has its own, and the outputs between are kept."""
    if not call.records() or scope.observer is not None or not applies(call.steps, every):
        return ops.run(call, find_faults)
    find_faults(call)
    find_our_faults(call)
    refuse_transforms()
    if call.directions() == 1 and call.between is None:
        output, *finals = _recorded(call.time_major(), every)
        return call.restored(output, tuple(finals))

    def run_layer(layer: Layer) -> tuple[Tensor, ...]:
        output, *finals = _recorded(layer.call(), every)
        return (output, *(final.squeeze(0) for final in finals))

    return layer_by_layer(call, run_layer)


def applies(steps: int, every: int) -> bool:
    """Whether a sequence falls into segments, if it is recorded. An exported graph is of any T, and keeps nothing."""
    return bool(every) and not dispatch.is_exporting() and torch.is_grad_enabled() and steps > every


def uncompiled(forward: Callable[..., Any], every: int) -> Callable[..., Any] | None:
    """A module's forward outside of the graph that torch.compile is making; None if it may be inside.

    In the graph there would be a node for each segment, and Inductor would run them all again before the first
    gradient: no memory would be saved.
    """
    read_every(every)  # an attribute, which may have been set to anything
    if not (every and torch.is_grad_enabled() and torch.compiler.is_compiling()) or dispatch.is_exporting():
        return None
    return torch.compiler.disable(forward, reason="tidegate: checkpoint_every runs outside of the graph")


def refuse_transforms() -> None:
    """Raises UnsupportedError: torch.func's transforms don't see what a checkpoint does."""
    if dispatch.is_transformed():
        raise UnsupportedError(
            "checkpoint_every: expected None under torch.func's transforms, which know no checkpoints; "
            "set the layer's checkpoint_every to 0 there"
        )


def run_cell(
    run_segment: Callable[[Nest, Nest, Marks], tuple[Nest, Nest]],
    inputs: Nest,
    state: Nest,
    marks: Marks,
    reverse: bool,
    every: int,
    cell: object,
) -> tuple[Nest, Nest]:
    """A cell over a sequence, of which nobody knows all the tensors that it reads: torch's checkpoints find them.

    Args:
        run_segment: (inputs, entering state, marks) of a segment -> its outputs and the state that leaves it.
        inputs, state, marks, reverse, every: as `in_segments` takes them.
        cell: what the segments call: it is for the backward what it is now.
    """
    refuse_transforms()
    before = Before(cell)
    # A state that is given anew at its place keeps for the segments what it holds.
    state = pytree.tree_map(_alias, state)

    def checkpointed(inputs: Nest, state: Nest, marks: Marks) -> tuple[Nest, Nest]:
        return checkpoint.checkpoint(Unchanged(run_segment, before), inputs, state, marks, use_reentrant=False)

    return in_segments(checkpointed, inputs, state, marks, reverse, every)


def in_segments(
    run_segment: Callable[[Nest, Nest, Marks], tuple[Nest, Nest]],
    inputs: Nest,
    state: Nest,
    marks: Marks,
    reverse: bool,
    every: int,
) -> tuple[Nest, Nest]:
    """Run a sequence segment by segment.

    Args:
        run_segment: (inputs, entering state, marks) of a segment -> its outputs and the state that leaves it.
        inputs: (T, B, ...) each.
        state: the state that enters the first step, the last one in reverse, (B, ...) each.

    Returns:
        outputs, (T, B, ...) each, and the last state.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    steps = leaves[0].shape[0]
    # Not slices: the gradient of each would be as long as the whole.
    parts = list(zip(*(leaf.split(every) for leaf in leaves), strict=True))
    outputs: Any = None
    for k, start, end in _spans(steps, every, reverse):
        if reverse and end < steps:
            state = _reset(state, marks, end, 0)
        output, state = run_segment(structure.unflatten(parts[k]), state, _between(marks, start, end))
        if outputs is None:
            outputs = pytree.tree_map(partial(_Whole, steps=steps, parts=len(parts)), output)
        pytree.tree_map(partial(_Whole.put, k=k, start=start), outputs, output)
    return pytree.tree_map(_Whole.joined, outputs), state


class _Span(NamedTuple):
    """A segment: which of them, and its steps."""

    k: int
    start: int
    end: int


def _spans(steps: int, every: int, reverse: bool) -> list[_Span]:
    """In the order in which they are run."""
    spans = [_Span(k, start, min(start + every, steps)) for k, start in enumerate(range(0, steps, every))]
    return spans[::-1] if reverse else spans


def _recorded(call: Call, every: int) -> tuple[Tensor, ...]:
    """(output, *final states) of a call over (T, B, I) in one direction."""
    found: Any = _InSegments.apply(call, every, *call.tensors)
    return found


class _InSegments(torch.autograd.Function):
    """`apply(call, every, *its tensors) -> (output, *final states)`: run without a record, and in the backward again,
    recorded, one segment after another.

    One node for all of them, whose states lie in one tensor: small things that are kept between large ones that are not
    leave gaps, where glibc's allocator finds no place for the next. That a tensor was changed before the backward is
    torch's to say, as of all that is saved.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, every: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        reverse, marks = call.direction is REVERSE, Marks(call.lengths, call.resets)
        inputs, states = call.input.split(every), tuple[Any, ...](call.states)
        whole: Any = None
        entering: list[Tensor] = []  # (segments, *a state's shape) each
        for span in _spans(call.steps, every, reverse):
            if whole is not None:
                states = _reset(states, marks, span.end, 1) if reverse else states
                for kept, state in zip(entering, states, strict=True):
                    kept[span.k] = state
            output, *states = ops.run(_part(call, inputs[span.k], tuple(states), marks, span))
            if whole is None:
                whole = output.new_empty((call.steps, *output.shape[1:]))
                entering = [state.new_empty((len(inputs), *state.shape)) for state in states]
            whole[span.start : span.end] = output
        # A parameter that is given other `.data` has that in its graph's place, too; not so an alias.
        then = [None if tensor is None else tensor.detach() for tensor in (*tensors, call.lengths, call.resets)]
        ctx.save_for_backward(*tensors, *then, *entering)
        ctx.call = call.with_tensors([None] * len(tensors))._replace(lengths=None, resets=None)
        ctx.every, ctx.named = every, scope.named
        ctx.set_materialize_grads(False)
        return (whole, *states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad[2:]
        count = len(needs)
        tensors, then, entering = (
            ctx.saved_tensors[:count],
            ctx.saved_tensors[count:],
            ctx.saved_tensors[2 * count + 2 :],
        )
        lengths, resets = then[count : count + 2]
        call = ctx.call.with_tensors(then[:count])._replace(lengths=lengths, resets=resets)
        if all(gradient is None for gradient in gradients):
            return (None,) * (2 + count)
        with backend(ctx.named):
            if torch.is_grad_enabled():
                return (None, None, *_whole_gradients(call, tensors, needs, gradients))
            return (None, None, *_gradients(call, ctx.every, entering, needs, gradients))


def _part(call: Call, input: Tensor, states: tuple[Any, ...], marks: Marks, span: _Span) -> Call:
    lengths, resets = _between(marks, span.start, span.end)
    return call._replace(input=input, states=states, lengths=lengths, resets=resets)


def _gradients(
    call: Call, every: int, entering: Sequence[Tensor], needs: tuple[bool, ...], gradients: Gradients
) -> list[Tensor | None]:
    """Of the call's tensors, from the segment that was run last to the first.

    Args:
        entering: the states that enter the segments but the first, (segments, ...).
        gradients: of the output and the final states.
    """
    reverse, marks = call.direction is REVERSE, Marks(call.lengths, call.resets)
    inputs, first_weight = call.input.split(every), 1 + len(entering)
    of_output, *of_states = gradients
    of_input = torch.zeros_like(call.input) if needs[0] else None
    of_weights: list[Tensor | None] = [None] * (len(needs) - first_weight)
    spans = _spans(call.steps, every, reverse)
    for span in reversed(spans):
        states, needed = tuple(kept[span.k] for kept in entering), (True,) * len(entering)
        if span is spans[0]:
            states, needed = call.states, needs[1:first_weight]
        needed = (needs[0], *needed, *needs[first_weight:])
        part, wanted = detached(_part(call, inputs[span.k], states, marks, span), needed)
        with torch.enable_grad():
            results = ops.run(part)
        cotangents = (None if of_output is None else of_output[span.start : span.end], *of_states)
        found = graph_gradients(results, wanted, cotangents, needed)
        of_states = found[1:first_weight]
        if reverse and span is not spans[0]:
            of_states = _reset(of_states, marks, span.end, 1)
        if of_input is not None and found[0] is not None:
            of_input[span.start : span.end] = found[0]
        of_weights = [_sum(*pair) for pair in zip(of_weights, found[first_weight:], strict=True)]
    return [of_input, *of_states, *of_weights]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _whole_gradients(
    call: Call, tensors: Sequence[Tensor | None], needs: tuple[bool, ...], gradients: Gradients
) -> list[Tensor | None]:
    """Of the call's tensors, and to be differentiated again: of the call run as a whole, which keeps everything.

    Args:
        tensors: the call's as the caller has them, of which the call has aliases.
    """
    # Aliases again: each gradient is of one place, and stops there.
    given: list[Any] = list(call.tensors)
    for k, (tensor, then) in enumerate(zip(tensors, call.tensors, strict=True)):
        if needs[k] and tensor is not None and then is not None:
            given[k] = as_it_was(tensor, then).view_as(then)
    wanted = [tensor for tensor, need in zip(given, needs, strict=True) if need]
    results = ops.run(call.with_tensors(given))
    pairs = [(result, grad) for result, grad in zip(results, gradients, strict=True) if grad is not None]
    roots, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


class _Whole:
    """An output over all steps, put together as its parts come.

    Parts kept until the last one has come would take the memory twice, and lie scattered among what each segment needs
    for a while, where glibc's allocator finds no place for the next.
    """

    def __init__(self, like: Tensor, steps: int, parts: int) -> None:
        self.data = like.new_empty((steps, *like.shape[1:]))
        self.parts: list[Any] = [None] * parts

    def put(self, part: Tensor, *, k: int, start: int) -> None:
        self.parts[k] = _Put.apply(part, self.data[start : start + part.shape[0]])

    def joined(self) -> Tensor:
        joined: Any = _Join.apply(self, *self.parts)
        return joined


class _Put(torch.autograd.Function):
    """`apply(part, place)`: the part is copied to its place. Returned is one of its shape that holds no numbers."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, place: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        place.copy_(part)
        return part.new_empty(()).expand(part.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class _Join(torch.autograd.Function):
    """`apply(whole, *what _Put returned)`: the whole, which depends on each part."""

    @staticmethod
    def forward(ctx: Any, whole: _Whole, *parts: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.sizes = [part.shape[0] for part in parts]
        return whole.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *gradient.split(ctx.sizes)


def _alias(leaf: Tensor) -> Tensor:
    return leaf.view_as(leaf)


def _between(marks: Marks, start: int, end: int) -> Marks:
    lengths, resets = marks
    return Marks(
        None if lengths is None else (lengths - start).clamp(0, end - start),
        None if resets is None else resets[start:end],
    )


def _reset(state: Nest, marks: Marks, first: int, rows: int) -> Nest:
    """In reverse, the state that enters step first - 1, or its gradient: zero where `first` begins a sequence.

    Args:
        rows: the dimension of B.
    """
    if marks.resets is None:
        return state
    fresh = marks.resets[first]  # (B,)
    if marks.lengths is not None:  # a mark on padding separates nothing
        fresh = fresh & (first < marks.lengths.to(fresh.device))

    def zeroed(leaf: Tensor | None) -> Tensor | None:
        if leaf is None:
            return None
        return leaf.masked_fill(fresh.view(*(1,) * rows, -1, *(1,) * (leaf.dim() - rows - 1)), 0)

    return pytree.tree_map(zeroed, state)
