# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Operations over a row's features, sums and what is made of them, as instructions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tidegate.fusion.builder import Builder
from tidegate.fusion.program import Argument, Operand
from tidegate.fusion.rows import Layout, Rows, aten, from_rows, values_of

_REDUCED = (aten.sum, aten.mean, aten.amax, aten.var, aten.var_mean)
OVER_FEATURES = (*_REDUCED, aten.native_layer_norm, aten._softmax, aten._log_softmax, aten.cumsum)


class OverFeatures(ABC):
    """What a lowering has, as far as these need it."""

    rows: Rows
    builder: Builder

    @abstractmethod
    def row(self, node: Any) -> Operand:
        """A node's features as an operand."""

    @abstractmethod
    def spread(self, argument: Any, shape: Sequence[int], layout: Layout) -> Argument:
        """An argument of an elementwise operation, spread over its result."""

    def over_features(self, node: fx.Node, kind: Any) -> Any:
        """The operand of one of `OVER_FEATURES`, or its operands.

        Raises:
            KeyError: with these arguments it has no instructions.
        """
        if kind is aten.native_layer_norm:
            return self._layer_norm(node)
        if kind in (aten._softmax, aten._log_softmax):
            return self._softmax(node, kind)
        if kind is aten.cumsum:
            return self._running_sum(node)
        if kind in (aten.var, aten.var_mean):
            both = self._variance_and_mean(node)
            return both if kind is aten.var_mean else both[0]
        return self._reduced(node, kind)

    def _grouped(self, node: Any, dims: Sequence[int]) -> tuple[Operand, int]:
        """A node's features with those dimensions last, and the number of groups before them."""
        value, layout = values_of(node), self.rows.layouts[node]
        assert layout is not None
        named = sorted(dim % value.dim() for dim in dims)
        operand = self.row(node)
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
        shifted = b.emit("sub", operand, b.emit("constant", b.reduce("max", operand, groups)), size=size, groups=groups)
        exponential = b.emit("exp", shifted)
        total = b.reduce("sum", exponential, groups)
        if kind is aten._log_softmax:
            return b.emit("sub", shifted, b.emit("log", total), size=size, groups=groups)
        return b.emit("div", exponential, total, size=size, groups=groups)

    def _running_sum(self, node: fx.Node) -> Operand:
        """In steps that double: each number plus the one 1 before it, then 2, 4, ..."""
        source, dim = node.args[0], node.args[1]
        if node.kwargs or not self._is_last(source, dim):  # pyright: ignore[reportArgumentType]
            raise KeyError(node.target)
        total, groups = self._grouped(source, [dim])  # pyright: ignore[reportArgumentType]
        b, each = self.builder, total.size // groups
        distance = 1
        while distance < each:
            zeros = b.emit("copy", 0.0, size=distance)
            rests = [total.part(group * each, each - distance) for group in range(groups)]
            total = b.emit("add", total, b.concat([piece for rest in rests for piece in (zeros, rest)]))
            distance *= 2
        return total

    def _centered(self, operand: Operand, groups: int) -> tuple[Operand, Operand, Operand]:
        """mean(x), x - mean(x), and the sum of its squares."""
        b, mean = self.builder, self.builder.reduce("mean", operand, groups)
        centered = b.emit("sub", operand, mean, size=operand.size, groups=groups)
        return mean, centered, b.reduce("sum", b.emit("mul", centered, centered), groups)

    def _variance_and_mean(self, node: fx.Node) -> list[Operand]:
        dims, correction = node.args[1], node.kwargs.get("correction", 1)
        operand, groups = self._grouped(node.args[0], dims)  # pyright: ignore[reportArgumentType]
        mean, _, total = self._centered(operand, groups)
        count = operand.size // groups - float(correction or 0)  # pyright: ignore[reportArgumentType]
        return [self.builder.emit("mul", total, 1.0 / count), mean]

    def _layer_norm(self, node: fx.Node) -> list[Any]:
        source, shape, weight, bias, epsilon = node.args
        value, layout = values_of(source), self.rows.layouts[source]  # pyright: ignore[reportArgumentType]
        assert layout is not None
        first = value.dim() - len(shape)  # pyright: ignore[reportArgumentType]
        operand, groups = self._grouped(source, range(first, value.dim()))
        b, size = self.builder, operand.size
        _, centered, total = self._centered(operand, groups)
        variance = b.emit("mul", total, 1.0 / (size // groups))
        scale = b.emit("rsqrt", b.emit("add", variance, float(epsilon)))  # pyright: ignore[reportArgumentType]
        result = b.emit("mul", centered, scale, size=size, groups=groups)
        for operation, tensor in (("mul", weight), ("add", bias)):
            if tensor is not None:
                result = b.emit(operation, result, self.spread(tensor, value.shape, layout), size=size)
        return [result, None, scale]
