# SPDX-License-Identifier: Apache-2.0
"""A program's instructions as the export writes them: moves followed to where their numbers come from, products that
are only added taken together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from tidegate.fusion.program import Argument, Instruction, Operand, Program


class Piece(NamedTuple):
    """Rows `first` .. of a matrix by an operand."""

    matrix: int
    first: int
    operand: Operand


class Product(NamedTuple):
    """The sum of pieces and vectors: `size` numbers.

    Attributes:
        biases: vectors, of `size` each.
        groups: each group of the operand's numbers is multiplied; by a block of its own if the matrix has so many.
    """

    size: int
    pieces: tuple[Piece, ...]
    biases: tuple[Operand, ...]
    groups: int = 1


class Move(NamedTuple):
    """Numbers from elsewhere, or constants, in a row."""

    size: int
    sources: tuple[Operand | float, ...]  # of one number each


Node: TypeAlias = Instruction | Product | Move


@dataclass
class Rewritten:
    """Attributes:
    nodes: by number, which operands in the bank "v" say.
    orders: by number, where a node stood among the program's instructions.
    next_states, outputs: what they become.
    """

    nodes: dict[int, Node]
    orders: dict[int, int]
    next_states: list[Operand]
    outputs: list[Operand]


def operands_of(node: Node) -> list[Operand]:
    if isinstance(node, Product):
        return [piece.operand for piece in node.pieces]
    arguments: Sequence[Argument] = node.sources if isinstance(node, Move) else node.operands
    return [argument for argument in arguments if isinstance(argument, Operand)]


def rewritten(program: Program) -> Rewritten:
    """The nodes of a program."""
    found = _Moves(program).run()
    _join_sums(found)
    _join_neighbours(found)
    _drop_unneeded(found)
    return found


class _Moves:
    """Follows every number through the instructions that only move it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sources: dict[int, list[Operand | float]] = {}
        self.nodes: dict[int, Node] = {}
        self.orders = {k: k for k in range(len(program.instructions))}

    def run(self) -> Rewritten:
        for k, instruction in enumerate(self.program.instructions):
            if self._is_move(instruction):
                self.sources[k] = self._moved(instruction)
            else:
                self.nodes[k] = self._node(instruction)
        next_states = [self._followed(operand) for operand in self.program.next_states]
        outputs = [self._followed(operand) for operand in self.program.outputs]
        return Rewritten(self.nodes, self.orders, next_states, outputs)

    @staticmethod
    def _is_move(instruction: Instruction) -> bool:
        if instruction.operation in ("gather", "concat"):
            return True
        # Of a number for each of its results, or of one for all.
        sizes = {argument.size if isinstance(argument, Operand) else 1 for argument in instruction.operands}
        return instruction.operation in ("copy", "constant") and sizes <= {1, instruction.size}

    def _moved(self, instruction: Instruction) -> list[Operand | float]:
        numbers = [number for argument in instruction.operands for number in self._numbers(argument)]
        if instruction.operation == "gather":
            return [numbers[k] for k in instruction.indices]
        return numbers * instruction.size if len(numbers) == 1 else numbers

    def _numbers(self, argument: Argument) -> list[Operand | float]:
        if not isinstance(argument, Operand):
            return [argument]
        if argument.bank == "v" and argument.number in self.sources:
            return self.sources[argument.number][argument.offset : argument.offset + argument.size]
        return [argument.part(k, 1) for k in range(argument.size)]

    def _node(self, instruction: Instruction) -> Node:
        operands = tuple(self._argument(argument) for argument in instruction.operands)
        if instruction.operation == "product":
            (operand,) = operands
            assert isinstance(operand, Operand)
            biases = () if instruction.bias is None else (instruction.bias,)
            return Product(instruction.size, (Piece(instruction.matrix, 0, operand),), biases, instruction.groups)
        return instruction._replace(operands=operands)

    def _argument(self, argument: Argument) -> Argument:
        if isinstance(argument, Operand) and argument.bank == "v" and argument.number in self.sources:
            first = self._numbers(argument)[0]
            if not isinstance(first, Operand) and set(map(repr, self._numbers(argument))) == {repr(first)}:
                return first
            return self._followed(argument)
        return argument

    def _followed(self, operand: Operand) -> Operand:
        """Where an operand's numbers are; moved there if they are not side by side."""
        if operand.bank != "v" or operand.number not in self.sources:
            return operand
        numbers = self._numbers(operand)
        first = numbers[0]
        if isinstance(first, Operand) and numbers == [first.part(k, 1) for k in range(len(numbers))]:
            return first._replace(size=len(numbers))
        sources = tuple(numbers)
        known = [k for k, node in self.nodes.items() if isinstance(node, Move) and node.sources == sources]
        place = known[0] if known else len(self.orders)
        if not known:
            self.nodes[place], self.orders[place] = Move(len(sources), sources), operand.number
        return Operand("v", place, 0, len(sources))


