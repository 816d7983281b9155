# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU backend: calls the operators of csrc/ and does the large products around them with torch.

The recurrent product, its pointwise part and the time loop are compiled; the input's product before the loop and the
weights' gradients after it are torch's. With `lengths`, only the valid rows of the input take part: they are gathered
into (N, I), N valid steps in all, and everything between is in that packed form.

Letters as in cells.py. The kept tensor has a row a step and batch row: r z n (W_hn h + b_hn) for a GRU, i f g o c for
an LSTM; an RNN's backward needs no more than its output.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate import kernels
from tidegate.cells import Call

_LIBRARY = "tidegate_cpu.so"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_KINDS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "gru_reset_before": 4}
_SAVED_GATES = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 5, "gru": 4, "gru_reset_before": 3}

Gradients = tuple[Tensor | None, ...]


@cache
def _missing() -> str | None:
    """Loads the compiled operators; says why if they cannot be loaded."""
    for folder in kernels.__path__:
        path = Path(folder) / _LIBRARY
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return f"the compiled operators are not installed: {error}"
            return None
    return f"the compiled operators are not installed: no {_LIBRARY}; reinstall with a C++20 compiler"


@cache
def operators() -> Any:
    """The compiled operators, loaded at first use."""
    missing = _missing()
    if missing:
        raise RuntimeError(missing)
    return torch.ops.tidegate_cpu


def _kind(call: Call) -> str:
    if call.cell.name == "rnn":
        return f"rnn_{call.options['nonlinearity']}"
    if call.cell.name == "gru" and not call.options["reset_after"]:
        return "gru_reset_before"
    return call.cell.name


def unsupported_reasons(call: Call) -> list[str]:
    """Why the compiled operators cannot run `call`; empty if they can. Never raises."""
    reasons: list[str] = []
    missing = _missing()
    if missing:
        reasons.append(missing)
    if _kind(call) not in _KINDS:
        reasons.append(f"no kernel for {call.cell.name} with {call.options}")
    if call.input.dtype not in _DTYPES:
        reasons.append(f"input is {str(call.input.dtype).removeprefix('torch.')}, not float32, float64 or bfloat16")
    names = ("input", *(f"{state}_0" for state in call.cell.states), *call.weights)
    for name, tensor in zip(names, call.tensors, strict=True):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            reasons.append(f"{name} is on {tensor.device}")
        elif tensor.layout != torch.strided:
            reasons.append(f"{name} is {tensor.layout}")
        elif tensor.dtype != call.input.dtype:
            reasons.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, unlike input")
    return reasons


def saved_shape(call: Call) -> tuple[int, ...]:
    """The shape of what `forward(call, save=True)` keeps for the backward."""
    gates = _SAVED_GATES[_kind(call)]
    if gates == 0:
        return (0,)
    return (call.input.shape[0] * call.input.shape[1], gates * call.hidden_size)


