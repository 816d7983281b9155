# SPDX-License-Identifier: Apache-2.0
"""A program's stages as C: a step over the state, x and y, with the runtime that it needs in front."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tidegate.export import products, products_int8
from tidegate.export.compile import Compiled
from tidegate.export.constants import Constants
from tidegate.export.loops import Loop
from tidegate.export.passes import Pass
from tidegate.export.rewrite import Move, Node, Piece, Product, rewritten
from tidegate.export.stages import Copy, Place, Stages, is_elementwise, staged
from tidegate.export.text import number, runtime
from tidegate.fusion.program import Argument, Instruction, Operand
from tidegate.quantization import Quantized

_FEW = 5
_REDUCTIONS = {"sum": "sum_of", "mean": "sum_of", "max": "max_of", "dot": "dot_of"}


@dataclass
class Body:
    """One pass's step in C.

    Attributes:
        text: over `state`, `x`, `y` and `row`.
        scratch: numbers of scratch memory.
        stack: bytes of numbers that it has on its stack.
    """

    text: str
    scratch: int
    stack: int

    def reads(self, name: str) -> bool:
        return re.search(rf"\b{name}\b", self.text) is not None


@dataclass
class Source:
    """Attributes:
    runtime: what the bodies call.
    constants: what they read.
    bodies: of each pass.
    """

    runtime: str
    constants: Constants
    bodies: list[Body] = field(default_factory=list[Body])

    @property
    def stack(self) -> int:
        return max(body.stack for body in self.bodies)


def source(compiled: Compiled) -> Source:
    sections, constants = _Sections(), Constants()
    bodies = [_Writer(compiled, part, sections, constants).run() for part in compiled.passes]
    return Source(sections.text(), constants, bodies)


class _Sections:
    """What the passes need of the runtime.

    Attributes:
        names: its sections.
        product_rows: of the products of floats and of halves, how many rows they have.
        fits_16: all loops are of no more than a few numbers, or of multiples of 16.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.product_rows: dict[str, list[int]] = {"weights": [], "halves": []}
        self.quantizes = False
        self.fits_16 = True

    def text(self) -> str:
        floats, halves = self.product_rows.values()
        names = self.names | ({"dot_of"} if any(rows % 4 for rows in floats) else set())
        names |= {"halves"} if halves else set()
        names |= {"absolute", "access"} if self.quantizes else set()
        narrow = "#define NARROW /* 16 lanes would straddle what was stored: no sizes of 16 */\n"
        parts = ["" if self.fits_16 else narrow, runtime(names)]
        parts += [products.source(products.FLOAT, floats)] if floats else []
        parts += [products.source(products.HALF, halves)] if halves else []
        parts += [products_int8.source()] if self.quantizes else []
        return "\n\n".join(part for part in parts if part)


