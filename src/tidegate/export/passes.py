# SPDX-License-Identifier: Apache-2.0
"""A step as passes over a block of steps: its states that run from the end need steps of which a stream knows nothing.

A pass goes over all steps in one direction and carries the states that can be carried by then: those of a second layer
need the first layer's output in both directions. What a later pass reads of an earlier one lies in a row a step.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate.export.sites import Kept, RefusedError
from tidegate.fusion.program import Argument, Instruction, Operand, Program


class Pass(NamedTuple):
    """Attributes:
    program: inputs are the step's, and of several passes the row; outputs go to `targets`.
    reverse: from the last step to the first.
    kept: its states.
    targets: of each output the place in the row; -1 for y.
    """

    program: Program
    reverse: bool
    kept: list[Kept]
    targets: list[int]


def one_pass(program: Program, kept: list[Kept]) -> Pass:
    return Pass(program, False, kept, [-1])


def passes(program: Program, kept: list[Kept]) -> tuple[list[Pass], int]:
    """The passes in order, and how many numbers a row has.

    Raises:
        RefusedError: a state from the front and one from the end read each other.
    """
    return _Split(program, kept).run()


class _Split:
    def __init__(self, program: Program, kept: list[Kept]) -> None:
        self.program, self.kept = program, kept
        # Passes alternate; the first goes where there is a state that needs no other.
        self.first = bool(kept) and all(state.reverse for state in kept)
        self.of_states, self.of_values = self._levels()
        self.places: dict[tuple[str, int], tuple[int, int]] = {}  # of what later passes read: where in the row, offset
        self.row = 0

    def run(self) -> tuple[list[Pass], int]:
        reads = [self._reads(level) for level in range(self._level(self.program.outputs[0]) + 1)]
        stored = [self._stored(level, reads) for level in range(len(reads))]
        return [self._pass(level, stored[level]) for level in range(len(reads))], self.row

    def _level(self, argument: Argument) -> int:
        if not isinstance(argument, Operand) or argument.bank in "ip":
            return -1
        return (self.of_states if argument.bank == "s" else self.of_values)[argument.number]

    def _levels(self) -> tuple[list[int], list[int]]:
        """Of every state and every value, in which pass it is made."""
        states, instructions = [0] * len(self.kept), self.program.instructions
        self.of_states = states
        for _ in range(2 * len(states) + 1):
            self.of_values = []
            for instruction in instructions:
                self.of_values.append(max((self._level(operand) for operand in instruction.operands), default=-1))
            before = list(states)
            for k, (operand, kept) in enumerate(zip(self.program.next_states, self.kept, strict=True)):
                level = max(states[k], self._level(operand))
                states[k] = level + ((level % 2 == 1) != (kept.reverse != self.first))
            if states == before:
                return states, self._sunk(self.of_values)
        raise RefusedError("model: a state that runs forward and one that runs from the end read each other")

    def _sunk(self, levels: list[int]) -> list[int]:
        """What needs no state is made in the first pass that reads it."""
        last = max((*levels, *self.of_states), default=0)
        needed = [last + 1] * len(levels)

        def read(argument: Argument, level: int) -> None:
            if isinstance(argument, Operand) and argument.bank == "v":
                needed[argument.number] = min(needed[argument.number], level)

        for operand, level in zip(self.program.next_states, self.of_states, strict=True):
            read(operand, level)
        (output,) = self.program.outputs
        read(output, max(self._level(output), 0))
        for k in reversed(range(len(levels))):
            if levels[k] < 0:
                levels[k] = needed[k]
            for operand in self.program.instructions[k].operands:
                read(operand, levels[k])
        return levels

    def _in(self, level: int) -> list[tuple[int, Instruction]]:
        return [(k, made) for k, made in enumerate(self.program.instructions) if self.of_values[k] == level]

    def _states(self, level: int) -> list[int]:
        return [k for k, of_state in enumerate(self.of_states) if of_state == level]

    def _results(self, level: int) -> list[Operand]:
        found = [self.program.next_states[k] for k in self._states(level)]
        output = self.program.outputs[0]
        return [*found, output] if max(self._level(output), 0) == level else found

    def _reads(self, level: int) -> list[Operand]:
        """What a pass reads of earlier ones."""
        arguments = [argument for _, made in self._in(level) for argument in made.operands]
        used = [argument for argument in (*arguments, *self._results(level)) if isinstance(argument, Operand)]
        return [operand for operand in used if 0 <= self._level(operand) < level]

    def _stored(self, level: int, reads: list[list[Operand]]) -> list[Operand]:
        """What a pass leaves in the row, each from the first to the last of its numbers that is read."""
        spans: dict[tuple[str, int], tuple[int, int]] = {}
        for operand in (one for later in reads[level + 1 :] for one in later if self._level(one) == level):
            start, end = spans.get(operand[:2], (operand.offset, 0))
            spans[operand[:2]] = min(start, operand.offset), max(end, operand.offset + operand.size)
        found: list[Operand] = []
        for (bank, number), (start, end) in spans.items():
            self.places[bank, number] = self.row, start
            self.row += end - start
            found.append(Operand(bank, number, start, end - start))
        return found

    def _pass(self, level: int, stored: list[Operand]) -> Pass:
        instructions, states = self._in(level), self._states(level)
        values = {k: at for at, (k, _) in enumerate(instructions)}
        numbers = {k: at for at, k in enumerate(states)}

        def moved(operand: Operand) -> Operand:
            if operand.bank in "ip":
                return operand
            if self._level(operand) < level:
                place, start = self.places[operand[:2]]
                return Operand("i", 1, place + operand.offset - start, operand.size)
            return operand._replace(number=(values if operand.bank == "v" else numbers)[operand.number])

        def changed(made: Instruction) -> Instruction:
            return made._replace(operands=tuple(moved(a) if isinstance(a, Operand) else a for a in made.operands))

        results = [moved(operand) for operand in self._results(level)]
        outputs = [*map(moved, stored), *results[len(states) :]]
        targets = [self.places[operand[:2]][0] for operand in stored] + [-1] * (len(results) - len(states))
        program = Program(
            tuple(self.program.states[k] for k in states),
            (*self.program.inputs, self.row) if self.row else self.program.inputs,
            self.program.vectors,
            self.program.matrices,
            tuple(changed(made) for _, made in instructions),
            tuple(results[: len(states)]),
            tuple(outputs),
        )
        return Pass(program, (level % 2 == 1) != self.first, [self.kept[k] for k in states], targets)
