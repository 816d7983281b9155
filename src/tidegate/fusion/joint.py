# SPDX-License-Identifier: Apache-2.0
# Torch.fx: a node's arguments are anything:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Joint products of input and state, taken apart before a trace is sorted."""

from __future__ import annotations

from typing import Any

from torch import fx

from tidegate.fusion.rows import aten, mapped, packet, values_of
from tidegate.fusion.trace import Trace


def split_joint_products(trace: Trace) -> None:
    """`[x, h] W` becomes `x W_x + h W_h`: the first half needs no loop."""
    graph = trace.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    own, inputs, _ = trace.counts
    reads_state: set[fx.Node] = set(placeholders[own + inputs :])
    for node in list(graph.nodes):
        if any(source in reads_state for source in node.all_input_nodes):
            reads_state.add(node)
        if node.op != "call_function" or packet(node) not in (aten.mm, aten.addmm):
            continue
        joint, weight = node.args[-2:] if packet(node) is aten.mm else node.args[1:3]
        if not isinstance(joint, fx.Node) or packet(joint) is not aten.cat or values_of(joint).dim() != 2:
            continue
        pieces, dim = joint.args[0], joint.args[1] if len(joint.args) > 1 else 0
        loop = [piece in reads_state for piece in pieces]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
        if dim not in (1, -1) or all(loop) or not any(loop) or len(node.kwargs) > 0:
            continue
        with graph.inserting_before(node), trace.mode:
            total, first = None, 0
            for is_loop in (False, True):
                for piece, in_loop in zip(pieces, loop, strict=True):  # pyright: ignore
                    width = values_of(piece).shape[1]
                    if in_loop is is_loop:
                        rows = _new(graph, aten.slice.Tensor, weight, 0, first, first + width)
                        if total is None and packet(node) is aten.addmm:
                            total = _new(graph, aten.addmm.default, node.args[0], piece, rows)
                        else:
                            product = _new(graph, aten.mm.default, piece, rows)
                            total = product if total is None else _new(graph, aten.add.Tensor, total, product)
                        if is_loop:
                            reads_state.add(total)
                    first = 0 if piece is pieces[-1] else first + width  # pyright: ignore
        assert total is not None
        total.meta["stack_trace"] = node.meta.get("stack_trace")
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        reads_state.add(total)
    graph.eliminate_dead_code()


def _new(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    values = mapped(args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
    node.meta["val"] = target(*values)
    return node
