# SPDX-License-Identifier: Apache-2.0
"""Inputs that cells take by their names beside x_t and the state: the time since the step before, say."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch

from tidegate import dispatch

Nest: TypeAlias = Any  # a tensor, or any nest of tuples, lists and dicts of tensors

_EVERY = "**"
_known: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


class Named(torch.nn.Module):
    """A cell as one whose input is a pair: `((x_t, named_t), state) -> cell(x_t, state, **named_t)`.

    It is made anew for each call. What is kept for it is kept for the cell, `around`.
    """

    def __init__(self, around: Callable[..., Any]) -> None:
        super().__init__()
        self.around = around

    def forward(self, input: tuple[Nest, dict[str, Nest]], state: Nest, *noise: Nest) -> Any:
        x, named = input
        return self.around(x, state, *noise, **named)

    def draw_noise(self, inputs: tuple[Nest, Any], state: Nest) -> Nest | None:
        draw: Any = getattr(self.around, "draw_noise", None)
        return None if draw is None else draw(inputs[0], state)

    def __getattr__(self, name: str) -> Any:
        # How a cell tells its state's size.
        return getattr(self.around, name) if name in ("state_size", "hidden_size") else super().__getattr__(name)


class _InGraphs:
    """The wrappers that compiled graphs hold, each an attribute: a compiler takes no module that is made in a graph."""


_in_graphs = _InGraphs()


@dispatch.asked_once
def _name_in_graphs(cell: Callable[..., Any]) -> str:
    """Make a wrapper while a compiler looks, which asks once."""
    name = f"around_{id(cell)}"
    setattr(_in_graphs, name, Named(cell))
    return name


def outside_of_graph(function: Callable[..., Any], named: Mapping[str, Nest]) -> Callable[..., Any] | None:
    """What takes inputs by name, outside of the graph that torch.compile is making; None if it may be inside."""
    if dispatch.asked_of_modules or not named or not torch.compiler.is_compiling() or dispatch.is_exporting():
        return None
    reason = "tidegate: the compiler of torch before 2.12 cannot ask a cell for the names of its inputs"
    return torch.compiler.disable(function, reason=reason)


def give(cell: Callable[..., Any], x: Nest, named: Mapping[str, Nest]) -> tuple[Any, Nest]:
    """What runs over time, and on what inputs: of `named` what the cell takes beside x."""
    taken = names_of(cell) if named else ()
    own = {name: value for name, value in named.items() if name in taken or _EVERY in taken}
    if not own:
        return cell, x
    return getattr(_in_graphs, _name_in_graphs(cell)) if torch.compiler.is_compiling() else Named(cell), (x, own)


def check(cells: Iterable[Any], named: Mapping[str, Nest]) -> None:
    """Every name is an input of some cell.

    Raises:
        TypeError: one is not.
    """
    taken = [name for cell in cells for name in names_of(cell)] if named else []
    for name in named:
        if name not in taken and _EVERY not in taken:
            what = f"they take {', '.join(dict.fromkeys(taken))}" if taken else "they take x_t and the state alone"
            raise TypeError(f"{name}: expected an input that a cell takes by this name; {what}")


def names_of(cell: object) -> tuple[str, ...]:
    """What a cell takes beside x_t and the state; `**` for whatever there is."""
    if torch.compiler.is_compiling():
        return _read(cell)
    if cell not in _known:
        _known[cell] = _read(cell)
    return _known[cell]


@dispatch.asked_once
def _read(cell: Any) -> tuple[str, ...]:
    function = getattr(cell, "function", cell)  # that of a function as a module
    function = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = list(inspect.signature(function).parameters.values())
    first = 2 + hasattr(cell, "draw_noise")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return (_EVERY,)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        one.name for k, one in enumerate(parameters) if one.kind in named and (k >= first or one.kind is named[1])
    )
