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


def availability() -> list[str]:
    """Why this installation has no compiled operators; empty if it has."""
    missing = _missing()
    return [missing] if missing else []


def _kind(call: Call) -> str:
    if call.cell.name == "rnn":
        return f"rnn_{call.options['nonlinearity']}"
    if call.cell.name == "gru" and not call.options["reset_after"]:
        return "gru_reset_before"
    return call.cell.name


def unsupported_reasons(call: Call) -> list[str]:
    """Why the compiled operators cannot run `call`; empty if they can. Never raises."""
    reasons = availability()
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
    """A call's arguments as the operators take them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.name = _kind(call)
        self.kind = _KINDS[self.name]
        weights = call.weights
        self.hidden_size = call.hidden_size
        self.gate_columns = call.hidden_size * len(call.cell.gates)
        x = call.input
        self.input = x if x.stride(2) == 1 else x.contiguous()
        self.weight_ih, self.weight_hh = _contiguous(weights["weight_ih"]), _contiguous(weights["weight_hh"])
        self.bias_ih, self.bias_hh = _contiguous(weights["bias_ih"]), _contiguous(weights["bias_hh"])
        self.weight_hr = _contiguous(weights.get("weight_hr"))
        self.h_0 = call.states[0].contiguous()
        self.c_0 = call.states[1].contiguous() if len(call.states) > 1 else None
        self.resets = None if call.resets is None else call.resets.to("cpu").contiguous()
        self.lengths = None if call.lengths is None else call.lengths.to("cpu", torch.int64).contiguous()


def _contiguous(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous()


def forward(call: Call, save: bool) -> tuple[Tensor, ...]:
    """Runs the sequence: output (T, B, P), the final states, and what `backward` needs, (0,) without `save`."""
    plan = _Plan(call)
    output, h_n, c_n, saved = operators().forward(
        plan.kind, plan.input, plan.h_0, plan.c_0, plan.weight_ih, plan.weight_hh, plan.bias_ih, plan.bias_hh,
        plan.weight_hr, plan.lengths, plan.resets, call.reverse, save,
    )  # fmt: skip
    return (output, h_n, saved) if plan.c_0 is None else (output, h_n, c_n, saved)


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
    own_weight_hh = plan.name != "gru_reset_before" and call.input.dtype != torch.bfloat16
    grad_h_n, grad_c_n = (*grad_states, None)[:2]
    output = output.contiguous()
    dgates, h_before, dh_0, dc_0 = operators().backward(
        plan.kind, saved, output, plan.h_0, plan.c_0, plan.weight_hh, plan.weight_hr, plan.lengths, plan.resets,
        call.reverse, _contiguous(grad_output), _contiguous(grad_h_n), _contiguous(grad_c_n),
        need["weight_hh"] and not own_weight_hh,
    )  # fmt: skip
    grads: dict[str, Tensor | None] = {"h": dh_0, "c": dc_0}
    if need["input"]:
        grads["input"] = operators().input_gradient(
            dgates, plan.weight_ih, plan.lengths, *call.input.shape[:2], call.reverse
        )
    if any(need[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        grads |= _grad_weights(plan, output, saved, dgates, h_before, need)
    if need.get("weight_hr"):
        grads["weight_hr"] = _grad_weight_hr(plan, saved, dgates)
    return tuple(grads[name] if needed else None for name, needed in need.items())


def _grad_weights(
    plan: _Plan, output: Tensor, saved: Tensor, dgates: Tensor, h_before: Tensor, need: dict[str, bool]
) -> dict[str, Tensor | None]:
    hidden_size, columns, call = plan.hidden_size, plan.gate_columns, plan.call
    reset_before, bfloat16 = plan.name == "gru_reset_before", call.input.dtype == torch.bfloat16
    if bfloat16:
        grad_ih, grad_hh, sums = _bfloat16_products(plan, dgates, h_before, need)
    else:
        grad_ih, grad_hh, sums = operators().weight_gradients(
            plan.kind, dgates, plan.input, output, plan.h_0, plan.lengths, plan.resets, hidden_size, call.reverse,
            need["weight_ih"], need["weight_hh"] and not reset_before,
        )  # fmt: skip
    if need["weight_hh"] and reset_before:
        reset_h = saved[: h_before.shape[0], :hidden_size] * h_before   # (N, H)
        grad_hh = torch.cat(
            (dgates[:, : 2 * hidden_size].t() @ h_before, dgates[:, 2 * hidden_size :].t() @ reset_h)
        )
    # Two tensors, so that accumulating into one bias' gradient does not change the other's.
    grad_bias_ih, grad_bias_hh = sums[:columns].clone(), sums[:columns].clone()
    if plan.name == "gru":
        grad_bias_hh[2 * hidden_size :] = sums[columns:]
    return {"weight_ih": grad_ih, "weight_hh": grad_hh, "bias_ih": grad_bias_ih, "bias_hh": grad_bias_hh}


def _bfloat16_products(
    plan: _Plan, dgates: Tensor, h_before: Tensor, need: dict[str, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """torch's, which use the matrix instructions for bfloat16 where there are any."""
    hidden_size, columns, call = plan.hidden_size, plan.gate_columns, plan.call
    grad_ih = grad_hh = None
    if need["weight_ih"]:
        time, batch, input_size = call.input.shape
        x = call.input.reshape(time * batch, input_size)
        if plan.lengths is not None:
            x = x.index_select(0, operators().places(plan.lengths, time, call.reverse))
        grad_ih = dgates[:, :columns].t() @ x
    if need["weight_hh"] and plan.name != "gru_reset_before":
        grad_hh = dgates[:, :columns].t() @ h_before
        if plan.name == "gru":
            grad_hh[2 * hidden_size :] = dgates[:, columns:].t() @ h_before
    return grad_ih, grad_hh, dgates.sum(0)


def _grad_weight_hr(plan: _Plan, saved: Tensor, dgates: Tensor) -> Tensor:
    hidden_size = plan.hidden_size
    kept = saved[: dgates.shape[0]]
    before_projection = kept[:, 3 * hidden_size : 4 * hidden_size] * kept[:, 4 * hidden_size :].tanh()   # (N, H)
    return dgates[:, 4 * hidden_size :].t() @ before_projection
