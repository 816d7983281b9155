# SPDX-License-Identifier: Apache-2.0
"""The backends in order of preference, what each cannot run, and the choice among them."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tidegate import dispatch, reference
from tidegate.cells import Call
from tidegate.checks import check, check_lengths
from tidegate.errors import UnsupportedError
from tidegate.kernels import aten, cpu, triton

Gradients = tuple["Tensor | None", ...]
Backward = Callable[[Call, Tensor, Tensor, "Tensor | None", Gradients, "tuple[bool, ...]", bool], Gradients]
T = TypeVar("T", Tensor, "Tensor | None")


class ShortWay(NamedTuple):
    """How a call that is plainly right runs at once. To any other it answers nothing: whoever asks goes the long way
    then, which names what is wrong.

    Attributes:
        step: `(cell, options, input, states, weights) -> new states`: a cell's step. Input (B, I) or (I,), states
            (B, H) or (H,). `options` are values in the cell's order; `states` is what the user gave, empty for zeros;
            `weights` are weight_ih, weight_hh and the biases, None for absent ones.
        layers: `(cell, options, input, states, weights, form) -> (output, *final states)`: all layers and directions.
            Input (T, B, I), with batch_first (B, T, I), or (T, I); states (L*D, B, .) or (L*D, .); `weights` in
            torch.nn's flat order; `form` a `cells.Form`.
    """

    step: Callable[..., Sequence[Tensor]]
    layers: Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Backend:
    """One way to run a call.

    Attributes:
        name: what `tidegate.backend` takes.
        availability: reasons why this machine cannot run it at all; empty when it can.
        unsupported_reasons: reasons why it cannot run a call; pure, never raises. It alone steers the choice.
        forward: `(call, save) -> (output, *final states, saved)`, not recording autograd; `saved` is one tensor for
            `backward`, of shape `saved_shape(call)`, empty where `save` is False.
        backward: `(call, output, saved, grad_output, grad_states, needs, overwrite) -> gradients`, in the order of
            `Call.tensors`, None where `needs` is False. Where `overwrite`, nobody reads `saved` afterwards.
        saved_shape: from shapes alone.
        checks: it refuses by itself what `checks.check` would, so that a plain call need not be looked at twice.
        prepare_step: `one-step calls of a stack of layers -> step(input (B, I), *states (L, B, .)) -> output`, the
            weights laid out once, the states replaced in place, all or none; None where `run_forward` is as quick.
        short: `ShortWay` without gradients, if it has one.
        recorded_forward: `(cell, options, form, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh) -> results`: a
            cell's step, where `form` is None, or one layer in one direction, in `ShortWay`'s forms, but what is absent
            is None. Results: output, of a cell (1, B, H); the new states; `saved` for `backward`; then, for absent
            states, the zeros in their place. `backward` takes all of them as (T, B, .) and (B, .).
        recorded_backward: `(cell, options, form, tensors, output, saved, gradients, needs, overwrite) -> gradients` of
            that call's tensors, input, states and weights, in its own forms; nothing where `backward` has to do it.
        composite: `call -> (output, *final states)` in torch's operations, recording autograd. A backend has this, or
            `forward`, `backward` and `saved_shape`.
        slower_reasons: why it leaves a call that it can run to the next backend that can, unless it is named; pure.
        only_named: why it runs only when the user names it, never by itself; "" if it may be chosen.
    """

    name: str
    unsupported_reasons: Callable[[Call], list[str]]
    availability: Callable[[], list[str]] = list
    composite: Callable[[Call], tuple[Tensor, ...]] | None = None
    forward: Callable[[Call, bool], tuple[Tensor, ...]] | None = None
    backward: Backward | None = None
    saved_shape: Callable[[Call], tuple[int, ...]] = lambda call: (0,)
    prepare_step: Callable[[Sequence[Call]], Callable[..., Tensor] | None] = lambda calls: None
    short: ShortWay | None = None
    recorded_forward: Callable[..., Sequence[Tensor]] | None = None
    recorded_backward: Callable[..., Gradients] | None = None
    checks: bool = False
    slower_reasons: Callable[[Call], list[str]] | None = None
    only_named: str = ""

    def choice_reasons(self, call: Call) -> list[str]:
        """Why `call` does not come here: what it cannot run, else that it has to be named and is not."""
        reasons = self.unsupported_reasons(call)
        if reasons or named() == self.name:
            return reasons
        if self.only_named:
            return [f"it runs only when named, as in tidegate.backend({self.name!r}): {self.only_named}"]
        return self.reasons_to_leave(call)

    def reasons_to_leave(self, call: Call) -> list[str]:
        """`slower_reasons`, if torch's operators can run the call."""
        slower = self.slower_reasons(call) if self.slower_reasons else []
        return slower if slower and not ATEN.unsupported_reasons(call) else []


