# SPDX-License-Identifier: Apache-2.0
"""The backends in order of preference, what each cannot run, the choice among them, and running the one chosen."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tidegate import dispatch, reference
from tidegate.call import Call, Layer, Layout, Unit, layer_by_layer
from tidegate.cell import Cell
from tidegate.checks import check, check_lengths, refuse_sparse
from tidegate.errors import UnsupportedError
from tidegate.fusion import backend as fused
from tidegate.higher_order import Gradients, detached, graph_gradients
from tidegate.kernels import aten, cpu, triton
from tidegate.scope import Ran, scope

T = TypeVar("T", Tensor, "Tensor | None")
U = TypeVar("U", bound=Unit)


def _nothing(call: Unit) -> tuple[int, ...]:
    return (0,)


def _no_reasons(call: Call) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One way to run a call.

    A backend is compiled, with `forward`, `backward` and `saved_shape`, or composite: torch's operations.

    Attributes:
        name: what `tidegate.backend` takes.
        unsupported_reasons: reasons why it cannot run a call; empty when it can. Pure, never raises.
        availability: reasons why this machine cannot run it at all; empty when it can.
        takes_stacks: it takes a whole `Call`; else it is given a `Layer` at a time.
        composite: `call -> (output, *final states)` in torch's operations, recording autograd.
        forward: `(call, save) -> (output, *final states[, saved])`, not recording autograd. One that takes stacks gives
            no output of a step, and may give more of it before `saved`, for `gradients` to put together; it saves a
            tensor for each layer.
        backward: of one that takes stacks `(call, saved, gradients, needs, overwrite) -> gradients` in the order of
            `Call.tensors`, None where `needs` is False; else `(layer, output, saved, gradients, needs)`. Where
            `overwrite`, nobody reads `saved` afterwards.
        saved_shape: from shapes alone.
        prepare: `call -> run`, the weights laid out once, for streams: `run(layout)(input, *states) -> output`, the
            new states in the memory of the old ones, all or none.
        layout: what `prepare`'s result holds for, beside the call.
        flops: of the operators that `prepare`'s result calls, how many floating-point operations a call of one takes.
        checks: what it refuses by itself as `checks.check` would, with a RuntimeError, so that a plain call need not be
            looked at twice: "all" calls, "steps" or "" for none.
        slower_reasons: why it leaves a call that it can run to another, if that one can and none is named; pure.
        slower_in_graph: the same of one layer as a registered operator, where the other one may be less quick; None
            where that makes no difference.
        leaves_to: that other one.
        only_named: why it runs only when the user names it, never by itself; "" if it may be chosen.
    """

    name: str
    unsupported_reasons: Callable[[Call], list[str]]
    availability: Callable[[], Sequence[str]] = tuple
    takes_stacks: bool = False
    composite: Callable[..., tuple[Tensor, ...]] | None = None
    forward: Callable[..., Sequence[Tensor]] | None = None
    backward: Callable[..., Gradients] | None = None
    saved_shape: Callable[..., tuple[int, ...]] = _nothing
    prepare: Callable[[Call], Callable[[Layout], Callable[..., Tensor]]] | None = None
    layout: Callable[[], str] = str
    flops: Callable[[], Mapping[Any, Callable[..., int]]] = dict
    checks: str = ""
    slower_reasons: Callable[[Call], list[str]] = _no_reasons
    slower_in_graph: Callable[[Call], list[str]] | None = None
    leaves_to: str = "aten"
    only_named: str = ""


TRITON = Backend(
    "triton",
    triton.unsupported_reasons,
    triton.availability,
    forward=triton.forward,
    backward=triton.backward,
    saved_shape=triton.saved_shape,
    slower_reasons=triton.slower_reasons,
    slower_in_graph=triton.slower_in_graph,
    only_named="Triton's interpreter is for tests" if triton.is_interpreted() else "",
)
CPU = Backend(
    "cpu",
    cpu.unsupported_reasons,
    cpu.availability,
    takes_stacks=True,
    forward=cpu.forward,
    backward=cpu.backward,
    saved_shape=cpu.saved_shape,
    prepare=cpu.prepare,
    layout=cpu.layout,
    flops=cpu.flops,
    checks="all",
    slower_reasons=cpu.slower_reasons,
)
ATEN = Backend(
    "aten",
    aten.unsupported_reasons,
    takes_stacks=True,
    composite=aten.forward,
    checks="steps",
)
FUSED = Backend(
    "fused",
    fused.unsupported_reasons,
    cpu.availability,
    composite=fused.forward,
    slower_reasons=fused.slower_reasons,
    leaves_to="reference",
)
REFERENCE = Backend("reference", reference.unsupported_reasons, composite=reference.forward)

