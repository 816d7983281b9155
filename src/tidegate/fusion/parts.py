# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Pieces of a trace as modules of torch's operations, over any number of rows; what enters the loop and leaves it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tidegate.fusion.rows import Layout, as_rows, aten, from_rows, packet, values_of
from tidegate.fusion.sorting import Sorted
from tidegate.fusion.trace import Trace


class Part:
    """A piece of the trace as a module of its own, over any number of rows."""

    def __init__(self, trace: Trace, first: str | None) -> None:
        self.trace = trace
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.rows: fx.Node | None = self.graph.placeholder(first) if first else None
        self.known: dict[fx.Node, fx.Node] = {}
        self.results: list[fx.Node] = []

    def take(self, node: fx.Node) -> fx.Node:
        """An argument of the module that stands for a node of the trace."""
        self.known[node] = self.graph.placeholder(node.name)
        return self.known[node]

    def copy(self, node: fx.Node) -> fx.Node:
        """The node and what it needs, but for nodes that were taken as arguments."""
        if node in self.known:
            return self.known[node]
        for source in node.all_input_nodes:
            self.copy(source)
        if node.op == "get_attr" and not hasattr(self.root, str(node.target)):
            self.root.register_buffer(str(node.target), None)
            setattr(self.root, str(node.target), _constant(self.trace, node))
        copied = self.graph.node_copy(node, lambda source: self.known[source])
        copied.args = tuple(self._resized(copied, argument) for argument in copied.args)
        copied.kwargs = {name: self._resized(copied, argument) for name, argument in copied.kwargs.items()}
        self.known[node] = copied
        return copied

    def _resized(self, node: fx.Node, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._resized(node, item) for item in argument]  # pyright: ignore[reportUnknownVariableType]
        traced = self.trace.rows
        is_rows = isinstance(argument, int) and not isinstance(argument, bool) and argument and argument % traced == 0
        if not is_rows:
            return argument
        times = argument // traced
        if self.rows is None:
            return times
        if times == 1:
            return self.rows
        with self.graph.inserting_before(node):
            return self.graph.call_function(operator.mul, (self.rows, times))

    def call(self, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        return self.graph.call_function(function, arguments)

    def module(self) -> fx.GraphModule:
        self.graph.output(tuple(self.results))
        return fx.GraphModule(self.root, self.graph)


def _constant(trace: Trace, node: fx.Node) -> Any:
    found: Any = trace.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found


def vector(value: Tensor, shape: Sequence[int], dim: int, shared: int) -> Tensor:
    """A tensor of parameters, spread over a value with rows, as the features of a row."""
    if value.dim() == 1 and shared == 1 and tuple(shape) == (1, value.shape[0]):
        return value
    return as_rows(value.expand(shape), Layout(dim, shared), 1).flatten()


def blocks(value: Tensor, transposed: bool) -> Tensor:
    """A matrix of a product as (blocks, rows, columns)."""
    value = value.transpose(-1, -2) if transposed else value
    return value if value.dim() == 3 else value.unsqueeze(0)


def input_rows(value: Tensor, layout: tuple[int, int], rows: int, dtype: torch.dtype) -> Tensor:
    result = as_rows(value, Layout(*layout), rows)
    return result if result.dtype == dtype else result.to(dtype)


def output_rows(value: Tensor, layout: tuple[int, int], shape: Sequence[int], rows: int, is_truth: bool) -> Tensor:
    result = from_rows(value, Layout(*layout), shape, rows)
    return result != 0 if is_truth else result


class LoopNeeds(NamedTuple):
    """What a program reads, and what of it is read.

    Attributes:
        inputs, outputs: nodes with rows.
        vectors: nodes of parameters, each with the shape of one row that it is spread over, and that one's layout.
        matrices: nodes, each with whether it is multiplied transposed.
    """

    inputs: list[fx.Node]
    vectors: list[tuple[fx.Node, tuple[int, ...], Layout]]
    matrices: list[tuple[fx.Node, bool]]
    outputs: list[fx.Node]


class TorchParts(NamedTuple):
    """What stays torch's operations: see `Lowered`."""

    once: fx.GraphModule
    before: fx.GraphModule
    after: fx.GraphModule | None
    fresh: tuple[bool, ...]
    once_for_before: int


def torch_parts(sorted_trace: Sorted, loop: LoopNeeds) -> TorchParts:
    """The operations of a trace that are not in its loop."""
    rows, outputs, after = sorted_trace.rows, sorted_trace.outputs, sorted_trace.after
    places = {known: k for k, known in enumerate(sorted_trace.graph.nodes)}

    def is_once(node: fx.Node) -> bool:
        depends = node in rows.reads_input or node in rows.reads_state
        return not depends and not rows.has_rows(node) and node.op != "output" and isinstance(values_of(node), Tensor)

    def is_before(node: fx.Node) -> bool:
        return node not in rows.reads_state and not is_once(node)

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
        return sorted(found, key=places.__getitem__)

    of_after = boundary([node for node in outputs if isinstance(node, fx.Node)], after.__contains__)
    # What is needed after the loop and does not come out of it.
    handed = [node for node in of_after if node not in rows.reads_state]

    def inside_before(node: fx.Node) -> bool:
        return is_before(node) and node not in rows.inputs

    wanted_before = [*loop.inputs, *(node for node in handed if is_before(node))]
    of_before = [node for node in boundary(wanted_before, inside_before) if node not in rows.inputs]
    once_for_before = [node for node in of_before if is_once(node)]
    once_for_after = [node for node in handed if is_once(node)]

    once = Part(rows.trace, None)
    for node in rows.own:
        once.take(node)
    for node, shape, layout in loop.vectors:
        once.results.append(once.call(vector, once.copy(node), shape, layout.dim, layout.shared))
    for node, transposed in loop.matrices:
        once.results.append(once.call(blocks, once.copy(node), transposed))
    for node in (*once_for_before, *once_for_after):
        once.results.append(once.copy(node))

    before = Part(rows.trace, "rows")
    for node in (*rows.inputs, *once_for_before):
        before.take(node)
    dtype = values_of(rows.states[0]).dtype if rows.states else torch.get_default_dtype()
    for node in loop.inputs:
        layout = rows.layouts[node]
        assert layout is not None
        before.results.append(before.call(input_rows, before.copy(node), tuple(layout), before.rows, dtype))
    for node in handed:
        if not is_once(node):
            before.results.append(before.copy(node))
    made = before.results[: len(loop.inputs)]
    fresh = tuple([_is_fresh(result) and before.results.count(result.args[0]) == 0 for result in made])

    def is_row(node: fx.Node) -> bool:
        value = values_of(node)
        return rows.layouts[node] == (0, 1) and value.dim() == 2 and value.dtype is not torch.bool

    if outputs == loop.outputs and all(map(is_row, outputs)):
        return TorchParts(once.module(), before.module(), None, fresh, len(once_for_before))
    rest = Part(rows.trace, "rows")
    for node in (*loop.outputs, *(node for node in handed if not is_once(node)), *once_for_after):
        rest.take(node)
    for node in loop.outputs:
        layout, shape = rows.layouts[node], tuple(values_of(node).shape)
        is_truth = values_of(node).dtype is torch.bool
        assert layout is not None
        rest.known[node] = rest.call(output_rows, rest.known[node], tuple(layout), shape, rest.rows, is_truth)
    for node in outputs:
        rest.results.append(rest.copy(node))
    return TorchParts(once.module(), before.module(), rest.module(), fresh, len(once_for_before))


# Operations that give memory of their own and keep no hold of it for their gradient.
_FRESH = (aten.mm, aten.addmm, aten.native_layer_norm, aten.add)


def _is_fresh(row: fx.Node) -> bool:
    """Of `input_rows(value, ...)`: whether nothing else has the value."""
    value = row.args[0]
    assert isinstance(value, fx.Node)
    maker = value.args[0] if value.target is operator.getitem else value
    assert isinstance(maker, fx.Node)
    return packet(maker) in _FRESH and values_of(value).dim() == 2 and len(value.users) == 1
