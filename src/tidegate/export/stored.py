# SPDX-License-Identifier: Apache-2.0
"""How a program's matrices are stored, and what the program gives with matrices that are stored so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tidegate.fusion.interpret import Step
from tidegate.fusion.program import Instruction, Program
from tidegate.quantization import Quantized, product, quantize_rows

KINDS = ("float32", "bfloat16", "int8")
_SMALLEST = 16  # rows and columns: smaller ones stay float32, they weigh nothing and an output layer is among them
MOVED = 1e-5  # what C's float32 numbers may be apart from torch's

Stored = Tensor | Quantized


def stored(matrices: Sequence[Tensor], weights: str) -> list[Stored]:
    """Matrices (blocks, rows, columns) as they are stored: float32 or bfloat16 tensors, or quantized."""
    return [_stored(matrix, weights) if min(matrix.shape[1:]) >= _SMALLEST else matrix for matrix in matrices]


def _stored(matrix: Tensor, weights: str) -> Stored:
    if weights == "int8":
        return quantize_rows(matrix)
    return matrix.bfloat16() if weights == "bfloat16" else matrix


def evaluate(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    vectors: Sequence[Tensor],
    matrices: Sequence[Stored],
    reverse: bool = False,
    moved: torch.Generator | None = None,
) -> list[Tensor]:
    """As `fusion.loop.evaluate`, step by step, by the arithmetic of `tidegate.quantization`.

    Args:
        moved: what becomes integers is moved by up to MOVED of its largest number, at random: more roundings fall the
            other way than where C's numbers are not torch's to the last bit.
    """
    steps = inputs[0].shape[0]
    wide = [_widened(matrix) for matrix in matrices]
    current, made = list(states), list[list[Tensor]]()
    for t in reversed(range(steps)) if reverse else range(steps):
        step = _StoredStep(program, [x[t : t + 1] for x in inputs], current, vectors, wide, moved)
        made.append([step.value(output) for output in program.outputs])
        current = [step.value(operand) for operand in program.next_states]
    ordered = made[::-1] if reverse else made
    return [torch.cat(column) for column in zip(*ordered, strict=True)]


def _widened(matrix: Stored) -> Stored:
    """The numbers of a matrix in the dtype in which they are multiplied, once for all steps."""
    if isinstance(matrix, Quantized):
        return matrix._replace(numbers=matrix.numbers.double())
    return matrix.float()


class _StoredStep(Step):
    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        vectors: Sequence[Tensor],
        matrices: Sequence[Stored],
        moved: torch.Generator | None,
    ) -> None:
        self.stored, self.moved = matrices, moved
        super().__init__(program, inputs, states, vectors, (), 1, (*states, *inputs)[0])

    def product(self, instruction: Instruction, operand: Tensor) -> Tensor:
        matrix, groups = self.stored[instruction.matrix], instruction.groups
        parts = operand.reshape(groups, -1)
        blocks = (matrix.numbers if isinstance(matrix, Quantized) else matrix).shape[0]
        results = [self._multiplied(part, matrix, k if blocks > 1 else 0) for k, part in enumerate(parts)]
        result = torch.cat(results).unsqueeze(0)
        return result if instruction.bias is None else result + self.value(instruction.bias)

    def _multiplied(self, x: Tensor, matrix: Stored, block: int) -> Tensor:
        if not isinstance(matrix, Quantized):
            return torch.mv(matrix[block], x)
        if self.moved is not None:
            x = x + MOVED * x.abs().max() * (2 * torch.rand(x.shape, generator=self.moved) - 1)
        return product(x, Quantized(matrix.numbers[block], matrix.scales[block]))
