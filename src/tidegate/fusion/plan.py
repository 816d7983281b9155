# SPDX-License-Identifier: Apache-2.0
"""A cell made ready to run over a sequence, and the run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch
from tidegate.fusion import loop
from tidegate.fusion.program import product
from tidegate.fusion.reading import Reading, computed, read, split_result
from tidegate.kernels import cpu

if TYPE_CHECKING:
    from tidegate.fusion.lower import Lowered


class Plan(torch.nn.Module):
    """A cell's step over sequences of some structure, sizes and dtype; or why there is none.

    A module, without tensors of its own, because that is what torch's compiler can take as given.

    Attributes:
        lowered: whether it can be fused; the others are None if not.
        once, before, after, counts, once_for_before: see `Lowered`.
        program: the loop.
        output: y_t's nest, with the places of its leaves.
        reasons: why it cannot be fused.
        compared, compared_one_row: whether it was held against the cell's own step.
        is_final: no other sizes or settings will change it.
        numbers: those of the cell's attributes that a compiled graph was made with.
    """

    once: torch.nn.Module
    before: torch.nn.Module
    after: torch.nn.Module

    def __init__(self, lowered: Lowered | None, output: Any, reasons: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.lowered, self.output, self.reasons = lowered is not None, output, reasons
        self.compared = self.compared_one_row = self.is_final = False
        self.numbers: list[float] = []
        if lowered is not None:
            self.once, self.before, self.after = lowered.once, lowered.before, lowered.after
            self.counts, self.once_for_before = lowered.counts, lowered.once_for_before
            self.program = loop.Looped.of(lowered.program)

    @property
    def text(self) -> str:
        """The program's readable form; "" if there is none."""
        return self.program.text if self.lowered else ""

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
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Over (T, B, ...) from (B, ...): the leaves of y (T, B, ...) and of the final state.

        Args:
            tensors: what the cell reads beside, as `Reading` has it.

        Past a row's length nothing is said of y: it is what the cell makes of zeros.
        """
        steps, batch = inputs[0].shape[:2]
        rows = steps * batch
        dtype = computed(states[0].dtype)
        if torch.is_grad_enabled() and dispatch.is_plain():
            # A graph keeps a leaf itself, whatever `.data` it is given before the backward; a view is what it was.
            tensors = [tensor.view_as(tensor) for tensor in tensors]
        once = self.once(*(_computed(tensor) for tensor in tensors))
        vectors, matrices, inputs_count = self.counts
        shared, rest = once[: vectors + matrices], once[vectors + matrices :]
        for_before, for_after = rest[: self.once_for_before], rest[self.once_for_before :]
        flat = [_computed(leaf).reshape(rows, *leaf.shape[2:]) for leaf in inputs]
        before = self.before(rows, *flat, *for_before)
        sequences = [value.reshape(steps, batch, value.shape[1]) for value in before[:inputs_count]]
        entering = [_as(state, dtype).reshape(batch, product(state.shape[1:])) for state in states]
        vectors_given = [_as(vector, dtype) for vector in shared[:vectors]]
        matrices_given = [_as(matrix, dtype) for matrix in shared[vectors:]]
        results = loop.run(
            self.program, sequences, entering, vectors_given, matrices_given, lengths, resets, steps, batch, reverse
        )
        count = len(results) - len(states)
        made = [value.reshape(rows, value.shape[2]) for value in results[:count]]
        outputs = self.after(rows, *made, *before[inputs_count:], *for_after)
        given = states[0].dtype
        y = [_given_back(value, given).reshape(steps, batch, *value.shape[1:]) for value in outputs]
        final = [_as(value, given).reshape(state.shape) for value, state in zip(results[count:], states, strict=True)]
        return y, final


def _computed(tensor: Tensor) -> Tensor:
    return _as(tensor, computed(tensor.dtype))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Quicker than to ask `to`, which has nothing to do nearly always.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _given_back(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Halves come back as what they were."""
    return value.to(dtype) if value.dtype != dtype and value.dtype == computed(dtype) else value


_plans: weakref.WeakKeyDictionary[Any, dict[Any, Plan]] = weakref.WeakKeyDictionary()

_ALWAYS = "whatever the sizes"

