# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Where the rows of the batch are in each value of a trace, and whether an operation keeps them apart.

A value's features, all its sizes but the rows', are a row of numbers in order. Where rows and features share a size,
(B*k, n), the k come first: (k, n).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tidegate.fusion.program import product
from tidegate.fusion.trace import NotTraceableError, Trace, where

aten: Any = torch.ops.aten

# What only moves numbers: known by what it does to their indices.
MOVING = {
    getattr(aten, name)
    for name in (
        *("view", "_unsafe_view", "reshape", "permute", "t", "transpose", "expand", "squeeze", "unsqueeze", "slice"),
        *("select", "split", "split_with_sizes", "unbind", "clone", "alias", "detach", "cat", "stack", "flip", "roll"),
        *("repeat", "contiguous", "lift_fresh_copy", "narrow", "chunk", "diagonal", "unfold", "index_select", "gather"),
        *("slice_scatter", "select_scatter"),
    )
    if hasattr(aten, name)
}
# Over some of the sizes, named by their second argument.
REDUCING = {
    getattr(aten, name)
    for name in ("sum", "mean", "amax", "amin", "prod", "max", "min", "any", "all", "argmax", "argmin", "cumsum")
} | {aten._softmax, aten._log_softmax, aten.logsumexp, aten.var, aten.var_mean, aten.std, aten.sort, aten.topk}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
# Number by number, though torch's tag does not say so: leaky_relu's in torch 2.10 alone.
UNTAGGED = {aten.hardswish, aten.leaky_relu}
CONVERTING = {aten._to_copy, aten.to, aten.type_as}
RANDOM = (
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "bernoulli", "native_dropout", "dropout"),
    *("normal", "normal_functional", "uniform", "multinomial", "rrelu_with_noise", "poisson", "exponential"),
)


class Layout(NamedTuple):
    """Of a value with rows: its dimension that has them, and how many features share it."""

    dim: int
    shared: int

    def features(self, shape: Sequence[int]) -> int:
        return self.shared * product([size for k, size in enumerate(shape) if k != self.dim])


def packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def values_of(node: fx.Node) -> Any:
    return node.meta.get("val")


