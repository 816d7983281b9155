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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tidegate.fusion import vocabulary
from tidegate.fusion.joint import split_joint_products
from tidegate.fusion.parts import Part, blocks, input_rows, output_rows, vector
from tidegate.fusion.program import Argument, Builder, Instruction, Matrix, Operand, Program
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
from tidegate.fusion.trace import NotTraceableError, Trace, where

_LARGEST_PAIRING = 1 << 16  # numbers that a product of rows by rows may spread over


@dataclass(frozen=True)
class Lowered:
    """A cell's step, ready to run over a sequence.

    Attributes:
        once: of the cell's tensors, the program's vectors, then its matrices, then what `before` and `after` need.
        before: `(rows, x leaves (rows, ...), what `once` gave it) -> the program's inputs (rows, n), then what `after`
            needs`.
        after: `(rows, the program's outputs (rows, n), what the others gave it) -> y leaves (rows, ...)`.
        counts: of vectors, matrices, and inputs.
        once_for_before: how many of the further results of `once` go to `before`; the others go to `after`.
    """

    program: Program
    once: fx.GraphModule
    before: fx.GraphModule
    after: fx.GraphModule
    counts: tuple[int, int, int]
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


class _Lowering:
    def __init__(self, rows: Rows, whole: bool) -> None:
        self.rows, self.trace = rows, rows.trace
        if whole:
            rows.reads_state |= rows.reads_input
        self.graph = rows.trace.graph
        results = next(node for node in self.graph.nodes if node.op == "output").args[0]
        self.outputs: list[Any] = list(results[: self.trace.outputs])  # pyright: ignore
        self.leaving: list[Any] = list(results[self.trace.outputs :])  # pyright: ignore
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[fx.Node] = []
        self.vectors: list[tuple[fx.Node, tuple[int, ...], Layout]] = []
        self.matrices: list[tuple[fx.Node, bool]] = []
        self.operands: dict[Any, Operand] = {}
        self.looped: list[fx.Node] = []
        self._result: tuple[list[int], Layout] | None = None
        self.whole = whole

    def run(self) -> Lowered:
        self._check_results()
        core = self._ancestors(self.leaving) & self.rows.reads_state
        after = set[fx.Node]() if self.whole else self._after(core)
        for node in self.graph.nodes:
            if node in self.rows.reads_state and node not in after and node.op != "output":
                self._lower(node)
        self.looped = self._needed_after(after)
        next_states = [self._row(node) for node in self.leaving]
        outputs = [self._row(node) for node in self.looped]
        program = self.builder.build(next_states, outputs)
        once, before, parts_of_after = self._once_and_before(after)
        counts = (len(self.vectors), len(self.matrices), len(self.inputs))
        return Lowered(program, once, before, parts_of_after, counts, self.once_for_before)

    # Sorting

    def _check_results(self) -> None:
        for name, nodes in (("y_t", self.outputs), ("the new state", self.leaving)):
            for node in nodes:
                layout = self.rows.layouts.get(node) if isinstance(node, fx.Node) else None
                if layout != (0, 1):
                    raise NotTraceableError(f"{name} has a tensor whose first dimension is not the rows of the batch")
        for old, new in zip(self.rows.states, self.leaving, strict=True):
            was, now = values_of(old), values_of(new)
            if not vocabulary.is_floating(was):
                raise NotTraceableError(f"the state has a tensor of {was.dtype}")
            if was.shape != now.shape or was.dtype != now.dtype:
                before = f"{tuple(was.shape[1:])} {was.dtype}"
                raise NotTraceableError(
                    f"a state of {before} becomes one of {tuple(now.shape[1:])} {now.dtype}{where(new)}"
                )

    def _ancestors(self, nodes: Iterable[Any]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = [node for node in nodes if isinstance(node, fx.Node)]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def _after(self, core: set[fx.Node]) -> set[fx.Node]:
        """What no state needs: from a product on, or from an operation without an instruction."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node not in self.rows.reads_state or node in core or node.op != "call_function":
                continue
            follows = any(source in found for source in node.all_input_nodes)
            if follows or packet(node) in PRODUCTS or not self._is_known(node):
                found.add(node)
        return found

    def _is_known(self, node: fx.Node) -> bool:
        kind = packet(node)
        special = (aten.native_layer_norm, aten._softmax, aten._log_softmax, aten.sum, aten.mean, aten.amax, aten.var)
        is_special = kind in special or kind in MOVING or kind in CONVERTING or kind in PRODUCTS
        return node.target is operator.getitem or is_special or vocabulary.is_elementwise(kind)

    def _needed_after(self, after: set[fx.Node]) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        for node in self.graph.nodes:
            if node in after:
                for source in node.all_input_nodes:
                    if source in self.rows.reads_state and source not in after:
                        found[self._tensor_of(source)] = None
        for node in self.outputs:
            if node in self.rows.reads_state and node not in after:
                found[node] = None
        return list(found)

    def _tensor_of(self, node: fx.Node) -> fx.Node:
        if isinstance(values_of(node), (list, tuple)):
            raise NotTraceableError(f"{node.target} gives several tensors to what no instruction does{where(node)}")
        return node

    # The torch parts

    def _once_and_before(self, after: set[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule]:
        def is_once(node: fx.Node) -> bool:
            depends = node in self.rows.reads_input or node in self.rows.reads_state
            return not depends and not self.rows.has_rows(node) and node.op != "output" and _is_tensor(node)

        def is_before(node: fx.Node) -> bool:
            return node not in self.rows.reads_state and not is_once(node)

        def boundary(wanted: Iterable[fx.Node], inside: Callable[[fx.Node], bool]) -> list[fx.Node]:
            """What lies outside and is needed by what lies inside."""
            found: dict[fx.Node, None] = {}
            seen: set[fx.Node] = set()
            waiting = list(wanted)
            while waiting:
                node = waiting.pop()
                if node in seen:
                    continue
                seen.add(node)
                if inside(node):
                    waiting += node.all_input_nodes
                else:
                    found[node] = None
            return sorted(found, key=self._place)

        is_inside_after = after.__contains__
        of_after = boundary([node for node in self.outputs if isinstance(node, fx.Node)], is_inside_after)
        # What is needed after the loop and does not come out of it.
        handed = [node for node in of_after if node not in self.rows.reads_state]

        def inside_before(node: fx.Node) -> bool:
            return is_before(node) and node not in self.rows.inputs

        wanted_before = [*self.inputs, *(node for node in handed if is_before(node))]
        of_before = [node for node in boundary(wanted_before, inside_before) if node not in self.rows.inputs]
        once_for_before = [node for node in of_before if is_once(node)]
        once_for_after = [node for node in handed if is_once(node)]

        once = Part(self.trace, None)
        for node in self.rows.own:
            once.take(node)
        for node, shape, layout in self.vectors:
            once.results.append(once.call(vector, once.copy(node), shape, layout.dim, layout.shared))
        for node, transposed in self.matrices:
            once.results.append(once.call(blocks, once.copy(node), transposed))
        for node in (*once_for_before, *once_for_after):
            once.results.append(once.copy(node))
        self.once_for_before = len(once_for_before)

        before = Part(self.trace, "rows")
        for node in (*self.rows.inputs, *once_for_before):
            before.take(node)
        dtype = values_of(self.rows.states[0]).dtype if self.rows.states else torch.get_default_dtype()
        for node in self.inputs:
            layout = self.rows.layouts[node]
            assert layout is not None
            before.results.append(before.call(input_rows, before.copy(node), tuple(layout), before.rows, dtype))
        for node in handed:
            if not is_once(node):
                before.results.append(before.copy(node))

        rest = Part(self.trace, "rows")
        for node in (*self.looped, *(node for node in handed if not is_once(node)), *once_for_after):
            rest.take(node)
        for node in self.looped:
            layout, shape = self.rows.layouts[node], tuple(values_of(node).shape)
            is_truth = values_of(node).dtype is torch.bool
            assert layout is not None
            rest.known[node] = rest.call(output_rows, rest.known[node], tuple(layout), shape, rest.rows, is_truth)
        for node in self.outputs:
            rest.results.append(rest.copy(node))
        return once.module(), before.module(), rest.module()

    def _place(self, node: fx.Node) -> int:
        if not hasattr(self, "_places"):
            self._places = {known: k for k, known in enumerate(self.graph.nodes)}
        return self._places[node]

    # Lowering

    def emit(self, operation: str, *operands: Argument) -> Operand:
        """An elementwise instruction of the size of the node that is being lowered."""
        shape, layout = self._result  # pyright: ignore[reportGeneralTypeIssues]
        size = layout.features(shape)
        groups = {
            operand.size for operand in operands if isinstance(operand, Operand) and operand.size not in (1, size)
        }
        assert len(groups) < 2
        return self.builder.emit(operation, *operands, size=size, groups=groups.pop() if groups else 1)

    def _row(self, node: Any) -> Operand:
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

    def _spread(self, argument: Any, shape: Sequence[int], layout: Layout) -> Argument:
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
        operand = self._row(argument)
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
            return self.builder.emit("constant", self._row(node.args[0]))
        if kind in MOVING:
            return self._moved(node)
        if kind in PRODUCTS:
            return self._product(node, kind)
        if kind is aten.native_layer_norm:
            return self._layer_norm(node)
        layout = self.rows.layouts[node]
        assert layout is not None
        if kind in (aten.sum, aten.mean, aten.amax):
            return self._reduced(node, kind)
        if kind in (aten._softmax, aten._log_softmax):
            return self._softmax(node, kind)
        if kind is aten.var:
            return self._variance(node)
        if vocabulary.is_logical(kind) and value.dtype is not torch.bool:
            raise KeyError(kind)
        self._result = (list(value.shape), layout)
        spread = [self._spread(a, value.shape, layout) if _is_value(a) else a for a in node.args]
        named = {k: self._spread(a, value.shape, layout) if _is_value(a) else a for k, a in node.kwargs.items()}
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
        operand = self._row(node.args[0])
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
            return self._row(node)
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
            operand = self._row(source)
            result = self.builder.add(
                Instruction("product", groups * shape.rows, (operand,), groups, matrix=matrix, bias=bias)
            )
            if bias is not None:
                return result
        if has_bias:
            if node.kwargs:
                raise KeyError(node.target)
            self._result = (list(value.shape), layout)
            return self.emit("add", result, self._spread(node.args[0], value.shape, layout))
        return result

    def _bias(self, node: fx.Node, groups: int) -> Operand | None:
        bias = node.args[0]
        if groups > 1 or node.kwargs or not isinstance(bias, fx.Node) or self.rows.layouts[bias] is not None:
            return None
        value, layout = values_of(node), self.rows.layouts[node]
        assert layout is not None
        spread = self._spread(bias, value.shape, layout)
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
        spread_a = self.builder.gather(self._row(left), a.flatten().tolist())
        spread_b = self.builder.gather(self._row(right), b.flatten().tolist())
        return self.builder.reduce("sum", self.builder.emit("mul", spread_a, spread_b), shared * m * j)

    def _grouped(self, node: Any, dims: Sequence[int]) -> tuple[Operand, int]:
        """A node's features with those dimensions last, and the number of groups before them."""
        value, layout = values_of(node), self.rows.layouts[node]
        assert layout is not None
        named = sorted(dim % value.dim() for dim in dims)
        operand = self._row(node)
        numbers = from_rows(torch.arange(operand.size).reshape(1, -1), layout, value.shape, 1)
        ordered = numbers.movedim(layout.dim, 0) if layout.dim not in named else None
        if ordered is None:
            raise KeyError(node)
        # Dimensions as they are after the rows' one came first.
        later = [dim + (dim < layout.dim) for dim in named]
        kept = [dim for dim in range(value.dim()) if dim not in later]
        order = ordered.permute(*kept, *later).flatten().tolist()
        count = 1
        for dim in later:
            count *= ordered.shape[dim]
        return self.builder.gather(operand, order), operand.size // count

    def _reduced(self, node: fx.Node, kind: Any) -> Operand:
        dims = node.args[1]
        if node.kwargs.get("dtype") is not None:
            raise KeyError(node.target)
        operand, groups = self._grouped(node.args[0], [dims] if isinstance(dims, int) else dims)  # pyright: ignore
        if kind is aten.amax:
            return self.builder.reduce("max", operand, groups)
        return self.builder.reduce("sum" if kind is aten.sum else "mean", operand, groups)

    def _is_last(self, node: Any, dim: int) -> bool:
        value, layout = values_of(node), self.rows.layouts[node]
        last = max(k for k in range(value.dim()) if layout is not None and k != layout.dim)
        return dim % value.dim() == last

    def _softmax(self, node: fx.Node, kind: Any) -> Operand:
        source, dim = node.args[0], node.args[1]
        if not self._is_last(source, dim):  # pyright: ignore[reportArgumentType]
            raise KeyError(node.target)
        operand, groups = self._grouped(source, [dim])  # pyright: ignore[reportArgumentType]
        b, size = self.builder, operand.size
        # The largest is only taken away: its gradients cancel out.
        shifted = b.emit("sub", operand, _constant_of(b.reduce("max", operand, groups), b), size=size, groups=groups)
        exponential = b.emit("exp", shifted)
        total = b.reduce("sum", exponential, groups)
        if kind is aten._log_softmax:
            return b.emit("sub", shifted, b.emit("log", total), size=size, groups=groups)
        return b.emit("div", exponential, total, size=size, groups=groups)

    def _centered(self, operand: Operand, groups: int) -> tuple[Operand, Operand]:
        """x - mean(x), and the sum of its squares."""
        b, mean = self.builder, self.builder.reduce("mean", operand, groups)
        centered = b.emit("sub", operand, mean, size=operand.size, groups=groups)
        return centered, b.reduce("sum", b.emit("mul", centered, centered), groups)

    def _variance(self, node: fx.Node) -> Operand:
        dims, correction = node.args[1], node.kwargs.get("correction", 1)
        operand, groups = self._grouped(node.args[0], dims)  # pyright: ignore[reportArgumentType]
        _, total = self._centered(operand, groups)
        return self.builder.emit("mul", total, 1.0 / (operand.size // groups - float(correction or 0)))  # pyright: ignore

    def _layer_norm(self, node: fx.Node) -> list[Any]:
        source, shape, weight, bias, epsilon = node.args
        value, layout = values_of(source), self.rows.layouts[source]  # pyright: ignore[reportArgumentType]
        assert layout is not None
        first = value.dim() - len(shape)  # pyright: ignore[reportArgumentType]
        operand, groups = self._grouped(source, range(first, value.dim()))
        b, size = self.builder, operand.size
        centered, total = self._centered(operand, groups)
        variance = b.emit("mul", total, 1.0 / (size // groups))
        scale = b.emit("rsqrt", b.emit("add", variance, float(epsilon)))  # pyright: ignore[reportArgumentType]
        result = b.emit("mul", centered, scale, size=size, groups=groups)
        for operation, tensor in (("mul", weight), ("add", bias)):
            if tensor is not None:
                result = b.emit(operation, result, self._spread(tensor, value.shape, layout), size=size)
        return [result, None, scale]


def _constant_of(operand: Operand, builder: Builder) -> Operand:
    """A value through which no gradient goes."""
    return builder.emit("constant", operand)


def _is_value(argument: Any) -> bool:
    return isinstance(argument, (fx.Node, bool, int, float))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(values_of(node), Tensor)