_SINGLE_STEP = "a single step is quicker in the cell's own operations"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Kind = tuple[tuple[int, ...], torch.dtype]  # sizes of features, and dtype


class Described(NamedTuple):
    """What a plan is made for: the nests that a cell is given, a 0 for each tensor, with each tensor's features.

    Attributes:
        with_noise: the input is a pair of the input and the noise.
    """

    input: Any
    inputs: tuple[Kind, ...]
    state: Any
    states: tuple[Kind, ...]
    with_noise: bool

    def example(self) -> tuple[Any, Any]:
        """Some x_t and a state of this kind."""
        inputs, states = (
            [torch.empty((2, *sizes), dtype=dtype, device="meta") for sizes, dtype in kinds]
            for kinds in (self.inputs, self.states)
        )
        structures = pytree.tree_structure(self.input), pytree.tree_structure(self.state)
        return pytree.tree_unflatten(inputs, structures[0]), pytree.tree_unflatten(states, structures[1])

    def key(self) -> tuple[Any, ...]:
        if all(place == 0 or (type(place) is tuple and not any(place)) for place in (self.input, self.state)):
            return self  # a tensor or a plain tuple of them
        structures = pytree.tree_structure(self.input), pytree.tree_structure(self.state)
        return (*structures, self.inputs, self.states, self.with_noise)


def planned(step: Callable[..., Any], settings: tuple[Any, ...], described: Described, kept_for: Any = None) -> Plan:
    """The plan of a cell over such sequences, made at the first call and kept for the next ones.

    Args:
        settings: what the step reads, as it is now.
        kept_for: what else it is kept for.
    """
    known = _plans.setdefault(_owner(step), {})
    if _ALWAYS in known:
        return known[_ALWAYS]
    key = (described.key(), kept_for, settings)
    if key not in known:
        made = _made(step, described)
        # What changes at each step would be traced anew each time.
        known[_ALWAYS if made.is_final else key] = made
    else:
        made = known[key]
    # Not while torch.export looks: it has its own way to call modules, for all threads.
    if made.lowered and not made.compared and (dispatch.is_plain() or torch.compiler.is_dynamo_compiling()):
        made.compared = True
        difference = dispatch.outside_of_tracing(partial(_difference, made, step, described))
        if difference:
            made = known[key] = Plan.impossible(difference)
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

    def make() -> Plan:
        try:
            traced = trace(Cell(step, described.with_noise), *described.example())
            return Plan(lower(traced), pytree.tree_unflatten(list(range(traced.outputs)), traced.output))
        except NotTraceableError as error:
            made = Plan.impossible(str(error))
            made.is_final = error.whatever_the_sizes
            return made
        except Exception as error:
            # A cell can always be run step by step: whatever is not foreseen here must not keep it from that.
            return Plan.impossible(f"it could not be fused: {type(error).__name__}: {error}")

    return dispatch.outside_of_tracing(make)


@torch.no_grad()
def _differs_for_one_row(made: Plan, step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool) -> bool:
    """A batch of one row is one of the sizes that a step can tell from others: whether it does something else there."""
    leaves = pytree.tree_leaves(inputs)
    if not dispatch.is_plain() or leaves[0].shape[0] == 0:
        return False
    one = [leaf[:1] for leaf in leaves]
    y, final = made.run(read(step).tensors, one, pytree.tree_leaves(state), None, None, False)
    x = pytree.tree_map(_first, inputs)
    expected_y, expected_state = split_result(step(*((x[0], state, x[1]) if with_noise else (x, state))), state)
    expected = [*pytree.tree_leaves(expected_y), *pytree.tree_leaves(expected_state)]
    return not _are_close([*(leaf[0] for leaf in y), *final], expected)