TRITON = Backend(
    "triton",
    triton.unsupported_reasons,
    triton.availability,
    forward=triton.forward,
    backward=triton.backward,
    saved_shape=triton.saved_shape,
    only_named="no GPU has timed it yet",
)
CPU = Backend(
    "cpu",
    cpu.unsupported_reasons,
    cpu.availability,
    forward=cpu.forward,
    backward=cpu.backward,
    saved_shape=cpu.saved_shape,
    prepare_step=cpu.prepare_step,
    short=ShortWay(cpu.short_step, cpu.short_layers),
    recorded_forward=cpu.recorded_forward,
    recorded_backward=cpu.recorded_backward,
    slower_reasons=cpu.slower_reasons,
    checks=True,
)
ATEN = Backend("aten", aten.unsupported_reasons, composite=aten.forward)
REFERENCE = Backend("reference", reference.unsupported_reasons, composite=reference.forward)

BACKENDS = (TRITON, CPU, ATEN, REFERENCE)  # the first that fits
BY_NAME = {candidate.name: candidate for candidate in BACKENDS}


# "The first that fits", as a traced graph says it. Compilers keep graphs on disk, with the choice made when they were
# traced: one that was traced without the compiled operators must not be found by an installation that has them.
AUTOMATIC = "first of cpu, aten, reference" if cpu.is_installed() else "first of aten, reference"


def _known(name: str, source: str) -> str:
    if name and name not in BY_NAME:
        raise ValueError(f"{source}: expected one of {', '.join(BY_NAME)}, got {name!r}")
    return name


_named = _known(os.environ.get("TIDEGATE_BACKEND", ""), "TIDEGATE_BACKEND")


def named() -> str:
    """The backend that the user named, or "" for the first that fits."""
    return _named


@contextlib.contextmanager
def backend(name: str | None) -> Generator[None]:
    """Run every call inside the block on one backend; None gives the choice back to tidegate.

    Like torch.backends' flags, this belongs to the process, not to a thread. A compiled model is compiled anew where
    the name differs from the one that it was compiled under.

    Raises:
        ValueError: no backend has this name.
        UnsupportedError: inside the block, on a call that the named backend cannot run. It never falls back.
    """
    global _named
    before, _named = _named, _known(name or "", "name")
    try:
        yield
    finally:
        _named = before


def select(call: Call, name: str) -> Backend:
    """The backend called `name`, or the first that can run `call`.

    Raises:
        UnsupportedError: the named one cannot; the message lists its reasons and what would run.
    """
    name = demanded(name)
    for candidate in BACKENDS:
        may = candidate.name == name if name else not candidate.only_named
        if may and not candidate.unsupported_reasons(call) and (name or not candidate.reasons_to_leave(call)):
            if candidate is not CPU and not name and call.input.is_cpu:
                _tell_what_is_missing()
            return candidate
    raise UnsupportedError(_refusal(call, name))


def short() -> Backend:
    """The backend whose `short` or `recorded_forward` is asked: the one that the user named, else the compiled one."""
    return BY_NAME[_named] if _named else CPU


def demanded(name: str) -> str:
    """The backend that an operator's argument demands; "" if it leaves the choice."""
    return "" if name.startswith("first of ") else name


@functools.cache
def _tell_what_is_missing() -> None:
    """Once: that the compiled operators are not here, so that nobody wonders where the speed is."""
    for reason in CPU.availability():
        warnings.warn(f"tidegate: {reason}. Until then torch's own operators run.", RuntimeWarning, stacklevel=2)


def reasons(call: Call) -> dict[str, list[str]]:
    """Every backend's reasons, in order of preference."""
    return {candidate.name: candidate.choice_reasons(call) for candidate in BACKENDS}


