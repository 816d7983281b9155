# SPDX-License-Identifier: Apache-2.0
"""A look inside: every gate, state and candidate over time, how far gradients reach back, and what it says.

Letters: T steps, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tidegate.call import Call, Layer, layer_by_layer
from tidegate.inspection.result import Inspection, LayerInspection
from tidegate.inspection.steps import look_at_cell, look_at_layer
from tidegate.nn.over_time import CellRun, Nest, name_of
from tidegate.scope import scope

__all__ = ["Inspection", "LayerInspection", "inspect"]


def inspect(module: Callable[..., Any], *args: object, directions: int = 64, **kwargs: object) -> Inspection:
    """Run `module(*args, **kwargs)` and note what happens inside every recurrent layer of tidegate's in it.

    It runs step by step, in plain torch operations, and so slowly: choose a few rows. Buffers are left as a call leaves
    them. Of a layer of tidegate's the names are the equations': r, z, n, h of a GRU; i, f, g, o, h, c of an LSTM; h of
    an RNN. Of any other cell in a `Recurrent` or `dynamic_rnn` they are those of the local variables of its forward,
    as they stand when it returns: whatever holds a row for each row of the batch. Of cells inside of a cell too, under
    their modules' names.

    Args:
        module: a layer, a `Recurrent`, or anything that contains some. torch.nn's layers are seen after `accelerate`.
        directions: how many of h_T's units are followed back at the most. All of them, if there are no more: then the
            reach is exact. Else it is estimated from so many random directions, 64 within about a tenth. 0: none.

    Returns:
        an Inspection: one LayerInspection for each layer and direction, in the order in which they run.

    Raises:
        ValueError: there was no recurrent layer to be seen, or no step or row for it.
        RuntimeError: in `torch.inference_mode()`, which records no gradients; `torch.no_grad()` is no hindrance.
    """
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"directions: expected 0 or more, got {directions!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inspect: expected to run outside of torch.inference_mode(), where gradients can be followed"
        )
    found: list[LayerInspection] = []

    def note(run: Call | CellRun) -> Any:
        scope.observer = None  # a cell's own calls are its step's
        try:
            return _cell(run) if isinstance(run, CellRun) else _call(run)
        finally:
            scope.observer = note

    def _call(call: Call) -> tuple[torch.Tensor, ...]:
        count, places = len(found), call.layers * call.directions()

        def look(layer: Layer) -> tuple[torch.Tensor, ...]:
            k = len(found) - count
            name = f"{call.cell.name}, layer {k // call.directions()}" if places > 1 else call.cell.name
            results, seen = look_at_layer(layer, name + ", reverse" * layer.reverse, directions)
            found.append(seen)
            return results

        return layer_by_layer(call, look)

    def _cell(run: CellRun) -> tuple[Nest, Nest]:
        results, seen = look_at_cell(run, name_of(run.cell) + ", reverse" * run.reverse, directions)
        found.append(seen)
        return results

    before, scope.observer = scope.observer, note
    try:
        result = module(*args, **kwargs)
    finally:
        scope.observer = before
    if not found:
        raise ValueError(
            "module: expected a recurrent layer of tidegate's in it, which its forward calls; torch.nn's are seen "
            "after tidegate.accelerate(module), a compiled module's before it is compiled"
        )
    return Inspection(tuple(found), result)
