# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU backend: calls the operators of csrc/, one forward and one backward.

Only the weights' gradients in bfloat16 are torch's. With `lengths`, only the valid steps take part, N in all: what is
kept between the forward and the backward is in that packed form.

Letters as in cells.py. The kept tensor has a row a step and batch row: r z n (W_hn h + b_hn) for a GRU, i f g o c for
an LSTM; an RNN's backward needs no more than its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidegate import kernels
from tidegate.cells import GRU, LSTM, RNN, Call, Cell, Form, extensions, is_extended

_LIBRARY = "tidegate_cpu.so"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_KINDS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "gru_reset_before": 4}
_SAVED_GATES = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 5, "gru": 4, "gru_reset_before": 3}

# Each kind by its cell and its options' values.
_KIND_OF = {
    (cell.name, *(cell.default_options | options).values()): kind
    for cell, options, kind in (
        (RNN, {}, "rnn_tanh"),
        (RNN, {"nonlinearity": "relu"}, "rnn_relu"),
        (LSTM, {}, "lstm"),
        (GRU, {}, "gru"),
        (GRU, {"reset_after": False}, "gru_reset_before"),
    )
}
_ABSENT = torch.empty(0, 0, 0, 0)  # a state or bias that is not given: no such tensor has four dimensions

Gradients = tuple[Tensor | None, ...]


@cache
def _missing() -> str | None:
    """Loads the compiled operators; says why if they cannot be loaded."""
    for folder in kernels.__path__:
        path = Path(folder) / _LIBRARY
        if path.exists():
            try:
                torch_ops: Any = torch.ops
                torch_ops.load_library(path)
            except OSError as error:
                return f"the compiled operators are not installed: {error}"
            return None
    return f"the compiled operators are not installed: no {_LIBRARY}; reinstall with a C++20 compiler"


def is_installed() -> bool:
    """Whether there is a library to load; loading it may still fail."""
    return any((Path(folder) / _LIBRARY).exists() for folder in kernels.__path__)


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
    return _KIND_OF[(call.cell.name, *call.options.values())]


def unsupported_reasons(call: Call) -> list[str]:
    """Why the compiled operators cannot run `call`; empty if they can. Never raises."""
    dtype = call.input.dtype
    if dtype in _DTYPES and not is_extended(call) and not _missing():
        for tensor in call.tensors:
            if tensor is not None and not (tensor.is_cpu and tensor.dtype is dtype and tensor.layout is torch.strided):
                break
        else:
            return []  # every streamed step comes this way
    return _reasons(call)


def slower_reasons(call: Call) -> list[str]:
    """Why torch's own operators, where they can run `call`, are the quicker; empty if they are not known to be.

    Large products in bfloat16, where the processor multiplies matrices (AMX): torch's use that, the kernels its
    vectors. No such processor has timed them; from these sizes on torch was the quicker on Zen 4 while its products ran
    at twice the kernels' rate. On Zen 4 both use the same instructions now, and nothing is left to torch. Measured
    2026-11-24, from B*H*H = 2**18 on: LSTM 0.96x to 1.5x torch.nn in inference and 0.95x to 8x in training, about even
    from 2**21 on at B >= 32; GRU and RNN 1.07x to 8x.
    """
    if call.input.dtype is not torch.bfloat16 or not _multiplies_matrices():
        return []
    steps, batch = call.input.shape[:2]
    hidden_size, least = call.hidden_size, 18 if call.cell is LSTM else 23
    if steps == 1 or batch * hidden_size * hidden_size < 2**least:
        return []
    return [f"torch's operators use AMX for bfloat16, and B*hidden_size**2 is 2**{least} or more"]


@cache
def _multiplies_matrices() -> bool:
    torch_cpu: Any = torch.cpu
    return torch_cpu._is_amx_tile_supported()


def _reasons(call: Call) -> list[str]:
    reasons = availability() + extensions(call)
    if call.input.dtype not in _DTYPES:
        reasons.append(f"input is {str(call.input.dtype).removeprefix('torch.')}, not float32, float64 or bfloat16")
    names = ("input", *(f"{state}_0" for state in call.cell.states), *call.weights)
    for name, tensor in zip(names, call.tensors, strict=True):
        if tensor is None:
            continue
        if not tensor.is_cpu:
            reasons.append(f"{name} is on {tensor.device}")
        elif tensor.layout is not torch.strided:
            reasons.append(f"{name} is {tensor.layout}")
        elif tensor.dtype is not call.input.dtype:
            reasons.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, unlike input")
    return reasons


def saved_shape(call: Call) -> tuple[int, ...]:
    """The shape of what `forward(call, save=True)` keeps for the backward."""
    gates = _SAVED_GATES[_kind(call)]
    if gates == 0:
        return (0,)
    return (call.input.shape[0] * call.input.shape[1], gates * call.hidden_size)


