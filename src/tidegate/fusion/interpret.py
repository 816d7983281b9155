# SPDX-License-Identifier: Apache-2.0
# pyright: reportUnknownLambdaType=false
"""A program in torch's operations, for gradients that come many at once (`is_grads_batched`): no kernel takes those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate.fusion.program import REDUCTIONS, Argument, Instruction, Operand, Program

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "copy": lambda a: a,
    "constant": lambda a: a.detach(),
    "sigmoid_gradient": lambda d, y: d * (y * (1 - y)),
    "tanh_gradient": lambda d, y: d * (1 - y * y),
    "where": lambda a, b, c: torch.where(a != 0, b, c),
    "muladd": lambda a, b, c: a * b + c,
    "clamp": lambda a, low, high: torch.minimum(torch.maximum(a, low), high),
    **{name: getattr(torch, name) for name in ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt")},
    **{name: getattr(torch, name) for name in ("reciprocal", "sigmoid", "tanh", "relu", "sin", "cos", "erf", "sign")},
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "maximum", "minimum", "pow")},
    **{name: getattr(torch, name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
}

_OVER: dict[str, Callable[..., Tensor]] = {
    "sum": lambda a: a.sum(-1),
    "mean": lambda a: a.mean(-1),
    "max": lambda a: a.amax(-1),
    "dot": lambda a, b: (a * b).sum(-1),
}


def interpret(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    vectors: Sequence[Tensor],
    matrices: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    steps: int,
    batch: int,
    reverse: bool,
) -> list[Tensor]:
    """As `torch.ops.tidegate.loop`, differentiable, in operations that torch can batch."""
    outputs: list[Sequence[Tensor]] = []
    current = list(states)
    like = (*states, *inputs)[0]
    valid = None
    if lengths is not None:
        valid = torch.arange(steps).unsqueeze(-1) < lengths  # (T, B)
    cuts = _cuts(resets, valid, reverse)
    for t in reversed(range(steps)) if reverse else range(steps):
        entering = current
        if cuts is not None:
            kept = len(states) - program.through_resets
            cut = cuts[t].unsqueeze(-1)
            entering = [s.masked_fill(cut, 0) if k < kept else s for k, s in enumerate(current)]
        step = Step(program, [x[t] for x in inputs], entering, vectors, matrices, batch, like)
        made = [step.value(operand) for operand in program.outputs]
        leaving = [step.value(operand) for operand in program.next_states]
        if valid is not None:
            live = valid[t].unsqueeze(-1)
            made = [value * live for value in made]
            leaving = [torch.where(live, new, old) for new, old in zip(leaving, current, strict=True)]
        outputs.append(made)
        current = leaving
    ordered = outputs[::-1] if reverse else outputs
    return [*(torch.stack(column) for column in zip(*ordered, strict=True)), *current]


def _cuts(resets: Tensor | None, valid: Tensor | None, reverse: bool) -> Tensor | None:
    """(T, B): the state that enters step t is zero."""
    if resets is None or not reverse:
        return resets
    marks = resets if valid is None else resets & valid
    return torch.cat((marks[1:], torch.zeros_like(marks[:1])))


class Step:
    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        vectors: Sequence[Tensor],
        matrices: Sequence[Tensor],
        batch: int,
        like: Tensor,
    ) -> None:
        self.banks: dict[str, list[Tensor]] = {"i": list(inputs), "s": list(states), "v": []}
        self.banks["p"] = [vector.expand(batch, -1) for vector in vectors]
        self.matrices, self.batch, self.like = matrices, batch, like
        for instruction in program.instructions:
            self.banks["v"].append(self._run(instruction))

    def value(self, argument: Argument) -> Tensor:
        if not isinstance(argument, Operand):
            return self.like.new_full((self.batch, 1), argument)
        bank, index, offset, size = argument
        whole = self.banks[bank][index]
        return whole if size == whole.shape[-1] else whole.narrow(-1, offset, size)

    def _run(self, instruction: Instruction) -> Tensor:
        operation, size, groups = instruction.operation, instruction.size, instruction.groups
        operands = [self.value(operand) for operand in instruction.operands]
        if instruction.matrix >= 0:
            return self.product(instruction, operands[0])
        if operation == "concat":
            return torch.cat(operands, -1)
        if operation == "gather":
            return operands[0].index_select(-1, torch.tensor(instruction.indices))
        if operation == "scatter":
            zeros = operands[0].new_zeros((self.batch, size))
            return zeros.index_add(-1, torch.tensor(instruction.indices), operands[0])
        if operation in REDUCTIONS:
            grouped = [operand.reshape(self.batch, groups, -1) for operand in operands]
            return _OVER[operation](*grouped)
        spread = [self._spread(operand, size, groups) for operand in operands]
        result: Any = _FUNCTIONS[operation](*spread)
        return result.to(self.like.dtype).expand(self.batch, groups, size // groups).reshape(self.batch, size)

    def _spread(self, operand: Tensor, size: int, groups: int) -> Tensor:
        """(B, groups, numbers of a group), or 1 in their place."""
        count = operand.shape[-1]
        if count == size:
            return operand.reshape(self.batch, groups, size // groups)
        return operand.reshape(self.batch, count, 1)

    def product(self, instruction: Instruction, operand: Tensor) -> Tensor:
        matrix = self.matrices[instruction.matrix]
        if instruction.operation == "product":
            matrix = matrix.transpose(-1, -2)
        grouped = operand.reshape(self.batch, instruction.groups, -1)
        result = (grouped.unsqueeze(-2) @ matrix).reshape(self.batch, instruction.size)
        return result if instruction.bias is None else result + self.value(instruction.bias)
