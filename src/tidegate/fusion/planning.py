# SPDX-License-Identifier: Apache-2.0
"""Which plan a call of a cell runs by, or why none; and the run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch
from tidegate.fusion.described import Described, kinds_of, leaves_of, like, places_of
from tidegate.fusion.plan import Plan
from tidegate.fusion.reading import Reading, computed, read
from tidegate.kernels import cpu

_plans: weakref.WeakKeyDictionary[Any, dict[Any, Plan]] = weakref.WeakKeyDictionary()

_ALWAYS = "whatever the sizes"

_SINGLE_STEP = "a single step is quicker in the cell's own operations"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def planned(
    step: Callable[..., Any],
    settings: tuple[Any, ...],
    described: Described,
    kept_for: Any = None,
    autocast: torch.dtype | None = None,
) -> Plan:
    """The plan of a cell over such sequences, made at the first call and kept for the next ones.

    Args:
        settings: what the step reads, as it is now.
        kept_for: what else it is kept for.
        autocast: what the cell's own step would be run under.
    """
    known = _plans.setdefault(_owner(step), {})
    if _ALWAYS in known:
        return known[_ALWAYS]
    key = (described.key(), kept_for, settings, autocast)
    if key not in known:
        made = _made(step, described)
        # What changes at each step would be traced anew each time.
        known[_ALWAYS if made.is_final else key] = made
    else:
        made = known[key]
    # Not while torch.export looks: it has its own way to call modules, for all threads.
    if made.lowered and not made.compared and (dispatch.is_plain() or torch.compiler.is_dynamo_compiling()):
        from tidegate.fusion.compare import difference

        made.compared = True
        found = dispatch.outside_of_tracing(partial(difference, made, step, described, autocast))
        if found:
            made = known[key] = Plan.impossible(found)
    return made


def _owner(step: Callable[..., Any]) -> Any:
    """Whose plans a step's are: of a wrapper that is made anew for each call, what it is `around`."""
    return getattr(step, "around", step)


def _numbers(step: Any) -> list[float]:
    return [value for module in step.modules() for value in module.__dict__.values() if isinstance(value, float)]


class _InGraphs:
    """The plans that compiled graphs hold, each an attribute: that is what torch's compiler can find again."""


_in_graphs = _InGraphs()


@dispatch.asked_once
def _name_in_graphs(step: Callable[..., Any], *described: Any) -> str:
    """Make a plan while a compiler looks, which asks once."""
    reading = read(step)
    reasons = _reasons_of(reading)
    made = Plan.impossible(*reasons) if reasons else planned(step, reading.settings, Described(*described))
    made.numbers = _numbers(step)
    name = f"plan_{id(made)}"
    setattr(_in_graphs, name, made)
    return name


def _made(step: Callable[..., Any], described: Described) -> Plan:
    # Imported where they are used: the first plan needs torch.fx, which importing tidegate does not.
    from tidegate.fusion.lower import lower
    from tidegate.fusion.trace import Cell, NotTraceableError, trace

    def made(with_lines: bool) -> Plan:
        traced = trace(Cell(step, described.with_noise), *described.example(), with_lines)
        return Plan(lower(traced), pytree.tree_unflatten(list(range(traced.outputs)), traced.output))

    def make() -> Plan:
        try:
            try:
                return made(with_lines=False)
            except NotTraceableError:
                return made(with_lines=True)  # for the reason, which is to name the line
        except NotTraceableError as error:
            refused = Plan.impossible(str(error))
            refused.is_final = error.whatever_the_sizes
            return refused
        except Exception as error:
            # A cell can always be run step by step: whatever is not foreseen here must not keep it from that.
            return Plan.impossible(f"it could not be fused: {type(error).__name__}: {error}")

    return dispatch.outside_of_tracing(make)


def _zeros_of_a_step(leaf: Tensor) -> Tensor:
    return leaf.new_zeros(leaf.shape[1:])