class _Writer:
    """One pass.

    Attributes:
        quantized: of what is multiplied by int8, the names of its whole numbers.
    """

    def __init__(self, compiled: Compiled, part: Pass, sections: _Sections, constants: Constants) -> None:
        self.compiled, self.sections, self.constants = compiled, sections, constants
        targets = [Place("row", target) if target >= 0 else Place("y", 0) for target in part.targets]
        self.stages: Stages = staged(rewritten(part.program), part.program, targets)
        self.quantized: dict[str, str] = {}
        self.quantized_bytes = 0
        self.lines: list[str] = []

    def run(self) -> Body:
        for stage in self.stages.order:
            node = self.stages.nodes[stage[0]]
            if is_elementwise(node):
                self._loop(stage)
            elif isinstance(node, Product):
                self._product(stage[0], node)
            elif isinstance(node, Move):
                self._move(self.stages.homes[stage[0]], node)
            else:
                self._reduction(stage[0], node)
        for copy in self.stages.copies:
            self._copy(copy)
        scratch = self.stages.scratch
        return Body("\n".join(self.lines), scratch, 4 * scratch + self.quantized_bytes)

    # Where numbers are

    def _at(self, place: Place) -> str:
        return f"{place.base} + {place.offset}" if place.offset else place.base

    def parameter(self, operand: Operand) -> Tensor:
        return self.compiled.vectors[operand.number][operand.offset : operand.offset + operand.size]

    def address(self, operand: Operand) -> str:
        if operand.bank == "p":
            return self._at(Place("vectors", self.constants.vector(self.parameter(operand))))
        return self._at(self.stages.place(operand))

    def _single(self, argument: Argument) -> str:
        """One number as a C expression."""
        if not isinstance(argument, Operand):
            return number(argument)
        if argument.bank == "p":
            return number(float(self.parameter(argument)))
        place = self.stages.place(argument)
        return f"{place.base}[{place.offset}]"

    # Stages

    def _product(self, k: int, node: Product) -> None:
        """Pieces of one form in one product, those of other forms added to it."""
        rows, home = node.size // node.groups, self._at(self.stages.homes[k])
        bias = "0"
        if node.biases:
            total = sum(self.parameter(bias) for bias in node.biases)
            assert isinstance(total, Tensor)
            bias = self._at(Place("vectors", self.constants.vector(total)))
        for name in ("weights", "halves"):
            pieces = [piece for piece in node.pieces if self._array_of(piece) == name]
            if pieces:
                self._product_of(name, node, pieces, rows, bias, home)
                bias = home
        for piece in node.pieces:
            if self._array_of(piece) == "bytes":
                self._product_of_bytes(node, piece, rows, bias, home)
                bias = home

    def _array_of(self, piece: Piece) -> str:
        matrix = self.compiled.matrices[piece.matrix]
        if isinstance(matrix, Quantized):
            return "bytes"
        return "halves" if matrix.dtype is torch.bfloat16 else "weights"

    def _product_of(self, name: str, node: Product, pieces: list[Piece], rows: int, bias: str, home: str) -> None:
        matrices = [self.compiled.matrices[piece.matrix] for piece in pieces]
        parts = [
            self._rows(matrix, piece, node)
            for matrix, piece in zip(matrices, pieces, strict=True)
            if isinstance(matrix, Tensor)
        ]
        blocks = [products.laid_out(torch.cat([part[b] for part in parts], -1)) for b in range(parts[0].shape[0])]
        at = self._at(Place(name, self.constants.add(name, blocks)))
        function = "product" if name == "weights" else "product_half"
        self.sections.product_rows[name].append(rows)
        given = [(self.address(p.operand), p.operand.size // node.groups) for p in pieces]
        (x, n), (x2, n2) = (given[0], given[1] if len(given) == 2 else (given[0][0], 0))
        if node.groups == 1:
            self.lines.append(f"    {function}({at}, {x}, {n}, {x2}, {n2}, {bias}, {home}, {rows});")
            return
        step = f" + g * {rows * n}" if len(blocks) > 1 else ""
        self.lines += [
            f"    for (int g = 0; g < {node.groups}; ++g)",
            f"        {function}({at}{step}, {x} + g * {n}, {n}, {x}, 0, 0, {home} + g * {rows}, {rows});",
        ]

    def _product_of_bytes(self, node: Product, piece: Piece, rows: int, bias: str, home: str) -> None:
        matrix = self.compiled.matrices[piece.matrix]
        assert isinstance(matrix, Quantized)
        numbers, scales = self._rows(matrix.numbers, piece, node), self._rows(matrix.scales, piece, node)
        blocks = [products_int8.laid_out(block) for block in numbers]
        at, of_scales = self.constants.add("bytes", blocks), self.constants.vector(scales.flatten())
        n = piece.operand.size // node.groups
        for g in range(node.groups):
            block = g if len(blocks) > 1 else 0
            q = self._quantized(piece.operand.part(g * n, n))
            weights = self._at(Place("bytes", at + block * blocks[0].numel()))
            scale = self._at(Place("vectors", of_scales + block * rows))
            to = f"{home} + {g * rows}" if g else home
            self.lines.append(f"    product_int8({weights}, {scale}, {q}, of_{q}, {n}, {bias}, {to}, {rows});")

    def _quantized(self, operand: Operand) -> str:
        """The name of an operand's whole numbers, made once."""
        key = f"{operand}"
        if key not in self.quantized:
            self.sections.quantizes = True
            name = self.quantized[key] = f"q{len(self.quantized)}"
            room = -(-operand.size // products_int8.GROUP) * products_int8.GROUP
            self.quantized_bytes += 2 * room
            self.lines += [
                f"    digit {name}[{room}];",
                f"    const of_digits of_{name} = quantized({self.address(operand)}, {operand.size}, {name});",
            ]
        return self.quantized[key]

    @staticmethod
    def _rows(whole: Tensor, piece: Piece, node: Product) -> Tensor:
        return whole if node.groups > 1 else whole[:, piece.first : piece.first + node.size]

    def _reduction(self, k: int, node: Node) -> None:
        assert isinstance(node, Instruction)
        function = _REDUCTIONS[node.operation]
        self.sections.names.add(function)
        operands = [operand for operand in node.operands if isinstance(operand, Operand)]
        each = operands[0].size // node.groups
        scale = f" * {number(1 / each)}" if node.operation == "mean" else ""
        home = self.stages.homes[k]
        if node.groups == 1:
            given = ", ".join(map(self.address, operands))
            self.lines.append(f"    {home.base}[{home.offset}] = {function}({given}, {each}){scale};")
            return
        given = ", ".join(f"{self.address(operand)} + g * {each}" for operand in operands)
        self.lines += [
            f"    for (int g = 0; g < {node.groups}; ++g)",
            f"        {home.base}[{home.offset} + g] = {function}({given}, {each}){scale};",
        ]

    def _copy(self, copy: Copy) -> None:
        move = copy.source
        if isinstance(move, Operand):
            move = Move(move.size, tuple(move.part(k, 1) for k in range(move.size)))
        self._move(copy.target, move)

    def _move(self, target: Place, move: Move) -> None:
        """Runs of numbers at a steady distance, in order."""
        at = 0
        while at < move.size:
            first = move.sources[at]
            if not isinstance(first, Operand):
                count = self._equal_numbers(move, at)
                self._fill(target, at, count, number(first))
                at += count
                continue
            count, step = self._run_of(move, at)
            self._copy_run(target, at, first, count, step)
            at += count

    @staticmethod
    def _equal_numbers(move: Move, at: int) -> int:
        end = at
        while end < move.size and repr(move.sources[end]) == repr(move.sources[at]):
            end += 1
        return end - at

    @staticmethod
    def _run_of(move: Move, at: int) -> tuple[int, int]:
        first = move.sources[at]
        following = move.sources[at + 1] if at + 1 < move.size else None
        assert isinstance(first, Operand)
        if not isinstance(following, Operand) or following[:2] != first[:2]:
            return 1, 1
        step, end = following.offset - first.offset, at + 2
        while end < move.size:
            source = move.sources[end]
            if not isinstance(source, Operand) or source != first.part(step * (end - at), 1):
                break
            end += 1
        return end - at, step

    def _fill(self, target: Place, at: int, count: int, value: str) -> None:
        place = self._at(target._replace(offset=target.offset + at))
        if count == 1:
            self.lines.append(f"    {target.base}[{target.offset + at}] = {value};")
        else:
            self.lines.append(f"    for (int i = 0; i < {count}; ++i) ({place})[i] = {value};")

    def _copy_run(self, target: Place, at: int, first: Operand, count: int, step: int) -> None:
        if count == 1:
            self._fill(target, at, 1, self._single(first))
            return
        place = self._at(target._replace(offset=target.offset + at))
        if first.bank == "p":
            whole = self.compiled.vectors[first.number]
            values = torch.stack([whole[first.offset + step * k] for k in range(count)])
            source, step = self._at(Place("vectors", self.constants.vector(values))), 1
        else:
            source = self._at(self.stages.place(first))
        index = "i" if step == 1 else f"i * {step}" if step else "0"
        self.lines.append(f"    for (int i = 0; i < {count}; ++i) ({place})[i] = ({source})[{index}];")

    def _loop(self, stage: list[int]) -> None:
        loop = Loop(self, stage)
        self.sections.fits_16 &= loop.each < _FEW or loop.each % 16 == 0
        self.sections.names |= loop.sections
        self.lines += loop.lines()
