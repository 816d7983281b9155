# SPDX-License-Identifier: Apache-2.0
"""Writes a program, instruction by instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tidegate.fusion.program import Argument, Instruction, Matrix, Operand, Program


def _are_neighbours(left: Operand, right: Operand) -> bool:
    return left[:2] == right[:2] and left.offset + left.size == right.offset


@dataclass
class Builder:
    """Collects a program's instructions; the same one twice is one."""

    states: list[int] = field(default_factory=list[int])
    inputs: list[int] = field(default_factory=list[int])
    vectors: list[int] = field(default_factory=list[int])
    matrices: list[Matrix] = field(default_factory=list[Matrix])
    instructions: list[Instruction] = field(default_factory=list[Instruction])
    known: dict[Instruction, Operand] = field(default_factory=dict[Instruction, Operand])

    def declare(self, bank: str, size: int) -> Operand:
        sizes = {"s": self.states, "i": self.inputs, "p": self.vectors}[bank]
        sizes.append(size)
        return Operand(bank, len(sizes) - 1, 0, size)

    def add(self, instruction: Instruction) -> Operand:
        found = self.known.get(instruction)
        if found is None:
            self.instructions.append(instruction)
            found = Operand("v", len(self.instructions) - 1, 0, instruction.size)
            self.known[instruction] = found
        return found

    def emit(self, operation: str, *operands: Argument, size: int = 0, groups: int = 1) -> Operand:
        """An elementwise instruction, of the size of its largest operand unless one is given.

        A number for a whole group is read where it is, not from its copies.
        """
        size = size or max(operand.size if isinstance(operand, Operand) else 1 for operand in operands)
        spread = [self._copied(operand, size) for operand in operands]
        wider = max([groups, *(made.groups for made in spread if made is not None)])
        read = tuple(made.operands[0] if made else operand for made, operand in zip(spread, operands, strict=True))
        if operation != "copy" and all(not isinstance(o, Operand) or o.size in (1, wider, size) for o in read):
            operands, groups = read, wider
        return self.add(Instruction(operation, size, operands, groups))

    def _copied(self, operand: Argument, size: int) -> Instruction | None:
        """What made an operand of this size, if it was a copy of one number for each group."""
        if not isinstance(operand, Operand) or operand.bank != "v" or operand.size != size:
            return None
        made = self.instructions[operand.number]
        source = made.operands[0] if made.operation == "copy" else None
        is_spread = isinstance(source, Operand) and source.size == made.groups < made.size == size
        return made if is_spread else None

    def reduce(self, operation: str, operand: Operand, groups: int) -> Operand:
        if operand.size == groups:
            return operand
        if operation == "sum" and operand.bank == "v":
            made = self.instructions[operand.number]
            if operand == self.whole(operand.number) and self._are_whole(made):
                if made.operation == "mul":
                    return self.add(Instruction("dot", groups, made.operands, groups))
                if made.operation == "neg":
                    (negated,) = made.operands
                    assert isinstance(negated, Operand)
                    return self.emit("neg", self.reduce("sum", negated, groups))
        return self.add(Instruction(operation, groups, (operand,), groups))

    def whole(self, index: int) -> Operand:
        """An instruction's result."""
        return Operand("v", index, 0, self.instructions[index].size)

    @staticmethod
    def _are_whole(made: Instruction) -> bool:
        return all(isinstance(operand, Operand) and operand.size == made.size for operand in made.operands)

    def gather(self, operand: Operand, indices: Sequence[int]) -> Operand:
        """operand[indices], without an instruction where these are neighbours in order."""
        first, count = indices[0], len(indices)
        if list(indices) == list(range(first, first + count)):
            return operand.part(first, count)
        return self.add(Instruction("gather", count, (operand,), indices=tuple(indices)))

    def concat(self, operands: Sequence[Argument]) -> Operand:
        """Neighbours of one another become one operand; numbers stand for one number each."""
        merged: list[Argument] = []
        for operand in operands:
            last = merged[-1] if merged else None
            if isinstance(last, Operand) and isinstance(operand, Operand) and _are_neighbours(last, operand):
                merged[-1] = last._replace(size=last.size + operand.size)
            else:
                merged.append(operand)
        if len(merged) == 1 and isinstance(merged[0], Operand):
            return merged[0]
        size = sum(operand.size if isinstance(operand, Operand) else 1 for operand in merged)
        return self.add(Instruction("concat", size, tuple(merged)))

    def build(self, next_states: Sequence[Operand], outputs: Sequence[Operand], through_resets: int = 0) -> Program:
        """The program of what these results need, products that are only added taken together with the sum."""
        results = [*next_states, *outputs]
        self._take_sums_together(results)
        needed = sorted(self._needed(results))
        places = {old: new for new, old in enumerate(needed)}

        def moved(argument: Argument) -> Argument:
            return moved_operand(argument) if isinstance(argument, Operand) else argument

        def moved_operand(operand: Operand) -> Operand:
            return operand._replace(number=places[operand.number]) if operand.bank == "v" else operand

        kept = tuple(
            instruction._replace(operands=tuple(map(moved, instruction.operands)))
            for instruction in (self.instructions[k] for k in needed)
        )
        return Program(
            tuple(self.states),
            tuple(self.inputs),
            tuple(self.vectors),
            tuple(self.matrices),
            kept,
            tuple(map(moved_operand, next_states)),
            tuple(map(moved_operand, outputs)),
            through_resets,
        )

    def _take_sums_together(self, results: Sequence[Operand]) -> None:
        """`v = mul a b; add v c`, if nobody else reads v, is `muladd a b c`."""
        needed = self._needed(results)
        uses: dict[int, int] = {}
        read = [operand for k in needed for operand in self.instructions[k].operands]
        for operand in (*read, *results):
            if isinstance(operand, Operand) and operand.bank == "v":
                uses[operand.number] = uses.get(operand.number, 0) + 1
        for k in sorted(needed):
            instruction = self.instructions[k]
            if instruction.operation != "add":
                continue
            for place in (0, 1):
                product, other = instruction.operands[place], instruction.operands[1 - place]
                if not isinstance(product, Operand) or product.bank != "v" or uses[product.number] != 1:
                    continue
                made = self.instructions[product.number]
                alike = made.size == product.size == instruction.size and made.groups in (1, instruction.groups)
                if made.operation == "mul" and alike and self._fits(made, instruction, other):
                    groups = max(made.groups, instruction.groups)
                    self.instructions[k] = Instruction("muladd", instruction.size, (*made.operands, other), groups)
                    break

    @staticmethod
    def _fits(made: Instruction, instruction: Instruction, other: Argument) -> bool:
        """Whether both instructions' operands can be read in one grouping."""
        groups = max(made.groups, instruction.groups)
        sizes = {operand.size for operand in (*made.operands, other) if isinstance(operand, Operand)}
        return sizes <= {1, groups, instruction.size}

    def _needed(self, results: Sequence[Operand]) -> set[int]:
        found: set[int] = set()
        waiting = [operand.number for operand in results if operand.bank == "v"]
        while waiting:
            k = waiting.pop()
            if k in found:
                continue
            found.add(k)
            operands = self.instructions[k].operands
            waiting += [operand.number for operand in operands if isinstance(operand, Operand) and operand.bank == "v"]
        return found
