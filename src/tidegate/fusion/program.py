# SPDX-License-Identifier: Apache-2.0
"""A program: one step of a recurrence as a flat list of instructions over rows of numbers.

Every value is a row of `size` numbers for each row of the batch; the features of a tensor (B, ...) lie in it in order.
A step reads the entering states, the step's inputs, and the vectors and matrices that all rows share; it gives the next
states and the step's outputs.

`str(program)` is the readable form, which the registered operator carries; `Program.parse` reads it back:

    state s0 2, s1 2
    input i0 8
    matrix m0 1x8x2
    v0 8 = product m0 s0
    v1 8 = add v0 i0
    v2 4 = sigmoid v1[0:4]
    ...
    next v9, v7
    output v9
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

# Instructions on numbers: name to how many operands. C++ numbers them in this order (csrc/engine/instruction.h).
ELEMENTWISE: dict[str, int] = {
    **dict.fromkeys(("copy", "neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal"), 1),
    **dict.fromkeys(
        ("sigmoid", "tanh", "relu", "sin", "cos", "erf", "constant"), 1
    ),  # constant: no gradient goes through
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum", "pow"), 2),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), 2),  # 1 or 0
    "sigmoid_gradient": 2,  # d y (1 - y)
    "tanh_gradient": 2,  # d (1 - y y)
    "where": 3,  # b where a is not 0, else c
    "clamp": 3,  # a into b..c
    "muladd": 3,  # a b + c
}
# Over groups of a row's numbers: one result a group. dot: of two rows of numbers.
REDUCTIONS = ("sum", "mean", "max", "dot")
# gather: result k is operand indices[k]. scatter: result indices[k] gets operand k added. concat: operands in a row.
MOVES = ("gather", "scatter", "concat")
OPERATIONS = (*ELEMENTWISE, *REDUCTIONS, *MOVES, "product", "product_transposed")


def product(sizes: Sequence[int]) -> int:
    """math.prod, which torch's compiler does not know."""
    result = 1
    for size in sizes:
        result = result * size
    return result


class Operand(NamedTuple):
    """Some neighbouring numbers of a row.

    Attributes:
        bank: "v" for an instruction's result, "s" for an entering state, "i" for an input, "p" for a
            vector of parameters.
        number: which one.
        offset, size: which numbers of it.
    """

    bank: str
    number: int
    offset: int
    size: int

    def part(self, offset: int, size: int) -> Operand:
        return self._replace(offset=self.offset + offset, size=size)


Argument = Operand | float


class Instruction(NamedTuple):
    """One instruction: `size` numbers from its operands.

    An elementwise one works on `groups` groups of numbers: an operand has a number for each of `size`, one for each
    group, or one for all.

    Attributes:
        indices: of a gather or scatter.
        matrix: of a product. With as many blocks as groups, each group is multiplied by a block of its own; with one,
            all by that.
        bias: of a product, a vector; or None.
    """

    operation: str
    size: int
    operands: tuple[Argument, ...]
    groups: int = 1
    indices: tuple[int, ...] = ()
    matrix: int = -1
    bias: Operand | None = None


class Matrix(NamedTuple):
    """(blocks, rows, columns): a product gives `rows` numbers from `columns`; transposed, the other way."""

    blocks: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Program:
    """Attributes:
    states, inputs, vectors: sizes.
    matrices: shapes.
    next_states: what each state becomes.
    outputs: what each step gives.
    through_resets: how many states, the last ones, resets do not zero: sums over time.
    """

    states: tuple[int, ...]
    inputs: tuple[int, ...]
    vectors: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    instructions: tuple[Instruction, ...]
    next_states: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    through_resets: int = 0

    def __str__(self) -> str:
        lines = [
            _declared("state", "s", self.states),
            _declared("input", "i", self.inputs),
            _declared("vector", "p", self.vectors),
            _declared("matrix", "m", ["x".join(map(str, matrix)) for matrix in self.matrices]),
        ]
        for k, instruction in enumerate(self.instructions):
            lines.append(f"v{k} {instruction.size} = {self._text(instruction)}")
        lines.append("next " + ", ".join(map(self._name, self.next_states)))
        lines.append("output " + ", ".join(map(self._name, self.outputs)))
        if self.through_resets:
            lines.append(f"through resets {self.through_resets}")
        return "\n".join(line for line in lines if line)

    def size_of(self, bank: str, index: int) -> int:
        if bank == "v":
            return self.instructions[index].size
        return {"s": self.states, "i": self.inputs, "p": self.vectors}[bank][index]

    def whole(self, bank: str, index: int) -> Operand:
        return Operand(bank, index, 0, self.size_of(bank, index))

    def _name(self, argument: Argument) -> str:
        if not isinstance(argument, Operand):
            return repr(argument)
        name = f"{argument.bank}{argument.number}"
        if (argument.offset, argument.size) == (0, self.size_of(argument.bank, argument.number)):
            return name
        return f"{name}[{argument.offset}:{argument.offset + argument.size}]"

    def _text(self, instruction: Instruction) -> str:
        words = [instruction.operation]
        if instruction.matrix >= 0:
            words.append(f"m{instruction.matrix}")
        words += map(self._name, instruction.operands)
        if instruction.bias is not None:
            words.append(f"+ {self._name(instruction.bias)}")
        if instruction.groups > 1:
            words.append(f"groups {instruction.groups}")
        if instruction.indices:
            words.append("at " + _ranges(instruction.indices))
        return " ".join(words)

    @staticmethod
    def parse(text: str) -> Program:
        """The program that `text` is the readable form of.

        Raises:
            ValueError: names the line.
        """
        return _parsed(text)


