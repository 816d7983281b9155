# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Pieces of a trace as modules of torch's operations, over any number of rows; what enters the loop and leaves it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tidegate.fusion.rows import Layout, as_rows, from_rows
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
