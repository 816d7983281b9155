# SPDX-License-Identifier: Apache-2.0
"""Zoneout: states that stay as they were, by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tidegate.cells.wrapper import Wrapper, read_probability, steps_of
from tidegate.nn import over_time
from tidegate.nn.over_time import AnyCell, Nest


class Zoneout(Wrapper):
    """A cell whose states keep, entry by entry, their old value with probability p.

        training: s' = mask s_new + (1 - mask) s,  mask ~ Bernoulli(1 - p) for each step, row and entry
        eval:     s' = (1 - p) s_new + p s

    Source: Krueger et al. 2016 (1606.01305). They and fairseq zone h and c of an LSTM with a rate each, p=(p_h, p_c);
    haste zones h alone, p=(p, 0). Where y_t is the state's first tensor, it is the zoned one.

    Args:
        cell: any cell.
        p: the probability that an entry stays: one for all states, or one for each, in their order.

    Parameters: the cell's, under `cell.`.
    """

    def __init__(self, cell: AnyCell, p: float | Sequence[float]) -> None:
        super().__init__(cell)
        self.p = tuple(read_probability("p", one) for one in p) if isinstance(p, Sequence) else read_probability("p", p)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def _draw(self, inputs: Nest, state: Nest) -> Nest | None:
        """Of each state that is zoned at all, which entries are new."""
        leaves = pytree.tree_leaves(state)
        steps = steps_of(inputs)
        masks: dict[str, Any] = {}
        for k, (leaf, p) in enumerate(zip(leaves, self._rates(len(leaves)), strict=True)):
            if p > 0:
                chances = torch.full((steps, *leaf.shape), 1 - p, device=leaf.device)
                masks[str(k)] = torch.bernoulli(chances).to(torch.bool)
        return masks or None

    def _step(self, input: Nest, state: Nest, own: Nest | None, inner: Nest | None) -> Any:
        result = self._call(input, state, inner)
        output, new = over_time.split_result(result, state)
        entries, structure = pytree.tree_flatten(new)
        zoned: list[Any] = []
        for k, (leaf, old, p) in enumerate(
            zip(entries, pytree.tree_leaves(state), self._rates(len(entries)), strict=True)
        ):
            if p == 0:
                zoned.append(leaf)
            elif own is None:
                zoned.append((1 - p) * leaf + p * old)
            else:
                zoned.append(torch.where(own[str(k)], leaf, old))
        after = pytree.tree_unflatten(zoned, structure)
        return (zoned[0] if output is entries[0] else output), after

    def _rates(self, count: int) -> tuple[float, ...]:
        if not isinstance(self.p, tuple):
            return (self.p,) * count
        if len(self.p) != count:
            raise ValueError(f"p: expected {count}, one for each of the cell's states, got {len(self.p)}")
        return self.p
