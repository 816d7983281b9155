# SPDX-License-Identifier: Apache-2.0
"""In which order a step does its work, and where every value is: in the state, in x or y, in scratch memory, or nowhere
but in a register of the loop that makes and reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tidegate.export.rewrite import Move, Node, Rewritten, operands_of
from tidegate.fusion.encode import Free
from tidegate.fusion.program import ELEMENTWISE, Instruction, Operand, Program

_ROOM = 4  # numbers: scratch memory is shared out in multiples


class Place(NamedTuple):
    """Attributes:
    base: "x", "y", "row", "state", "scratch" or "vectors".
    offset: in numbers.
    """

    base: str
    offset: int


class Copy(NamedTuple):
    """At the end of a step: what a state, or an output, becomes.

    Attributes:
        source: an operand, or a move that is done right there, in rising order.
    """

    target: Place
    source: Operand | Move


@dataclass
class Stages:
    """Attributes:
    order: the nodes' numbers, those together that share a loop.
    homes: where nodes' results are, of those that have a place in memory.
    copies: the last of it.
    state_offsets, vector_offsets: of each state in the state, of each vector among the vectors.
    scratch: how many numbers of it.
    """

    nodes: dict[int, Node]
    order: list[list[int]]
    copies: list[Copy]
    state_offsets: list[int]
    vector_offsets: list[int]
    homes: dict[int, Place] = field(default_factory=dict[int, Place])
    scratch: int = 0

    def place(self, operand: Operand) -> Place:
        bank, number, offset, _ = operand
        if bank == "v":
            home = self.homes[number]
            return home._replace(offset=home.offset + offset)
        if bank == "s":
            return Place("state", self.state_offsets[number] + offset)
        if bank == "p":
            return Place("vectors", self.vector_offsets[number] + offset)
        return Place("row" if number else "x", offset)


def staged(found: Rewritten, program: Program, targets: list[Place]) -> Stages:
    """
    Args:
        targets: where the outputs are to be.
    """
    return _Stager(found, program, targets).run()


def is_elementwise(node: Node) -> bool:
    return isinstance(node, Instruction) and node.operation in ELEMENTWISE


def _offsets(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:k]) for k in range(len(sizes))]


class _Stager:
    def __init__(self, found: Rewritten, program: Program, targets: list[Place]) -> None:
        self.found, self.program, self.targets = found, program, targets
        self.nodes = dict(found.nodes)
        self.next_states = list(found.next_states)

    def run(self) -> Stages:
        copied = self._moves_at_the_end()
        order = self._ordered(set(copied))
        stages = Stages(self.nodes, order, [], _offsets(self.program.states), _offsets(self.program.vectors))
        stage_of = {k: at for at, stage in enumerate(order) for k in stage}
        self._give_homes(stages, stage_of, copied)
        self._give_scratch(stages, stage_of)
        return stages

    def _moves_at_the_end(self) -> dict[int, int]:
        """Moves that are nothing but a state's next value and can be done in the state: number to state.

        A state that becomes another's old value, or a mixture, is moved into scratch memory first.
        """
        copied: dict[int, int] = {}
        for state, operand in enumerate(self.next_states):
            if operand.bank == "s" and operand != self._whole_state(state):
                number = max(self.found.orders, default=0) + 1
                sources = tuple(operand.part(k, 1) for k in range(operand.size))
                self.nodes[number] = Move(operand.size, sources)
                self.found.orders[number] = number
                operand = self.next_states[state] = Operand("v", number, 0, operand.size)
            node = self.nodes[operand.number] if operand.bank == "v" else None
            if isinstance(node, Move) and self._is_ascending(node, state) and self._readers(operand.number) == 1:
                copied[operand.number] = state
        return copied

    def _whole_state(self, state: int) -> Operand:
        return Operand("s", state, 0, self.program.states[state])

    @staticmethod
    def _is_ascending(move: Move, state: int) -> bool:
        """Whether it can be done in the state itself, in order: nothing is read after it was written."""
        for k, source in enumerate(move.sources):
            if isinstance(source, Operand) and source.bank == "s" and (source.number != state or source.offset < k):
                return False
        return True

    def _readers(self, number: int) -> int:
        read = [operand for node in self.nodes.values() for operand in operands_of(node)]
        return sum(operand[:2] == ("v", number) for operand in (*read, *self.next_states, *self.found.outputs))

    def _ordered(self, left_out: set[int]) -> list[list[int]]:
        waiting = sorted((k for k in self.nodes if k not in left_out), key=lambda k: (self.found.orders[k], k))
        made: set[int] = set()
        order: list[list[int]] = []
        while waiting:
            head = next(k for k in waiting if self._is_ready(k, made))
            stage = [head]
            waiting.remove(head)
            if is_elementwise(self.nodes[head]):
                for k in list(waiting):
                    if self._joins(k, stage, made):
                        stage.append(k)
                        waiting.remove(k)
            made.update(stage)
            order.append(stage)
        return order

    def _is_ready(self, number: int, made: set[int]) -> bool:
        return all(operand.bank != "v" or operand.number in made for operand in operands_of(self.nodes[number]))

    def _joins(self, number: int, stage: list[int], made: set[int]) -> bool:
        """Whether an instruction can be done in the same loop."""
        node, head = self.nodes[number], self.nodes[stage[0]]
        if not is_elementwise(node) or (node.size, _groups(node)) != (head.size, _groups(head)):
            return False
        for operand in operands_of(node):
            if operand.bank == "v" and operand.number in stage:
                if operand.size != node.size:
                    return False
            elif operand.bank == "v" and operand.number not in made:
                return False
        return True

    def _give_homes(self, stages: Stages, stage_of: dict[int, int], copied: dict[int, int]) -> None:
        """What is made where it is to be at the end of the step; the rest is copied there."""
        end = [operand for operand in (*self.next_states, *self.found.outputs) if operand.bank == "s"]
        end += [operand for number in copied for operand in operands_of(self.nodes[number])]
        state_copies: list[Copy] = []
        for state, operand in enumerate(self.next_states):
            target = Place("state", stages.state_offsets[state])
            if operand.bank == "v" and operand.number in copied:
                move = self.nodes[operand.number]
                assert isinstance(move, Move)
                state_copies.append(Copy(target, move))
            elif operand == self._whole_state(state):
                continue
            elif self._fits(operand, stages) and self._is_last_use(state, stage_of[operand.number], stages, end):
                stages.homes[operand.number] = target
            else:
                state_copies.append(Copy(target, operand))
        for output, target in zip(self.found.outputs, self.targets, strict=True):
            if output.bank == "v" and output.number not in copied and self._fits(output, stages):
                stages.homes[output.number] = target
            else:
                stages.copies.append(Copy(target, output))
        stages.copies += state_copies

    def _fits(self, operand: Operand, stages: Stages) -> bool:
        """Whether it is all of a result that has no place yet."""
        if operand.bank != "v" or operand.number in stages.homes:
            return False
        return operand == Operand("v", operand.number, 0, self.nodes[operand.number].size)

    def _is_last_use(self, state: int, stage: int, stages: Stages, end: list[Operand]) -> bool:
        """Whether the old state is read nowhere after a stage, and in it only number by number."""
        size = self.program.states[state]
        later = [
            operand for after in stages.order[stage + 1 :] for k in after for operand in operands_of(self.nodes[k])
        ]
        if any(operand[:2] == ("s", state) for operand in (*later, *end)):
            return False
        for k in stages.order[stage]:
            node = self.nodes[k]
            for operand in operands_of(node):
                same = is_elementwise(node) and operand.size == node.size == size
                if operand[:2] == ("s", state) and not same:
                    return False
        return True

    def _give_scratch(self, stages: Stages, stage_of: dict[int, int]) -> None:
        end = len(stages.order)
        last: dict[int, int] = {}
        for at, stage in enumerate(stages.order):
            for k in stage:
                for operand in operands_of(self.nodes[k]):
                    if operand.bank == "v" and stage_of[operand.number] != at:
                        last[operand.number] = at
        for copy in stages.copies:
            sources = [copy.source] if isinstance(copy.source, Operand) else copy.source.sources
            for operand in sources:
                if isinstance(operand, Operand) and operand.bank == "v":
                    last[operand.number] = end
        free = Free()
        ends: dict[int, list[int]] = {}
        for at, stage in enumerate(stages.order):
            for k in stage:
                is_kept = k in last or not is_elementwise(self.nodes[k])
                if k not in stages.homes and is_kept:
                    room = -(-self.nodes[k].size // _ROOM) * _ROOM
                    stages.homes[k] = Place("scratch", free.take(room))
                    ends.setdefault(last.get(k, at), []).append(k)
            for done in ends.pop(at, ()):
                free.give(stages.homes[done].offset, -(-self.nodes[done].size // _ROOM) * _ROOM)
        stages.scratch = free.size


def _groups(node: Node) -> int:
    return node.groups if isinstance(node, Instruction) else 1