def _declared(word: str, letter: str, sizes: Sequence[object]) -> str:
    return f"{word} " + ", ".join(f"{letter}{k} {size}" for k, size in enumerate(sizes)) if sizes else ""


def _ranges(indices: Sequence[int]) -> str:
    """0,1,2,3,8,8,8 as `0:4,8*3`: runs that rise by one, and repeated numbers."""
    parts: list[str] = []
    k = 0
    while k < len(indices):
        first, end = indices[k], k + 1
        step = indices[end] - first if end < len(indices) and indices[end] - first in (0, 1) else None
        while step is not None and end < len(indices) and indices[end] == indices[end - 1] + step:
            end += 1
        count = end - k
        parts.append(str(first) if count == 1 else f"{first}:{first + count}" if step else f"{first}*{count}")
        k = end
    return ",".join(parts)


def _indices(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        if ":" in part:
            found += range(*map(int, part.split(":")))
        else:
            first, _, count = part.partition("*")
            found += [int(first)] * int(count or 1)
    return tuple(found)


_OPERAND = re.compile(r"([vsip])(\d+)(?:\[(\d+):(\d+)\])?")


@cache
def _parsed(text: str) -> Program:
    declared: dict[str, list[str]] = {"state": [], "input": [], "vector": [], "matrix": []}
    instructions: list[Instruction] = []
    results: dict[str, tuple[Operand, ...]] = {"next": (), "output": ()}
    through_resets = 0

    def operand(word: str) -> Argument:
        match = _OPERAND.fullmatch(word)
        if match is None:
            return float(word)
        bank, index, first, end = match[1], int(match[2]), match[3], match[4]
        if bank == "v":
            size = instructions[index].size
        else:
            size = int(declared[{"s": "state", "i": "input", "p": "vector"}[bank]][index])
        return Operand(bank, index, int(first or 0), int(end or size) - int(first or 0))

    def read(line: str) -> None:
        nonlocal through_resets
        head, _, tail = line.partition(" ")
        if head in declared:
            declared[head] = [item.split()[1] for item in tail.split(", ")]
        elif head in results:
            named = [operand(word) for word in tail.split(", ")] if tail else []
            results[head] = tuple(item for item in named if isinstance(item, Operand))
        elif head == "through":
            through_resets = int(tail.split()[1])
        else:
            size, _, right = tail.partition(" = ")
            instructions.append(_instruction(int(size), right.split(), operand))

    line = ""
    try:
        for line in text.splitlines():
            read(line)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"program: cannot read the line {line!r}") from error
    matrices = tuple(Matrix(*map(int, shape.split("x"))) for shape in declared["matrix"])
    states, inputs, vectors = (tuple(map(int, declared[word])) for word in ("state", "input", "vector"))
    return Program(
        states, inputs, vectors, matrices, tuple(instructions), results["next"], results["output"], through_resets
    )


def _instruction(size: int, words: list[str], operand: Callable[[str], Argument]) -> Instruction:
    operation, *rest = words
    if operation not in OPERATIONS:
        raise ValueError(operation)
    matrix, groups, bias = -1, 1, None
    indices: tuple[int, ...] = ()
    operands: list[Argument] = []
    while rest:
        word = rest.pop(0)
        if word == "groups":
            groups = int(rest.pop(0))
        elif word == "at":
            indices = _indices(rest.pop(0))
        elif word == "+":
            found = operand(rest.pop(0))
            bias = found if isinstance(found, Operand) else None
        elif word[0] == "m":
            matrix = int(word[1:])
        else:
            operands.append(operand(word))
    return Instruction(operation, size, tuple(operands), groups, indices, matrix, bias)
