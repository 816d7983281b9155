# SPDX-License-Identifier: Apache-2.0
"""Long sequences in less memory: a recorded sequence is run in segments, of which the backward keeps the entering state
alone and runs each again when it comes to it.

The sum of what is kept and of one segment is least near a segment's length of sqrt(T); Chen et al. 2016 (1604.06174).
Letters: T steps, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from tidegate import dispatch, ops
from tidegate.backends import backend, detached
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
    read_every(every)  # an attribute, which may have been set to anything
    if not (every and torch.is_grad_enabled() and torch.compiler.is_compiling()) or torch.compiler.is_exporting():
        return None
    return torch.compiler.disable(forward, reason="tidegate: checkpoint_every runs outside of the graph")


def _run_call(call: Call, every: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A call over (T, B, I) in one direction."""

    reverse = call.direction is Direction.REVERSE
    marks = Marks(call.lengths, call.resets)

    def checkpointed(input: Tensor, states: tuple[Tensor, ...], marks: Marks) -> tuple[Tensor, tuple[Tensor, ...]]:
        part = call._replace(input=input, states=states, lengths=marks.lengths, resets=marks.resets)
        found: Any = _Segment.apply(part, *part.tensors)
        return found[0], found[1:]

    return in_segments(checkpointed, call.input, call.states, marks, reverse, every, rows=1)


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
    cell: Any,
) -> tuple[Nest, Nest]:
    """A cell over a sequence, of which nobody knows all the tensors that it reads: torch's checkpoints find them.

    Args:
        run_segment: (inputs, entering state, marks) of a segment -> its outputs and the state that leaves it.
        inputs, state, marks, reverse, every: as `in_segments` takes them.
        cell: of a module the parameters are known, which must not change in place.
    """
    refuse_transforms()

    def checkpointed(inputs: Nest, state: Nest, marks: Marks) -> tuple[Nest, Nest]:
        return checkpoint.checkpoint(_Unchanged(run_segment, cell), inputs, state, marks, use_reentrant=False)

    return in_segments(checkpointed, inputs, state, marks, reverse, every)


def in_segments(
    run_segment: Callable[[Nest, Nest, Marks], tuple[Nest, Nest]],
    inputs: Nest,
    state: Nest,
    marks: Marks,
    reverse: bool,
    every: int,
    rows: int = 0,
) -> tuple[Nest, Nest]:
    """Run a sequence segment by segment.

    Args:
        run_segment: (inputs, entering state, marks) of a segment -> its outputs and the state that leaves it.
        inputs: (T, B, ...) each.
        state: the state that enters the first step, the last one in reverse; B is dimension `rows` of each.

    Returns:
        outputs, (T, B, ...) each, and the last state.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    steps = leaves[0].shape[0]
    # Not slices: the gradient of each would be as long as the whole.
    parts = list(zip(*(leaf.split(every) for leaf in leaves), strict=True))
    outputs: Any = None
    for k in reversed(range(len(parts))) if reverse else range(len(parts)):
        start, end = k * every, min((k + 1) * every, steps)
        if reverse and end < steps:
            state = _reset(state, marks, end, rows)
        output, state = run_segment(structure.unflatten(parts[k]), state, _between(marks, start, end))
        if outputs is None:
            outputs = pytree.tree_map(partial(_Whole, steps=steps, parts=len(parts)), output)
        pytree.tree_map(partial(_Whole.put, k=k, start=start), outputs, output)
    return pytree.tree_map(_Whole.joined, outputs), state


class _Segment(torch.autograd.Function):
    """`apply(call, *its tensors) -> (output, *final states)`: run without a record, and again, recorded, in the
    backward. That a tensor was changed in between is torch's to say, as of all that it saves."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*tensors, call.lengths, call.resets)
        ctx.call = call.with_tensors([None] * len(tensors))._replace(lengths=None, resets=None)
        ctx.named = scope.named
        ctx.set_materialize_grads(False)
        return tuple(ops.run(call))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, lengths, resets = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        call = ctx.call.with_tensors(tensors)._replace(lengths=lengths, resets=resets)
        is_first_order = not torch.is_grad_enabled()
        if is_first_order:
            call, wanted = detached(call, needs)
        else:
            # Aliases: each gradient is of one place, and stops there. The state that enters comes of the weights, too.
            tensors = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(tensors, needs, strict=True)]
            wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            call = call.with_tensors(tensors)
        with torch.enable_grad(), backend(ctx.named):
            results = ops.run(call)
        pairs = [(result, grad) for result, grad in zip(results, gradients, strict=True) if grad is not None]
        if not pairs:
            return (None,) * (1 + len(tensors))
        roots, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(roots, wanted, cotangents, create_graph=not is_first_order, allow_unused=True)
        each = iter(found)
        return None, *(next(each) if need else None for need in needs)


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


class _Unchanged:
    """A segment's function: when it is called again, the cell is for that call what it was at first, with the tensors
    that `functional_call` lent it, and in train or eval mode.

    Raises:
        RuntimeError: a tensor was changed in place, as torch says it.
    """

    def __init__(self, function: Callable[[Nest, Nest, Marks], tuple[Nest, Nest]], cell: Any) -> None:
        self.function = function
        self.cell = cell if isinstance(cell, torch.nn.Module) else torch.nn.Module()
        self.reads = dict(self.cell.named_parameters())
        self.held = {**self.reads, **dict(self.cell.named_buffers())}
        self.modes = {module: module.training for module in self.cell.modules()}
        self.versions: list[int] = []

    def __call__(self, inputs: Nest, state: Nest, marks: Marks) -> tuple[Nest, Nest]:
        tensors = [leaf for leaf in (*self.reads.values(), *pytree.tree_leaves((inputs, state))) if leaf is not None]
        versions = [version_of(tensor) for tensor in tensors]
        self.versions = self.versions or versions
        for tensor, now, then in zip(tensors, versions, self.versions, strict=True):
            if now != then:
                what = f"a tensor of shape {tuple(tensor.shape)} that checkpoint_every reads again"
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{what} is at version {now}; expected version {then} instead."
                )
        now = {**dict(self.cell.named_parameters()), **dict(self.cell.named_buffers())}
        others = {name: tensor for name, tensor in self.held.items() if now.get(name) is not tensor}
        with _in_modes(self.modes):
            if not others:
                return self.function(inputs, state, marks)
            lent = {f"cell.{name}": tensor for name, tensor in others.items()}
            return torch.func.functional_call(_Around(self.cell, self.function), lent, (inputs, state, marks))


class _Around(torch.nn.Module):
    """A function that calls a module, as a module that has it."""

    def __init__(self, cell: torch.nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.cell, self.function = cell, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@contextmanager
def _in_modes(modes: dict[torch.nn.Module, bool]) -> Generator[None]:
    """Modules in train or eval mode as given, inside the block."""
    others = {module: module.training for module, mode in modes.items() if module.training is not mode}
    for module in others:
        module.training = modes[module]
    try:
        yield
    finally:
        for module, mode in others.items():
            module.training = mode


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
