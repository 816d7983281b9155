# SPDX-License-Identifier: Apache-2.0
"""From tensors to kernels: buffers, grids and arguments. The one file that knows both torch and triton."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from tidegate.call import Layer
from tidegate.kernels.triton import gru, held, lstm, plan, pointwise, reset_before, resident, rnn, streamed

INTERPRETED = type(streamed.forward).__name__ == "InterpretedFunction"  # decided when triton.jit made it

_ACC: dict[torch.dtype, Any] = {torch.float64: tl.float64}  # else float32


@dataclass(frozen=True)
class Kind:
    """A cell's functions, and how many tiles a unit they take and give.

    Attributes:
        kept: values that the backward reads; the RNN's is the output, which is kept anyway.
        columns: gate gradients; the last `gates` are those of the input's products.
    """

    gates: int
    kept: int
    columns: int
    forward: Any = None
    backward: Any = None


KINDS = {
    "rnn_tanh": Kind(1, 1, 1, rnn.forward_tanh, rnn.backward_tanh),
    "rnn_relu": Kind(1, 1, 1, rnn.forward_relu, rnn.backward_relu),
    "lstm": Kind(4, 5, 4, lstm.forward, lstm.backward),
    "gru": Kind(3, 4, 4, gru.forward, gru.backward),
    "gru_reset_before": Kind(3, 3, 3),
}


def device_on(device: torch.device) -> plan.Device:
    """What a plan has to know of a device."""
    return plan.Device(True) if INTERPRETED else plan.device_on(device)


def plan_of(call: Layer, backward: bool = False) -> plan.Plan:
    """The kernel that would run `call` or its gradient, its block sizes, and the other kernels' reasons."""
    return plan.choose(plan.size_of(call), device_on(call.input.device), backward)


