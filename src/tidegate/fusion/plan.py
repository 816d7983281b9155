# SPDX-License-Identifier: Apache-2.0
"""A cell made ready to run over a sequence, and the run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch
from tidegate.fusion import loop
from tidegate.fusion.lower import Lowered, lower
from tidegate.fusion.trace import (
    SETS_ATTRIBUTES,
    Cell,
    NotTraceableError,
    computed,
    has_hooks,
    settings,
    split_result,
    tensors_of,
    trace,
)
from tidegate.kernels import cpu


@dataclass(frozen=True)
class Plan:
    """A cell's step over sequences of some structure, sizes and dtype; or why there is none.

    Attributes:
        lowered: None if it cannot be fused.
        text: the program's readable form.
        output: the structure of y_t.
        reasons: why it cannot be fused.
    """

    lowered: Lowered | None
    text: str
    output: pytree.TreeSpec | None
    reasons: tuple[str, ...] = ()

    def run(
        self,
        step: Callable[..., Any],
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        reverse: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Over (T, B, ...) from (B, ...): the leaves of y (T, B, ...) and of the final state.

        Past a row's length nothing is said of y: it is what the cell makes of zeros.
        """
        assert self.lowered is not None
        lowered = self.lowered
        steps, batch = inputs[0].shape[:2]
        rows = steps * batch
        dtype = computed(states[0].dtype)
        once = lowered.once(*(_computed(tensor) for tensor in tensors_of(step)))
        vectors, matrices, inputs_count = lowered.counts
        shared, rest = once[: vectors + matrices], once[vectors + matrices :]
        for_before, for_after = rest[: lowered.once_for_before], rest[lowered.once_for_before :]
        flat = [_computed(leaf).reshape(rows, *leaf.shape[2:]) for leaf in inputs]
        before = lowered.before(rows, *flat, *for_before)
        sequences = [value.reshape(steps, batch, value.shape[1]) for value in before[:inputs_count]]
        entering = [state.to(dtype).reshape(batch, prod(state.shape[1:])) for state in states]
        vectors_given = [vector.to(dtype).contiguous() for vector in shared[:vectors]]
        matrices_given = [matrix.to(dtype) for matrix in shared[vectors:]]
        results = loop.run(
            self.text, sequences, entering, vectors_given, matrices_given, lengths, resets, steps, batch, reverse
        )
        count = len(results) - len(states)
        made = [value.reshape(rows, value.shape[2]) for value in results[:count]]
        outputs = lowered.after(rows, *made, *before[inputs_count:], *for_after)
        given = states[0].dtype
        y = [_given_back(value, given).reshape(steps, batch, *value.shape[1:]) for value in outputs]
        final = [value.to(given).reshape(state.shape) for value, state in zip(results[count:], states, strict=True)]
        return y, final


def _computed(tensor: Tensor) -> Tensor:
    return tensor.to(computed(tensor.dtype))