def _uses(found: Rewritten) -> list[Operand]:
    used = [operand for node in found.nodes.values() for operand in operands_of(node)]
    return [operand for operand in (*used, *found.next_states, *found.outputs) if operand.bank == "v"]


def _overlap(a: Operand, b: Operand) -> bool:
    return a[:2] == b[:2] and a.offset < b.offset + b.size and b.offset < a.offset + a.size


def _join_sums(found: Rewritten) -> None:
    """`add` of two products' numbers that nobody else reads is one product with both's pieces."""
    uses = _uses(found)

    def product_of(argument: Argument) -> Product | None:
        if not isinstance(argument, Operand) or argument.bank != "v":
            return None
        node = found.nodes[argument.number]
        if not isinstance(node, Product) or node.groups != 1 or sum(_overlap(argument, use) for use in uses) != 1:
            return None
        return node

    for k, node in list(found.nodes.items()):
        if not isinstance(node, Instruction) or node.operation != "add":
            continue
        a, b = node.operands
        left, right = product_of(a), product_of(b)
        if left is None or right is None or len(left.pieces) + len(right.pieces) > 2:
            continue
        assert isinstance(a, Operand)
        assert isinstance(b, Operand)
        if a.size != node.size or b.size != node.size or _overlap(a, b):
            continue
        parts = [_rows(left, a), _rows(right, b)]
        found.nodes[k] = Product(
            node.size, tuple(p for part in parts for p in part.pieces), tuple(v for part in parts for v in part.biases)
        )


def _rows(product: Product, operand: Operand) -> Product:
    """The rows of a product that an operand names."""
    pieces = tuple(piece._replace(first=piece.first + operand.offset) for piece in product.pieces)
    biases = tuple(bias.part(operand.offset, operand.size) for bias in product.biases)
    return Product(operand.size, pieces, biases)


def _join_neighbours(found: Rewritten) -> None:
    """Of each product only the rows that are read, and rows that follow one another made at once."""
    uses = _uses(found)
    joined: list[Product] = []
    orders: list[int] = []
    places: dict[int, list[tuple[Operand, int, int]]] = {}  # of a product's rows: which of `joined`, and where in it
    for k, node in list(found.nodes.items()):
        if not isinstance(node, Product) or node.groups != 1:
            continue
        del found.nodes[k]
        places[k] = []
        for start, end in _joined_spans((use.offset, use.offset + use.size) for use in uses if use.number == k):
            rows = Operand("v", k, start, end - start)
            part = _rows(node, rows)
            for which, known in enumerate(joined):
                both = _following(known, part)
                if both is not None:
                    places[k].append((rows, which, known.size))
                    joined[which], orders[which] = both, max(orders[which], found.orders[k])
                    break
            else:
                places[k].append((rows, len(joined), 0))
                joined.append(part)
                orders.append(found.orders[k])
    first = max(found.orders, default=0) + 1
    for which, node in enumerate(joined):
        found.nodes[first + which], found.orders[first + which] = node, orders[which]

    def moved(operand: Operand) -> Operand:
        for rows, which, at in places.get(operand.number, ()) if operand.bank == "v" else ():
            if rows.offset <= operand.offset and operand.offset + operand.size <= rows.offset + rows.size:
                return operand._replace(number=first + which, offset=operand.offset - rows.offset + at)
        return operand

    found.nodes = {k: _with_operands(node, moved) for k, node in found.nodes.items()}
    found.next_states = [moved(operand) for operand in found.next_states]
    found.outputs = [moved(operand) for operand in found.outputs]


def _joined_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _following(first: Product, second: Product) -> Product | None:
    """Both as one, if the second's rows are those that follow."""
    if len(first.pieces) != len(second.pieces) or len(first.biases) != len(second.biases):
        return None
    for a, b in zip(first.pieces, second.pieces, strict=True):
        if a._replace(first=a.first + first.size) != b:
            return None
    for a, b in zip(first.biases, second.biases, strict=True):
        if a[:2] != b[:2] or a.offset + first.size != b.offset:
            return None
    biases = tuple(bias._replace(size=first.size + second.size) for bias in first.biases)
    return Product(first.size + second.size, first.pieces, biases)


def _with_operands(node: Node, change: Callable[[Operand], Operand]) -> Node:
    def changed(argument: Argument) -> Argument:
        return change(argument) if isinstance(argument, Operand) else argument

    if isinstance(node, Product):
        return node._replace(pieces=tuple(piece._replace(operand=change(piece.operand)) for piece in node.pieces))
    if isinstance(node, Move):
        return node._replace(sources=tuple(map(changed, node.sources)))
    return node._replace(operands=tuple(map(changed, node.operands)))


def _drop_unneeded(found: Rewritten) -> None:
    needed: set[int] = set()
    waiting = [operand.number for operand in (*found.next_states, *found.outputs) if operand.bank == "v"]
    while waiting:
        k = waiting.pop()
        if k not in needed:
            needed.add(k)
            waiting += [operand.number for operand in operands_of(found.nodes[k]) if operand.bank == "v"]
    found.nodes = {k: node for k, node in found.nodes.items() if k in needed}
