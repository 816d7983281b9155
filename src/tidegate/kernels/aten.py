# SPDX-License-Identifier: Apache-2.0
"""torch's own recurrent operators, oneDNN's and cuDNN's among them, for the calls that they can run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidegate.call import Call, Direction
from tidegate.cells import LSTM, RNN, extensions


def unsupported_reasons(call: Call) -> list[str]:
    """Why torch's operators cannot run `call`; empty if they can. Never raises."""
    reasons = extensions(call.cell, call.options, call.weights)
    if call.resets is not None:
        reasons.append("torch's operators cannot reset a state in mid-sequence")
    if call.named_options().get("reset_after", True) is False:
        reasons.append("torch's GRU applies the reset after the matmul: reset_after=False is not among its forms")
    if call.lengths is not None and call.lengths.device.type != "cpu":
        reasons.append(f"lengths are on {call.lengths.device}: torch packs from lengths on the cpu")
    if call.steps == 0:
        reasons.append("torch's operators need at least one step")
    first = call.weights_of(0)
    projection = first.get("weight_hr")
    if projection is not None and projection.shape[0] == projection.shape[1]:
        reasons.append("torch's LSTM knows a projection by its giving fewer features than hidden_size")
    if (first.get("bias_ih") is None) != (first.get("bias_hh") is None):
        reasons.append("torch's operators take both biases or none")
    return reasons


def forward(call: Call) -> tuple[Tensor, ...]:
    """Run `call`, all layers at once, recording autograd as torch's operators do."""
    whole = call.time_major()
    if call.is_step and call.weights_of(0).get("weight_hr") is None:
        return call.restored(whole.input, [state.unsqueeze(0) for state in _step(whole)])
    if call.lengths is not None:
        return call.restored(*_packed(whole, call.lengths))
    reverse = call.direction is Direction.REVERSE
    output, finals = _run(whole, (whole.input.flip(0) if reverse else whole.input,), _given(whole), (False,))
    return call.restored(output.flip(0) if reverse else output, finals)


def _given(call: Call) -> list[Tensor]:
    return [state for state in call.states if state is not None]


def _run(
    call: Call, data: tuple[Any, ...], states: list[Tensor], layout: tuple[Any, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's operator on all layers. data is (input,), or (packed data, batch sizes) with no layout."""
    weights = [weight for weight in call.weights if weight is not None]
    has_biases = call.weights_of(0)["bias_ih"] is not None
    operators: dict[str, Any] = {"gru": torch.gru, "lstm": torch.lstm, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}
    operator = operators[call.named_options().get("nonlinearity", call.cell.name)]
    # cuDNN computes gradients in training mode alone; without dropout the results are the same.
    settings = (has_biases, call.layers, 0.0, torch.is_grad_enabled(), call.direction is Direction.BOTH, *layout)
    output, *finals = operator(*data, states if call.cell is LSTM else states[0], weights, *settings)
    return output, tuple(finals)


def _step(call: Call) -> tuple[Tensor, ...]:
    weights = [call.weights_of(0)[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    input, states = call.input[0], [state[0] for state in _given(call)]
    if call.cell is LSTM:
        return torch.lstm_cell(input, states, *weights)
    if call.cell is RNN:
        operator = torch.rnn_tanh_cell if call.named_options()["nonlinearity"] == "tanh" else torch.rnn_relu_cell
        return (operator(input, states[0], *weights),)
    return (torch.gru_cell(input, states[0], *weights),)


def _packed(call: Call, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Pack the valid steps, longest row first, each row from its end if all run in reverse; unpack what comes back."""
    steps, batch = call.input.shape[:2]
    lengths, order = torch.sort(lengths.cpu(), descending=True, stable=True)
    live = int((lengths > 0).sum())
    step, row = torch.nonzero(torch.arange(steps, device="cpu").unsqueeze(-1) < lengths, as_tuple=True)
    time = lengths[row] - 1 - step if call.direction is Direction.REVERSE else step
    position = (time * batch + order[row]).to(call.input.device)  # of each packed step in (T * B)
    rows = order[:live].to(call.input.device)
    if live == 0:
        # They still depend on every tensor, so that its gradient is zero and not absent.
        nothing = sum(tensor.flatten()[:0].sum() for tensor in call.tensors if tensor is not None)
        width = call.directions * _given(call)[0].shape[-1]
        return call.input.new_zeros((steps, batch, width)) + nothing, tuple(s + nothing for s in _given(call))
    data = call.input.flatten(0, 1).index_select(0, position)
    batch_sizes = torch.bincount(step)
    initial = [state.index_select(1, rows) for state in _given(call)]
    packed, finals = _run(call, (data, batch_sizes), initial, ())
    output = packed.new_zeros((steps * batch, packed.shape[-1])).index_copy(0, position, packed)
    states = (state.index_copy(1, rows, final) for state, final in zip(_given(call), finals, strict=True))
    return output.unflatten(0, (steps, batch)), tuple(states)
