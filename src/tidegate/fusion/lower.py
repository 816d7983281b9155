# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""A trace sorted by what depends on what, its loop lowered to a program.

Parameters alone: once a call. The input: over all steps' rows at once, before the loop. The state: the loop. What the
state does not need and is a product, or has no instruction: over all rows, after it. All but the loop stay torch's
operations.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tidegate.fusion import vocabulary
from tidegate.fusion.builder import Builder
from tidegate.fusion.joint import split_joint_products
from tidegate.fusion.over_features import OVER_FEATURES, OverFeatures
from tidegate.fusion.parts import LoopNeeds, torch_parts
from tidegate.fusion.program import Argument, Instruction, Matrix, Operand, Program
from tidegate.fusion.rows import (
    CONVERTING,
    MOVING,
    PRODUCTS,
    Layout,
    Rows,
    as_rows,
    aten,
    from_rows,
    packet,
    resized,
    values_of,
)
from tidegate.fusion.sorting import Sorted
from tidegate.fusion.trace import NotTraceableError, Trace, where

_LARGEST_PAIRING = 1 << 16  # numbers that a product of rows by rows may spread over


@dataclass(frozen=True)
class Lowered:
    """A cell's step, ready to run over a sequence.

    Attributes:
        once: of the cell's tensors, the program's vectors, then its matrices, then what `before` and `after` need.
        before: `(rows, x leaves (rows, ...), what `once` gave it) -> the program's inputs (rows, n), then what `after`
            needs`.
        after: `(rows, the program's outputs (rows, n), what the others gave it) -> y leaves (rows, ...)`; None where
            the program's outputs are those.
        counts: of vectors, matrices, and inputs.
        fresh: of each input, whether it has memory of its own that nothing of `before` reads again, even in backward.
        once_for_before: how many of the further results of `once` go to `before`; the others go to `after`.
    """

    program: Program
    counts: tuple[int, int, int]
    once: fx.GraphModule
    before: fx.GraphModule
    after: fx.GraphModule | None
    fresh: tuple[bool, ...]
    once_for_before: int


def lower(trace: Trace, whole: bool = False) -> Lowered:
    """Sort and lower.

    Args:
        whole: all that depends on the input or the state goes into the loop, whose inputs are then the leaves of x_t
            and whose outputs those of y_t; nothing is left for before and after.

    Raises:
        NotTraceableError: an operation mixes rows, or one that the loop needs has no instruction.
    """
    if not whole:
        split_joint_products(trace)
    return _Lowering(Rows(trace), whole).run()


