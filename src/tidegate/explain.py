# SPDX-License-Identifier: Apache-2.0
"""Which backend would run a module's recurrent calls, and why not another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tidegate import backends
from tidegate.call import Call
from tidegate.scope import scope


@dataclass(frozen=True)
class CallExplanation:
    """One layer in one direction: the call in a line, the backend that would run it, the others' reasons."""

    call: str
    backend: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        why = [f"  {name}: {'; '.join(found)}" for name, found in self.reasons.items() if found]
        return "\n".join([f"{self.call}: {self.backend}", *why])


@dataclass(frozen=True)
class Explanation:
    """What `explain` found, call by call."""

    calls: tuple[CallExplanation, ...]

    @property
    def backend(self) -> str:
        """The backends that would run, in order of first use: usually one name."""
        return ", ".join(dict.fromkeys(call.backend for call in self.calls))

    def __str__(self) -> str:
        return "\n".join(str(call) for call in self.calls) or "no recurrent call of tidegate's"


def explain(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run each recurrent call of `module(*args, **kwargs)`, without running them.

    Args:
        module: a tidegate layer or cell, or anything that contains some; its forward is called, with zeros in place of
            every recurrent result, so that its hooks and statistics may see zeros.

    Raises:
        UnsupportedError: the backend that `tidegate.backend` names cannot run a call.
    """
    found: list[CallExplanation] = []

    def note(call: Call) -> tuple[Any, ...]:
        chosen = backends.select(call, scope.named)
        found.append(CallExplanation(backends.describe(call), chosen.name, backends.reasons(call)))
        return _zeros(call)

    before, scope.observer = scope.observer, note
    try:
        _uncompiled(module)(*args, **kwargs)
    finally:
        scope.observer = before
    return Explanation(tuple(found))


def _uncompiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given: a graph that is compiled already makes no calls that could be looked at."""
    found: Any = module
    return getattr(found, "_orig_mod", getattr(found, "_torchdynamo_orig_callable", found))


def _zeros(call: Call) -> tuple[Any, ...]:
    """The results of a call, zeros."""
    whole = call.time_major()
    states = [state for state in whole.states if state is not None]
    output = call.input.new_zeros((call.steps, call.batch, call.directions * states[0].shape[-1]))
    return call.restored(output, [state.new_zeros(state.shape) for state in states])
