# SPDX-License-Identifier: Apache-2.0
"""A cell made ready to run over a sequence, and the run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate.fusion import loop
from tidegate.fusion.lower import Lowered, lower
from tidegate.fusion.trace import Cell, NotTraceable, computed, settings, trace


@dataclass(frozen=True)
class Plan:
    """A cell's step over sequences of some structure, sizes and dtype; or why there is none.

    Attributes:
        cell: read anew at each call.
        lowered: None if it cannot be fused.
        text: the program's readable form.
        output: the structure of y_t.
        reasons: why it cannot be fused.
    """

    cell: Cell | None
    lowered: Lowered | None
    text: str
    output: pytree.TreeSpec | None
    reasons: tuple[str, ...] = ()

    def run(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Over (T, B, ...) from (B, ...): the leaves of y (T, B, ...) and of the final state.

        Past a row's length nothing is said of y: it is what the cell makes of zeros.
        """
        assert self.cell is not None and self.lowered is not None
        lowered = self.lowered
        steps, batch = inputs[0].shape[:2]
        rows = steps * batch
        dtype = computed(states[0].dtype)
        once = lowered.once(*(_computed(tensor) for tensor in self.cell.read_anew()))
        vectors, matrices, inputs_count = lowered.counts
        shared, rest = once[: vectors + matrices], once[vectors + matrices :]
        for_before, for_after = rest[: lowered.once_for_before], rest[lowered.once_for_before :]
        flat = [_computed(leaf).reshape(rows, *leaf.shape[2:]) for leaf in inputs]
        before = lowered.before(rows, *flat, *for_before)
        sequences = [value.reshape(steps, batch, -1) for value in before[:inputs_count]]
        entering = [state.to(dtype).reshape(batch, -1) for state in states]
        vectors_given = [vector.to(dtype).contiguous() for vector in shared[:vectors]]
        matrices_given = [matrix.to(dtype) for matrix in shared[vectors:]]
        results = loop.run(
            self.text, sequences, entering, vectors_given, matrices_given, lengths, resets, steps, batch, reverse
        )
        count = len(results) - len(states)
        made = [value.reshape(rows, -1) for value in results[:count]]
        outputs = lowered.after(rows, *made, *before[inputs_count:], *for_after)
        given = states[0].dtype
        y = [value.to(_returned(value.dtype, given)).reshape(steps, batch, *value.shape[1:]) for value in outputs]
        final = [value.to(given).reshape(state.shape) for value, state in zip(results[count:], states, strict=True)]
        return y, final


def _computed(tensor: Tensor) -> Tensor:
    return tensor.to(computed(tensor.dtype))


def _returned(dtype: torch.dtype, given: torch.dtype) -> torch.dtype:
    """Halves come back as what they were."""
    return given if dtype == computed(given) else dtype


_plans: weakref.WeakKeyDictionary[Any, dict[Any, Plan]] = weakref.WeakKeyDictionary()


def plan(step: Callable[..., Any], inputs: Any, state: Any) -> Plan:
    """The plan of a cell over sequences like these, made at the first call and kept for the next ones.

    Args:
        inputs: a nest of (T, B, ...).
        state: a nest of (B, ...).
    """
    input_leaves, input_spec = pytree.tree_flatten(inputs)
    state_leaves, state_spec = pytree.tree_flatten(state)
    shapes = tuple((*leaf.shape[2:], leaf.dtype) for leaf in input_leaves)
    of_states = tuple((*leaf.shape[1:], leaf.dtype) for leaf in state_leaves)
    key = (str(input_spec), shapes, str(state_spec), of_states, settings(step))
    known = _plans.setdefault(step, {})
    if key not in known:
        known[key] = _made(step, pytree.tree_map(lambda leaf: leaf[0], inputs), state)
    return known[key]


def _made(step: Callable[..., Any], inputs: Any, state: Any) -> Plan:
    try:
        cell = Cell(step)
        traced = trace(cell, inputs, state)
        lowered = lower(traced)
    except NotTraceable as error:
        return Plan(None, None, "", None, (str(error),))
    return Plan(cell, lowered, str(lowered.program), traced.output)