@contextlib.contextmanager
def _on(device: torch.device) -> Generator[None]:
    """Triton launches on the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _buffers(call: Layer) -> plan.Buffers:
    device, bias = call.input.device, call.weights["bias_hh"]
    lengths = None if call.lengths is None else call.lengths.to(device).contiguous()
    resets = None if call.resets is None else call.resets.contiguous().view(torch.uint8)
    return plan.Buffers(
        call.weights["weight_hh"].contiguous(), None if bias is None else bias.contiguous(), lengths, resets
    )


def _constants(call: Layer) -> dict[str, Any]:
    dtype = call.input.dtype
    return {
        "HAS_LENGTHS": call.lengths is not None,
        "HAS_RESETS": call.resets is not None,
        "REVERSE": call.reverse,
        "ACC": _ACC.get(dtype, tl.float32),
        "PRECISION": plan.precision(dtype),
        "WIDEN": INTERPRETED and dtype is torch.bfloat16,
    }


def _options(config: plan.Config) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    # A buffer that its flag says is absent still needs a pointer.
    stand_in = next(argument for argument in arguments if isinstance(argument, Tensor))
    kernel[grid](*(stand_in if argument is None else argument for argument in arguments), **constants)


def _run_streamed(
    chosen: plan.Plan, kernel: Any, tensors: tuple[Any, ...], sizes: tuple[int, int, int], rounds: int,
    constants: dict[str, Any], place: int,
) -> None:  # fmt: skip
    """Launch K2 or K3 over `rounds` steps. The flags go to `place` among the tensors."""
    config, device = chosen.config, tensors[0].device
    tiles = _tiles(sizes[1], config.block_b)
    sync = {"streamed": "block", "persistent": "flags", "per_step": "launch"}[chosen.kernel]
    flags = torch.zeros(tiles * config.programs, dtype=torch.int32, device=device) if sync == "flags" else None
    tensors = (*tensors[:place], flags, *tensors[place:])
    constants = {
        **constants, **_options(config),
        "BLOCK_B": config.block_b, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PROGRAMS": config.programs, "FLAGS": 1 << (config.programs - 1).bit_length(), "SYNC": sync,
        "SPINS": 0 if INTERPRETED else plan.SPINS,
    }  # fmt: skip
    if sync == "flags":
        constants["launch_cooperative_grid"] = True
    grid = (tiles, config.programs)
    for first, count in [(step, 1) for step in range(rounds)] if sync == "launch" else [(0, rounds)]:
        _launch(kernel, grid, (*tensors, *sizes, first, count), constants)


def run_forward(
    call: Layer, chosen: plan.Plan, x: Tensor, kept: Tensor | None, skip: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The recurrence after the input's product x (T, B, G*H): output (T, B, H) and the final states.

    kept (T*B, n*H) receives the cell's kept values after the first `skip`; None keeps none.
    """
    name = plan.kind_of(call)
    kind = KINDS[name]
    steps, batch, hidden_size = sizes = (call.input.shape[0], call.input.shape[1], call.hidden_size)
    buffers = _buffers(call)
    if chosen.kernel == "held":
        return held.run_forward(call, chosen, x, buffers, kept, skip)
    new = x.new_empty if call.lengths is None else x.new_zeros
    out = new((steps, batch, hidden_size))
    constants = {
        **_constants(call),
        "KEPT": 0 if kept is None else kept.shape[1] // hidden_size,
        "HAS_BIAS": buffers.bias is not None,
    }
    if kind.forward is not None:
        constants |= {"CELL": kind.forward, "GATES": kind.gates, "SKIP": skip, "HAS_C": len(call.states) == 2}
    reset_first = name == "gru_reset_before"
    with _on(x.device):
        if chosen.kernel == "resident":
            initial = tuple(state.contiguous() for state in call.states)
            finals = tuple(torch.empty_like(state) for state in initial)
            h_0, c_0 = (*initial, None)[:2]
            h_n, c_n = (*finals, None)[:2]
            states = (h_0, h_n) if reset_first else (h_0, c_0, h_n, c_n)
            kernel = reset_before.resident_forward if reset_first else resident.forward
            config = chosen.config
            constants |= {"BLOCK_B": config.block_b, "BLOCK_H": config.block_n, **_options(config)}
            grid = (_tiles(batch, config.block_b),)
            _launch(kernel, grid, (x, *buffers, *states, out, kept, *sizes), constants)
            return out, finals
        carries = tuple(_carry(state) for state in call.states)
        exchange = x.new_empty((2, batch, hidden_size))
        exchange[0].copy_(call.states[0])
        if reset_first:
            extra = (torch.empty_like(carries[0]), exchange, torch.empty_like(exchange[0]))
            kernel, states, rounds = reset_before.streamed_forward, (carries[0], *extra), 2 * steps
        else:
            kernel, states, rounds = streamed.forward, (*(*carries, None)[:2], exchange), steps
        tensors = (x, *buffers, *states, out, kept)
        _run_streamed(chosen, kernel, tensors, sizes, rounds, constants, len(tensors) - 2)
    return out, tuple(carry.to(x.dtype) for carry in carries)


def _carry(state: Tensor) -> Tensor:
    """A copy to carry a state or its gradient in."""
    wide = torch.float64 if state.dtype is torch.float64 else torch.float32
    return torch.empty(state.shape, dtype=wide, device=state.device).copy_(state)


