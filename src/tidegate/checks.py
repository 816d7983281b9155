# SPDX-License-Identifier: Apache-2.0
"""What every call must satisfy, whatever backend runs it. All faults are collected, then raised once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tidegate import activations
from tidegate.cells import Call


def check(call: Call) -> None:
    """Shapes, dtypes and devices; nothing that reads a value.

    Raises:
        ValueError: names each argument that disagrees, what was expected and what came.
    """
    if call.input.dim() != 3:
        raise ValueError(f"input: expected (T, B, input_size), got {call.input.dim()} dimensions")
    weight_hh = call.weights["weight_hh"]
    if weight_hh is None or weight_hh.dim() != 2 or weight_hh.shape[0] % len(call.cell.gates):
        shape = None if weight_hh is None else tuple(weight_hh.shape)
        raise ValueError(f"weight_hh: expected ({len(call.cell.gates)}*hidden_size, hidden_size), got {shape}")
    faults: list[str] = []
    for name, tensor, expected, letters in _expectations(call):
        if tensor is None:
            if name not in call.cell.optional_weights:
                faults.append(f"{name}: expected a tensor {letters}, got None")
            continue
        if tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
            faults.append(f"{name}: expected {letters} = {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype != call.input.dtype:
            faults.append(f"{name}: expected input's dtype {call.input.dtype}, got {tensor.dtype}")
        if tensor.device != call.input.device:
            faults.append(f"{name}: expected input's device {call.input.device}, got {tensor.device}")
    faults += _sequence_faults(call)
    if faults:
        raise ValueError("\n".join(faults))


def _expectations(call: Call) -> list[tuple[str, Tensor | None, tuple[int, ...], str]]:
    batch, input_size = call.input.shape[1:]
    hidden, gates = call.hidden_size, len(call.cell.gates)
    weight_hr = call.weights.get("weight_hr")
    proj = hidden if weight_hr is None else weight_hr.shape[0]
    letters = "hidden_size" if weight_hr is None else "proj_size"
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "weight_ih": ((gates * hidden, input_size), f"({gates}*hidden_size, input_size)"),
        "weight_hh": ((gates * hidden, proj), f"({gates}*hidden_size, {letters})"),
        "bias_ih": ((gates * hidden,), f"({gates}*hidden_size,)"),
        "bias_hh": ((gates * hidden,), f"({gates}*hidden_size,)"),
        "weight_hr": ((proj, hidden), "(proj_size, hidden_size)"),
        "weight_peephole": ((3 * hidden,), "(3*hidden_size,)"),
    }
    states: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        (
            f"{name}_0",
            state,
            (batch, proj if name == "h" else hidden),
            f"(B, {letters if name == 'h' else 'hidden_size'})",
        )
        for name, state in zip(call.cell.states, call.states, strict=True)
    ]
    return [*states, *((name, tensor, shapes[name][0], shapes[name][1]) for name, tensor in call.weights.items())]


def _sequence_faults(call: Call) -> list[str]:
    faults: list[str] = []
    steps, batch = call.input.shape[:2]
    lengths, resets = call.lengths, call.resets
    if lengths is not None:
        if lengths.dim() != 1 or lengths.shape[0] != batch:
            faults.append(f"lengths: expected (B,) = ({batch},), got {tuple(lengths.shape)}")
        if lengths.dtype != torch.int64:
            faults.append(f"lengths: expected torch.int64, got {lengths.dtype}")
    if resets is not None:
        if resets.dim() != 2 or resets.shape[0] != steps or resets.shape[1] != batch:
            faults.append(f"resets: expected (T, B) = ({steps}, {batch}), got {tuple(resets.shape)}")
        if resets.dtype != torch.bool:
            faults.append(f"resets: expected torch.bool, got {resets.dtype}")
        if resets.device != call.input.device:
            faults.append(f"resets: expected input's device {call.input.device}, got {resets.device}")
    return faults + _option_faults(call)


def _option_faults(call: Call) -> list[str]:
    faults: list[str] = []
    for name, option in call.options.items():
        if option == call.cell.options[name][1]:
            continue
        if name in ("nonlinearity", "activations"):
            faults += activations.faults(name, option, len(call.cell.activations) or 1)
        elif name.endswith("clip") and not 0 <= option < math.inf:
            faults.append(f"{name}: expected a positive number, or 0 for none, got {option}")
    return faults


def check_lengths(lengths: Tensor | None, steps: int, name: str = "lengths") -> None:
    """Every length in 0..T. On a GPU the check is asynchronous: no synchronisation, a device-side assertion.

    Raises:
        ValueError: a length on the cpu is outside.
    """
    if lengths is None or lengths.numel() == 0:
        return
    if lengths.device.type != "cpu":
        torch.ops.aten._assert_async(((lengths >= 0) & (lengths <= steps)).all())
        return
    low, high = (int(bound) for bound in torch.aminmax(lengths))
    if low < 0 or high > steps:
        raise ValueError(f"{name}: expected values in 0..T = 0..{steps}, got {low if low < 0 else high}")
