# SPDX-License-Identifier: Apache-2.0
"""Cells of TensorFlow v1, tf.compat.v1.nn.rnn_cell, from the variables of a checkpoint.

Letters: I input_size, H hidden_size (num_units), P num_proj, else H. A kernel [I+P, columns] multiplies [x, h] from the
right: its first I rows are weight_ih transposed, the others weight_hh transposed. The bias is our bias_ih, bias_hh 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tidegate.cell import GATE_ORDERS, GRU, LSTM, RNN, reordered
from tidegate.convert.canonical import Faults, Weights, activation, build_cell, class_name

_VARIABLES = {
    "GRUCell": ("gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias"),
    "BasicRNNCell": ("kernel", "bias"),
    "BasicLSTMCell": ("kernel", "bias"),
    "LSTMCell": ("kernel", "bias"),
}
_PEEPHOLES = ("w_i_diag", "w_f_diag", "w_o_diag")
_PROJECTION = "projection/kernel"
_OPTIONS = {
    "GRUCell": ("activation",),
    "BasicRNNCell": ("activation",),
    "BasicLSTMCell": ("activation", "forget_bias"),
    "LSTMCell": ("activation", "forget_bias", "use_peepholes", "num_proj", "cell_clip", "proj_clip"),
}
_ACTIVATIONS = {
    name: name
    for name in ("tanh", "relu", "sigmoid", "elu", "selu", "softsign", "softplus", "relu6", "linear", "silu", "swish")
} | {
    "swish": "silu",
    "identity": "linear",
    "exponential": "exponential",
    "exp": "exponential",
    "leaky_relu": "leaky_relu(0.2)",
    "hard_sigmoid": "hard_sigmoid(0.2,0.5)",
}


def from_tf1(cell_class: object, variables: Mapping[str, Any], *, scope: str = "", **options: object) -> Any:
    """A tidegate cell with a TensorFlow v1 cell's weights and meaning, for `tg.dynamic_rnn`.

    Args:
        cell_class: "GRUCell", "BasicRNNCell", "BasicLSTMCell" or "LSTMCell", or the class itself.
        variables: arrays by their names in a checkpoint, any scope before them:
            GRUCell: gates/kernel [I+H, 2H] columns r, u; gates/bias; candidate/kernel [I+H, H]; candidate/bias.
            BasicRNNCell: kernel [I+H, H], bias. BasicLSTMCell, LSTMCell: kernel [I+P, 4H] columns i, j, f, o; bias;
            with peepholes w_i_diag, w_f_diag, w_o_diag [H]; with a projection projection/kernel [H, P].
        scope: only variables whose names begin with it are read.
        options: the constructor's `activation, forget_bias, use_peepholes, num_proj, cell_clip, proj_clip`, with
            TensorFlow's defaults. `forget_bias` (1.0) goes into bias_ih.

    Returns:
        tg.GRUCell(reset_after=False), tg.RNNCell or tg.LSTMCell, of the arrays' dtype. Its state is h, for an LSTM
        (h, c), where TensorFlow's is (c, h). bias_hh is 0: to train one bias as TensorFlow does, freeze it.

    Raises:
        ConversionError: lists every option, variable and shape at fault.
    """
    name = class_name(cell_class)
    faults = Faults(f"from_tf1({name})")
    if name not in _VARIABLES:
        faults.option("cell_class", name, f"one of {', '.join(_VARIABLES)}")
        faults.raise_any()
    for option, value in options.items():
        if option not in _OPTIONS[name]:
            faults.option(option, value, f"{name} takes {', '.join(_OPTIONS[name])}")
    seen = len(faults.lines)
    faults.names("variables", variables)
    if not isinstance(scope, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        faults.option("scope", scope, "a text")
    if len(faults.lines) > seen:
        faults.raise_any()
    _check_options(faults, options)
    act = "tanh"
    if options.get("activation") is not None:
        act = activation(faults, "activation", options["activation"], _ACTIVATIONS)
    found = _found(faults, name, variables, scope, options)
    faults.raise_any()
    if name == "GRUCell":
        return _gru(faults, found, act)
    if name == "BasicRNNCell":
        return _rnn(faults, found, act)
    return _lstm(faults, found, act, options)


def _check_options(faults: Faults, options: Mapping[str, Any]) -> None:
    """Faults for values that TensorFlow's constructors do not take."""
    for name in ("cell_clip", "proj_clip"):
        if options.get(name) is not None and not (_is_number(options[name]) and options[name] > 0):
            faults.option(name, options[name], "a positive number, or None")
    if not _is_number(options.get("forget_bias", 1.0)):
        faults.option("forget_bias", options["forget_bias"], "a finite number")
    if not isinstance(options.get("use_peepholes") or False, bool):
        faults.option("use_peepholes", options["use_peepholes"], "True or False")
    size = options.get("num_proj")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        faults.option("num_proj", size, "a positive integer, or None")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _found(
    faults: Faults, name: str, variables: Mapping[str, Any], scope: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables by the names of `_VARIABLES`; faults for missing, double and unknown ones."""
    wanted = [*_VARIABLES[name]]
    known = [*wanted, *_PEEPHOLES, _PROJECTION] if name == "LSTMCell" else wanted
    found: dict[str, Any] = {}
    places: dict[str, list[str]] = {}
    for full, value in variables.items():
        if not full.startswith(scope):
            continue
        path = "/" + full.removesuffix(":0")
        tails = [tail for tail in known if path.endswith("/" + tail)]
        if not tails:
            faults.add(f"{full}: unknown variable; {name} has {', '.join(known)}")
            continue
        tail = max(tails, key=len)
        found[tail] = value
        places.setdefault(tail, []).append(full)
    for tail, fulls in places.items():
        if len(fulls) > 1:
            faults.add(f"{tail}: expected one, got {', '.join(fulls)}; choose one cell by scope=")
    for option, group in (("use_peepholes", _PEEPHOLES), ("num_proj", (_PROJECTION,))):
        given = bool(options[option]) if options.get(option) is not None else any(tail in found for tail in group)
        if given:
            wanted += group
        elif any(tail in found for tail in group):
            faults.add(f"{option}={options[option]!r}, but there are variables {', '.join(group)}")
    faults.lines += [f"{tail}: missing" for tail in wanted if tail not in found]
    return found


def _split(faults: Faults, name: str, value: object, gates: int, recurrent: int | None) -> tuple[Tensor, Tensor]:
    """A kernel [I+P, gates*H] as weight_ih (gates*H, I) and weight_hh (gates*H, P); P is H if None."""
    kernel = faults.tensor(name, value, (None, None), "[input_size+hidden_size, columns]")
    faults.raise_any()
    size = kernel.shape[1] // gates if recurrent is None else recurrent
    if kernel.shape[1] % gates or kernel.shape[0] <= size:
        letters = f"[input_size+{'hidden_size' if recurrent is None else 'num_proj'}, {gates}*hidden_size]"
        faults.add(f"{name}: expected {letters}, got {tuple(kernel.shape)}")
    faults.raise_any()
    input_size = kernel.shape[0] - size
    return kernel[:input_size].T, kernel[input_size:].T


def _gru(faults: Faults, found: dict[str, Any], act: str) -> Any:
    gates_ih, gates_hh = _split(faults, "gates/kernel", found["gates/kernel"], 2, None)
    hidden_size, input_size = gates_hh.shape[1], gates_ih.shape[1]
    shape = (input_size + hidden_size, hidden_size)
    kernel = faults.tensor(
        "candidate/kernel", found["candidate/kernel"], shape, "[input_size+hidden_size, hidden_size]"
    )
    bias = [
        faults.tensor("gates/bias", found["gates/bias"], (2 * hidden_size,), "[2*hidden_size]"),
        faults.tensor("candidate/bias", found["candidate/bias"], (hidden_size,), "[hidden_size]"),
    ]
    faults.same_dtype({"gates/kernel": gates_ih, "candidate/kernel": kernel, "gates/bias": bias[0], "bias": bias[1]})
    faults.raise_any()
    weights = {
        "weight_ih": torch.cat([gates_ih, kernel[:input_size].T]),
        "weight_hh": torch.cat([gates_hh, kernel[input_size:].T]),
        "bias_ih": torch.cat(bias),
    }
    return build_cell(GRU, weights, reset_after=False, activations=f"sigmoid,{act}")


def _rnn(faults: Faults, found: dict[str, Any], act: str) -> Any:
    weight_ih, weight_hh = _split(faults, "kernel", found["kernel"], 1, None)
    bias = faults.tensor("bias", found["bias"], (weight_hh.shape[0],), "[hidden_size]")
    faults.same_dtype({"kernel": weight_ih, "bias": bias})
    faults.raise_any()
    return build_cell(RNN, {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias}, activations=act)


def _lstm(faults: Faults, found: dict[str, Any], act: str, options: Mapping[str, Any]) -> Any:
    weight_hr = None
    if _PROJECTION in found:
        weight_hr = faults.tensor(
            _PROJECTION, found[_PROJECTION], (None, options.get("num_proj")), "[hidden_size, P]"
        ).T
        faults.raise_any()
    weight_ih, weight_hh = _split(faults, "kernel", found["kernel"], 4, None if weight_hr is None else len(weight_hr))
    hidden_size = weight_hh.shape[0] // 4
    if weight_hr is not None and weight_hr.shape[1] != hidden_size:
        faults.add(f"{_PROJECTION}: expected [hidden_size, P] = ({hidden_size}, P), got {tuple(weight_hr.T.shape)}")
    bias = faults.tensor("bias", found["bias"], (4 * hidden_size,), "[4*hidden_size]")
    peepholes = {
        tail: faults.tensor(tail, found[tail], (hidden_size,), "[hidden_size]") for tail in _PEEPHOLES if tail in found
    }
    faults.same_dtype({"kernel": weight_ih, "bias": bias, _PROJECTION: weight_hr, **peepholes})
    clips: dict[str, float | None] = {name: options.get(name) for name in ("cell_clip", "proj_clip")}
    forget_bias = options.get("forget_bias", 1.0)
    faults.raise_any()
    order, ours = GATE_ORDERS["tf1"][LSTM.name], "".join(LSTM.gates)
    bias = reordered(bias, order, ours)
    bias[hidden_size : 2 * hidden_size] += forget_bias
    weights: Weights = {
        "weight_ih": reordered(weight_ih, order, ours),
        "weight_hh": reordered(weight_hh, order, ours),
        "bias_ih": bias,
        "weight_hr": weight_hr,
        "weight_peephole": torch.cat(list(peepholes.values())) if peepholes else None,
    }
    # TensorFlow clips a projection alone: without one it reads no proj_clip.
    if weight_hr is None:
        clips["proj_clip"] = None
    return build_cell(LSTM, weights, activations=f"sigmoid,{act},{act}", **clips)
