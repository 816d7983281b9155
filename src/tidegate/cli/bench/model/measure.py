# SPDX-License-Identifier: Apache-2.0
"""A user's model and each recurrent module in it, timed before and after `tidegate.accelerate`, in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import tidegate
from tidegate.cli.bench.agreement import TOLERANCES, relative_difference
from tidegate.cli.bench.model.load import ModelError, Subject
from tidegate.cli.bench.model.record import record
from tidegate.cli.bench.model.values import floats_in
from tidegate.cli.bench.timing import Effort, TimeSlice, interleave, local_slice

SIDES: dict[str, Callable[[Module], Module]] = {"torch.nn": tidegate.restore, "tidegate": tidegate.accelerate}


@dataclass(frozen=True)
class Agreement:
    """How far the results are apart, in units of a tensor's largest value where that is above 1.

    Attributes:
        results: how many tensors were compared: outputs, in training also gradients.
        difference: of the accelerated model's from the model's.
        own: of the model's from its own, called twice under one seed.
        allowed: by the coarsest dtype that takes part.
    """

    results: int
    difference: float
    own: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= max(self.allowed, 2 * self.own)


@dataclass(frozen=True)
class ModuleResult:
    """One recurrent module: its place, what it ran, and the seconds of its calls in one call of the model."""

    name: str
    module: str
    swapped: bool
    why: str
    calls: int
    shapes: dict[str, int]
    seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.seconds["torch.nn"] / self.seconds["tidegate"]


@dataclass(frozen=True)
class ModelResult:
    """The model in one mode: seconds of one call of it with torch.nn's modules and with tidegate's, and its parts."""

    name: str
    mode: str
    seconds: dict[str, float]
    modules: list[ModuleResult]
    agreement: Agreement

    @property
    def ratio(self) -> float:
        return self.seconds["torch.nn"] / self.seconds["tidegate"]

    def share(self, side: str) -> float:
        """Of the model's time, spent in the modules that are swapped."""
        return (
            sum(module.seconds[side] for module in self.modules if module.swapped and module.calls) / self.seconds[side]
        )

    @property
    def limit(self) -> float | None:
        """Amdahl's: how many times as fast the model would be if the swapped modules took no time; None: no limit."""
        left = 1 - self.share("torch.nn")
        return 1 / left if left > 0 else None


def measure_model(subject: Subject, mode: str, effort: Effort, advance: Callable[[], None]) -> ModelResult:
    """Compare, then time; the model stays accelerated.

    Raises:
        ModelError: the model fails on its example, holds no recurrent module, or nothing in it can be trained.
    """
    model = subject.model.train(mode == "train")
    SIDES["torch.nn"](model)
    call = _build_call(subject, list(model.parameters()), mode)
    found = record(model, lambda: _checked(subject, call))
    if not found:
        raise ModelError(f"--model: {subject.name} holds no recurrent module: no RNN, LSTM, GRU or cell of torch.nn's")
    agreement = _compare(model, call)  # accelerates
    swapped = {entry.names for entry in tidegate.report(model).swapped}
    why = {entry.names: entry.why for entry in tidegate.report(model).entries}
    calls: dict[str, Callable[[], object]] = {"": call}
    for recurrent in found:
        if recurrent.calls:
            calls[recurrent.name] = _build_call(recurrent.run, recurrent.leaves(), mode)
    slices = {f"{side}/{name}": _on_side(model, side, one) for name, one in calls.items() for side in SIDES}
    seconds = interleave(slices, effort, advance)
    modules = [
        ModuleResult(
            recurrent.name,
            recurrent.entry.module,
            recurrent.entry.names in swapped,
            why[recurrent.entry.names],
            len(recurrent.calls),
            dict(recurrent.shapes),
            {side: seconds[f"{side}/{recurrent.name}"] for side in SIDES if recurrent.calls},
        )
        for recurrent in found
    ]
    return ModelResult(subject.name, mode, {side: seconds[f"{side}/"] for side in SIDES}, modules, agreement)


def _build_call(run: Callable[[], Any], leaves: list[Tensor], mode: str) -> Callable[[], list[Tensor]]:
    """What is timed. It returns the outputs; in training then the gradients of `leaves`, for the outputs' sum."""

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return floats_in(run())

    def train() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        outputs = floats_in(run())
        losses = [output.float().sum() for output in outputs if output.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return [output.detach() for output in outputs] + gradients

    return train if mode == "train" else infer


def _checked(subject: Subject, call: Callable[[], list[Tensor]]) -> None:
    """The first call: whatever is wrong with the model or its example shows here."""
    try:
        results = call()
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ModelError(f"--model: {subject.name} raised {line}") from error
    if not results:
        raise ModelError(f"--model: {subject.name} returned no floating-point tensor: there is nothing to compare")
    trained = any(parameter.grad is not None for parameter in subject.model.parameters())
    if subject.model.training and not trained:
        raise ModelError(f"--mode train: no output of {subject.name} asks for a gradient: nothing in it is trained")


def _compare(model: Module, call: Callable[[], list[Tensor]]) -> Agreement:
    def results() -> list[Tensor]:
        torch.manual_seed(0)
        return [result.clone() for result in call()]

    expected, again = results(), results()
    SIDES["tidegate"](model)
    found = results()
    dtypes = {result.dtype for result in expected} | {p.dtype for p in model.parameters() if p.is_floating_point()}
    allowed = max(TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES)
    return Agreement(len(expected), _apart(expected, found), _apart(expected, again), allowed)


def _apart(expected: list[Tensor], found: list[Tensor]) -> float:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    apart = [relative_difference(wanted, got) for wanted, got in zip(expected, found, strict=True)]
    return math.inf if any(map(math.isnan, apart)) else max(apart)


def _on_side(model: Module, side: str, call: Callable[[], object]) -> TimeSlice:
    """Swap, which takes no part in the time, then call."""
    run = local_slice(call)

    def timed(seconds: float) -> float:
        SIDES[side](model)
        return run(seconds)

    return timed


def describe_shapes(recurrent: ModuleResult) -> list[str]:
    """Each shape that it ran, with the number of calls where there are several."""
    return [f"{count} x {shape}" if count > 1 else shape for shape, count in recurrent.shapes.items()]
