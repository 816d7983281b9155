# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""A trace's operations, sorted by where they run: before the loop, in it, or after it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from tidegate.fusion import vocabulary
from tidegate.fusion.over_features import OVER_FEATURES
from tidegate.fusion.rows import CONVERTING, MOVING, PRODUCTS, Rows, aten, packet, values_of
from tidegate.fusion.trace import NotTraceableError, where


class Sorted:
    """Attributes:
    outputs, leaving: the nodes of y_t's leaves and of the new state's.
    after: what runs after the loop, over all rows.

    Args:
        whole: nothing is to run after it.

    Raises:
        NotTraceableError: the step does not give a state like the one that it was given.
    """

    def __init__(self, rows: Rows, whole: bool) -> None:
        self.rows, self.trace, self.graph = rows, rows.trace, rows.trace.graph
        results = next(node for node in self.graph.nodes if node.op == "output").args[0]
        self.outputs: list[Any] = list(results[: self.trace.outputs])  # pyright: ignore
        self.leaving: list[Any] = list(results[self.trace.outputs :])  # pyright: ignore
        self._check_results()
        needed = self._ancestors(self.leaving)
        self.rows.reads_state |= self._norms_for_the_loop(needed)
        core = needed & self.rows.reads_state
        self.after: set[fx.Node] = set() if whole else self._after(core)

    def in_loop(self) -> list[fx.Node]:
        return [
            node
            for node in self.graph.nodes
            if node in self.rows.reads_state and node not in self.after and node.op != "output"
        ]

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

    def _norms_for_the_loop(self, needed: set[fx.Node]) -> set[fx.Node]:
        """Layer norms of a product with the input, where nobody but the loop reads either.

        Before the loop they would double what a training step keeps: both what is normed and what comes of it.
        """
        found: set[fx.Node] = set()
        for norm in self.graph.nodes:
            if packet(norm) is not aten.native_layer_norm or norm in self.rows.reads_state:
                continue
            source, results = norm.args[0], list(norm.users)
            is_product = packet(source) in (aten.mm, aten.addmm) and len(source.users) == 1
            readers = [reader for result in results for reader in result.users]
            if is_product and all(reader in needed and reader in self.rows.reads_state for reader in readers):
                found |= {norm, *results}
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
        is_known = kind in OVER_FEATURES or kind in MOVING or kind in CONVERTING or kind in PRODUCTS
        return node.target is operator.getitem or is_known or vocabulary.is_elementwise(kind)

    def needed_after(self) -> list[fx.Node]:
        """What the loop has to give: for the operations after it, and of y_t."""
        found: dict[fx.Node, None] = {}
        for node in self.graph.nodes:
            if node in self.after:
                for source in node.all_input_nodes:
                    if source in self.rows.reads_state and source not in self.after:
                        found[self._tensor_of(source)] = None
        for node in self.outputs:
            if node in self.rows.reads_state and node not in self.after:
                found[node] = None
        return list(found)

    def _tensor_of(self, node: fx.Node) -> fx.Node:
        if isinstance(values_of(node), (list, tuple)):
            raise NotTraceableError(f"{node.target} gives several tensors to what no instruction does{where(node)}")
        return node