BACKENDS = (TRITON, CPU, ATEN, FUSED, REFERENCE)  # the first that fits
_AUTOMATIC = tuple(candidate for candidate in BACKENDS if not candidate.only_named)
_ON_CPU = tuple(candidate for candidate in _AUTOMATIC if candidate is not TRITON)  # a step's choice must be quick
BY_NAME = {candidate.name: candidate for candidate in BACKENDS}


# "The first that fits", as a traced graph says it. Compilers keep graphs on disk, with the choice made when they were
# traced: one that was traced without the compiled operators must not be found by an installation that has them.
_INSTALLED = {TRITON: triton.is_installed(), CPU: cpu.is_installed(), FUSED: cpu.is_installed()}
AUTOMATIC = "first of " + ", ".join(each.name for each in _AUTOMATIC if _INSTALLED.get(each, True))


def _known(name: str, source: str) -> str:
    if name and name not in BY_NAME:
        raise ValueError(f"{source}: expected one of {', '.join(BY_NAME)}, got {name!r}")
    return name


_known(scope.named, "TIDEGATE_BACKEND")


@contextlib.contextmanager
def backend(name: str | None) -> Generator[None]:
    """Run every call of this thread inside the block on one backend; None gives the choice back to tidegate.

    A compiled model is compiled anew where the name differs from the one that it was compiled under.

    Raises:
        ValueError: no backend has this name.
        UnsupportedError: inside the block, on a call that the named backend cannot run. It never falls back.
    """
    before, scope.named = scope.named, _known(name or "", "name")
    try:
        yield
    finally:
        scope.named = before


@contextlib.contextmanager
def trace() -> Generator[list[Ran]]:
    """Note what runs: which backend each recurrent call of this thread went to, and each backward.

    Calls inside a compiled graph are noted when they run, layer by layer.

    Yields:
        a list that grows by a `Ran` for each, in order.
    """
    before, scope.trace = scope.trace, []
    try:
        yield scope.trace
    finally:
        scope.trace = before


def demanded(name: str) -> str:
    """The backend that an operator's argument demands; "" if it leaves the choice."""
    return "" if name.startswith("first of ") else name


def select(call: Call, name: str, in_graph: bool = False) -> Backend:
    """The backend called `name`, or the first that can run `call` and is not known to be slower than another.

    Args:
        in_graph: the call is one layer and runs as a registered operator.

    Raises:
        UnsupportedError: the named one cannot; the message lists its reasons and what would run.
    """
    if name:
        chosen = BY_NAME[name]
        if chosen.unsupported_reasons(call):
            raise UnsupportedError(_refusal(call, name))
        return chosen
    # By sizes that are not known nothing is chosen: a graph would hold for the sizes alone for which the choice does.
    is_known = type(call.input) is Tensor or call.has_known_sizes()
    for candidate in _ON_CPU if call.input.is_cpu else _AUTOMATIC:
        if candidate.unsupported_reasons(call):
            continue
        slower = (in_graph and candidate.slower_in_graph) or candidate.slower_reasons
        if is_known and slower(call) and not BY_NAME[candidate.leaves_to].unsupported_reasons(call):
            return BY_NAME[candidate.leaves_to]
        if candidate is CPU:
            return candidate
        if call.input.is_cpu:
            _tell_what_is_missing()
        if candidate is REFERENCE and call.input.is_cuda and call.steps > 1:
            _tell_of_loop(call.cell.name, tuple(f"{name}: {why[0]}" for name, why in reasons(call).items() if why))
        return candidate
    raise UnsupportedError("; ".join(call.inference_reasons()) or _refusal(call, name))


def select_for_operator(layer: Layer, name: str) -> Backend:
    """What runs a layer as a registered operator, whose argument `name` is."""
    return select(layer.call(), demanded(name), in_graph=True)


def leaves_step(cell: str, rows: int, hidden_size: int) -> bool:
    """Whether `select` would leave a float32 step on the CPU to torch, for who asks before there is a call."""
    return not CPU.availability() and bool(cpu.many_rows_reasons(cell, rows, hidden_size))


LEAVES_UNITS = cpu.LARGE  # hidden_size from which it may leave a sequence on the CPU to torch


