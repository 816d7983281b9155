# SPDX-License-Identifier: Apache-2.0
"""The GPU backend: the recurrence in CUDA C++ and Triton, the large products around it in torch. Imports them late.

The input's product comes before the loop and the gradients of input, weights and biases after it, each one product
over all steps; sums are deterministic. What the forward keeps has a row a step and batch row: r z n (W_hn h + b_hn) for
a GRU, r z n for one with the reset before, i f g o c for an LSTM; an RNN's backward needs no more than its output. With
`plan.using(recompute=True)` an LSTM keeps c and the others nothing, and the backward computes the rest again.

Letters as in cell.py and common.py.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.call import Call, Layer
from tidegate.cell import Cell, extensions
from tidegate.kernels.triton import plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEPT = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 5, "gru": 4, "gru_reset_before": 3}
_OLDEST = (3, 6)

Gradients = tuple[Tensor | None, ...]


def is_interpreted() -> bool:
    """Whether Triton's interpreter is to run the kernels, on a CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@cache
def _missing() -> str | None:
    wanted = ".".join(map(str, _OLDEST))
    found = _version()
    if found is None:
        return f"triton is not installed: torch's builds for CUDA bring it; {wanted} or later"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < _OLDEST:
        return f"triton {found} is too old: {wanted} or later"
    return None


def _version() -> str | None:
    if not is_installed():
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def is_installed() -> bool:
    """Whether a triton is here, of whatever version: to know that, metadata would be read at import."""
    return find_spec("triton") is not None


@cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


def availability() -> list[str]:
    """Why this machine cannot run the kernels at all; empty if it can."""
    reasons: list[str] = []
    missing = _missing()
    if missing:
        reasons.append(missing)
    if not is_interpreted() and not _has_cuda():
        reasons.append("no CUDA device")
    return reasons


def unsupported_reasons(call: Call) -> list[str]:
    """Why the kernels cannot run `call`; empty if they can. Never raises."""
    reasons = [*availability(), *extensions(call.cell, call.options, call.weights)]
    if call.weights_of(0).get("weight_hr") is not None:
        reasons.append("LSTM with projections is not among the kernels")
    input, dtype = call.input, call.input.dtype
    if not (input.is_cuda or (input.is_cpu and is_interpreted())):
        reasons.append(f"input is on {input.device}")
    if dtype is torch.float64:
        if not is_interpreted():
            reasons.append("float64 runs under Triton's interpreter alone")
    elif dtype not in _DTYPES:
        reasons.append(f"input is {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or float16")
    if dtype is torch.bfloat16 and input.is_cuda and _has_cuda() and plan.device_on(input.device).capability < (8, 0):
        reasons.append("bfloat16 needs compute capability 8.0")
    device, tensors = input.device, call.tensors if not call.cell.storage else (input, *call.states)
    for place, tensor in enumerate(tensors):
        if tensor is None or (tensor.dtype is dtype and tensor.layout is torch.strided and tensor.device == device):
            continue
        reasons.append(_unlike_input(call, place, tensor))
    # Offsets within a step and within a weight are 32-bit.
    hidden_size = call.hidden_size
    if max(2, call.steps) * call.batch() * hidden_size >= 2**31:
        reasons.append("T*B*hidden_size is 2**31 or more")
    if len(call.cell.gates) * hidden_size**2 >= 2**31:
        reasons.append("weight_hh has 2**31 entries or more")
    return reasons


def _unlike_input(call: Call, place: int, tensor: Tensor) -> str:
    names = ("input", *(f"{state}_0" for state in call.cell.states), *call.cell.parameters)
    first = 1 + len(call.states)
    name = names[place if place < first else first + (place - first) % len(call.cell.parameters)]
    if tensor.layout is not torch.strided:
        return f"{name} is {tensor.layout}"
    return f"{name} is {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}, unlike input"


def slower_reasons(call: Call) -> list[str]:
    """Why torch's operators, cuDNN's among them, run a call faster; empty if they do not. Measured on an H200, against
    what a user calls, host and all: benchmarks/results. Never raises."""
    if call.is_step:
        return ["one step is two products and a pointwise kernel, in torch, too"]
    device = plan.device_on(call.input.device)
    return [*plan.slower_reasons(plan.size_of(call), call.layers * call.directions(), device)]


