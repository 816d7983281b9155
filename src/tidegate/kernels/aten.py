# SPDX-License-Identifier: Apache-2.0
"""torch's own recurrent operators, oneDNN's and cuDNN's among them, for the calls that they can run."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tidegate import torchs_nodes
from tidegate.call import BATCH_FIRST, BOTH, REVERSE, STEP, UNBATCHED_STEP, Call
from tidegate.cell import LSTM, TORCHS_STEPS, extensions

_OPERATORS: dict[str, Any] = {
    "gru": torch.gru, "lstm": torch.lstm, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu,
}  # fmt: skip


def unsupported_reasons(call: Call) -> list[str]:
    """Why torch's operators cannot run `call`; empty if they can. Never raises."""
    plain = len(call.weights) == 4 or (len(call.weights) == 6 and call.weights[4] is None and call.weights[5] is None)
    if call.layout >= STEP and plain and (call.cell.name, call.options) in TORCHS_STEPS:
        return []  # a cell's step must be quick
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
    if call.is_step and (len(call.weights) == 4 or call.weights[4] is None):
        return _step(call)
    if call.lengths is not None:
        return call.restored(*_packed(call.time_major(), call.lengths))
    if call.layout <= BATCH_FIRST and call.direction is not REVERSE:
        whole = call.with_states()
        output, finals = _run(whole, (whole.input,), _given(whole), (call.layout is BATCH_FIRST,))
        return (output, *finals)
    whole = call.time_major()
    reverse = call.direction is REVERSE
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
    operator = _OPERATORS[call.named_options().get("nonlinearity", call.cell.name)]
    # cuDNN computes gradients in training mode alone; without dropout the results are the same.
    settings = (has_biases, call.layers, 0.0, torch.is_grad_enabled(), call.direction is BOTH, *layout)
    output, *finals = operator(*data, states if call.cell is LSTM else states[0], weights, *settings)
    torchs_nodes.complete(finals[0], call.cell, call.options, call.weights, call.layers, call.direction is BOTH)
    return output, tuple(finals)


def _step(call: Call) -> tuple[Tensor, ...]:
    """torch's own cells, which check for themselves."""
    input, weights = call.input, cast("tuple[Tensor, ...]", call.weights[:4])
    unbatched = call.layout is UNBATCHED_STEP
    if unbatched:
        input = input.unsqueeze(0)
    states: Any = [
        _zero_state(call, input) if state is None else state.unsqueeze(0) if unbatched else state
        for state in call.states
    ]
    if call.cell.name == "lstm":
        new = torch.lstm_cell(input, states, *weights)
    elif call.cell.name == "rnn":
        operator = torch.rnn_tanh_cell if call.options[0] == "tanh" else torch.rnn_relu_cell
        new = (operator(input, states[0], *weights),)
    else:
        new = (torch.gru_cell(input, states[0], *weights),)
    return tuple([state.squeeze(0) for state in new]) if unbatched else new


def _zero_state(call: Call, input: Tensor) -> Tensor:
    return input.new_zeros((input.shape[0], call.hidden_size))


def _packed(call: Call, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Pack the valid steps, longest row first, each row from its end if all run in reverse; unpack what comes back."""
    steps, batch = call.input.shape[:2]
    lengths, order = torch.sort(lengths.cpu(), descending=True, stable=True)
    live = int((lengths > 0).sum())
    step, row = torch.nonzero(torch.arange(steps, device="cpu").unsqueeze(-1) < lengths, as_tuple=True)
    time = lengths[row] - 1 - step if call.direction is REVERSE else step
    position = (time * batch + order[row]).to(call.input.device)  # of each packed step in (T * B)
    rows = order[:live].to(call.input.device)
    if live == 0:
        # They still depend on every tensor, so that its gradient is zero and not absent.
        nothing = sum(tensor.flatten()[:0].sum() for tensor in call.tensors if tensor is not None)
        width = call.directions() * _given(call)[0].shape[-1]
        return call.input.new_zeros((steps, batch, width)) + nothing, tuple(s + nothing for s in _given(call))
    data = call.input.flatten(0, 1).index_select(0, position)
    batch_sizes = torch.bincount(step)
    initial = [state.index_select(1, rows) for state in _given(call)]
    packed, finals = _run(call, (data, batch_sizes), initial, ())
    output = packed.new_zeros((steps * batch, packed.shape[-1])).index_copy(0, position, packed)
    states = (state.index_copy(1, rows, final) for state, final in zip(_given(call), finals, strict=True))
    return output.unflatten(0, (steps, batch)), tuple(states)
