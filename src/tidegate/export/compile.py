# SPDX-License-Identifier: Apache-2.0
"""A model's step as a program with its parameters' numbers, held against the model on the example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tidegate.export.faults import first_difference
from tidegate.export.passes import Pass, one_pass, passes
from tidegate.export.sites import RefusedError
from tidegate.export.step import Model, first_of
from tidegate.export.stored import Stored, evaluate, stored
from tidegate.fusion import loop
from tidegate.fusion.lower import lower
from tidegate.fusion.trace import Cell, NotTraceableError, trace

_SEARCHED_STEPS = 48  # for the module at fault: a step takes a millisecond there
_VARIED_STEPS = 16
_TOLERANCE = 1e-4  # of the output's scale: what is looked for is another computation, not a rounding
# Of int8 at least, where a rounding that falls the other way is a 127th of a number: what the model makes of many of
# them is tried, and twice that allowed.
_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-5, "int8": 5e-3}
# Where roundings that were tried have grown to this much of the output's scale, others may have grown to anything.
_MAGNIFIED = 0.05


@dataclass(frozen=True)
class Compiled:
    """Attributes:
    passes: over the steps; of a stream one.
    row: how many numbers a step leaves for later passes.
    inputs, outputs: of a step.
    vectors: the parameters' numbers, (n,), float32.
    matrices: theirs, (blocks, rows, columns), as they are stored.
    example: (T, I), indices as numbers.
    expected: (T, O), the model's own output; where it gives one for a whole sequence, that after each step. Of weights
        that are stored shorter what they give.
    apart: how far that is from the model's own at most.
    tolerance: how far from `expected` C may be, of the output's scale.
    """

    passes: list[Pass]
    row: int
    inputs: int
    outputs: int
    vectors: list[Tensor]
    matrices: list[Stored]
    example: Tensor
    expected: Tensor
    apart: float = 0.0
    tolerance: float = _TOLERANCES["float32"]


@torch.no_grad()
def compile_step(
    model: Any, example: Any, weights: str = "float32", block: bool = False, longest: int = 256
) -> Compiled:
    """Trace and lower one step of a model, and compare it with the model on the example's first steps.

    Args:
        weights: how matrices are stored, one of `stored.KINDS`.
        block: the model's states may run from the end.
        longest: of the example, at most so many steps are used.

    Raises:
        TypeError, ValueError: the arguments are not what `export_c` takes.
        RefusedError: the model is no step; names the module.
    """
    made = Model(model, example, block)
    x = made.example.narrow(made.time, 0, min(made.steps, longest))
    expected = made.guarded(lambda: _expected(made, x))
    pair = torch.cat((x.select(made.time, 0),) * 2)
    try:
        cell = Cell(made.step)
        lowered = lower(trace(cell, pair, tuple(made.initial(2))), whole=True)
    except NotTraceableError as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, RefusedError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise _fault(made, x) or RefusedError(f"model: it cannot be traced: {error}") from None
    if not lowered.program.outputs:
        raise RefusedError("model: its output depends neither on the input nor on a state")
    shared = [tensor.float().clone() for tensor in lowered.once(*cell.tensors)]
    count = lowered.counts[0]
    vectors, matrices = shared[:count], shared[count : count + lowered.counts[1]]
    if not all(bool(tensor.isfinite().all()) for tensor in (*shared, x, expected)):
        raise RefusedError("model: expected finite parameters, example and output, got infinities or NaN")
    program = lowered.program
    parts, row = passes(program, made.kept) if block else ([one_pass(program, made.kept)], 0)
    for sequence in (x, *_varied(x, made.time)):
        whole = expected if sequence is x else made.guarded(lambda sequence=sequence: _expected(made, sequence))
        found = _output(parts, row, _steps(made, sequence), partial(loop.evaluate, vectors=vectors, matrices=matrices))
        if not _alike(found, whole):
            # What magnifies roundings step by step is compared as far as PyTorch itself tells.
            told, _ = _told_apart(made, sequence, whole)
            if _alike(found[:told], whole[:told]):
                continue
            raise _fault(made, sequence) or RefusedError("model: its steps are not its output over a sequence")
    steps, rounding = _told_apart(made, x, expected)
    given, expected = _steps(made, x)[:steps], expected[:steps]
    short = stored(matrices, weights)
    apart, tolerance = 0.0, max(_TOLERANCES[weights], 4 * rounding)
    if weights != "float32":
        run = partial(evaluate, vectors=vectors, matrices=short)
        whole, expected = expected, _output(parts, row, given, run)
        if weights == "int8":
            moved = _output(parts, row, given, partial(run, moved=torch.Generator().manual_seed(0)))
            if not made.in_blocks:  # of a block the last step tells on the first
                told = _told_apart_in_int8(moved, expected)
                given, whole, expected, moved = given[:told], whole[:told], expected[:told], moved[:told]
            by_rounding = (moved - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            tolerance = max(tolerance, 2 * float(by_rounding))
        apart = float((expected - whole).abs().max())
    sizes = program.inputs[0], program.outputs[0].size
    return Compiled(parts, row, *sizes, vectors, short, given, expected, apart, tolerance)


def _output(parts: list[Pass], row: int, x: Tensor, run: Callable[..., list[Tensor]]) -> Tensor:
    """Of the passes over x (T, I), each by `run`: (T, O)."""
    y, rows = x, x.new_zeros(x.shape[0], row)
    for part in parts:
        states = [torch.tensor(kept.initial).unsqueeze(0) for kept in part.kept]
        inputs = [x, rows] if row else [x]
        for target, found in zip(part.targets, run(part.program, inputs, states, reverse=part.reverse), strict=True):
            if target < 0:
                y = found
            else:
                rows[:, target : target + found.shape[1]] = found
    return y


def _steps(made: Model, x: Tensor) -> Tensor:
    """(T, I), indices as numbers."""
    given = x.select(1 - made.time, 0)
    return given.reshape(given.shape[0], -1).float()


def _varied(x: Tensor, time: int) -> list[Tensor]:
    """A sequence like x with steps that differ, where x has none: equal steps do not tell which of them is read."""
    first = x.narrow(time, 0, 1)
    if x.shape[time] > 1 and not bool((x == first).all()):
        return []
    if not x.is_floating_point():
        raise ValueError(f"example: expected indices that differ, got {x.shape[time]} equal to {int(x.flatten()[0])}")
    shape = list(x.shape)
    shape[time] = max(x.shape[time], _VARIED_STEPS)
    return [first + torch.randn(shape, generator=torch.Generator().manual_seed(0))]


def _fault(made: Model, x: Tensor) -> RefusedError | None:
    few = x.narrow(made.time, 0, min(x.shape[made.time], _SEARCHED_STEPS))
    return made.guarded(lambda: first_difference(made, few))


def _expected(made: Model, x: Tensor) -> Tensor:
    y = first_of(made.module(x))
    steps = x.shape[made.time]
    if y.dim() == 3 and y.shape[1 - made.time] == 1:
        if y.shape[made.time] != steps:
            raise RefusedError(f"model: for {steps} steps of its input its output has {y.shape[made.time]}")
        return y.select(1 - made.time, 0)
    if y.dim() == 2 and y.shape[0] == 1:
        if made.in_blocks:
            raise RefusedError(f"model: expected an output of every step, (1, T, O), got {tuple(y.shape)} for all")
        prefixes = (first_of(made.module(x.narrow(made.time, 0, t + 1))) for t in range(steps))
        return torch.cat(list(prefixes))
    raise RefusedError(f"model: expected an output (1, T, O), (T, 1, O) or (1, O), got {tuple(y.shape)}")


def _told_apart(made: Model, x: Tensor, expected: Tensor) -> tuple[int, float]:
    """How many steps tell a rounding from an error, and how far PyTorch itself is from float64 there, of their scale.

    A model may magnify roundings, as a LayerNorm of nearly equal numbers does, and more so step by step.
    """
    made.module.double()
    try:
        exact = _expected(made, x.double() if x.is_floating_point() else x)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # a model that makes float32 tensors of its own cannot be run in another dtype
        return x.shape[made.time], 0.0
    finally:
        made.module.float()
    apart = (exact - expected).abs().amax(1).cummax(0).values
    apart /= expected.abs().amax(1).cummax(0).values.clamp(min=1e-30)
    steps = int((4 * apart <= _TOLERANCE).sum())
    if steps < (len(apart) if made.in_blocks else 1):  # of a block the last step tells on the first
        which = "output" if made.in_blocks else "first output"
        raise RefusedError(
            f"model: its {which} in float32 is {float(apart[steps]):.1g} of its size from that in float64: it "
            "magnifies roundings, and C cannot be held against it"
        )
    return steps, float(apart[steps - 1])


def _told_apart_in_int8(moved: Tensor, expected: Tensor) -> int:
    """How many steps tell a rounding from an error, one at least: after them the model has magnified what was moved."""
    apart = (moved - expected).abs().amax(1).cummax(0).values / expected.abs().max().clamp(min=1e-30)
    return max(1, int((apart <= _MAGNIFIED).sum()))


def _alike(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, 0, _TOLERANCE * scale, equal_nan=True)
