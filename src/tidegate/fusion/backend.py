# SPDX-License-Identifier: Apache-2.0
"""The fused loop as a backend: every registered cell with all its options, by what `Cell.step` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidegate.call import Call, Layer
from tidegate.cell import Cell, Options
from tidegate.fusion.described import Described
from tidegate.fusion.plan import Plan
from tidegate.fusion.planning import DTYPES, planned
from tidegate.fusion.reading import read
from tidegate.kernels import cpu

# What `gates_x` has of the input: the step does not read it.
_OF_INPUT = ("weight_ih", "bias_ih")


class _Step(torch.nn.Module):
    """`Cell.step` as a module, with tensors of the weights' sizes in their place."""

    def __init__(self, cell: Cell, options: tuple[Any, ...], sizes: tuple[tuple[int, ...] | None, ...]) -> None:
        super().__init__()
        self.cell, self.options = cell, options
        for name, size in zip(cell.parameters, sizes, strict=True):
            self.register_buffer(name, None if size is None else torch.empty(size, device="meta"))

    def forward(self, gates_x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        options: Options = dict(zip(self.cell.options, self.options, strict=True))
        weights = {name: getattr(self, name) for name in self.cell.parameters}
        return self.cell.step(gates_x, states, weights, options)


# By the cell's name, which is its own, the options, the weights' sizes and the dtype.
_known: dict[tuple[Any, ...], Plan] = {}


def _made(cell: Cell, options: tuple[Any, ...], sizes: tuple[tuple[int, ...] | None, ...], dtype: torch.dtype) -> Plan:
    step = _Step(cell, options, sizes)
    for name, buffer in step.named_buffers():
        step.register_buffer(name, buffer.to(dtype))
    letters = cell.sizes(dict(step.named_buffers()) | {name: None for name, s in step._buffers.items() if s is None})
    gates = ((len(cell.gates) * letters["H"],), dtype)
    states = tuple([((letters[letter],), dtype) for letter in cell.states.values()])
    described = Described(0, (gates,), (0,) * len(states), states, False)
    return planned(step, read(step).settings, described)


def _plan_of(call: Call, weights: tuple[Tensor | None, ...]) -> Plan:
    sizes = tuple([
        None if weight is None or name in _OF_INPUT else tuple(weight.shape)
        for name, weight in zip(call.cell.parameters, weights, strict=True)
    ])  # fmt: skip
    key = (call.cell.name, call.options, sizes, call.input.dtype)
    if key not in _known:
        _known[key] = _made(call.cell, call.options, sizes, call.input.dtype)
    return _known[key]


def unsupported_reasons(call: Call) -> list[str]:
    """Why the fused loop cannot run `call`; empty if it can. Never raises."""
    reasons = list(cpu.availability())
    if call.cell.storage:
        reasons.append(f"its weights are {call.cell.storage}")
    if not call.input.is_cpu:
        reasons.append(f"input is on {call.input.device}")
    if call.input.dtype not in DTYPES:
        reasons.append(f"input is {str(call.input.dtype).removeprefix('torch.')}, not a floating dtype")
    if call.steps == 0 and not call.is_step:
        reasons.append("there is no step")
    if reasons:
        return reasons
    try:
        count = len(call.cell.parameters)
        return list(_plan_of(call, call.weights[:count]).reasons)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # sizes that do not fit
        return [f"its step cannot be traced: {error}"]


def slower_reasons(call: Call) -> list[str]:
    """A step or two: the loop costs more to begin than the reference's operations."""
    return ["so few steps are quicker in torch's operations"] if call.is_step or call.steps < 3 else []


def forward(layer: Layer) -> tuple[Tensor, ...]:
    """As `reference.forward`."""
    call = layer.call()
    plan = _plan_of(call, call.weights)
    input = layer.input
    if layer.lengths is not None:
        past = torch.arange(input.shape[0]).unsqueeze(-1) >= layer.lengths.cpu()
        # Padding may hold anything, and 0 * NaN is NaN in a weight's gradient.
        input = input.masked_fill(past.unsqueeze(-1), 0)
    gates_x = layer.cell.gates_x(input, layer.weights)
    tensors = [w for name, w in layer.weights.items() if w is not None and name not in _OF_INPUT]
    (output,), states = plan.run(tensors, [gates_x], layer.states, layer.lengths, layer.resets, layer.reverse)
    return (output, *states)