def describe(call: Call) -> str:
    """A call in one line: gru(T=50, B=8, I=64, H=256, float32, cpu)."""
    steps, batch, input_size = call.input.shape
    dtype = str(call.input.dtype).removeprefix("torch.")
    words = [f"T={steps}", f"B={batch}", f"I={input_size}", f"H={call.hidden_size}", dtype, str(call.input.device)]
    words += [f"{option}={value}" for option, value in call.options.items() if value != call.cell.options[option][1]]
    words += [name for name in ("lengths", "resets") if getattr(call, name) is not None]
    return f"{call.cell.name}({', '.join(words + ['reverse'] * call.reverse)})"


def _refusal(call: Call, name: str) -> str:
    lines = [f"no backend{f' named {name!r}' if name else ''} runs {describe(call)}"]
    for candidate, why in reasons(call).items():
        if why:
            lines.append(f"  {candidate}: {'; '.join(why)}")
        elif candidate != name:
            lines.append(f"  {candidate} would run it")
    return "\n".join(lines)


def run_forward(backend: Backend, call: Call, save: bool) -> tuple[Tensor, ...]:
    """`Backend.forward`, or its stand-in for a composite backend: nothing recorded, nothing saved, nothing aliased."""
    if backend.forward is not None:
        try:
            return backend.forward(call, save)
        except RuntimeError:
            # A kernel that checks refuses at the first fault, in its own words: name them all in ours, if it is one.
            check(call)
            check_lengths(call.lengths, call.input.shape[0])
            raise
    assert backend.composite is not None
    with torch.no_grad():
        outputs = backend.composite(call)
    return (*_owned(outputs, call.tensors), call.input.new_empty(0))


def run_stack(
    chosen: Sequence[Backend], calls: Sequence[Call], input: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Layers on top of one another over input (T, B, I), from states (L, B, .); no autograd.

    Returns:
        the last layer's output (T, B, P) and the final states.
    """
    finals: list[tuple[Tensor, ...]] = []
    for k, (candidate, call) in enumerate(zip(chosen, calls, strict=True)):
        call = call._replace(input=input, states=tuple(state[k] for state in states))
        input, *last, _ = run_forward(candidate, call, save=False)
        finals.append(tuple(last))
    return (input, *(torch.stack(column) for column in zip(*finals, strict=True)))


def step_of_stack(chosen: Sequence[Backend], calls: Sequence[Call]) -> Callable[..., Tensor]:
    """`Backend.prepare_step`, or its stand-in for backends that have none."""
    prepared = chosen[0].prepare_step(calls) if all(candidate is chosen[0] for candidate in chosen) else None
    if prepared is not None:
        return prepared

    def step(input: Tensor, *states: Tensor) -> Tensor:
        rows = input if input.dim() == 2 else input.unsqueeze(0)
        output, *finals = run_stack(chosen, calls, rows.unsqueeze(0), states)
        for state, final in zip(states, finals, strict=True):
            state.copy_(final)
        return output[0] if rows is input else output[0, 0]

    return step


def run_backward(
    backend: Backend,
    call: Call,
    output: Tensor,
    saved: Tensor,
    grad_output: Tensor | None,
    grad_states: Gradients,
    needs: tuple[bool, ...],
    overwrite: bool = False,
) -> Gradients:
    """`Backend.backward`, or its stand-in for a composite backend: the forward again, this time recorded."""
    if backend.backward is not None:
        return backend.backward(call, output, saved, grad_output, grad_states, needs, overwrite)
    assert backend.composite is not None
    with dispatch.recording():
        recorded, wanted = detached(call, needs)
        gradients = graph_gradients(backend.composite(recorded), wanted, (grad_output, *grad_states), needs)
    return _owned(gradients, (*call.tensors, grad_output, *grad_states))


def _owned(results: tuple[T, ...], arguments: Sequence[Tensor | None]) -> tuple[T, ...]:
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


def detached(call: Call, needs: tuple[bool, ...]) -> tuple[Call, list[Tensor]]:
    """`call` on leaves of a graph of its own, and those of them that a gradient is needed of."""
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(call.tensors, needs, strict=True)
    ]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need]
    return call.with_tensors(leaves), wanted


def graph_gradients(
    outputs: tuple[Tensor, ...], wanted: list[Tensor], gradients: Gradients, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of the recorded `outputs` for the leaves in `wanted`, spread over the places that `needs` marks."""
    pairs = [
        (out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None and out.requires_grad
    ]
    if not pairs or not wanted:
        return (None,) * len(needs)
    roots, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, wanted, cotangents, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)