def slower_in_graph(call: Call) -> list[str]:
    """The same of a layer as one operator of a graph."""
    return [*plan.slower_in_graph(plan.size_of(call), plan.device_on(call.input.device))]


def leaves(
    cell: Cell, options: tuple[Any, ...], steps: int, batch: int, hidden_size: int, cells: int, input: Tensor
) -> bool:
    """Whether there is a reason of either kind against a plain call of torch.nn's equations."""
    if input.dtype not in _DTYPES or steps * batch * hidden_size >= 2**31:
        return True
    kind = f"rnn_{options[0]}" if cell.name == "rnn" else cell.name
    sizes = (kind, len(cell.gates), steps, batch, hidden_size, input.dtype, plan.precision(input.dtype), True)
    return _leaves(sizes, cells, input.device)


@lru_cache(maxsize=1024)
def _leaves(sizes: tuple[Any, ...], cells: int, device: torch.device) -> bool:
    if availability():
        return True
    return bool(plan.slower_reasons(plan.Size(*sizes), cells, plan.device_on(device)))


def saved_shape(call: Layer) -> tuple[int, ...]:
    """The shape of what `forward(call, save=True)` keeps for the backward."""
    kind = plan.kind_of(call)
    kept = _KEPT[kind] if not plan.settings.recompute else int(kind == "lstm")
    if kept == 0:
        return (0,)
    return (call.input.shape[0] * call.input.shape[1], kept * call.hidden_size)


def forward(call: Layer, save: bool) -> tuple[Tensor, ...]:
    """Runs the sequence: output (T, B, H), the final states, and what `backward` needs, (0,) without `save`."""
    from tidegate.kernels.triton import launch

    steps, batch = call.input.shape[:2]
    shape = saved_shape(call) if save else (0,)
    # Past a row's length what is kept meets gate gradients of 0 in a product.
    saved = call.input.new_empty(shape) if call.lengths is None else call.input.new_zeros(shape)
    if steps == 0 or batch == 0:
        output = call.input.new_zeros((steps, batch, call.hidden_size))
        return (output, *(state.clone(memory_format=torch.contiguous_format) for state in call.states), saved)
    chosen = launch.plan_of(call)
    x = linear(call.input, call.weights["weight_ih"], call.weights["bias_ih"]).contiguous()  # (T, B, G*H)
    kept = saved if saved.numel() else None
    if chosen.kernel == "step":
        states = tuple(state.contiguous() for state in call.states)
        new, kept = launch.run_pointwise(call, x[0], states, keep=kept is not None)
        if saved.numel():
            saved = kept[:, -saved.shape[1] :].contiguous()
        return (new[0].clone().unsqueeze(0), *new, saved)
    skip = 4 if kept is not None and plan.kind_of(call) == "lstm" and plan.settings.recompute else 0
    output, finals = launch.run_forward(call, chosen, x, kept, skip)
    return (output, *finals, saved)


def _valid(call: Layer) -> Tensor | None:
    """(T, B) bool: the steps within each row's length; None for all."""
    if call.lengths is None:
        return None
    steps = torch.arange(call.input.shape[0], device=call.input.device)
    return steps.unsqueeze(-1) < call.lengths.to(call.input.device)


def _before(call: Layer, after: Tensor, initial: Tensor, valid: Tensor | None) -> Tensor:
    """The state that entered each step, from that which left it: (T, B, H); past a row's length anything finite."""
    fresh = call.resets
    if not call.reverse:
        before = torch.cat((initial.unsqueeze(0), after[:-1]))
    else:
        before = torch.cat((after[1:], initial.unsqueeze(0)))
        if call.lengths is not None:
            last = torch.arange(after.shape[0], device=after.device).unsqueeze(-1) == call.lengths.to(after.device) - 1
            before = torch.where(last.unsqueeze(-1), initial, before)
        if fresh is not None:
            marked = fresh if valid is None else fresh & valid
            fresh = torch.cat((marked[1:], torch.zeros_like(marked[:1])))
    return before if fresh is None else before.masked_fill_(fresh.unsqueeze(-1), 0)


