# SPDX-License-Identifier: Apache-2.0
"""torch's own recurrent operators, oneDNN's and cuDNN's among them, for the calls that they can run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidegate.cells import LSTM, RNN, Call, States, extensions


def unsupported_reasons(call: Call) -> list[str]:
    reasons = extensions(call)
    if call.resets is not None:
        reasons.append("torch's operators cannot reset a state in mid-sequence")
    if not call.options.get("reset_after", True):
        reasons.append("torch's GRU applies the reset after the matmul: reset_after=False is not among its forms")
    if call.lengths is not None and call.lengths.device.type != "cpu":
        reasons.append(f"lengths are on {call.lengths.device}: torch packs from lengths on the cpu")
    if call.input.shape[0] == 0:
        reasons.append("torch's operators need at least one step")
    projection = call.weights.get("weight_hr")
    if projection is not None and projection.shape[0] == projection.shape[1]:
        reasons.append("torch's LSTM knows a projection by its giving fewer features than hidden_size")
    if (call.weights["bias_ih"] is None) != (call.weights["bias_hh"] is None):
        reasons.append("torch's operators take both biases or none")
    return reasons


def forward(call: Call) -> tuple[Tensor, ...]:
    """Run `call`, recording autograd as torch's operators do."""
    if call.lengths is not None:
        return _packed(call)
    if call.input.shape[0] == 1 and call.weights.get("weight_hr") is None:
        return _cell(call)
    input = call.input.flip(0) if call.reverse else call.input
    output, *states = _operator(call, (input,), call.states, (False,))
    return (output.flip(0) if call.reverse else output, *states)


def _operator(call: Call, data: tuple[Any, ...], states: States, layout: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """torch's operator, one layer in one direction. data is (input,), or (packed data, batch sizes) with no layout."""
    weights = [weight for weight in call.weights.values() if weight is not None]
    has_biases = call.weights["bias_ih"] is not None
    hidden = [state.unsqueeze(0) for state in states]
    operators: dict[str, Any] = {"gru": torch.gru, "lstm": torch.lstm, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}
    operator = operators[call.options.get("nonlinearity", call.cell.name)]
    # cuDNN computes gradients in training mode alone; without dropout the results are the same.
    settings = (weights, has_biases, 1, 0.0, torch.is_grad_enabled(), False, *layout)
    output, *finals = operator(*data, hidden if call.cell is LSTM else hidden[0], *settings)
    return (output, *(final.squeeze(0) for final in finals))


def _cell(call: Call) -> tuple[Tensor, ...]:
    weights = [call.weights[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    input = call.input[0]
    if call.cell is LSTM:
        states = torch.lstm_cell(input, call.states, *weights)
    elif call.cell is RNN:
        operator = torch.rnn_tanh_cell if call.options["nonlinearity"] == "tanh" else torch.rnn_relu_cell
        states = (operator(input, call.states[0], *weights),)
    else:
        states = (torch.gru_cell(input, call.states[0], *weights),)
    # A copy: who zeroes h_n in place must not change the output.
    return (states[0].unsqueeze(0).clone(), *states)


def _packed(call: Call) -> tuple[Tensor, ...]:
    """Pack the valid steps, longest row first, each row from its end in reverse; unpack what comes back."""
    assert call.lengths is not None
    steps, batch = call.input.shape[:2]
    lengths, order = torch.sort(call.lengths.cpu(), descending=True, stable=True)
    live = int((lengths > 0).sum())
    step, row = torch.nonzero(torch.arange(steps).unsqueeze(-1) < lengths, as_tuple=True)
    time = lengths[row] - 1 - step if call.reverse else step
    position = (time * batch + order[row]).to(call.input.device)  # of each packed step in (T * B)
    rows = order[:live].to(call.input.device)
    if live == 0:
        return call.without_steps()
    data = call.input.flatten(0, 1).index_select(0, position)
    batch_sizes = torch.bincount(step)
    initial = tuple(state.index_select(0, rows) for state in call.states)
    packed, *finals = _operator(call, (data, batch_sizes), initial, ())
    output = packed.new_zeros((steps * batch, packed.shape[-1])).index_copy(0, position, packed)
    states = (state.index_copy(0, rows, final) for state, final in zip(call.states, finals, strict=True))
    return (output.unflatten(0, (steps, batch)), *states)
