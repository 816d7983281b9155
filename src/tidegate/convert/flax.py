# SPDX-License-Identifier: Apache-2.0
"""Cells of Flax, linen and nnx, from their parameters.

Letters: I input_size, H hidden_size (features). A kernel (I, H) multiplies from the right: it is our block transposed.
linen has a Dense for each gate; nnx, but for its LSTMCell, one dense_i and one dense_h for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tidegate.cell import GRU, LSTM, RNN, Cell
from tidegate.convert.canonical import Faults, Weights, activation, build_cell, class_name

# Of each class: our cell, and for each of its gates the letter in the names of the Dense layers, (i or h) + letter.
_GATED = {
    "GRUCell": (GRU, ("r", "z", "n")),
    "LSTMCell": (LSTM, ("i", "f", "g", "o")),
    "OptimizedLSTMCell": (LSTM, ("i", "f", "g", "o")),
    "SimpleCell": (RNN, ("",)),
}
_ACTIVATIONS = {
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu": "relu",
    "identity": "linear",
    "elu": "elu",
    "selu": "selu",
    "silu": "silu",
    "swish": "silu",
    "softplus": "softplus",
    "soft_sign": "softsign",
    "leaky_relu": "leaky_relu",
    "relu6": "relu6",
    "gelu": "gelu_tanh",
    "hard_tanh": "hard_tanh",
    "log_sigmoid": "log_sigmoid",
    "mish": "mish",
    "exp": "exponential",
    "hard_sigmoid": f"hard_sigmoid({1 / 6!r},0.5)",
}


def from_flax(cell_class: object, params: object, **options: object) -> Any:
    """A tidegate cell with a Flax cell's weights and meaning, for `tg.dynamic_rnn` or `convert.as_layer`.

    Args:
        cell_class: "GRUCell", "LSTMCell", "OptimizedLSTMCell" or "SimpleCell" of flax.linen or flax.nnx, or the class.
        params: the cell's parameters: linen's nested dict, with or without "params" and the cell's name around it, or
            flat with "ir/kernel" as names; nnx.state(cell, nnx.Param), as it is or as a dict.
        options: the constructor's `activation_fn` and `gate_fn`, by name or as functions, and SimpleCell's `residual`;
            Flax's defaults.

    Returns:
        tg.GRUCell, tg.LSTMCell or tg.RNNCell, of the arrays' dtype. An LSTM's state is (h, c), where Flax's is (c, h).

    Raises:
        ConversionError: lists every option, parameter and shape at fault.
    """
    name = class_name(cell_class)
    faults = Faults(f"from_flax({name})")
    if name not in _GATED:
        faults.option("cell_class", name, f"one of {', '.join(_GATED)}")
        faults.raise_any()
    cell, letters = _GATED[name]
    known = ("activation_fn", "residual") if cell is RNN else ("activation_fn", "gate_fn")
    for option, value in options.items():
        if option not in known:
            faults.option(option, value, f"{name} takes {', '.join(known)}")
    act = activation(faults, "activation_fn", options.get("activation_fn", "tanh"), _ACTIVATIONS)
    gate = activation(faults, "gate_fn", options.get("gate_fn", "sigmoid"), _ACTIVATIONS)
    faults.names("params", params)
    faults.raise_any()
    found = _flat(faults, params)
    fused = any(path.startswith("dense_") for path in found)
    weights = _fused(faults, cell, found) if fused else _separate(faults, cell, letters, found)
    faults.raise_any()
    if cell is RNN:
        if options.get("residual"):
            # h' = act(W x + b + W_h h + h).
            weights["weight_hh"] = weights["weight_hh"] + torch.eye(len(weights["weight_hh"])).to(weights["weight_hh"])
        return build_cell(RNN, weights, activations=act)
    return build_cell(cell, weights, activations=",".join([gate] + [act] * (len(cell.activations) - 1)))


def _flat(faults: Faults, params: object) -> dict[str, Any]:
    """Arrays by "dense/kernel": the last two names of each path, wherever the cell stands; a fault for two cells."""
    found: dict[str, Any] = {}
    cells: dict[str, None] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for key, inner in node.items():
                walk(inner, (*path, *str(key).split("/")))
        else:
            # nnx calls its if-gate "if_" beside Python's keyword.
            dense, leaf = (*path, "", "")[:2] if len(path) < 2 else path[-2:]
            cells["/".join(path[:-2])] = None
            found[f"{dense.rstrip('_')}/{leaf}"] = node[...] if hasattr(node, "raw_value") else node

    walk(params, ())
    if len(cells) > 1:
        faults.add(f"params: expected those of one cell, got parameters below {', '.join(map(repr, cells))}; give one")
    return found


def _separate(faults: Faults, cell: Cell, letters: tuple[str, ...], found: dict[str, Any]) -> Weights:
    """linen's, and nnx's LSTMs: one Dense for each gate and side. An absent bias is zero."""
    names = {side: [side + letter for letter in letters] for side in "ih"}
    expected = [f"{dense}/{leaf}" for side in "ih" for dense in names[side] for leaf in ("kernel", "bias")]
    faults.lines += [f"{path}: unknown parameter" for path in found if path not in expected]
    missing = [f"{dense}/kernel" for side in "ih" for dense in names[side] if f"{dense}/kernel" not in found]
    faults.lines += [f"{path}: missing" for path in missing]
    faults.raise_any()
    first = faults.tensor(f"{names['i'][0]}/kernel", found[f"{names['i'][0]}/kernel"], (None, None), "(I, H)")
    faults.raise_any()
    input_size, hidden_size = first.shape
    read: dict[str, Tensor] = {}
    for path, value in found.items():
        rows = input_size if path.startswith("i") else hidden_size
        shape, words = ((rows, hidden_size), f"({'I' if path.startswith('i') else 'H'}, H)")
        if path.endswith("/bias"):
            shape, words = (hidden_size,), "(H,)"
        read[path] = faults.tensor(path, value, shape, words)
    faults.same_dtype(read)
    faults.raise_any()
    weights: Weights = {}
    for side, denses in names.items():
        weights[f"weight_{side}h"] = torch.cat([read[f"{dense}/kernel"].T for dense in denses])
        biases = [read.get(f"{dense}/bias") for dense in denses]
        if any(bias is not None for bias in biases):
            weights[f"bias_{side}h"] = torch.cat([first.new_zeros(hidden_size) if b is None else b for b in biases])
    return weights


def _fused(faults: Faults, cell: Cell, found: dict[str, Any]) -> Weights:
    """nnx's GRUCell (r, z, n) and SimpleCell, with a bias in dense_i; OptimizedLSTMCell (i, f, g, o), in dense_h."""
    expected = ("dense_i/kernel", "dense_i/bias", "dense_h/kernel", "dense_h/bias")
    faults.lines += [
        f"{path}: unknown parameter; expected {', '.join(expected)}" for path in found if path not in expected
    ]
    faults.lines += [f"{path}: missing" for path in expected if path not in found and not path.endswith("bias")]
    faults.raise_any()
    gates = len(cell.gates)
    recurrent = faults.tensor("dense_h/kernel", found["dense_h/kernel"], (None, None), f"(H, {gates}*H)")
    faults.raise_any()
    rows = gates * recurrent.shape[0]
    if recurrent.shape[1] != rows:
        faults.add(f"dense_h/kernel: expected (H, {gates}*H), got {tuple(recurrent.shape)}")
    kernel = faults.tensor("dense_i/kernel", found["dense_i/kernel"], (None, rows), f"(I, {gates}*H)")
    weights: Weights = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    for side in "ih":
        if f"dense_{side}/bias" in found:
            bias = faults.tensor(f"dense_{side}/bias", found[f"dense_{side}/bias"], (rows,), f"({gates}*H,)")
            weights[f"bias_{side}h"] = bias
    faults.same_dtype(weights)
    return weights
