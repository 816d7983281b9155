# SPDX-License-Identifier: Apache-2.0
"""The recurrence in plain torch operations: any device, any dtype, differentiable any number of times.

This is the oracle that every kernel is tested against, and the backend that runs what no kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells import Call, States


def unsupported_reasons(call: Call) -> list[str]:
    return []


def forward(call: Call) -> tuple[Tensor, ...]:
    """Run `call`, recording autograd. float16 and bfloat16 are computed in float32 and rounded once, at the end.

    Returns:
        output (T, B, P), 0 past each row's length, and the final states.
    """
    dtype = call.input.dtype
    if dtype in (torch.float16, torch.bfloat16):
        output, *states = _scan(call.to(torch.float32))
        return (output.to(dtype), *(state.to(dtype) for state in states))
    return _scan(call)


def _scan(call: Call) -> tuple[Tensor, ...]:
    steps = call.input.shape[0]
    valid = valid_steps(call)
    fresh = _fresh_steps(call, valid)
    # Padding may hold anything, and 0 * NaN is NaN in a weight's gradient.
    input = call.input if valid is None else call.input.masked_fill(~valid.unsqueeze(-1), 0)
    gates_x = linear(input, call.weights["weight_ih"], call.weights["bias_ih"])  # (T, B, G*H)
    states = call.states
    outputs: list[Tensor] = []
    for t in reversed(range(steps)) if call.reverse else range(steps):
        entering = states if fresh is None else _zero_where(fresh[t], states)
        stepped = call.cell.step(gates_x[t], entering, call.weights, call.options)
        if valid is None:
            states = stepped
            outputs.append(stepped[0])
        else:
            keep = valid[t].unsqueeze(-1)
            states = tuple(torch.where(keep, new, old) for new, old in zip(stepped, states, strict=True))
            outputs.append(stepped[0].masked_fill(~keep, 0))
    if not outputs:
        return call.without_steps()
    return (torch.stack(outputs[::-1] if call.reverse else outputs), *states)


def valid_steps(call: Call) -> Tensor | None:
    """(T, B) bool, False past each row's length; None where every step is valid."""
    if call.lengths is None:
        return None
    steps = torch.arange(call.input.shape[0], device=call.input.device)
    return steps.unsqueeze(-1) < call.lengths.to(call.input.device)


def _fresh_steps(call: Call, valid: Tensor | None) -> Tensor | None:
    """(T, B) bool: the state entering step t is zero, in the direction of `call`."""
    if call.resets is None or not call.reverse:
        return call.resets
    # In reverse, the state that leaves t + 1 enters t; a mark on padding separates nothing.
    resets = call.resets if valid is None else call.resets & valid
    return torch.cat((resets[1:], torch.zeros_like(resets[:1])))


def _zero_where(mask: Tensor, states: States) -> States:
    return tuple(state.masked_fill(mask.unsqueeze(-1), 0) for state in states)
