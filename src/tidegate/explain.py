# SPDX-License-Identifier: Apache-2.0
"""What would run a module's recurrent calls, and why not something else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import backends, fusion
from tidegate.call import Call
from tidegate.nn import over_time
from tidegate.nn.dynamic import dynamic_rnn
from tidegate.nn.over_time import CellRun, Nest
from tidegate.scope import scope


@dataclass(frozen=True)
class CallExplanation:
    """One layer in one direction, or one cell over a sequence.

    Attributes:
        call: in a line, as `gru(T=50, B=8, I=64, H=256, float32, cpu)`, or `MyCell(T=50, B=8, float32, cpu)`.
        backend: what would run it: a backend's name; of a cell over a sequence "fused", one loop over all steps, or
            "step by step", the cell called at each of them.
        reasons: of each of the others, or of "fused" alone, all that speaks against it, with the line of the cell's
            code where there is one.
        program: the fused loop of a cell in its readable form; "" if there is none.
    """

    call: str
    backend: str
    reasons: dict[str, list[str]]
    program: str = ""

    def __str__(self) -> str:
        if self.reasons.keys() == {"fused"}:  # a cell over a sequence
            details = [f"not fused: {reason}" for reason in self.reasons["fused"]]
        else:
            details = [f"{name}: {'; '.join(found)}" for name, found in self.reasons.items() if found]
        if self.backend == "fused":
            details += self.program.splitlines()
        return "\n".join([f"{self.call}: {self.backend}", *(f"  {line}" for line in details)])


@dataclass(frozen=True)
class Explanation:
    """What `explain` found, call by call.

    Attributes:
        calls: in the order in which they are made. The calls inside a cell that runs step by step follow it, those of
            one step.
    """

    calls: tuple[CallExplanation, ...]

    @property
    def backend(self) -> str:
        """The backends that would run, in order of first use: usually one name."""
        return ", ".join(dict.fromkeys(call.backend for call in self.calls))

    def __str__(self) -> str:
        return "\n".join(str(call) for call in self.calls) or "no recurrent call of tidegate's"


def explain(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say what would run each recurrent call of `module(*args, **kwargs)`, without running them.

    Args:
        module: a tidegate layer or cell, or anything that contains some; its forward is called, with zeros in place of
            every recurrent result, so that its hooks and statistics may see zeros. Of a cell over a sequence one step
            is run, on zeros. A cell given a sequence, (B, T, ...), is explained as `dynamic_rnn(cell, ...)`; one that
            tells its state's size by `hidden_size` alone has to need two arguments to be known for a cell: of others
            ask `explain(dynamic_rnn, cell, ...)`.

    Raises:
        UnsupportedError: the backend that `tidegate.backend` names cannot run a call.
    """
    found: list[CallExplanation] = []

    def note(call: Call | CellRun) -> Any:
        if isinstance(call, CellRun):
            return _explain_cell(call, found)
        chosen = backends.select(call, scope.named)
        found.append(CallExplanation(backends.describe(call), chosen.name, backends.reasons(call)))
        return _zeros(call)

    called = _uncompiled(module)
    with _observed_by(note):
        if _is_cell_over_time(called, args):
            dynamic_rnn(called, *args, **kwargs)
        else:
            called(*args, **kwargs)
    return Explanation(tuple(found))


@contextmanager
def _observed_by(observer: Callable[[Any], Any] | None) -> Generator[None]:
    before, scope.observer = scope.observer, observer
    try:
        yield
    finally:
        scope.observer = before


def _explain_cell(run: CellRun, found: list[CallExplanation]) -> tuple[Nest, Nest]:
    """Note a cell over a sequence, and the calls of a step if it runs step by step; zeros for its results."""
    cell, inputs, state, fuse = run[:4]
    with _observed_by(None):  # of what is traced, and of a fused step, no call is made
        with torch.random.fork_rng(devices=[]):
            noise = over_time.draw_noise(cell, inputs, state)
        reasons, program = fusion.explain(cell, inputs, state, noise, fuse is True)
    reasons += ["fuse is False"] if fuse is False else []
    backend = "step by step" if reasons else "fused"
    found.append(CallExplanation(over_time.describe(cell, inputs, state), backend, {"fused": reasons}, program))
    with _observed_by(scope.observer if reasons else None):
        nothing = over_time.outputs_without_steps(cell, inputs, state, noise)
    steps = pytree.tree_leaves(inputs)[0].shape[0]
    outputs = over_time.mapped(lambda leaf: leaf.new_zeros((steps, *leaf.shape[1:])), nothing)
    return outputs, over_time.mapped(torch.zeros_like, state)


def _is_cell_over_time(module: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it is a cell, given a sequence and no step."""
    leaves = pytree.tree_leaves(args[0]) if args else []
    if not leaves or not isinstance(leaves[0], Tensor) or leaves[0].dim() < 3:
        return False
    if isinstance(module, torch.nn.RNNCellBase) or getattr(module, "state_size", None) is not None:
        return True
    return over_time.state_size(module) is not None and _needs_state(module)


def _needs_state(module: Callable[..., Any]) -> bool:
    taken = inspect.signature(getattr(module, "forward", module)).parameters.values()
    needed = [p for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) >= 2


def _uncompiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given: a graph that is compiled already makes no calls that could be looked at."""
    found: Any = module
    return getattr(found, "_orig_mod", getattr(found, "_torchdynamo_orig_callable", found))


def _zeros(call: Call) -> tuple[Any, ...]:
    """The results of a call, zeros."""
    whole = call.time_major()
    states = [state for state in whole.states if state is not None]
    output = call.input.new_zeros((call.steps, call.batch(), call.directions() * states[0].shape[-1]))
    return call.restored(output, [state.new_zeros(state.shape) for state in states])
