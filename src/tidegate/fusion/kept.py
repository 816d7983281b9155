# SPDX-License-Identifier: Apache-2.0
"""What a program keeps for its backward, and which of its outputs take the memory of inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from tidegate.fusion.program import Operand, Program


@cache
def keeping(program: Program) -> Program:
    """The program with what its backward needs among its outputs: the entering states and the products' results.

    Where a product is only put into another order, and added to something else of its size, the sum is kept in its
    place: so neither of the two is.
    """
    more = tuple(operand for operand in kept_by(program) if operand not in program.outputs)
    return replace(program, outputs=(*program.outputs, *more))


def kept_by(program: Program) -> dict[Operand, None]:
    """The values that the backward of a program reads and does not compute again, in order."""
    readers: dict[int, list[int]] = {}
    for k, instruction in enumerate(program.instructions):
        for operand in instruction.operands:
            if isinstance(operand, Operand) and operand.bank == "v":
                readers.setdefault(operand.number, []).append(k)
    read_later = {operand.number for operand in (*program.next_states, *program.outputs) if operand.bank == "v"}

    def kept(k: int) -> int:
        by = readers.get(k, [])
        if len(by) != 1 or k in read_later:
            return k
        reader, size = program.instructions[by[0]], program.instructions[k].size
        reorders = reader.operation == "gather" and len(set(reader.indices)) == size
        is_all = reader.size == size and program.whole("v", k) in reader.operands
        return kept(by[0]) if is_all and (reorders or reader.operation == "add") else k

    operands = [program.whole("s", k) for k in range(len(program.states))]
    operands += [program.whole("v", kept(k)) for k, made in enumerate(program.instructions) if made.matrix >= 0]
    return dict.fromkeys(operands)


@cache
def places_over(text: str, is_free: tuple[bool, ...]) -> tuple[int, ...]:
    """For each output, the input whose memory it may take; -1 for memory of its own.

    Args:
        text: the program's.
        is_free: of each input, whether nobody reads it after its step.
    """
    program = Program.parse(text)
    # An output is written when the others may not be yet.
    written_out = {operand.number for operand in program.outputs if operand.bank == "i"}
    left = [k for k, free in enumerate(is_free) if free and k not in written_out]
    places: list[int] = []
    for output in program.outputs:
        found = next((k for k in left if program.inputs[k] == output.size), -1)
        if found >= 0:
            left.remove(found)
        places.append(found)
    return tuple(places)
