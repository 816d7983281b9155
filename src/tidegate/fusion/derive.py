# SPDX-License-Identifier: Apache-2.0
"""The program of a program's gradients.

It runs the steps the other way round: its states are the gradients of the states, its inputs what the forward kept and
the gradients of the outputs. What costs a product was kept; the cheap rest is computed again. In the loop is only what
the recurrence needs: the gradients of matrices are products over all steps afterwards, of what the loop gives for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tidegate.fusion.builder import Builder
from tidegate.fusion.kept import kept_by
from tidegate.fusion.program import REDUCTIONS, Argument, Instruction, Operand, Program
from tidegate.fusion.rules import RULES, Through


@dataclass(frozen=True)
class Wanted:
    """Whose gradients are asked for, and which outputs have one; the states' are always there."""

    inputs: tuple[bool, ...]
    vectors: tuple[bool, ...]
    matrices: tuple[bool, ...]
    outputs: tuple[bool, ...]


@dataclass(frozen=True)
class MatrixGradient:
    """What a matrix's gradient is a product of.

    Attributes:
        gradient: the product's gradient, by its place among the backward's outputs.
        multiplied: what it multiplied, by its place among these, or, if `is_kept`, among the forward's outputs.
    """

    matrix: int
    groups: int
    transposed: bool
    gradient: int
    multiplied: int
    is_kept: bool


@dataclass(frozen=True)
class Backward:
    """Attributes:
    program: its states are the gradients of the forward's states, then a sum for each vector wanted; its inputs are
        those of `inputs`, then the kept outputs, then the gradients of the outputs that have one.
    text: its readable form.
    inputs: which of the forward's inputs it reads.
    kept: which of the forward's outputs it reads.
    input_gradients: for each wanted input, its place among the outputs; -1 if it has none.
    vector_gradients: which vectors the sums are of.
    matrix_gradients: what the gradients of the matrices are made of.
    """

    program: Program
    text: str
    inputs: tuple[int, ...]
    kept: tuple[int, ...]
    input_gradients: tuple[int, ...]
    vector_gradients: tuple[int, ...]
    matrix_gradients: tuple[MatrixGradient, ...]


@cache
def derive(text: str, wanted: Wanted) -> Backward:
    """The backward of a program, given by its text, that keeps what it needs.

    By its text, because a string knows its hash: this is asked at each call.
    """
    return _Derivation(Program.parse(text), wanted).run()