def _given_back(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Halves come back as what they were."""
    return value.to(dtype) if value.dtype == computed(dtype) else value


_plans: weakref.WeakKeyDictionary[Any, dict[Any, Plan]] = weakref.WeakKeyDictionary()

_ALWAYS = "whatever the sizes"

_SINGLE_STEP = "a single step is quicker in the cell's own operations"
_HOOKS = "the cell has hooks, which see each of its steps"
_TRANSFORMS = "torch.func's transforms, or forward-mode differentiation, run the cell's own operations"

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def plan(step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool) -> Plan:
    """The plan of a cell over sequences like these, made at the first call and kept for the next ones.

    Args:
        inputs: a nest of (T, B, ...).
        state: a nest of (B, ...).
        with_noise: inputs are a pair of the input and the noise.
    """
    input_leaves, input_spec = pytree.tree_flatten(inputs)
    state_leaves, state_spec = pytree.tree_flatten(state)
    shapes = tuple((*leaf.shape[2:], leaf.dtype) for leaf in input_leaves)
    of_states = tuple((*leaf.shape[1:], leaf.dtype) for leaf in state_leaves)
    is_one_row = bool(state_leaves) and state_leaves[0].shape[0] == 1  # a step may treat it in its own way
    key = (input_spec, shapes, state_spec, of_states, with_noise, is_one_row, settings(step))
    known = _plans.setdefault(step, {})
    if _ALWAYS in known:
        return known[_ALWAYS]
    if key not in known:
        made = _made(step, inputs, state, with_noise)
        # What changes at each step would be traced anew each time.
        known[_ALWAYS if SETS_ATTRIBUTES in made.reasons else key] = made
    return known.get(key) or known[_ALWAYS]


def _made(step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool) -> Plan:
    try:
        cell = Cell(step, with_noise)
        traced = trace(cell, pytree.tree_map(_first_step, inputs), state)
        lowered = lower(traced)
        made = Plan(lowered, str(lowered.program), traced.output)
        _compare_one_row(made, cell, inputs, state)
    except NotTraceableError as error:
        return Plan(None, "", None, (str(error),))
    return made


@torch.no_grad()
def _compare_one_row(made: Plan, cell: Cell, inputs: Any, state: Any) -> None:
    """A batch of one row is one of the sizes that a step can tell from others: see that it does nothing else there.

    Raises:
        NotTraceableError: the step gives other numbers than its plan.
    """
    states = pytree.tree_leaves(state)
    leaves, input_structure = pytree.tree_flatten(inputs)
    if not dispatch.is_plain() or states[0].shape[0] != 1 or leaves[0].shape[0] == 0:
        return
    one = [leaf[:1] for leaf in leaves]
    y, final = made.run(cell.step, one, states, None, None, False)
    x = pytree.tree_unflatten([leaf[0] for leaf in one], input_structure)
    expected_y, expected_state = split_result(cell.call(cell.tensors, x, state), state)
    expected = [*pytree.tree_leaves(expected_y), *pytree.tree_leaves(expected_state)]
    found = [*(leaf[0] for leaf in y), *final]
    # Wide enough for any rounding: what is looked for is another computation.
    tolerance = 1e-6 if states[0].dtype is torch.float64 else 1e-2
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True):
            raise NotTraceableError("of one row the step gives other numbers than of several")


def _first_step(leaf: Tensor) -> Tensor:
    """Of (T, B, ...), T perhaps 0, something like a step."""
    return leaf.new_empty(leaf.shape[1:], device="meta") if isinstance(leaf, Tensor) else leaf


def reasons_against(step: Callable[..., Any], inputs: Any, state: Any) -> list[str]:
    """Why no cell could be run fused on these: what needs no trace to be seen."""
    states = pytree.tree_leaves(state)
    tensors = [*pytree.tree_leaves(inputs), *states]
    reasons = list(cpu.availability())
    if not all(isinstance(leaf, Tensor) and leaf.is_cpu for leaf in tensors):
        reasons.append("the input or the state is not on the CPU")
    dtypes = {leaf.dtype for leaf in states}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        reasons.append("the state's tensors are not of one dtype, float32, float64, bfloat16 or float16")
    if has_hooks(step):
        reasons.append(_HOOKS)
    if dispatch.is_transformed() or dispatch.any_tangent(tensors):
        reasons.append(_TRANSFORMS)
    if dispatch.is_autocast():
        reasons.append("autocast is on")
    return reasons


def run(
    step: Callable[..., Any],
    inputs: Any,
    state: Any,
    noise: Any,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    always: bool,
) -> tuple[Sequence[str], tuple[Any, Any] | None]:
    """Run a cell over a sequence as one fused loop: see `over_time.run`.

    Args:
        always: though it may not be the quicker way.

    Returns:
        why it was not run, and the result; one of them is empty.
    """
    reasons = reasons_against(step, inputs, state)
    leaves = pytree.tree_leaves(inputs)
    if not reasons and not always and leaves[0].shape[0] == 1:
        reasons = [_SINGLE_STEP]
    if reasons:
        return reasons, None
    given = inputs if noise is None else (inputs, noise)
    made = plan(step, given, state, noise is not None)
    if made.lowered is None:
        return made.reasons, None
    past = None
    if lengths is not None:
        steps = torch.arange(leaves[0].shape[0], device=lengths.device).unsqueeze(-1)
        past = steps >= lengths  # (T, B)
        given = pytree.tree_map(partial(_zero_at, past), given)
    states, structure = pytree.tree_flatten(state)
    outputs, final = made.run(step, pytree.tree_leaves(given), states, lengths, resets, reverse)
    if leaves[0].shape[0] == 0:
        final = states
    if past is not None:
        outputs = [_zero_at(past, output) for output in outputs]
    assert made.output is not None
    return (), (pytree.tree_unflatten(outputs, made.output), pytree.tree_unflatten(final, structure))


def _zero_at(past: Tensor, tensor: Tensor) -> Tensor:
    return tensor.masked_fill(past.view(*past.shape, *(1,) * (tensor.dim() - 2)), 0)


def explain(step: Callable[..., Any], inputs: Any, state: Any, noise: Any, always: bool = False) -> Plan:
    """The plan that `run` would take, and every reason against it."""
    reasons = reasons_against(step, inputs, state)
    leaves = [*pytree.tree_leaves(inputs), *pytree.tree_leaves(state)]
    if not always and leaves[0].shape[0] == 1:
        reasons.append(_SINGLE_STEP)
    # Hooks would see the tracing; what is no tensor cannot be traced.
    if _HOOKS in reasons or _TRANSFORMS in reasons or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return Plan(None, "", None, tuple(reasons))
    made = plan(step, inputs if noise is None else (inputs, noise), state, noise is not None)
    return replace(made, reasons=(*reasons, *made.reasons))
