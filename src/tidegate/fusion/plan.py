# SPDX-License-Identifier: Apache-2.0
"""A cell made ready to run over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tidegate import dispatch
from tidegate.fusion import loop
from tidegate.fusion.described import leaves_of
from tidegate.fusion.program import product
from tidegate.fusion.reading import computed

if TYPE_CHECKING:
    from tidegate.fusion.lower import Lowered


Dtypes = tuple[list[torch.dtype], list[torch.dtype]]  # of y, and of the final state


class Plan(torch.nn.Module):
    """A cell's step over sequences of some structure, sizes and dtype; or why there is none.

    A module, without tensors of its own, because that is what torch's compiler can take as given.

    Attributes:
        lowered: whether it can be fused; the others are None if not.
        once, before, after, counts, fresh, once_for_before: see `Lowered`.
        program: the loop.
        output: y_t's nest, with the places of its leaves.
        reasons: why it cannot be fused.
        compared, compared_one_row: whether it was held against the cell's own step.
        is_final: no other sizes or settings will change it.
        numbers: those of the cell's attributes that a compiled graph was made with.
        under_autocast: the dtypes of results, for those of what was given.
    """

    once: torch.nn.Module
    before: torch.nn.Module
    after: torch.nn.Module | None

    def __init__(self, lowered: Lowered | None, output: Any, reasons: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.lowered, self.output, self.reasons = lowered is not None, output, reasons
        self.compared = self.compared_one_row = self.is_final = False
        self.numbers: list[float] = []
        self.under_autocast: dict[Any, Dtypes] = {}
        if lowered is not None:
            self.once, self.before, self.after = lowered.once, lowered.before, lowered.after
            self.counts, self.fresh, self.once_for_before = lowered.counts, lowered.fresh, lowered.once_for_before
            self.program = loop.Looped.of(lowered.program)

    @property
    def text(self) -> str:
        """The program's readable form; "" if there is none."""
        return self.program.text if self.lowered else ""

    def dtypes_under(
        self, autocast: torch.dtype, step: Callable[..., Any], inputs: Any, state: Any, *options: bool
    ) -> Dtypes:
        """What the loop over the cell's own steps would give under autocast: see `dtypes_of_loop`."""
        from tidegate.fusion.compare import dtypes_of_loop

        leaves = leaves_of(inputs), leaves_of(state)
        given = (tuple([leaf.dtype for leaf in kind]) for kind in leaves)
        key = (*given, min(2, leaves[0][0].shape[0]), *options)
        if key not in self.under_autocast:
            self.under_autocast[key] = dtypes_of_loop(step, inputs, state, options[0], autocast, options[1])
        return self.under_autocast[key]

    @staticmethod
    def impossible(*reasons: str) -> Plan:
        return Plan(None, None, reasons)

    def run(
        self,
        tensors: Sequence[Tensor],
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
        dtypes: Dtypes | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Over (T, B, ...) from (B, ...): the leaves of y (T, B, ...) and of the final state.

        Args:
            tensors: what the cell reads beside, as `Reading` has it.
            dtypes: of what is returned; None for those of what was given.

        Past a row's length nothing is said of y: it is what the cell makes of zeros.
        """
        steps, batch = inputs[0].shape[:2]
        rows = steps * batch
        dtype = computed(states[0].dtype)
        if torch.is_grad_enabled() and dispatch.is_plain():
            # A graph keeps a leaf itself, whatever `.data` it is given before the backward; a view is what it was.
            tensors = [tensor.view_as(tensor) for tensor in tensors]
        # Their forward itself: a module's call, which looks for hooks, is a tenth of a short sequence's time.
        once = self.once.forward(*(_computed(tensor) for tensor in tensors))
        vectors, matrices, inputs_count = self.counts
        shared, rest = once[: vectors + matrices], once[vectors + matrices :]
        for_before, for_after = rest[: self.once_for_before], rest[self.once_for_before :]
        flat = [_computed(leaf).reshape(rows, *leaf.shape[2:]) for leaf in inputs]
        before = self.before.forward(rows, *flat, *for_before)
        sequences = [value.reshape(steps, batch, value.shape[1]) for value in before[:inputs_count]]
        entering = [_flat(_as(state, dtype), batch) for state in states]
        vectors_given = [_as(vector, dtype) for vector in shared[:vectors]]
        matrices_given = [_as(matrix, dtype) for matrix in shared[vectors:]]
        shared_by_rows = vectors_given, matrices_given
        given_to_loop = (sequences, entering, *shared_by_rows, lengths, resets, steps, batch, reverse)
        results = loop.run(self.program, *given_to_loop, fresh=self.fresh)
        count = len(results) - len(states)
        outputs = results[:count]
        if self.after is not None:
            made = [value.reshape(rows, value.shape[2]) for value in outputs]
            made = self.after.forward(rows, *made, *before[inputs_count:], *for_after)
            outputs = [value.reshape(steps, batch, *value.shape[1:]) for value in made]
        given = states[0].dtype
        if dtypes is None:
            dtypes = [_returned(value.dtype, given) for value in outputs], [given] * len(states)
        y = [_as(value, d) for value, d in zip(outputs, dtypes[0], strict=True)]
        leaving = zip(results[count:], states, dtypes[1], strict=True)
        return y, [_shaped(_as(value, d), state) for value, state, d in leaving]


def _computed(tensor: Tensor) -> Tensor:
    return _as(tensor, computed(tensor.dtype))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Quicker than to ask `to`, which has nothing to do nearly always.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _flat(state: Tensor, batch: int) -> Tensor:
    return state if state.dim() == 2 else state.reshape(batch, product(state.shape[1:]))


def _shaped(value: Tensor, state: Tensor) -> Tensor:
    return value if state.dim() == 2 else value.reshape(state.shape)


def _returned(dtype: torch.dtype, given: torch.dtype) -> torch.dtype:
    """Halves come back as what they were."""
    return given if dtype == computed(given) else dtype