class _Lowering(OverFeatures):
    def __init__(self, rows: Rows, whole: bool) -> None:
        self.rows, self.trace = rows, rows.trace
        if whole:
            rows.reads_state |= rows.reads_input
        self.sorted = Sorted(rows, whole)
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[fx.Node] = []
        self.vectors: list[tuple[fx.Node, tuple[int, ...], Layout]] = []
        self.matrices: list[tuple[fx.Node, bool]] = []
        self.operands: dict[Any, Operand] = {}
        self._result: tuple[list[int], Layout] | None = None

    def run(self) -> Lowered:
        for node in self.sorted.in_loop():
            self._lower(node)
        outputs = self.sorted.needed_after()
        next_states = [self.row(node) for node in self.sorted.leaving]
        program = self.builder.build(next_states, [self.row(node) for node in outputs])
        parts = torch_parts(self.sorted, LoopNeeds(self.inputs, self.vectors, self.matrices, outputs))
        return Lowered(program, (len(self.vectors), len(self.matrices), len(self.inputs)), *parts)

    def emit(self, operation: str, *operands: Argument) -> Operand:
        """An elementwise instruction of the size of the node that is being lowered."""
        shape, layout = self._result  # pyright: ignore[reportGeneralTypeIssues]
        size = layout.features(shape)
        groups = {
            operand.size for operand in operands if isinstance(operand, Operand) and operand.size not in (1, size)
        }
        assert len(groups) < 2
        return self.builder.emit(operation, *operands, size=size, groups=groups.pop() if groups else 1)

    def row(self, node: Any) -> Operand:
        """A node's features as an operand."""
        if node in self.values:
            return self.values[node]
        return self._before_loop(node)

    def _before_loop(self, node: fx.Node) -> Operand:
        """Of a node that no state reaches: an input of the program, or a vector if all rows share it."""
        key: Any = node
        if key not in self.operands:
            layout, shape = self.rows.layouts[node], values_of(node).shape
            assert layout is not None
            size = layout.features(shape)
            if node in self.rows.reads_input:
                self.operands[key] = self.builder.declare("i", size)
                self.inputs.append(node)
            else:
                self.operands[key] = self._vector(node, tuple(resized(shape, self.trace.rows, 1)), layout)
        return self.operands[key]

    def _vector(self, node: fx.Node, shape: tuple[int, ...], layout: Layout) -> Operand:
        key = (node, shape, layout)
        if key not in self.operands:
            self.vectors.append(key)
            self.operands[key] = self.builder.declare("p", layout.features(shape) if layout.shared else 1)
        return self.operands[key]

    def spread(self, argument: Any, shape: Sequence[int], layout: Layout) -> Argument:
        """An argument of an elementwise operation, spread over its result."""
        if not isinstance(argument, fx.Node):
            return float(argument)
        constant = vocabulary.number(argument)
        if constant is not None:
            return constant
        value, traced = values_of(argument), self.trace.rows
        source = self.rows.layouts[argument]
        one_row = resized(shape, traced, 1)
        if source is None:
            if value.numel() == 1:
                return self._vector(argument, (1,) * len(one_row), Layout(layout.dim, 1))
            return self._vector(argument, tuple(one_row), layout)
        operand = self.row(argument)
        numbers = torch.arange(operand.size).reshape(1, -1)
        own = from_rows(numbers, source, value.shape, 1).expand(one_row)
        return self._fit(operand, as_rows(own, layout, 1).flatten().tolist())

    def _fit(self, operand: Operand, indices: list[int]) -> Operand:
        size = len(indices)
        if len(set(indices)) == 1:
            return operand.part(indices[0], 1)
        each = size // operand.size
        if each > 1 and indices == [k // each for k in range(size)]:
            return operand  # a number for each group
        return self.builder.gather(operand, indices)

    def _lower(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            layout = self.rows.layouts[node]
            assert layout is not None
            bank = "s" if node in self.rows.states else "i"
            self.values[node] = self.builder.declare(bank, layout.features(values_of(node).shape))
            return
        kind = packet(node)
        try:
            self.values[node] = self._lowered(node, kind)
        except KeyError:
            name = str(node.target).removeprefix("aten.").split(".")[0]
            raise NotTraceableError(f"{name} has no instruction{where(node)}") from None

    def _lowered(self, node: fx.Node, kind: Any) -> Any:
        value = values_of(node)
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # pyright: ignore
        if kind in CONVERTING:
            return self._converted(node)
        if kind is aten.detach:
            return self.builder.emit("constant", self.row(node.args[0]))
        if kind in MOVING:
            return self._moved(node)
        if kind in PRODUCTS:
            return self._product(node, kind)
        if kind in OVER_FEATURES:
            return self.over_features(node, kind)
        layout = self.rows.layouts[node]
        assert layout is not None
        if vocabulary.is_logical(kind) and value.dtype is not torch.bool:
            raise KeyError(kind)
        self._result = (list(value.shape), layout)
        spread = [self.spread(a, value.shape, layout) if _is_value(a) else a for a in node.args]
        named = {k: self.spread(a, value.shape, layout) if _is_value(a) else a for k, a in node.kwargs.items()}
        return vocabulary.write(self, kind, self._one_grouping(spread, layout.features(value.shape)), named)

    def _one_grouping(self, operands: list[Any], size: int) -> list[Any]:
        """An instruction knows one number of groups: other operands are written out."""
        groups = {o.size for o in operands if isinstance(o, Operand) and o.size not in (1, size)}
        if len(groups) < 2:
            return operands
        kept = max(groups)

        def whole(operand: Any) -> Any:
            if isinstance(operand, Operand) and operand.size not in (1, size, kept):
                each = size // operand.size
                return self.builder.gather(operand, [k // each for k in range(size)])
            return operand

        return [whole(operand) for operand in operands]

    def _converted(self, node: fx.Node) -> Operand:
        source, target = values_of(node.args[0]), values_of(node).dtype  # pyright: ignore[reportArgumentType]
        operand = self.row(node.args[0])
        if source.dtype == target or (source.dtype is torch.bool and target.is_floating_point):
            return operand
        if target is torch.bool:
            return self.builder.emit("ne", operand, 0.0)
        raise NotTraceableError(f"the step changes {source.dtype} to {target}{where(node)}")

    def _moved(self, node: fx.Node) -> Any:
        sources = node.all_input_nodes
        moves = self.rows.moves.get(node)
        if moves is None:
            raise KeyError(node.target)
        found: list[Operand] = []
        for numbers in moves:
            pieces: list[Argument] = []
            at = 0
            while at < len(numbers):
                argument = numbers[at][0]
                end = at
                while end < len(numbers) and numbers[end][0] == argument:
                    end += 1
                places = [place for _, place in numbers[at:end]]
                constant = vocabulary.number(sources[argument])
                if constant is not None:
                    pieces.append(self.builder.emit("copy", constant, size=len(places)))
                else:
                    pieces.append(self.builder.gather(self._shared_or_row(sources[argument]), places))
                at = end
            found.append(pieces[0] if len(pieces) == 1 else self.builder.concat(pieces))  # pyright: ignore
        return found if isinstance(values_of(node), (list, tuple)) else found[0]

    def _shared_or_row(self, node: fx.Node) -> Operand:
        if self.rows.layouts[node] is not None:
            return self.row(node)
        count = values_of(node).numel()
        return self._vector_of_all(node, count)

    def _vector_of_all(self, node: fx.Node, count: int) -> Operand:
        """All numbers of a tensor of parameters, in order."""
        shape = tuple(values_of(node).shape)
        # A layout whose rows' dimension is one that is not there: (1, *shape).
        return self._vector(node, (1, *shape), Layout(0, 1)) if count else self._vector(node, (1,), Layout(0, 1))

    def _matrix(self, node: Any, transposed: bool) -> int:
        if not isinstance(node, fx.Node) or self.rows.layouts[node] is not None:
            raise KeyError(node)
        key = (node, transposed)
        if key not in self.matrices:
            shape = list(values_of(node).shape)
            rows, columns = reversed(shape[-2:]) if transposed else shape[-2:]
            self.matrices.append(key)
            self.builder.matrices.append(Matrix(shape[0] if len(shape) == 3 else 1, rows, columns))
        return self.matrices.index(key)

    def _product(self, node: fx.Node, kind: Any) -> Operand:
        has_bias = kind in (aten.addmm, aten.baddbmm)
        left, right = node.args[1:3] if has_bias else node.args[:2]
        value, layout = values_of(node), self.rows.layouts[node]
        assert layout is not None
        if self.rows.has_rows(left) and self.rows.has_rows(right):
            result = self._paired(left, right)  # pyright: ignore[reportArgumentType]
        else:
            rows_left = self.rows.has_rows(left)
            source, weight = (left, right) if rows_left else (right, left)
            source_layout = self.rows.layouts[source]  # pyright: ignore[reportArgumentType]
            assert source_layout is not None
            assert isinstance(source, fx.Node)
            if source_layout.dim == 0 and kind in (aten.bmm, aten.baddbmm):
                raise KeyError(node.target)
            matrix = self._matrix(weight, rows_left)
            shape = self.builder.matrices[matrix]
            groups = source_layout.shared if shape.blocks == 1 else shape.blocks
            if shape.blocks > 1 and source_layout.shared > 1:
                raise KeyError(node.target)
            bias = self._bias(node, groups) if has_bias else None
            operand = self.row(source)
            result = self.builder.add(
                Instruction("product", groups * shape.rows, (operand,), groups, matrix=matrix, bias=bias)
            )
            if bias is not None:
                return result
        if has_bias:
            if node.kwargs:
                raise KeyError(node.target)
            self._result = (list(value.shape), layout)
            return self.emit("add", result, self.spread(node.args[0], value.shape, layout))
        return result

    def _bias(self, node: fx.Node, groups: int) -> Operand | None:
        bias = node.args[0]
        if groups > 1 or node.kwargs or not isinstance(bias, fx.Node) or self.rows.layouts[bias] is not None:
            return None
        value, layout = values_of(node), self.rows.layouts[node]
        assert layout is not None
        spread = self.spread(bias, value.shape, layout)
        is_vector = isinstance(spread, Operand) and spread.bank == "p" and spread.size == layout.features(value.shape)
        return spread if is_vector else None  # pyright: ignore[reportReturnType]

    def _paired(self, left: fx.Node, right: fx.Node) -> Operand:
        """(B*k, m, i) by (B*k, i, j), both of the rows: multiplied number by number and added up."""
        layout = self.rows.layouts[left]
        if layout is None or layout.dim != 0 or layout != self.rows.layouts[right]:
            raise KeyError(left)
        shared, (m, i), j = layout.shared, values_of(left).shape[1:], values_of(right).shape[2]
        if shared * m * i * j > _LARGEST_PAIRING:
            raise KeyError(left)
        a = torch.arange(shared * m * i).reshape(shared, m, 1, i).expand(shared, m, j, i)
        b = torch.arange(shared * i * j).reshape(shared, 1, i, j).transpose(2, 3).expand(shared, m, j, i)
        spread_a = self.builder.gather(self.row(left), a.flatten().tolist())
        spread_b = self.builder.gather(self.row(right), b.flatten().tolist())
        return self.builder.reduce("sum", self.builder.emit("mul", spread_a, spread_b), shared * m * j)


def _is_value(argument: Any) -> bool:
    return isinstance(argument, (fx.Node, bool, int, float))
