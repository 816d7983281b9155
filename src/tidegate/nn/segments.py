# SPDX-License-Identifier: Apache-2.0
"""Long sequences in less memory: a recorded sequence is run in segments, of which the backward keeps the entering state
alone and runs each again when it comes to it.

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
from tidegate.backends import find_faults as find_our_faults
from tidegate.call import Call, Direction, Layer, layer_by_layer
from tidegate.errors import UnsupportedError
from tidegate.gradients import version_of
from tidegate.scope import scope

Nest: TypeAlias = Any  # a tensor, or any nest of tuples, lists and dicts of tensors


class Marks(NamedTuple):
    """What there is to know of a sequence's rows: lengths (B,) and resets (T, B), as in `Call`, or None."""

    lengths: Tensor | None
    resets: Tensor | None


def read_every(value: Any) -> int:
    """The argument `checkpoint_every`: 0 for None.

    Raises:
        ValueError: it is no positive integer.
    """
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"checkpoint_every: expected a number of steps, 1 or more, or None, got {value!r}")
    return value


def run(call: Call, find_faults: Callable[[Call], None] = ops.no_faults, *, every: int) -> Sequence[Tensor]:
    """`ops.run`, in segments of `every` steps if it is recorded. Layers that run one way share their segments; where
    two directions or dropout need a layer's whole output, each layer has its own, and the outputs between are kept."""
    if not call.records() or scope.observer is not None or not applies(call.steps, every):
        return ops.run(call, find_faults)
    find_faults(call)
    find_our_faults(call)
    refuse_transforms()
    if call.directions == 1 and call.between is None:
        output, finals = _run_call(call.time_major(), every)
        return call.restored(output, finals)

    def run_layer(layer: Layer) -> tuple[Tensor, ...]:
        output, finals = _run_call(layer.call(), every)
        return (output, *(final.squeeze(0) for final in finals))

    return layer_by_layer(call, run_layer)


def applies(steps: int, every: int) -> bool:
    """Whether a sequence falls into segments, if it is recorded. An exported graph is of any T, and keeps nothing."""
    return bool(every) and not torch.compiler.is_exporting() and torch.is_grad_enabled() and steps > every


def uncompiled(forward: Callable[..., Any], every: int) -> Callable[..., Any] | None:
    """A module's forward outside of the graph that torch.compile is making; None if it may be inside.

    In the graph there would be a node for each segment, and Inductor would run them all again before the first
    gradient: no memory would be saved.
    """
    if not (every and torch.is_grad_enabled() and torch.compiler.is_compiling()) or torch.compiler.is_exporting():
        return None
    return torch.compiler.disable(forward, reason="tidegate: checkpoint_every runs outside of the graph")


def _run_call(call: Call, every: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A call over (T, B, I) in one direction."""

    def run_segment(input: Tensor, states: tuple[Tensor, ...], marks: Marks) -> tuple[Tensor, tuple[Tensor, ...]]:
        part = call._replace(input=input, states=states, lengths=marks.lengths, resets=marks.resets)
        output, *finals = ops.run(part)
        return output, tuple(finals)

    reverse = call.direction is Direction.REVERSE
    marks = Marks(call.lengths, call.resets)
    return in_segments(run_segment, call.input, call.states, marks, reverse, every, reads=call.weights, rows=1)


def refuse_transforms() -> None:
    """Raises UnsupportedError: torch.func's transforms don't see what a checkpoint does."""
    if dispatch.is_transformed():
        raise UnsupportedError(
            "checkpoint_every: expected None under torch.func's transforms, which know no checkpoints; "
            "set the layer's checkpoint_every to 0 there"
        )


def in_segments(
    run_segment: Callable[[Nest, Nest, Marks], tuple[Nest, Nest]],
    inputs: Nest,
    state: Nest,
    marks: Marks,
    reverse: bool,
    every: int,
    *,
    reads: Sequence[Tensor | None],
    rows: int = 0,
    draws: bool = False,
) -> tuple[Nest, Nest]:
    """Run a sequence segment by segment, each a checkpoint.

    Args:
        run_segment: (inputs, entering state, marks) of a segment -> its outputs and the state that leaves it.
        inputs: (T, B, ...) each.
        state: the state that enters the first step, the last one in reverse; B is dimension `rows` of each.
        reads: what `run_segment` reads beside its arguments, so far as it is known.
        draws: `run_segment` may draw random numbers, which must be the same when it runs again.

    Returns:
        outputs, (T, B, ...) each, and the last state.
    """
    steps = pytree.tree_leaves(inputs)[0].shape[0]
    outputs: list[Nest] = []
    watched = [tensor for tensor in reads if tensor is not None]
    for start in sorted(range(0, steps, every), reverse=reverse):
        end = min(start + every, steps)
        if reverse and end < steps:
            state = _reset(state, marks, end, rows)
        part = pytree.tree_map(partial(_steps_between, start, end), inputs)
        segment, given = _Unchanged(run_segment, watched), (part, state, _between(marks, start, end))
        output, state = checkpoint.checkpoint(segment, *given, use_reentrant=False, preserve_rng_state=draws)
        outputs.append(output)
    return pytree.tree_map(_joined, *(outputs[::-1] if reverse else outputs)), state


class _Unchanged:
    """A segment's function: what it reads must be what it was when the function is called again.

    Raises:
        RuntimeError: a tensor was changed in place, as torch says it.
    """

    def __init__(self, function: Callable[[Nest, Nest, Marks], tuple[Nest, Nest]], reads: list[Tensor]) -> None:
        self.function, self.reads = function, reads
        self.versions: list[int] = []

    def __call__(self, inputs: Nest, state: Nest, marks: Marks) -> tuple[Nest, Nest]:
        tensors = [leaf for leaf in (*self.reads, *pytree.tree_leaves((inputs, state))) if leaf is not None]
        versions = [version_of(tensor) for tensor in tensors]
        self.versions = self.versions or versions
        for tensor, now, then in zip(tensors, versions, self.versions, strict=True):
            if now != then:
                what = f"a tensor of shape {tuple(tensor.shape)} that checkpoint_every reads again"
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{what} is at version {now}; expected version {then} instead."
                )
        return self.function(inputs, state, marks)


def _steps_between(start: int, end: int, leaf: Tensor) -> Tensor:
    return leaf[start:end]


def _between(marks: Marks, start: int, end: int) -> Marks:
    lengths, resets = marks
    return Marks(
        None if lengths is None else (lengths - start).clamp(0, end - start),
        None if resets is None else resets[start:end],
    )


def _reset(state: Nest, marks: Marks, first: int, rows: int) -> Nest:
    """In reverse, the state that enters step first - 1: zero where `first` begins a sequence."""
    if marks.resets is None:
        return state
    fresh = marks.resets[first]  # (B,)
    if marks.lengths is not None:  # a mark on padding separates nothing
        fresh = fresh & (first < marks.lengths.to(fresh.device))

    def zeroed(leaf: Tensor) -> Tensor:
        return leaf.masked_fill(fresh.view(*(1,) * rows, -1, *(1,) * (leaf.dim() - rows - 1)), 0)

    return pytree.tree_map(zeroed, state)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
