# SPDX-License-Identifier: Apache-2.0
"""The ways to run one cell over a sequence, and the one call that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tidegate
from tidegate.cli.bench.candidates import Call
from tidegate.cli.bench.cells.load import Subject
from tidegate.nn import over_time

YARDSTICK = "tg.LSTM"


def loop(step: Callable[..., Any], inputs: Any, state: Any) -> Any:
    """The outputs of a cell in a Python loop, as its author would write it."""
    leaves, structure = pytree.tree_flatten(inputs)
    steps = zip(*(leaf.unbind() for leaf in leaves), strict=True)
    frames = [pytree.tree_unflatten(list(frame), structure) for frame in steps]
    split: Callable[[Any], tuple[Any, Any]] | None = None
    outputs: list[Any] = []
    for frame in frames:
        made = step(frame, state)
        split = split or _splitter(made, state)
        y, state = split(made)
        outputs.append(y)
    return pytree.tree_map(_stacked, *outputs)


def _splitter(result: Any, state: Any) -> Callable[[Any], tuple[Any, Any]]:
    """How a cell's results are read as (y_t, state)."""
    structure = pytree.tree_structure(state)
    if pytree.tree_structure(result) == structure:
        return (lambda made: (made, made)) if isinstance(result, Tensor) else lambda made: (made[0], made)
    if pytree.tree_structure(result[1]) == structure:
        return lambda made: made
    return lambda made: (made[1], made[0])


def _stacked(*steps: Tensor) -> Tensor:
    return torch.stack(steps)


def fused(step: Callable[..., Any], inputs: Any, state: Any) -> Any:
    return over_time.run(step, inputs, state, fuse=True)[0]


def build_contenders(subject: Subject, mode: str, compiled: bool) -> dict[str, Call]:
    """By name; the first call of the compiled loop takes long, minutes where the compiler's cache has nothing of it."""
    calls = {
        "loop": build_call(partial(loop, subject.cell), subject, mode),
        "fused": build_call(partial(fused, subject.cell), subject, mode),
    }
    if compiled:
        torch.compiler.reset()  # it stops to compile a function that it met in several shapes and modes
        step = torch.compile(subject.cell)
        if mode == "train":  # the first step is then as the others are, and one graph is enough
            subject = replace(subject, state=pytree.tree_map(_recorded, subject.state))
        calls["compiled loop"] = build_call(partial(loop, step), subject, mode)
    return calls


def _recorded(state: Tensor) -> Tensor:
    return state.clone().requires_grad_()


def build_yardstick(subject: Subject, hidden_size: int, mode: str) -> Call:
    """The hand-written LSTM over the same input."""
    x: Tensor = pytree.tree_leaves(subject.inputs)[0]
    lstm = tidegate.LSTM(x.shape[-1], hidden_size).to(x.dtype)

    def run(inputs: Any, state: Any) -> Tensor:
        return lstm(inputs)[0]

    return build_call(run, Subject(YARDSTICK, lstm, x, ()), mode)


def build_call(run: Callable[[Any, Any], Any], subject: Subject, mode: str) -> Call:
    """What is timed. It returns the outputs; in training then the gradients of input and parameters."""
    floats = [leaf for leaf in pytree.tree_leaves(subject.inputs) if leaf.is_floating_point()]
    first: Tensor = floats[0]

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return pytree.tree_leaves(run(subject.inputs, subject.state))

    parameters = [parameter for parameter in subject.parameters if parameter.requires_grad]

    def train() -> list[Tensor]:
        outputs: list[Tensor] = pytree.tree_leaves(run(subject.inputs, subject.state))
        loss = torch.stack([output.sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, [first, *parameters], materialize_grads=True)
        return [*(output.detach() for output in outputs), *gradients]

    if mode == "train":
        first.requires_grad_()
    return train if mode == "train" else infer