class _Plan:
    """A call's arguments as the operators take them, and the rows of the input that are valid."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.name = _kind(call)
        self.time, self.batch, self.input_size = call.input.shape
        self.hidden_size = call.hidden_size
        self.gate_columns = call.hidden_size * len(call.cell.gates)
        weights = call.weights
        self.weight_ih, self.weight_hh = weights["weight_ih"], _contiguous(weights["weight_hh"])
        self.bias_ih, self.bias_hh = weights["bias_ih"], _contiguous(weights["bias_hh"])
        self.weight_hr = _contiguous(weights.get("weight_hr"))
        self.h_0 = call.states[0].contiguous()
        self.c_0 = call.states[1].contiguous() if len(call.states) > 1 else None
        self.resets = None if call.resets is None else call.resets.to("cpu").contiguous()
        self.lengths = None if call.lengths is None else call.lengths.to("cpu", torch.int64).contiguous()
        self.places: Tensor | None = None
        if self.lengths is not None:
            self.places = operators().places(self.lengths, self.time, call.reverse)
            if self.places.shape[0] == self.time * self.batch:   # every row is full
                self.lengths = self.places = None

    def valid_input(self) -> Tensor:
        x = self.call.input.reshape(self.time * self.batch, self.input_size)
        return x if self.places is None else x.index_select(0, self.places)

    def whole_input(self, rows: Tensor) -> Tensor:
        """The inverse of `valid_input`, zero elsewhere."""
        if self.places is not None:
            rows = rows.new_zeros(self.time * self.batch, self.input_size).index_copy_(0, self.places, rows)
        return rows.view(self.time, self.batch, self.input_size)


def _contiguous(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous()


def forward(call: Call, save: bool) -> tuple[Tensor, ...]:
    """Runs the sequence: output (T, B, P), the final states, and what `backward` needs, (0,) without `save`."""
    plan = _Plan(call)
    x = plan.valid_input()
    assert plan.weight_ih is not None
    saved = x.new_empty(saved_shape(call) if save else (0,))
    if saved.dim() == 2:
        # The kernel turns the pre-activations into the gates where they lie.
        gates = saved[: x.shape[0]]
        _linear_into(gates[:, : plan.gate_columns], x, plan.weight_ih, plan.bias_ih)
    else:
        gates = linear(x, plan.weight_ih, plan.bias_ih)
    output, h_n, c_n = operators().forward(
        _KINDS[plan.name], gates, plan.h_0, plan.c_0, plan.weight_hh, plan.bias_hh, plan.weight_hr, plan.lengths,
        plan.resets, plan.time, call.reverse, saved.dim() == 2,
    )  # fmt: skip
    return (output, h_n, saved) if plan.c_0 is None else (output, h_n, c_n, saved)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def backward(
    call: Call,
    output: Tensor,
    saved: Tensor,
    grad_output: Tensor | None,
    grad_states: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> Gradients:
    """The gradients of `Call.tensors`, in that order, None where not needed."""
    plan = _Plan(call)
    need = dict(zip(("input", *call.cell.states, *call.weights), needs, strict=True))
    packed = plan.places is not None or plan.resets is not None
    want_h_before = need["weight_hh"] and (packed or plan.name == "gru_reset_before")
    grad_h_n, grad_c_n = (*grad_states, None)[:2]
    dgates, h_before, dh_0, dc_0 = operators().backward(
        _KINDS[plan.name], saved, output.contiguous(), plan.h_0, plan.c_0, plan.weight_hh, plan.weight_hr,
        plan.lengths, plan.resets, call.reverse, _contiguous(grad_output), _contiguous(grad_h_n),
        _contiguous(grad_c_n), want_h_before,
    )  # fmt: skip
    dgates_x = dgates[:, : plan.gate_columns]
    grads: dict[str, Tensor | None] = {"h": dh_0, "c": dc_0}
    if need["input"]:
        assert plan.weight_ih is not None
        grads["input"] = plan.whole_input(dgates_x @ plan.weight_ih)
    if need["weight_ih"]:
        grads["weight_ih"] = dgates_x.t() @ plan.valid_input()
    if need["weight_hh"]:
        grads["weight_hh"] = _grad_weight_hh(plan, output, saved, dgates, h_before if want_h_before else None)
    if need["bias_ih"] or need["bias_hh"]:
        grads["bias_ih"], grads["bias_hh"] = _grad_biases(plan, dgates)
    if need.get("weight_hr"):
        grads["weight_hr"] = _grad_weight_hr(plan, saved, dgates)
    return tuple(grads[name] if needed else None for name, needed in need.items())


def _grad_biases(plan: _Plan, dgates: Tensor) -> tuple[Tensor, Tensor]:
    hidden_size = plan.hidden_size
    sums = dgates.sum(0)
    grad_ih = sums[: plan.gate_columns]
    if plan.name == "gru":
        return grad_ih.clone(), torch.cat((sums[: 2 * hidden_size], sums[3 * hidden_size :]))
    # Two tensors, so that accumulating into one bias' gradient does not change the other's.
    return grad_ih.clone(), grad_ih.clone()


def _grad_weight_hh(plan: _Plan, output: Tensor, saved: Tensor, dgates: Tensor, h_before: Tensor | None) -> Tensor:
    hidden_size = plan.hidden_size
    result = torch.empty_like(plan.weight_hh)
    if plan.name == "gru":
        blocks = [(0, 2 * hidden_size, 0), (2 * hidden_size, 3 * hidden_size, 3 * hidden_size)]
    elif plan.name == "gru_reset_before":
        assert h_before is not None
        r = saved[: h_before.shape[0], :hidden_size]
        torch.mm(dgates[:, : 2 * hidden_size].t(), h_before, out=result[: 2 * hidden_size])
        torch.mm(dgates[:, 2 * hidden_size :].t(), r * h_before, out=result[2 * hidden_size :])
        return result
    else:
        blocks = [(0, plan.gate_columns, 0)]
    for first, last, column in blocks:
        dgates_h = dgates[:, column : column + last - first].t()
        if h_before is None:
            _product_with_h_before(plan, output, dgates_h, result[first:last])
        else:
            torch.mm(dgates_h, h_before, out=result[first:last])
    return result


def _product_with_h_before(plan: _Plan, output: Tensor, dgates_h: Tensor, out: Tensor) -> None:
    """out = dgates_h^T times the h that entered each step: the output one step before, and h_0. No copy of either."""
    rows = plan.time * plan.batch
    h = output.view(rows, -1)
    batch = plan.batch if plan.time > 0 else 0
    if plan.call.reverse:
        first, rest = dgates_h[:, rows - batch :], dgates_h[:, : rows - batch]
        h = h[batch:]
    else:
        first, rest = dgates_h[:, :batch], dgates_h[:, batch:]
        h = h[: rows - batch]
    torch.mm(rest, h, out=out)
    if batch:
        out.addmm_(first, plan.h_0)


def _grad_weight_hr(plan: _Plan, saved: Tensor, dgates: Tensor) -> Tensor:
    hidden_size = plan.hidden_size
    kept = saved[: dgates.shape[0]]
    before_projection = kept[:, 3 * hidden_size : 4 * hidden_size] * kept[:, 4 * hidden_size :].tanh()   # (N, H)
    return dgates[:, 4 * hidden_size :].t() @ before_projection
