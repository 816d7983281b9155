# SPDX-License-Identifier: Apache-2.0
"""The recurrence in plain torch operations: any device, any dtype, differentiable any number of times.

This is the oracle that every kernel is tested against, and the backend that runs what no kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.call import Call, Layer
from tidegate.cell import States


def unsupported_reasons(call: Call) -> list[str]:
    """Why it cannot run `call`; empty if it can. Never raises."""
    return call.inference_reasons()


def forward(layer: Layer) -> tuple[Tensor, ...]:
    """Run one layer in one direction, recording autograd.

    float16 and bfloat16 are computed in float32 and rounded once, at the end.

    Returns:
        output (T, B, P), 0 past each row's length, and the final states.
    """
    dtype = layer.input.dtype
    if dtype in (torch.float16, torch.bfloat16):
        output, *states = _scan(layer.to(torch.float32))
        return (output.to(dtype), *(state.to(dtype) for state in states))
    return _scan(layer)


def _scan(layer: Layer) -> tuple[Tensor, ...]:
    steps = layer.input.shape[0]
    valid = valid_steps(layer)
    fresh = _fresh_steps(layer, valid)
    # Padding may hold anything, and 0 * NaN is NaN in a weight's gradient.
    input = layer.input if valid is None else layer.input.masked_fill(~valid.unsqueeze(-1), 0)
    gates_x = layer.cell.gates_x(input, layer.weights)  # (T, B, G*H)
    states = layer.states
    outputs: list[Tensor] = []
    for t in reversed(range(steps)) if layer.reverse else range(steps):
        entering = states if fresh is None else _zero_where(fresh[t], states)
        stepped = layer.cell.step(gates_x[t], entering, layer.weights, layer.options)
        if valid is None:
            states = stepped
            outputs.append(stepped[0])
        else:
            keep = valid[t].unsqueeze(-1)
            states = tuple(torch.where(keep, new, old) for new, old in zip(stepped, states, strict=True))
            outputs.append(stepped[0].masked_fill(~keep, 0))
    if not outputs:
        return layer.without_steps()
    return (torch.stack(outputs[::-1] if layer.reverse else outputs), *states)


def valid_steps(layer: Layer) -> Tensor | None:
    """(T, B) bool, False past each row's length; None where every step is valid."""
    if layer.lengths is None:
        return None
    steps = torch.arange(layer.input.shape[0], device=layer.input.device)
    return steps.unsqueeze(-1) < layer.lengths.to(layer.input.device)


def _fresh_steps(layer: Layer, valid: Tensor | None) -> Tensor | None:
    """(T, B) bool: the state entering step t is zero, in the direction of `layer`."""
    if layer.resets is None or not layer.reverse:
        return layer.resets
    # In reverse, the state that leaves t + 1 enters t; a mark on padding separates nothing.
    resets = layer.resets if valid is None else layer.resets & valid
    return torch.cat((resets[1:], torch.zeros_like(resets[:1])))


def _zero_where(mask: Tensor, states: States) -> States:
    return tuple(state.masked_fill(mask.unsqueeze(-1), 0) for state in states)


def output_gate(call: Call) -> Tensor:
    """An LSTM's o in one step, in the form of its c'."""
    weights, h = call.weights_of(0), call.states[0]
    gates = linear(call.input, weights["weight_ih"], weights["bias_ih"])
    if h is not None:
        gates = gates + linear(h, weights["weight_hh"])
    if weights["bias_hh"] is not None:
        gates = gates + weights["bias_hh"]
    return gates.chunk(len(call.cell.gates), -1)[call.cell.gates.index("o")].sigmoid()