def _on_cpu(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """lengths and resets, which may be on any device."""
    lengths, resets = call.lengths, call.resets
    if lengths is not None:
        lengths = lengths.to("cpu", torch.int64)
    if resets is not None:
        resets = resets.to("cpu")
    return lengths, resets


def forward(call: Call, save: bool) -> tuple[Tensor, ...]:
    """Runs the sequence: output (T, B, P), the final states, and what `backward` needs, (0,) without `save`."""
    weights = call.weights
    h_0, c_0 = (*call.states, None)[:2]
    lengths, resets = _on_cpu(call)
    return tuple(_operator("forward")(
        _KINDS[_kind(call)], call.input, h_0, c_0, weights["weight_ih"], weights["weight_hh"],
        weights["bias_ih"], weights["bias_hh"], weights.get("weight_hr"), lengths, resets, call.reverse, save,
    ))  # fmt: skip


def backward(
    call: Call,
    output: Tensor,
    saved: Tensor,
    grad_output: Tensor | None,
    grad_states: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    overwrite: bool = False,
) -> Gradients:
    """The gradients of `Call.tensors`, in that order, None where not needed. With `overwrite`, `saved` may be lost."""
    weights = call.weights
    h_0, c_0 = (*call.states, None)[:2]
    grad_h_n, grad_c_n = (*grad_states, None)[:2]
    lengths, resets = _on_cpu(call)
    found = _operator("backward")(
        _KINDS[_kind(call)], saved, output, call.input, h_0, c_0, weights["weight_ih"], weights["weight_hh"],
        weights.get("weight_hr"), lengths, resets, call.reverse, grad_output, grad_h_n, grad_c_n,
        _wanted(needs, len(call.states)), overwrite,
    )  # fmt: skip
    if call.input.dtype is torch.bfloat16:
        *found, dgates, h_before, multiplied = found
        need = dict(zip(weights, needs[1 + len(call.states) :], strict=True))
        found += _bfloat16_products(call, dgates, h_before, multiplied, lengths, need).values()
    return _in_order(found, needs, len(call.states))


def recorded_backward(
    cell: Cell,
    options: Any,
    form: Form | None,
    tensors: Sequence[Tensor | None],
    output: Tensor,
    saved: Tensor,
    gradients: Sequence[Tensor | None],
    needs: tuple[bool, ...],
    overwrite: bool,
) -> Gradients:
    """`backends.Backend.recorded_backward`."""
    states = len(cell.states)
    input, h_0, *rest = tensors
    assert input is not None
    if input.dtype is torch.bfloat16:  # whose products of the weights are torch's
        return ()
    c_0 = rest[0] if states > 1 else None
    weight_ih, weight_hh = rest[states - 1 : states + 1]
    grad_output, grad_h_n, grad_c_n = (*gradients, None)[:3]
    found = _operator("recorded_backward")(
        _KINDS[_KIND_OF[(cell.name, *options)]], saved, output, input, h_0, c_0, weight_ih, weight_hh,
        grad_output, grad_h_n, grad_c_n, *_recorded_form(form), _wanted(needs, states), overwrite,
    )  # fmt: skip
    return _in_order(found, needs, states)


def _recorded_form(form: Form | None) -> tuple[bool, bool, bool, Tensor | None]:
    """The operators' is_cell, reverse, batch_first, lengths."""
    return (True, False, False, None) if form is None else (False, form.reverse, form.batch_first, form.lengths)


def _wanted(needs: tuple[bool, ...], states: int) -> int:
    """A bit for the states, then one for each of input and weights."""
    each = (any(needs[1 : 1 + states]), needs[0], *needs[1 + states :])
    return sum([need << place for place, need in enumerate(each)])


def _in_order(found: Sequence[Tensor], needs: tuple[bool, ...], states: int) -> Gradients:
    """The states' gradients, then those of input and weights that are wanted, in the order of `needs`."""
    rest = iter(found[states:])
    of_input = next(rest) if needs[0] else None
    of_states = [gradient if need else None for gradient, need in zip(found, needs[1 : 1 + states], strict=False)]
    return (of_input, *of_states, *[next(rest) if need else None for need in needs[1 + states :]])


def _bfloat16_products(
    call: Call, dgates: Tensor, h_before: Tensor, multiplied: Tensor, lengths: Tensor | None, need: dict[str, bool]
) -> dict[str, Tensor]:
    """torch's, which use the matrix instructions for bfloat16 where there are any."""
    hidden_size, columns = call.hidden_size, call.hidden_size * len(call.cell.gates)
    x_side = h_side = dgates[:, :columns]
    if _kind(call) == "gru":  # the n gate has its own gradient on h's side
        h_side = torch.cat((dgates[:, : 2 * hidden_size], dgates[:, columns:]), 1)
    grads: dict[str, Tensor] = {}
    if need["weight_ih"]:
        steps, batch, input_size = call.input.shape
        x = call.input.reshape(steps * batch, input_size)
        if lengths is not None:
            x = x.index_select(0, operators().places.default(lengths, steps, call.reverse))
        grads["weight_ih"] = x_side.t() @ x
    if need["weight_hh"] and _kind(call) == "gru_reset_before":
        halves = (h_side[:, : 2 * hidden_size].t() @ h_before, h_side[:, 2 * hidden_size :].t() @ multiplied)
        grads["weight_hh"] = torch.cat(halves)
    elif need["weight_hh"]:
        grads["weight_hh"] = h_side.t() @ h_before
    if need["bias_ih"]:
        grads["bias_ih"] = x_side.sum(0)
    if need["bias_hh"]:
        same = need["bias_ih"] and h_side is x_side
        grads["bias_hh"] = grads["bias_ih"].clone() if same else h_side.sum(0)
    if need.get("weight_hr"):
        grads["weight_hr"] = dgates[:, columns:].t() @ multiplied
    return grads


def prepare_step(calls: Sequence[Call]) -> Callable[..., Tensor]:
    """One step through a stack of layers, their weights packed for it, once.

    Args:
        calls: each layer's, over one step; all of one size but for the first layer's input.

    Returns:
        `step(input, *states) -> output`: input (B, I), states (L, B, .), replaced in place once all is computed.
    """
    first = calls[0]
    biased = any(call.weights[name] is not None for call in calls for name in ("bias_ih", "bias_hh"))
    projects = first.weights.get("weight_hr") is not None
    pieces: list[Tensor] = []
    for call in calls:
        weights = call.weights
        none = weights["weight_ih"].new_zeros(weights["weight_ih"].shape[0])
        biases = [none if weights[name] is None else weights[name] for name in ("bias_ih", "bias_hh")]
        pieces += [weights["weight_ih"], weights["weight_hh"], *biases * biased]
        pieces += [weights["weight_hr"]] if projects else []
    packed = operators().pack.default(_KINDS[_kind(first)], [p.contiguous() for p in pieces], biased, projects)
    return partial(operators().step.default, packed)


def short_step(
    cell: Cell, options: Any, input: Tensor, states: Sequence[Any], weights: Sequence[Any]
) -> Sequence[Tensor]:
    """`backends.ShortWay.step`: the operator checks for itself, and answers nothing to what is not for it."""
    kind, h, c = _read_short(cell, options, states)
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    if bias_ih is None and bias_hh is None:
        bias_ih = bias_hh = _ABSENT
    if kind is None or bias_ih is None or bias_hh is None:
        return ()
    return _operator("cell_step")(kind, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)


def short_layers(
    cell: Cell, options: Any, input: Tensor, states: Sequence[Any], weights: Sequence[Any], form: Form
) -> Sequence[Tensor]:
    """`backends.ShortWay.layers`, as `short_step`."""
    kind, h, c = _read_short(cell, options, states)
    if kind is None or (input.dtype is torch.bfloat16 and _multiplies_matrices()):
        return ()
    found = [weight for weight in weights if weight is not None]
    return _operator("layers")(kind, input, h, c, found, *form)


def _read_short(cell: Cell, options: Any, states: Sequence[Any]) -> tuple[int | None, Any, Any]:
    """The operators' number of a kind, and its states; None for what they do not run."""
    kind = _KIND_OF.get((cell.name, *options))
    h, c = (*states, _ABSENT, _ABSENT)[:2]
    if kind is None or _missing() or len(states) not in (0, len(cell.states)):
        return None, h, c
    if not isinstance(h, Tensor) or not isinstance(c, Tensor):
        return None, h, c
    return _KINDS[kind], h, c


def recorded_forward(
    cell: Cell, options: Any, form: Form | None, input: Tensor, *tensors: Tensor | None
) -> Sequence[Tensor]:
    """`backends.Backend.recorded_forward`: the operator checks for itself."""
    kind = _KIND_OF.get((cell.name, *options))
    if kind is None or _missing() or (form and input.dtype is torch.bfloat16 and _multiplies_matrices()):
        return ()
    present = [_ABSENT if tensor is None else tensor for tensor in tensors]
    return _operator("recorded_forward")(_KINDS[kind], input, *present, *_recorded_form(form))


@cache
def _operator(name: str) -> Callable[..., list[Tensor]]:
    return getattr(operators(), name).default