class _Derivation:
    def __init__(self, program: Program, wanted: Wanted) -> None:
        self.program, self.wanted = program, wanted
        self.builder = Builder(vectors=list(program.vectors), matrices=list(program.matrices))
        # Of each bank and index, its gradients so far: which numbers of it, and what they get.
        self.gradients: dict[tuple[str, int], list[tuple[int, Operand]]] = {}
        self.inputs: dict[int, Operand] = {}
        self.kept: dict[int, Operand] = {}
        self.keepable = kept_by(program)
        self.again: dict[int, Operand] = {}
        self.products: list[tuple[Instruction, Operand]] = []

    def run(self) -> Backward:
        program, b = self.program, self.builder
        entering = [b.declare("s", size) for size in program.states]
        live = self._live()
        for state, gradient in zip(program.next_states, entering, strict=True):
            self._give(state, gradient)
        self.of_outputs: list[Operand] = []
        for output, has_gradient in zip(program.outputs, self.wanted.outputs, strict=True):
            if has_gradient:
                # Declared last: renumbered below, when it is known how many inputs come before.
                gradient = Operand("i", -1 - len(self.of_outputs), 0, output.size)
                self.of_outputs.append(gradient)
                self._give(output, gradient)
        for k in reversed(range(len(program.instructions))):
            gradient = self._gathered("v", k)
            if gradient is not None and k in live:
                self._through(k, program.instructions[k], gradient)
        leaving = [self._gathered("s", k) or self._zeros(size) for k, size in enumerate(program.states)]
        outputs: list[Operand] = []
        input_gradients = self._of_inputs(outputs)
        sums, of_vectors = self._of_vectors()
        matrices = self._of_matrices(outputs)
        return self._assembled(leaving + sums, outputs, input_gradients, of_vectors, matrices)

    def _live(self) -> set[int]:
        """The instructions through which something wanted, or a state, gets its gradient."""
        found: set[int] = set()
        for k, instruction in enumerate(self.program.instructions):
            operands = [*instruction.operands, instruction.bias]
            if any(isinstance(o, Operand) and self._is_live(o, found) for o in operands) or (
                instruction.matrix >= 0 and self.wanted.matrices[instruction.matrix]
            ):
                found.add(k)
        self.live = found
        return found

    def _is_live(self, operand: Operand, live: set[int] | None = None) -> bool:
        bank, index = operand[:2]
        if bank == "v":
            return index in (self.live if live is None else live)
        return bank == "s" or (self.wanted.inputs if bank == "i" else self.wanted.vectors)[index]

    # What the forward had

    def _value(self, argument: Argument) -> Argument:
        """An operand of the forward's, in the backward."""
        if not isinstance(argument, Operand):
            return argument
        bank, index, offset, size = argument
        if bank == "p":
            return argument
        if bank == "i":
            if index not in self.inputs:
                self.inputs[index] = Operand("x", index, 0, self.program.inputs[index])
            return self.inputs[index].part(offset, size)
        whole = self.program.whole(bank, index)
        if whole in self.keepable:
            place = self.program.outputs.index(whole)
            if place not in self.kept:
                self.kept[place] = Operand("k", len(self.kept), 0, whole.size)
            return self.kept[place].part(offset, size)
        if index not in self.again:
            instruction = self.program.instructions[index]
            operands = tuple(self._value(operand) for operand in instruction.operands)
            self.again[index] = self.builder.add(instruction._replace(operands=operands))
        return self.again[index].part(offset, size)

    # Gradients

    def _give(self, operand: Argument, gradient: Operand) -> None:
        """Add a gradient of as many numbers as the operand has."""
        if isinstance(operand, Operand) and self._is_live(operand):
            self.gradients.setdefault(operand[:2], []).append((operand.offset, gradient))

    def _gathered(self, bank: str, index: int) -> Operand | None:
        """The sum of what an operand's numbers got."""
        pieces = self.gradients.get((bank, index))
        if not pieces:
            return None
        b, size = self.builder, self.program.size_of(bank, index)
        whole = [gradient for _, gradient in pieces if gradient.size == size]
        of_place: dict[tuple[int, int], Operand] = {}
        for offset, gradient in pieces:
            if gradient.size < size:
                place = (offset, gradient.size)
                of_place[place] = b.emit("add", of_place[place], gradient) if place in of_place else gradient
        parts = sorted(of_place)
        # Layers of pieces that do not overlap, each in one row.
        while parts:
            layer: list[Operand] = []
            end, rest = 0, []
            for place in parts:
                offset, gradient = place[0], of_place[place]
                if offset < end:
                    rest.append(place)
                    continue
                if offset > end:
                    layer.append(self._zeros(offset - end))
                layer.append(gradient)
                end = offset + gradient.size
            if end < size:
                layer.append(self._zeros(size - end))
            whole.append(b.concat(layer))
            parts = rest
        total = whole[0]
        for more in whole[1:]:
            total = b.emit("add", total, more)
        return total

    def _zeros(self, size: int) -> Operand:
        return self.builder.emit("copy", 0.0, size=size)

    def _through(self, index: int, instruction: Instruction, d: Operand) -> None:
        operation = instruction.operation
        if instruction.matrix >= 0:
            self._through_product(instruction, d)
        elif operation in _MOVES:
            _MOVES[operation](self, instruction, d)
        elif operation in REDUCTIONS:
            self._through_reduction(index, instruction, d)
        elif operation in RULES:
            self._through_numbers(index, instruction, d)

    def _through_product(self, instruction: Instruction, d: Operand) -> None:
        (operand,) = instruction.operands
        assert isinstance(operand, Operand)
        transposed = instruction.operation == "product_transposed"
        if self._is_live(operand):
            back = "product" if transposed else "product_transposed"
            self._give(
                operand,
                self.builder.add(Instruction(back, operand.size, (d,), instruction.groups, matrix=instruction.matrix)),
            )
        if instruction.bias is not None:
            self._give(instruction.bias, d)
        if self.wanted.matrices[instruction.matrix]:
            self.products.append((instruction, d))

    def _through_reduction(self, index: int, instruction: Instruction, d: Operand) -> None:
        operand = instruction.operands[0]
        assert isinstance(operand, Operand)
        b, groups, size = self.builder, instruction.groups, operand.size
        if instruction.operation == "dot":
            one, other = instruction.operands
            if one == other:
                self._give(one, b.emit("mul", self._value(one), b.emit("add", d, d), size=size, groups=groups))
                return
            for one, other in (instruction.operands, instruction.operands[::-1]):
                if isinstance(one, Operand) and self._is_live(one):
                    self._give(one, b.emit("mul", self._value(other), d, size=size, groups=groups))
            return
        if instruction.operation != "max":
            each = d if instruction.operation == "sum" else b.emit("mul", d, groups / size)
            self._give(operand, b.emit("copy", each, size=size, groups=groups))
            return
        # Those that are the largest share it.
        value, largest = self._value(operand), self._value(self.program.whole("v", index))
        is_largest = b.emit("eq", value, largest, size=size, groups=groups)
        share = b.emit("div", d, b.reduce("sum", is_largest, groups))
        self._give(operand, b.emit("mul", is_largest, share, size=size, groups=groups))

    def _through_numbers(self, index: int, instruction: Instruction, d: Operand) -> None:
        result = self.program.whole("v", index)
        rules = RULES[instruction.operation]
        for place, operand in enumerate(instruction.operands):
            rule = rules[place]
            if rule is None or not isinstance(operand, Operand) or not self._is_live(operand):
                continue
            gradient = rule(Through(self.builder, self._value, instruction, result, d))
            if operand.size < instruction.size:
                # One number for a whole group, or for all.
                groups = instruction.groups if operand.size == instruction.groups else 1
                if gradient.size < instruction.size:
                    gradient = self.builder.emit("copy", gradient, size=instruction.size, groups=instruction.groups)
                gradient = self.builder.reduce("sum", gradient, groups)
            elif gradient.size < instruction.size:
                gradient = self.builder.emit("copy", gradient, size=instruction.size, groups=instruction.groups)
            self._give(operand, gradient)

    # Putting it together

    def _of_inputs(self, outputs: list[Operand]) -> tuple[int, ...]:
        places: list[int] = []
        for k, wanted in enumerate(self.wanted.inputs):
            if not wanted:
                continue
            gradient = self._gathered("i", k)
            places.append(-1 if gradient is None else _placed(outputs, gradient))
        return tuple(places)

    def _of_vectors(self) -> tuple[list[Operand], tuple[int, ...]]:
        sums: list[Operand] = []
        found: list[int] = []
        for k, wanted in enumerate(self.wanted.vectors):
            gradient = self._gathered("p", k) if wanted else None
            if gradient is not None:
                before = self.builder.declare("s", gradient.size)
                sums.append(self.builder.emit("add", before, gradient))
                found.append(k)
        return sums, tuple(found)

    def _of_matrices(self, outputs: list[Operand]) -> tuple[MatrixGradient, ...]:
        found: list[MatrixGradient] = []
        for instruction, d in self.products:
            value = self._value(instruction.operands[0])
            assert isinstance(value, Operand)
            whole = [k for k, kept in self.kept.items() if kept == value]
            places = _placed(outputs, d), whole[0] if whole else _placed(outputs, value)
            transposed = instruction.operation == "product_transposed"
            found.append(MatrixGradient(instruction.matrix, instruction.groups, transposed, *places, bool(whole)))
        return tuple(found)

    def _assembled(
        self,
        leaving: list[Operand],
        outputs: list[Operand],
        input_gradients: tuple[int, ...],
        of_vectors: tuple[int, ...],
        matrices: tuple[MatrixGradient, ...],
    ) -> Backward:
        """Number the inputs: the forward's that are read, what it kept, the gradients of its outputs."""
        b, read = self.builder, sorted(self.inputs)
        b.inputs = [
            *(self.program.inputs[k] for k in read),
            *(operand.size for operand in self.kept.values()),
            *(gradient.size for gradient in self.of_outputs),
        ]

        def numbered(argument: Argument) -> Argument:
            if not isinstance(argument, Operand):
                return argument
            if argument.bank == "x":
                return argument._replace(bank="i", number=read.index(argument.number))
            if argument.bank == "k":
                return argument._replace(bank="i", number=len(read) + argument.number)
            if argument.bank == "i":
                return argument._replace(number=len(read) + len(self.kept) - 1 - argument.number)
            return argument

        def numbered_operand(operand: Operand) -> Operand:
            result = numbered(operand)
            assert isinstance(result, Operand)
            return result

        b.instructions = [
            instruction._replace(operands=tuple(map(numbered, instruction.operands))) for instruction in b.instructions
        ]
        program = b.build(
            [numbered_operand(operand) for operand in leaving],
            [numbered_operand(operand) for operand in outputs],
            len(of_vectors) + self.program.through_resets,
        )
        return Backward(program, str(program), tuple(read), tuple(self.kept), input_gradients, of_vectors, matrices)


def _placed(outputs: list[Operand], operand: Operand) -> int:
    if operand not in outputs:
        outputs.append(operand)
    return outputs.index(operand)


def _through_gather(derivation: _Derivation, instruction: Instruction, d: Operand) -> None:
    (operand,) = instruction.operands
    assert isinstance(operand, Operand)
    if derivation._is_live(operand):
        scattered = Instruction("scatter", operand.size, (d,), indices=instruction.indices)
        derivation._give(operand, derivation.builder.add(scattered))


def _through_scatter(derivation: _Derivation, instruction: Instruction, d: Operand) -> None:
    (operand,) = instruction.operands
    derivation._give(operand, derivation.builder.gather(d, instruction.indices))


def _through_concat(derivation: _Derivation, instruction: Instruction, d: Operand) -> None:
    at = 0
    for operand in instruction.operands:
        size = operand.size if isinstance(operand, Operand) else 1
        derivation._give(operand, d.part(at, size))
        at += size


_MOVES: dict[str, Callable[[_Derivation, Instruction, Operand], None]] = {
    "gather": _through_gather,
    "scatter": _through_scatter,
    "concat": _through_concat,
}

__all__ = ["Backward", "MatrixGradient", "Wanted", "derive"]