def layout_of(value: Any, rows: int, node: fx.Node) -> Layout | None:
    """Where a tensor's rows are; None if it has none."""
    if not isinstance(value, Tensor):
        return None
    dims = [k for k, size in enumerate(value.shape) if size and size % rows == 0]
    if len(dims) > 1:
        raise NotTraceableError(f"{node.name} pairs rows with rows{where(node)}")
    return Layout(dims[0], value.shape[dims[0]] // rows) if dims else None


def as_rows(value: Tensor, layout: Layout, rows: int) -> Tensor:
    """A tensor's features as (rows, n)."""
    if layout == (0, 1) and value.dim() == 2:
        return value
    return value.movedim(layout.dim, 0).reshape(rows, layout.features(value.shape))


def from_rows(value: Tensor, layout: Layout, shape: Sequence[int], rows: int) -> Tensor:
    """The inverse of `as_rows`: `shape` is the tensor's own, whatever rows it says."""
    if layout == (0, 1) and len(shape) == 2:
        return value
    sizes = [size for k, size in enumerate(shape) if k != layout.dim]
    return value.reshape(rows * layout.shared, *sizes).movedim(0, layout.dim)


def resized(shape: Iterable[int], traced: int, rows: int) -> list[int]:
    """Sizes of the trace with another number of rows."""
    return [size // traced * rows if size and size % traced == 0 else size for size in shape]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with every leaf changed."""
    if isinstance(value, (list, tuple)):
        return [mapped(item, change) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, slice):
        return value
    return change(value)


class Rows:
    """What each node of a trace is: with or without rows, and what it depends on."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.layouts: dict[fx.Node, Layout | None] = {}
        self.reads_input: set[fx.Node] = set()
        self.reads_state: set[fx.Node] = set()
        self.reads_tensors: set[fx.Node] = set()  # whatever they are
        self.moves: dict[fx.Node, list[list[tuple[int, int]]] | None] = {}
        placeholders = [node for node in trace.graph.nodes if node.op == "placeholder"]
        own, inputs, _ = trace.counts
        self.own, self.inputs, self.states = (
            placeholders[:own],
            placeholders[own : own + inputs],
            placeholders[own + inputs :],
        )
        self.reads_input |= set(self.inputs)
        self.reads_state |= set(self.states)
        for node in trace.graph.nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        """Look at a node whose arguments were looked at.

        Raises:
            NotTraceableError: it mixes rows, or is not known to keep them apart.
        """
        if node.op == "output":
            return
        if any(source in self.reads_input for source in node.all_input_nodes):
            self.reads_input.add(node)
        if any(source in self.reads_state for source in node.all_input_nodes):
            self.reads_state.add(node)
        if node.op != "call_function" or any(source in self.reads_tensors for source in node.all_input_nodes):
            self.reads_tensors.add(node)
        value = values_of(node)
        if node.op == "placeholder" or not isinstance(value, (list, tuple)):
            self.layouts[node] = layout_of(value, self.trace.rows, node)
        if node.op == "get_attr" and self.layouts[node] is not None:
            raise NotTraceableError("it makes a tensor of values that left torch")
        if node.op == "call_function":
            self._check(node)

    def has_rows(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self.layouts.get(node) is not None

    def _check(self, node: fx.Node) -> None:
        kind, name = packet(node), str(node.target)
        short = name.removeprefix("aten.").split(".")[0]
        if short in RANDOM:
            raise NotTraceableError(f"{short} draws random numbers inside the step{where(node)}")
        if (short.endswith("_") and not short.startswith("_")) or kind is aten.copy_:
            raise NotTraceableError(f"{short} changes a tensor that the cell keeps{_where_made(node)}")
        if node.target is operator.getitem or not self._with_rows(node):
            return
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or kind in UNTAGGED
        result_has_rows = isinstance(values_of(node), (list, tuple)) or self.layouts.get(node) is not None
        pointwise = pointwise and kind not in MOVING
        if result_has_rows and (pointwise or kind in CONVERTING or self._keeps_apart(node, kind)):
            return
        mixes = (
            "mixes the rows of a batch" if self._is_known(kind) else "is not known to keep the rows of a batch apart"
        )
        raise NotTraceableError(f"{short} {mixes}{where(node)}")

    def _with_rows(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if self._source_has_rows(source)]

    def _source_has_rows(self, node: fx.Node) -> bool:
        value = values_of(node)
        if isinstance(value, (list, tuple)):
            return any(layout_of(item, self.trace.rows, node) is not None for item in value)
        return self.layouts.get(node) is not None

    @staticmethod
    def _is_known(kind: Any) -> bool:
        return kind in MOVING or kind in REDUCING or kind in PRODUCTS or kind is aten.native_batch_norm

    def _keeps_apart(self, node: fx.Node, kind: Any) -> bool:
        first = node.args[0] if node.args else None
        if kind in MOVING:
            # A move is looked at where it is used: see `moved`. Only the number of rows matters here.
            self.moves[node] = moved(self, node)
            return self.moves[node] is not None
        if kind in REDUCING:
            place = 2 if kind is aten.topk else 1
            dims = node.args[place] if len(node.args) > place else -1 if kind in (aten.sort, aten.topk) else None
            layout = self.layouts.get(first) if isinstance(first, fx.Node) else None
            if layout is None or dims is None or not isinstance(dims, (int, list, tuple)) or dims == []:
                return False
            ndim = values_of(first).dim()  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
            named = [dims] if isinstance(dims, int) else list(dims)
            return layout.dim not in [dim % ndim for dim in named if isinstance(dim, int)]
        if kind in PRODUCTS:
            return self._product_keeps_apart(node, kind)
        if kind is aten.native_layer_norm:
            layout, shape = self.layouts[first], node.args[1]  # pyright: ignore[reportArgumentType]
            return layout is not None and layout.dim < values_of(first).dim() - len(shape)  # pyright: ignore
        if kind in (aten.native_group_norm, aten.convolution, aten.pixel_shuffle):
            only_first = not any(self.has_rows(source) for source in node.args[1:])
            layout = self.layouts.get(first) if isinstance(first, fx.Node) else None
            return only_first and layout is not None and layout == (0, 1)
        if kind is aten.embedding:
            return not self.has_rows(first)
        return kind in (aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like)

    def _product_keeps_apart(self, node: fx.Node, kind: Any) -> bool:
        left, right = node.args[-2:] if kind in (aten.mm, aten.bmm) else node.args[1:3]
        with_rows = [source for source in (left, right) if self.has_rows(source)]
        if not with_rows:
            return True  # a bias with rows
        if kind in (aten.mm, aten.addmm):
            # The dimension that is summed over has no rows, or the result would not have them.
            return len(with_rows) == 1
        layouts = [self.layouts[source] for source in with_rows]  # pyright: ignore[reportArgumentType]
        if len(with_rows) == 2:
            return all(layout is not None and layout.dim == 0 for layout in layouts)
        return True


def _where_made(node: fx.Node) -> str:
    """The line of a node that the tracer added, which is that of what it is made of."""
    lines = (where(node), *(_where_made(source) for source in node.all_input_nodes))
    return next((line for line in lines if line), "")


def moved(rows: Rows, node: fx.Node) -> list[list[tuple[int, int]]] | None:
    """What a move does, row by row: for each result, for each of its numbers (which argument, which of its numbers).

    Arguments are counted among `node.all_input_nodes`. None if numbers go from one row to another.
    """
    sources = node.all_input_nodes
    small, stride = 2, 1 << 40
    # Each number's index: argument, row, place.
    known: dict[fx.Node, Tensor | list[Tensor]] = {}

    def numbered(k: int, value: Tensor, source: fx.Node) -> Tensor:
        layout = layout_of(value, rows.trace.rows, source)
        if layout is None and source not in rows.reads_tensors and not value.dtype.is_floating_point:
            return constant(source)
        if layout is None:
            count = value.numel()
            return torch.arange(count).reshape(value.shape) + k * stride
        count = layout.features(value.shape)
        flat = torch.arange(small * count).reshape(small, count) + k * stride
        return from_rows(flat, layout, value.shape, small)

    for k, source in enumerate(sources):
        value = values_of(source)
        if not isinstance(value, Tensor):
            return None
        known[source] = numbered(k, value, source)

    def change(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return known[argument]
        if isinstance(argument, int) and not isinstance(argument, bool):
            return resized([argument], rows.trace.rows, small)[0]
        return argument

    try:
        result = node.target(*mapped(node.args, change), **{k: change(v) for k, v in node.kwargs.items()})  # pyright: ignore
    except (RuntimeError, IndexError):
        return None
    value = values_of(node)
    found: list[list[tuple[int, int]]] = []
    for part, expected in zip(_as_list(result), _as_list(value), strict=True):
        layout = layout_of(expected, rows.trace.rows, node)
        if layout is None:
            return None
        flat = as_rows(part, layout, small)
        arguments, places = flat // stride, flat % stride
        of_row: list[tuple[int, int]] = []
        second_row: list[tuple[int, int]] = []
        for at_row, into in ((0, of_row), (1, second_row)):
            for argument, place in zip(arguments[at_row].tolist(), places[at_row].tolist(), strict=True):
                source_layout = rows.layouts.get(sources[argument])
                if source_layout is not None:
                    count = source_layout.features(values_of(sources[argument]).shape)
                    if place // count != at_row:
                        return None
                    place %= count
                into.append((argument, place))
        if of_row != second_row:
            return None
        found.append(of_row)
    return found


def constant(node: fx.Node) -> Any:
    """The value of a node that depends on no tensor."""
    return node.target(*mapped(node.args, _constant_of), **{k: _constant_of(v) for k, v in node.kwargs.items()})  # pyright: ignore


def _constant_of(argument: Any) -> Any:
    return constant(argument) if isinstance(argument, fx.Node) else argument


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
