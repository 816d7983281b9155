# SPDX-License-Identifier: Apache-2.0
"""A model's step as a program with its parameters' numbers, held against the model on the example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidegate.export.faults import first_difference
from tidegate.export.sites import Kept, RefusedError
from tidegate.export.step import Model, first_of
from tidegate.export.stored import Stored, evaluate, stored
from tidegate.fusion import loop
from tidegate.fusion.lower import lower
from tidegate.fusion.program import Program
from tidegate.fusion.trace import Cell, NotTraceableError, trace

_COMPARED_STEPS = 48  # also of the search for a fault, where a step takes a millisecond
_TOLERANCE = 1e-4  # of the output's scale: what is looked for is another computation, not a rounding


@dataclass(frozen=True)
class Compiled:
    """Attributes:
    program: one input, one output.
    vectors: the parameters' numbers, (n,), float32.
    matrices: theirs, (blocks, rows, columns), as they are stored.
    kept: the states.
    example: (T, I), indices as numbers.
    expected: (T, O), the model's own output; where it gives one for a whole sequence, that after each step. Of weights
        that are stored shorter what they give.
    apart: how far that is from the model's own at most.
    rounding: how far PyTorch itself is from float64, of the output's scale.
    """

    program: Program
    vectors: list[Tensor]
    matrices: list[Stored]
    kept: list[Kept]
    example: Tensor
    expected: Tensor
    apart: float = 0.0
    rounding: float = 0.0


@torch.no_grad()
def compile_step(model: Any, example: Any, weights: str = "float32", longest: int = 256) -> Compiled:
    """Trace and lower one step of a model, and compare it with the model on the example's first steps.

    Args:
        weights: how matrices are stored, one of `stored.KINDS`.
        longest: of the example, at most so many steps are used.

    Raises:
        TypeError, ValueError: the arguments are not what `export_c` takes.
        RefusedError: the model is no step; names the module.
    """
    made = Model(model, example)
    x = made.example.narrow(made.time, 0, min(made.steps, longest))
    expected = _expected(made, x)
    compared = x.narrow(made.time, 0, min(x.shape[made.time], _COMPARED_STEPS))
    step_x = x.select(made.time, 0)
    pair = torch.cat((step_x, step_x))
    try:
        cell = Cell(made.step)
        lowered = lower(trace(cell, pair, tuple(made.initial(2))), whole=True)
    except NotTraceableError as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, RefusedError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise first_difference(made, compared) or RefusedError(f"model: it cannot be traced: {error}") from None
    if not lowered.program.outputs:
        raise RefusedError("model: its output depends neither on the input nor on a state")
    shared = [tensor.float().clone() for tensor in lowered.once(*cell.tensors)]
    count = lowered.counts[0]
    vectors, matrices = shared[:count], shared[count : count + lowered.counts[1]]
    if not all(bool(tensor.isfinite().all()) for tensor in (*shared, x, expected)):
        raise RefusedError("model: expected finite parameters, example and output, got infinities or NaN")
    given = x.transpose(0, 1) if made.time else x  # (T, 1, ...)
    given = given.reshape(given.shape[0], 1, -1).float()
    steps = compared.shape[made.time]
    states = [state.flatten(1) for state in made.initial(1)]
    program = lowered.program
    found = loop.evaluate(program, given[:steps, 0], states, vectors, matrices)
    if not _alike(found, expected[:steps]):
        raise first_difference(made, compared) or RefusedError("model: its steps are not its output over a sequence")
    rounding = _rounding(made, x, expected)
    short = stored(matrices, weights)
    apart = 0.0
    if weights != "float32":
        of_short = evaluate(program, given[:, 0], states, vectors, short)
        apart, expected = float((of_short - expected).abs().max()), of_short
    return Compiled(program, vectors, short, made.kept, given[:, 0], expected, apart, rounding)


def _expected(made: Model, x: Tensor) -> Tensor:
    y = first_of(made.module(x))
    steps = x.shape[made.time]
    if y.dim() == 3 and y.shape[1 - made.time] == 1:
        if y.shape[made.time] != steps:
            raise RefusedError(f"model: for {steps} steps of its input its output has {y.shape[made.time]}")
        return y.select(1 - made.time, 0)
    if y.dim() == 2 and y.shape[0] == 1:
        prefixes = (first_of(made.module(x.narrow(made.time, 0, t + 1))) for t in range(steps))
        return torch.cat(list(prefixes))
    raise RefusedError(f"model: expected an output (1, T, O), (T, 1, O) or (1, O), got {tuple(y.shape)}")


def _rounding(made: Model, x: Tensor, expected: Tensor) -> float:
    """The last use of the module, which is float64 then."""
    made.module.double()
    try:
        exact = _expected(made, x.double() if x.is_floating_point() else x)
    except RuntimeError:  # a model that makes float32 tensors of its own cannot be run in another dtype
        return 0.0
    return float((exact - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _alike(found: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, 0, _TOLERANCE * scale, equal_nan=True)