def backward(
    call: Layer,
    output: Tensor,
    saved: Tensor,
    gradients: Gradients,
    needs: tuple[bool, ...],
) -> Gradients:
    """The gradients of `Layer.tensors`, in that order, None where not needed."""
    from tidegate.kernels.triton import launch

    kind = launch.KINDS[plan.kind_of(call)]
    grad_output, *grad_states = gradients
    dfinals = tuple(
        torch.zeros_like(state, memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
        for state, grad in zip(call.states, grad_states, strict=True)
    )
    need = dict(zip(("input", *call.cell.states, *call.weights), needs, strict=True))
    steps, batch, input_size = call.input.shape
    if steps == 0:
        zeros = (None if tensor is None else torch.zeros_like(tensor) for tensor in call.tensors)
        found = {**dict(zip(need, zeros, strict=True)), **dict(zip(call.cell.states, dfinals, strict=True))}
        return tuple(found[name] if needed else None for name, needed in need.items())
    valid = _valid(call)
    input = call.input if valid is None else call.input.masked_fill(~valid.unsqueeze(-1), 0)
    h_before = _before(call, output, call.states[0], valid)
    if batch == 0:
        dgates = call.input.new_zeros((steps * batch, kind.columns * call.hidden_size))
        kept, dinitial = saved, tuple(grad.clone() for grad in dfinals)
    else:
        kept, before = _kept(call, output, saved, input, h_before, valid)
        dout = torch.zeros_like(output) if grad_output is None else grad_output.contiguous()
        chosen = launch.plan_of(call, backward=True)
        dgates, dinitial = launch.run_backward(call, chosen, kept, before, dout, dfinals)
    found: dict[str, Tensor | None] = dict(zip(call.cell.states, dinitial, strict=True))
    rows = input.reshape(steps * batch, input_size)
    found |= _products(call, dgates, rows, h_before.flatten(0, 1), kept, need)
    return tuple(found[name] if needed else None for name, needed in need.items())


def _kept(
    call: Layer, output: Tensor, saved: Tensor, input: Tensor, h_before: Tensor, valid: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The kept values, (T*B, n*H), and the states that entered each step."""
    from tidegate.kernels.triton import launch

    name, hidden_size = plan.kind_of(call), call.hidden_size
    before = (h_before,)
    if name == "lstm":
        c = saved[:, -hidden_size:].reshape(output.shape)
        before = (h_before, _before(call, c, call.states[1], valid))
    if name.startswith("rnn"):
        return output, before
    if saved.shape[-1] == _KEPT[name] * hidden_size:
        return saved, before
    x = linear(input, call.weights["weight_ih"], call.weights["bias_ih"]).flatten(0, 1).contiguous()
    _, kept = launch.run_pointwise(call, x, tuple(state.flatten(0, 1) for state in before), keep=True)
    return kept, before


def _products(
    call: Layer, dgates: Tensor, input: Tensor, h_before: Tensor, kept: Tensor, need: dict[str, bool]
) -> dict[str, Tensor | None]:
    """The gradients of input, weights and biases, each one product or sum over all steps."""
    kind, hidden_size = plan.kind_of(call), call.hidden_size
    of_input = dgates[:, dgates.shape[1] - len(call.cell.gates) * hidden_size :]
    found: dict[str, Tensor | None] = {}
    if need["input"]:
        found["input"] = (of_input @ call.weights["weight_ih"]).view(call.input.shape)
    if need["weight_ih"]:
        found["weight_ih"] = of_input.t() @ input
    if need["weight_hh"]:
        if kind == "gru":
            of_candidate, rest = dgates[:, :hidden_size], dgates[:, hidden_size : 3 * hidden_size]
            found["weight_hh"] = torch.cat((rest.t() @ h_before, of_candidate.t() @ h_before))
        elif kind == "gru_reset_before":
            rest, of_candidate = dgates.split([2 * hidden_size, hidden_size], 1)
            reset_h = h_before if kept.numel() == 0 else kept[:, :hidden_size] * h_before
            found["weight_hh"] = torch.cat((rest.t() @ h_before, of_candidate.t() @ reset_h))
        else:
            found["weight_hh"] = dgates.t() @ h_before
    if need["bias_ih"] or need["bias_hh"]:
        sums = dgates.sum(0)
        found["bias_ih"] = sums[sums.shape[0] - of_input.shape[1] :].clone()
        found["bias_hh"] = sums
        if kind == "gru":
            found["bias_hh"] = torch.cat((sums[hidden_size : 3 * hidden_size], sums[:hidden_size]))
    return found
