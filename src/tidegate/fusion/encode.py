# SPDX-License-Identifier: Apache-2.0
"""A program as the numbers that csrc/engine/program.cpp reads, every value with its place in memory.

A row has scratch memory, whose places are used again once a value is no longer read; products' results, which a team's
threads share, have memory of their own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tidegate.fusion.program import OPERATIONS, Argument, Instruction, Operand, Program

_SCRATCH, _PRODUCTS, _STATES, _CONSTANTS, _FIRST_INPUT = range(5)
_LINE = 16  # numbers: places begin with a cache line


class Encoded(NamedTuple):
    """Attributes:
    code: int64.
    constants: in the dtype of the call.
    """

    code: Tensor
    constants: Tensor


@cache
def encode(text: str, dtype: torch.dtype) -> Encoded:
    """A program by its readable form."""
    code, constants = _Encoder(_with_copies(Program.parse(text))).run()
    return Encoded(code, constants.to(dtype))


def _with_copies(program: Program) -> Program:
    """Products read scratch memory or states: what they read of an input or a vector is copied."""
    places: list[int] = []
    found: list[Instruction] = []

    def moved(argument: Argument) -> Argument:
        if isinstance(argument, Operand) and argument.bank == "v":
            return argument._replace(number=places[argument.number])
        return argument

    for instruction in program.instructions:
        operands = tuple(map(moved, instruction.operands))
        source = operands[0] if operands else 0.0
        if instruction.matrix >= 0 and isinstance(source, Operand) and source.bank in "ip":
            found.append(Instruction("copy", source.size, (source,)))
            operands = (Operand("v", len(found) - 1, 0, source.size),)
        found.append(instruction._replace(operands=operands))
        places.append(len(found) - 1)

    def result(operand: Operand) -> Operand:
        return operand._replace(number=places[operand.number]) if operand.bank == "v" else operand

    next_states, outputs = tuple(map(result, program.next_states)), tuple(map(result, program.outputs))
    return replace(program, instructions=tuple(found), next_states=next_states, outputs=outputs)


def _lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


class _Encoder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.constants: list[float] = []
        self.state_offsets: list[int] = []
        at = 0
        for size in program.states:
            self.state_offsets.append(at)
            at += _lines(size)
        # A whole odd number of lines, so that rows do not fall on one set of the cache.
        self.state_size = at | _LINE if at else 0
        self.places, self.scratch_size, self.products_size = self._placed()

    def _placed(self) -> tuple[list[int], int, int]:
        """Each value's offset in its memory, and the sizes of both."""
        instructions = self.program.instructions
        end = len(instructions)
        last_read = list(range(end))
        for k, instruction in enumerate(instructions):
            for operand in instruction.operands:
                if isinstance(operand, Operand) and operand.bank == "v":
                    last_read[operand.number] = k
        for operand in (*self.program.next_states, *self.program.outputs):
            if operand.bank == "v":
                last_read[operand.number] = end
        home = self._homes()
        for k, (into, _) in home.items():
            last_read[into] = max(last_read[into], last_read[k])
        places = [-1] * end
        ends_at: dict[int, list[int]] = {}
        free = Free()
        products = 0
        for k in range(end):
            into = home[k][0] if k in home else k
            if places[into] < 0:
                if instructions[into].matrix >= 0:
                    places[into] = products
                    products += _lines(instructions[into].size)
                else:
                    places[into] = free.take(_lines(instructions[into].size))
                    ends_at.setdefault(last_read[into], []).append(into)
            if k in home:
                places[k] = places[into] + home[k][1]
            for done in ends_at.pop(k, ()):
                free.give(places[done], _lines(instructions[done].size))
        return places, (free.size | _LINE) if free.size else _LINE, (products | _LINE) if products else 0

    def _homes(self) -> dict[int, tuple[int, int]]:
        """What is made where a concat wants it: value to the concat and the offset in it."""
        found: dict[int, tuple[int, int]] = {}
        for k, instruction in enumerate(self.program.instructions):
            if instruction.operation != "concat":
                continue
            at = 0
            for operand in instruction.operands:
                size = operand.size if isinstance(operand, Operand) else 1
                if isinstance(operand, Operand) and operand.bank == "v" and operand.number not in found:
                    maker = self.program.instructions[operand.number]
                    whole = operand.offset == 0 and operand.size == maker.size
                    if whole and maker.matrix < 0 and maker.operation != "concat":
                        found[operand.number] = (k, at)
                at += size
        return found

    def _operand(self, argument: Argument) -> tuple[int, int, int]:
        program = self.program
        if not isinstance(argument, Operand):
            key = repr(argument)
            known = list(map(repr, self.constants))
            if key not in known:
                self.constants.append(argument)
                known.append(key)
            return _CONSTANTS, known.index(key), 1
        bank, index, offset, size = argument
        if bank == "v":
            is_product = program.instructions[index].matrix >= 0
            return _PRODUCTS if is_product else _SCRATCH, self.places[index] + offset, size
        if bank == "s":
            return _STATES, self.state_offsets[index] + offset, size
        if bank == "i":
            return _FIRST_INPUT + index, offset, size
        return _FIRST_INPUT + len(program.inputs) + index, offset, size

    def _instruction(self, k: int, instruction: Instruction) -> list[int]:
        bias = -1 if instruction.bias is None else instruction.bias.number
        numbers = [OPERATIONS.index(instruction.operation), instruction.groups]
        numbers += self._operand(Operand("v", k, 0, instruction.size))
        numbers.append(len(instruction.operands))
        for operand in instruction.operands:
            numbers += self._operand(operand)
        return [*numbers, instruction.matrix, bias, len(instruction.indices), *instruction.indices]

    def run(self) -> Encoded:
        program = self.program
        body: list[int] = [len(program.instructions)]
        for k, instruction in enumerate(program.instructions):
            body += self._instruction(k, instruction)
        for operand in program.next_states:
            body += self._operand(operand)
        body.append(len(program.outputs))
        for operand in program.outputs:
            body += self._operand(operand)
        head = [len(program.states), *program.states, len(program.states), *self.state_offsets]
        head += [len(program.inputs), *program.inputs, len(program.vectors), *program.vectors]
        head += [len(program.matrices), *(size for matrix in program.matrices for size in matrix)]
        head += [program.through_resets, self.scratch_size, self.products_size, self.state_size, len(self.constants)]
        return Encoded(
            torch.tensor(head + body, dtype=torch.int64), torch.tensor(self.constants or [], dtype=torch.float64)
        )


class Free:
    """Memory whose pieces come back."""

    def __init__(self) -> None:
        self.size = 0
        self.pieces: list[tuple[int, int]] = []  # offset, size; in order, never side by side

    def take(self, size: int) -> int:
        for k, (offset, room) in enumerate(self.pieces):
            if room >= size:
                self.pieces[k : k + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        self.size += size
        return self.size - size

    def give(self, offset: int, size: int) -> None:
        self.pieces = sorted([*self.pieces, (offset, size)])
        merged: list[tuple[int, int]] = []
        for start, room in self.pieces:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self.pieces = merged