def run_backward(
    call: Layer, chosen: plan.Plan, kept: Tensor, before: tuple[Tensor, ...], dout: Tensor, dfinals: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The recurrence's gradient: dgates (T*B, D*H), zero where a row has no step, and those of the initial states.

    before: each state entering each step, (T, B, H). dout and dfinals are contiguous.
    """
    name = plan.kind_of(call)
    kind = KINDS[name]
    steps, batch, hidden_size = sizes = (call.input.shape[0], call.input.shape[1], call.hidden_size)
    weight, _, lengths, resets = buffers = _buffers(call)
    if chosen.kernel == "held":
        return held.run_backward(call, chosen, kind.columns, buffers, kept, before, dout, dfinals)
    new = dout.new_empty if lengths is None else dout.new_zeros
    dgates = new((steps * batch, kind.columns * hidden_size))
    initial = tuple(torch.empty_like(gradient) for gradient in dfinals)
    constants = _constants(call)
    reset_first = name == "gru_reset_before"
    h_before, c_before = (*before, None)[:2]
    befores = (h_before,) if reset_first else (h_before, c_before)
    if not reset_first:
        constants |= {
            "CELL": kind.backward, "GATES": kind.gates, "KEPT": kind.kept, "COLUMNS": kind.columns,
            "HAS_C": len(before) == 2,
        }  # fmt: skip
    with _on(dout.device):
        if chosen.kernel == "resident":
            dh_n, dc_n, dh_0, dc_0 = dfinals[0], (*dfinals, None)[1], initial[0], (*initial, None)[1]
            ends = (dh_n, dgates, dh_0) if reset_first else (dh_n, dc_n, dgates, dh_0, dc_0)
            kernel = reset_before.resident_backward if reset_first else resident.backward
            config = chosen.config
            constants |= {"BLOCK_B": config.block_b, "BLOCK_H": config.block_n, **_options(config)}
            grid = (_tiles(batch, config.block_b),)
            _launch(kernel, grid, (weight, kept, *befores, dout, lengths, resets, *ends, *sizes), constants)
            return dgates, initial
        carries = tuple(_carry(gradient) for gradient in dfinals)
        if reset_first:
            kernel, states, rounds = reset_before.streamed_backward, carries, 2 * steps + 1
        else:
            kernel, states, rounds = streamed.backward, (*carries, None)[:2], steps + 1
        tensors = (weight, kept, *befores, dout, lengths, resets, *states, dgates, initial[0])
        _run_streamed(chosen, kernel, tensors, sizes, rounds, constants, len(tensors))
    return dgates, (initial[0], *(carry.to(dout.dtype) for carry in carries[1:]))


def run_pointwise(call: Layer, x: Tensor, before: tuple[Tensor, ...], keep: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """Steps that do not depend on one another, their input's product x (N, G*H): the new states and the kept values.

    before: the states entering them, (N, H) each, contiguous. Without `keep` the kept values are an empty tensor.
    """
    name = plan.kind_of(call)
    kind = KINDS[name]
    rows, hidden_size = before[0].shape
    config = plan.STEP
    grid = (_tiles(rows, config.block_b), _tiles(hidden_size, config.block_n))
    constants = {
        "ACC": _ACC.get(x.dtype, tl.float32), "BLOCK_B": config.block_b, "BLOCK_N": config.block_n,
        **_options(config),
    }  # fmt: skip
    weight, bias = call.weights["weight_hh"], call.weights["bias_hh"]
    reset_first = name == "gru_reset_before"
    kept = x.new_empty((rows, kind.kept * hidden_size) if keep or reset_first else (0,))
    new = tuple(torch.empty_like(state) for state in before)
    with _on(x.device):
        if not reset_first:
            constants |= {
                "CELL": kind.forward, "GATES": kind.gates, "KEPT": kind.kept if keep else 0, "HAS_C": len(before) == 2,
            }  # fmt: skip
            h, c, h_n, c_n = before[0], (*before, None)[1], new[0], (*new, None)[1]
            a = linear(before[0], weight, bias)
            _launch(pointwise.forward, grid, (x, a, h, c, h_n, c_n, kept, rows, hidden_size), constants)
            return new, kept
        rest = torch.empty_like(new[0])
        parts = ((False, rest, slice(0, 2 * hidden_size)), (True, new[0], slice(2 * hidden_size, None)))
        for second, target, split in parts:
            a = linear(rest if second else before[0], weight[split], None if bias is None else bias[split])
            arguments = (x, a, before[0], target, kept, rows, hidden_size)
            _launch(pointwise.reset_before, grid, arguments, {**constants, "SECOND": second})
    return new, kept if keep else x.new_empty(0)