def leaves_sequence(
    cell: Cell, options: tuple[Any, ...], steps: int, rows: int, hidden_size: int, cells: int, input: Tensor
) -> bool:
    """The same of a sequence, by torch.nn's equations, without lengths, resets, projections and dropout, on a CPU
    without gradients.

    Args:
        cells: layers times directions.
        input: of which dtype and device are read.
    """
    if input.is_cpu:
        is_known = input.dtype is torch.float32 and not CPU.availability()
        return is_known and bool(cpu.few_steps_reasons(cell.name, steps, rows, hidden_size))
    return triton.leaves(cell, options, steps, rows, hidden_size, cells, input)


def _reasons_to_leave(candidate: Backend, call: Call) -> list[str]:
    slower = candidate.slower_reasons(call)
    return slower if slower and not BY_NAME[candidate.leaves_to].unsupported_reasons(call) else []


@functools.cache
def _tell_what_is_missing() -> None:
    """Once: that the compiled operators are not here, so that nobody wonders where the speed is."""
    for reason in CPU.availability():
        warnings.warn(f"tidegate: {reason}. Until then torch's own operators run.", RuntimeWarning, stacklevel=2)


@functools.cache
def _tell_of_loop(cell: str, why: tuple[str, ...]) -> None:
    """Once for each set of reasons: that a GPU runs a Python loop, and what would be faster."""
    text = f"tidegate: a Python loop over the steps runs this {cell} on a GPU, since no kernel can: {'; '.join(why)}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def reasons(call: Call) -> dict[str, list[str]]:
    """Every backend's reasons, in order of preference: what it cannot run, else why it is not chosen."""
    return {candidate.name: _reasons(candidate, call) for candidate in BACKENDS}


def _reasons(candidate: Backend, call: Call) -> list[str]:
    unsupported = candidate.unsupported_reasons(call)
    if unsupported or scope.named == candidate.name:
        return unsupported
    if candidate.only_named:
        return [f"it runs only when named, as in tidegate.backend({candidate.name!r}): {candidate.only_named}"]
    return _reasons_to_leave(candidate, call)


def describe(call: Unit) -> str:
    """A call in one line: gru(T=50, B=8, I=64, H=256, float32, cpu)."""
    call = call.call() if isinstance(call, Layer) else call
    sizes = call.sizes()
    words = [f"T={call.steps}", f"B={call.batch()}", f"I={call.input.shape[-1]}", f"H={sizes['H']}"]
    words += [f"layers={call.layers}"] * (call.layers > 1)
    words += [str(call.input.dtype).removeprefix("torch."), str(call.input.device)]
    options = call.named_options()
    words += [f"{name}={value}" for name, value in options.items() if value != call.cell.options[name][1]]
    words += [name for name in ("lengths", "resets") if getattr(call, name) is not None]
    words += ["reverse", "bidirectional"][call.direction - 1 : call.direction] if call.direction else []
    return f"{call.cell.name}({', '.join(words)})"


def _refusal(call: Call, name: str) -> str:
    lines = [f"no backend{f' named {name!r}' if name else ''} runs {describe(call)}"]
    for candidate, why in reasons(call).items():
        if why:
            lines.append(f"  {candidate}: {'; '.join(why)}")
        elif candidate != name:
            lines.append(f"  {candidate} would run it")
    return "\n".join(lines)


def _note(chosen: Backend, what: str, call: Unit) -> None:
    if scope.trace is not None:
        scope.trace.append(Ran(chosen.name, what, describe(call), int(chosen is CPU)))


def run_forward(chosen: Backend, call: Call, save: bool) -> Sequence[Tensor]:
    """`Backend.forward` of one that takes stacks, or of a call that is one layer and is not to be saved."""
    if scope.trace is not None:
        _note(chosen, "forward", call)
    assert chosen.forward is not None
    return chosen.forward(call, save)


def run(chosen: Backend, call: Call) -> Sequence[Tensor]:
    """A call on a backend that takes stacks, with nothing recorded."""
    if chosen.composite is not None:
        return run_composite(chosen, call)
    if scope.trace is not None:
        _note(chosen, "forward", call)
    assert chosen.forward is not None
    return chosen.forward(call)