def plan(
    step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool, autocast: torch.dtype | None
) -> tuple[Plan, Sequence[Tensor]]:
    """The plan of a cell over (T, B, ...) from a state (B, ...), with every reason against it; and what it reads.

    Args:
        with_noise: inputs are a pair of the input and the noise.
        autocast: to which dtype, or None where it is off.
    """
    input_leaves, state_leaves = leaves_of(inputs), leaves_of(state)
    reasons = _reasons_against([*input_leaves, *state_leaves], state_leaves, autocast)
    if reasons:
        more = [] if torch.compiler.is_dynamo_compiling() else _reasons_of(read(step))
        return Plan.impossible(*reasons, *more), ()
    places = places_of(inputs), places_of(state)
    kinds = kinds_of(input_leaves, 2, autocast), kinds_of(state_leaves, 1, autocast)
    described = Described(places[0], kinds[0], places[1], kinds[1], with_noise)
    if torch.compiler.is_dynamo_compiling():
        if not isinstance(step, torch.nn.Module):
            return Plan.impossible("a compiler does not see what a function reads that is no module"), ()
        if not dispatch.asked_of_modules:
            return Plan.impossible("the compiler of torch before 2.12 cannot ask for a module's plan"), ()
        # A step whose results nobody reads: the compiler guards on all that decides what the step does.
        x = pytree.tree_map(_zeros_of_a_step, inputs)
        step(*((x[0], state, x[1]) if with_noise else (x, state)))
        made = getattr(_in_graphs, _name_in_graphs(step, *described))
        # Of numbers alone the compiler takes it that they may change: those in a plan may not.
        for number, planned_with in zip(_numbers(step), made.numbers, strict=True):
            if number != planned_with:
                raise AssertionError("a number of the cell is another while it is compiled")
        return made, [*step.parameters(), *step.buffers()]
    reading = read(step)
    reasons = _reasons_of(reading)
    if dispatch.is_transformed() or dispatch.any_tangent([*input_leaves, *state_leaves]):
        reasons.append("torch.func's transforms, and forward-mode differentiation, run the cell's own operations")
    if reasons:
        return Plan.impossible(*reasons), ()
    if state_leaves[0].shape[0] != 1:
        return planned(step, reading.settings, described, None, autocast), reading.tensors
    made = planned(step, reading.settings, described, "one row", autocast)
    if made.lowered and not made.compared_one_row:
        from tidegate.fusion.compare import differs_for_one_row

        made.compared_one_row = True
        if differs_for_one_row(made, step, inputs, state, with_noise, autocast):
            made = Plan.impossible("of one row the step gives other numbers than of several")
            known = _plans[_owner(step)]
            _plans[_owner(step)] = {key: made if key[1] == "one row" else other for key, other in known.items()}
    return made, reading.tensors


def _reasons_against(tensors: Sequence[Any], states: Sequence[Any], autocast: torch.dtype | None) -> list[str]:
    """Why no cell could be run fused on these."""
    reasons: list[str] = []
    if not all(isinstance(leaf, Tensor) and leaf.is_cpu for leaf in tensors):
        return ["the input or the state is not on the CPU"]
    dtypes = {leaf.dtype if autocast is None else computed(leaf.dtype) for leaf in states}
    if len(dtypes) != 1 or states[0].dtype not in DTYPES:
        reasons.append("the state's tensors are not of one dtype, float32, float64, bfloat16 or float16")
    if autocast is not None and torch.compiler.is_dynamo_compiling():
        reasons.append("autocast is on while a compiler looks, which is to see the dtypes of each operation")
    return reasons


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _reasons_of(reading: Reading) -> list[str]:
    reasons = list(cpu.availability())
    return [*reasons, "the cell has hooks, which see each of its steps"] if reading.has_hooks else reasons


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
    steps = leaves_of(inputs)[0].shape[0]
    if steps == 1 and not always:
        return (_SINGLE_STEP,), None
    given = inputs if noise is None else (inputs, noise)
    autocast = _autocast()
    made, tensors = plan(step, given, state, noise is not None, autocast)
    if not made.lowered:
        return made.reasons, None
    dtypes = None
    if autocast is not None:
        dtypes = made.dtypes_under(autocast, step, given, state, noise is not None, lengths is not None)
    past = None
    if lengths is not None:
        past = torch.arange(steps, device=lengths.device).unsqueeze(-1) >= lengths  # (T, B)
        given = pytree.tree_map(partial(_zero_at, past), given)
    states = leaves_of(state)
    # It is float32 throughout, which is more exact than what autocast makes of the cell's operations.
    with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", enabled=False):
        outputs, final = made.run(tensors, leaves_of(given), states, lengths, resets, reverse, dtypes)
    if steps == 0:
        final = states
    if past is not None:
        outputs = [_zero_at(past, output) for output in outputs]
    y = outputs[0] if made.output == 0 else pytree.tree_map(outputs.__getitem__, made.output)
    return (), (y, like(state, final))


def _zero_at(past: Tensor, tensor: Tensor) -> Tensor:
    return tensor.masked_fill(past.view(*past.shape, *(1,) * (tensor.dim() - 2)), 0)


def explain(
    step: Callable[..., Any], inputs: Any, state: Any, noise: Any, always: bool = False
) -> tuple[list[str], str]:
    """Every reason why `run` would not run a cell, and its program in its readable form, "" if there is none."""
    given = inputs if noise is None else (inputs, noise)
    leaves, states = leaves_of(given), leaves_of(state)
    autocast = _autocast()
    reasons = _reasons_against([*leaves, *states], states, autocast)
    if isinstance(leaves[0], Tensor) and leaves[0].shape[0] == 1 and not always:
        reasons.append(_SINGLE_STEP)
    made, _ = plan(step, given, state, noise is not None, autocast)
    return list(dict.fromkeys([*reasons, *made.reasons])), made.text