def _are_close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Wide enough for any rounding: what is looked for is another computation. None is zero."""
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if any(one is not None and bool((one != 0).any()) for one in (a, b)):
                return False
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        tolerance = 1e-6 if a.dtype is torch.float64 else 2e-3 if a.dtype is torch.float32 else 0.1
        a, b = a.double(), b.double()
        finite = b[b.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        if not torch.allclose(a, b, 0, tolerance * max(scale, 1e-3), equal_nan=True):
            return False
    return True


def _difference(made: Plan, step: Callable[..., Any], described: Described) -> str:
    """What is other in a random step's results or gradients than in the cell's own; "" for nothing.

    What the operations of a graph do not say: `no_grad`, hooks on tensors, whatever asks whether autograd records.
    """
    from tidegate.fusion.trace import Cell

    cell, generator = Cell(step, described.with_noise), torch.Generator().manual_seed(0)

    def random(sizes: tuple[int, ...], dtype: torch.dtype, records: bool) -> Tensor:
        value = torch.randn((3, *sizes), generator=generator)
        if dtype.is_floating_point:
            return value.to(dtype).requires_grad_(records)
        # Of integers zeros, which are indices into whatever they may be.
        return value > 0 if dtype is torch.bool else torch.zeros((3, *sizes), dtype=dtype)

    def results(own: list[Tensor], x: list[Tensor], state: list[Tensor], plan: bool) -> list[Tensor]:
        if plan:
            y, final = made.run(own, [leaf.unsqueeze(0) for leaf in x], state, None, None, False)
            return [*(leaf[0] for leaf in y), *final]
        entering = pytree.tree_unflatten(state, structures[1])
        y, leaving = split_result(cell.call(own, pytree.tree_unflatten(x, structures[0]), entering), entering)
        return [*pytree.tree_leaves(y), *pytree.tree_leaves(leaving)]

    structures = pytree.tree_structure(described.input), pytree.tree_structure(described.state)
    found: list[list[Tensor | None]] = []
    x = [random(sizes, dtype, True) for sizes, dtype in described.inputs]
    state = [random(sizes, dtype, True) for sizes, dtype in described.states]
    own = [_own_twin(tensor) for tensor in cell.tensors]
    wanted = [tensor for tensor in (*x, *state, *own) if tensor.requires_grad]
    for plan in (False, True):
        try:
            outcome = results(own, x, state, plan)
        except Exception as error:
            # Of a cell that cannot do a step on random numbers nothing can be said.
            return f"a step on random numbers raised {type(error).__name__}: {error}"
        recorded = [leaf for leaf in outcome if leaf.requires_grad]
        loss = sum((leaf.float() * torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape)).sum() for leaf in recorded)
        gradients: Any = ()
        if isinstance(loss, Tensor):
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append([*(leaf.detach() for leaf in outcome), *gradients])
    if len(found[0]) == len(found[1]) and _are_close(found[1], found[0]):
        return ""
    return "its results or gradients are not what its operations say"


def _own_twin(tensor: Tensor) -> Tensor:
    """A parameter or buffer with the same values, on the CPU, apart from it."""
    if tensor.device.type == "meta":
        return torch.ones(tensor.shape, dtype=tensor.dtype) * 0.1
    return tensor.detach().cpu().clone().requires_grad_(tensor.requires_grad)


def _zeros_of_a_step(leaf: Tensor) -> Tensor:
    return leaf.new_zeros(leaf.shape[1:])


def _zero(leaf: Any) -> int:
    return 0


def _first(leaf: Tensor) -> Tensor:
    return leaf[0]


def _kinds(leaves: Sequence[Tensor], skipped: int) -> tuple[Kind, ...]:
    # The length of a range is a number to a compiler, too, even where a size may change.
    return tuple([(tuple([len(range(size)) for size in leaf.shape[skipped:]]), leaf.dtype) for leaf in leaves])


def plan(step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool) -> tuple[Plan, Sequence[Tensor]]:
    """The plan of a cell over (T, B, ...) from a state (B, ...), with every reason against it; and what it reads.

    Args:
        with_noise: inputs are a pair of the input and the noise.
    """
    input_leaves, state_leaves = leaves_of(inputs), leaves_of(state)
    reasons = _reasons_against([*input_leaves, *state_leaves], state_leaves)
    if reasons:
        more = [] if torch.compiler.is_dynamo_compiling() else _reasons_of(read(step))
        return Plan.impossible(*reasons, *more), ()
    places = _places(inputs), _places(state)
    described = Described(places[0], _kinds(input_leaves, 2), places[1], _kinds(state_leaves, 1), with_noise)
    if torch.compiler.is_dynamo_compiling():
        if not isinstance(step, torch.nn.Module):
            return Plan.impossible("a compiler does not see what a function reads that is no module"), ()
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
        return planned(step, reading.settings, described), reading.tensors
    made = planned(step, reading.settings, described, "one row")
    if made.lowered and not made.compared_one_row:
        made.compared_one_row = True
        if _differs_for_one_row(made, step, inputs, state, with_noise):
            made = Plan.impossible("of one row the step gives other numbers than of several")
            known = _plans[_owner(step)]
            _plans[_owner(step)] = {key: made if key[1] == "one row" else other for key, other in known.items()}
    return made, reading.tensors


def leaves_of(nest: Any) -> list[Any]:
    """The leaves of a nest: of the usual ones without a walk."""
    if type(nest) is Tensor:
        return [nest]
    if type(nest) is tuple and all(type(leaf) is Tensor for leaf in nest):  # pyright: ignore[reportUnknownVariableType]
        return [*nest]  # pyright: ignore[reportUnknownArgumentType]
    return pytree.tree_leaves(nest)


def _places(nest: Any) -> Any:
    """The nest with a 0 for each leaf."""
    if type(nest) is Tensor:
        return 0
    if type(nest) is tuple and all(type(leaf) is Tensor for leaf in nest):  # pyright: ignore[reportUnknownVariableType]
        return (0,) * len(nest)  # pyright: ignore[reportUnknownArgumentType]
    return pytree.tree_map(_zero, nest)


def _reasons_against(tensors: Sequence[Any], states: Sequence[Any]) -> list[str]:
    """Why no cell could be run fused on these."""
    reasons: list[str] = []
    if not all(isinstance(leaf, Tensor) and leaf.is_cpu for leaf in tensors):
        return ["the input or the state is not on the CPU"]
    if len({leaf.dtype for leaf in states}) != 1 or states[0].dtype not in DTYPES:
        reasons.append("the state's tensors are not of one dtype, float32, float64, bfloat16 or float16")
    if torch.is_autocast_enabled("cpu"):
        reasons.append("autocast is on")
    return reasons


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
    made, tensors = plan(step, given, state, noise is not None)
    if not made.lowered:
        return made.reasons, None
    past = None
    if lengths is not None:
        past = torch.arange(steps, device=lengths.device).unsqueeze(-1) >= lengths  # (T, B)
        given = pytree.tree_map(partial(_zero_at, past), given)
    states = leaves_of(state)
    outputs, final = made.run(tensors, leaves_of(given), states, lengths, resets, reverse)
    if steps == 0:
        final = states
    if past is not None:
        outputs = [_zero_at(past, output) for output in outputs]
    y = outputs[0] if made.output == 0 else pytree.tree_map(outputs.__getitem__, made.output)
    return (), (y, _like(state, final))


def _like(nest: Any, leaves: Sequence[Tensor]) -> Any:
    """The leaves in the nest's structure."""
    if type(nest) is Tensor:
        return leaves[0]
    if type(nest) is tuple and all(type(leaf) is Tensor for leaf in nest):  # pyright: ignore[reportUnknownVariableType]
        return tuple(leaves)
    return pytree.tree_unflatten(list(leaves), pytree.tree_structure(nest))


def _zero_at(past: Tensor, tensor: Tensor) -> Tensor:
    return tensor.masked_fill(past.view(*past.shape, *(1,) * (tensor.dim() - 2)), 0)


def explain(
    step: Callable[..., Any], inputs: Any, state: Any, noise: Any, always: bool = False
) -> tuple[list[str], str]:
    """Every reason why `run` would not run a cell, and its program in its readable form, "" if there is none."""
    given = inputs if noise is None else (inputs, noise)
    leaves, states = leaves_of(given), leaves_of(state)
    reasons = _reasons_against([*leaves, *states], states)
    if isinstance(leaves[0], Tensor) and leaves[0].shape[0] == 1 and not always:
        reasons.append(_SINGLE_STEP)
    with torch.autocast("cpu", enabled=False):
        made, _ = plan(step, given, state, noise is not None)
    return list(dict.fromkeys([*reasons, *made.reasons])), made.text