def run_composite(chosen: Backend, call: Unit) -> tuple[Tensor, ...]:
    """`Backend.composite`, recorded by autograd where that records: of a call, or of what it takes."""
    if isinstance(call, Call) and not chosen.takes_stacks:
        return layer_by_layer(call, lambda layer: run_composite(chosen, layer))
    if scope.trace is not None:
        _note(chosen, "forward", call)
    assert chosen.composite is not None
    return chosen.composite(call)


def run_composite_layer(chosen: Backend, layer: Layer) -> tuple[Tensor, ...]:
    """`run_composite` of one layer: output and final states (B, .)."""
    _note(chosen, "forward", layer)
    return _composite_layer(chosen, layer)


def _composite_layer(chosen: Backend, layer: Layer) -> tuple[Tensor, ...]:
    assert chosen.composite is not None
    if not chosen.takes_stacks:
        return chosen.composite(layer)
    output, *finals = chosen.composite(layer.call())
    return (output, *(final.squeeze(0) for final in finals))


def run_layer(chosen: Backend, layer: Layer, save: bool) -> tuple[Tensor, ...]:
    """One layer on any backend, nothing recorded, nothing aliased: output, final states, saved."""
    _note(chosen, "forward", layer)
    if chosen.composite is not None:
        with torch.no_grad():
            outputs = _composite_layer(chosen, layer)
        return (*_owned(outputs, layer.tensors), layer.input.new_empty(0))
    assert chosen.forward is not None
    if not chosen.takes_stacks:
        return tuple(chosen.forward(layer, save))
    output, *finals = chosen.forward(layer.call(), save)
    saved = finals.pop() if save else layer.input.new_empty(0)
    return (output, *(final.squeeze(0) for final in finals), saved)


def saved_shape(chosen: Backend, layer: Layer) -> tuple[int, ...]:
    """Of what `run_layer` saves."""
    return chosen.saved_shape(layer.call() if chosen.takes_stacks else layer)


def run_layer_backward(
    chosen: Backend, layer: Layer, output: Tensor, saved: Tensor, gradients: Gradients, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients of `layer.tensors`, None where not needed.

    Args:
        gradients: of output and final states, None for zeros.
    """
    _note(chosen, "backward", layer)
    _refuse_sparse_gradients(layer, gradients)
    if chosen.composite is not None:
        with dispatch.recording():
            recorded, wanted = detached(layer, needs)
            found = graph_gradients(_composite_layer(chosen, recorded), wanted, gradients, needs)
        return _owned(found, (*layer.tensors, *gradients))
    assert chosen.backward is not None
    if not chosen.takes_stacks:
        return chosen.backward(layer, output, saved, gradients, needs)
    of_output, *of_states = gradients
    whole = (of_output, *(None if grad is None else grad.unsqueeze(0) for grad in of_states))
    found = chosen.backward(layer.call(), (saved,), whole, needs, False)
    states = slice(1, 1 + len(layer.states))
    squeezed = tuple(None if grad is None else grad.squeeze(0) for grad in found[states])
    return (*found[: states.start], *squeezed, *found[states.stop :])


def run_backward(
    chosen: Backend, call: Call, saved: Sequence[Tensor], gradients: Gradients, needs: tuple[bool, ...], overwrite: bool
) -> Gradients:
    """`Backend.backward` of one that takes stacks."""
    _note(chosen, "backward", call)
    assert chosen.backward is not None
    try:
        return chosen.backward(call, saved, gradients, needs, overwrite)
    except RuntimeError:
        _refuse_sparse_gradients(call, gradients)
        raise


def _refuse_sparse_gradients(call: Unit, gradients: Gradients) -> None:
    names = ["grad_output", *(f"grad_{state}_n" for state in call.cell.states)]
    if isinstance(call, Call) and call.is_step:
        del names[0]  # of a step that opens its gate, the last has none
    refuse_sparse(zip(names, gradients, strict=False))


def find_faults(call: Call) -> None:
    """Raise what is wrong with a call, in our own words.

    Raises:
        ValueError: names each argument.
    """
    check(call)
    check_lengths(call.lengths, call.steps)


def _owned(results: Sequence[T], arguments: Sequence[Tensor | None]) -> tuple[T, ...]:
    """An operator's results: contiguous, and sharing memory neither with its arguments nor with one another."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in arguments if tensor is not None}
    owned: list[T] = []
    for result in results:
        if result is not None:
            result = result.contiguous()
            if result.untyped_storage().data_ptr() in taken:
                result = result.clone()
            taken.add(result.untyped_storage().data_ptr())
        owned.append(result)
    return tuple(owned)
