# SPDX-License-Identifier: Apache-2.0
"""GRU, LSTM and RNN nodes of an ONNX model. The model is read, never run.

Letters as in onnx_names.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from tidegate.cells import GRU, LSTM, Cell
from tidegate.convert.canonical import Faults, Weights, build_layer
from tidegate.convert.onnx_file import Constants, load
from tidegate.convert.onnx_names import CELLS, direction_weights, read_activations

_INPUTS: tuple[str, ...] = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_ATTRIBUTES = {
    "RNN": {"activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "layout"},
}
_ATTRIBUTES["GRU"] = _ATTRIBUTES["RNN"] | {"linear_before_reset"}
_ATTRIBUTES["LSTM"] = _ATTRIBUTES["RNN"] | {"input_forget"}
# What may stand between two nodes of a stack: they move or rename features, and compute nothing.
_LINKS = ("Transpose", "Squeeze", "Reshape", "Identity", "Dropout")


class _Layer(NamedTuple):
    """One node in our terms."""

    cell: Cell
    directions: list[Weights]
    options: dict[str, Any]


def from_onnx(model_or_path: Any, node: str | None = None) -> Any:
    """A tidegate layer with the weights and meaning of a GRU, LSTM or RNN node.

    Args:
        model_or_path: an onnx.ModelProto, or the path of an .onnx file; needs the package onnx.
        node: the node's name, or the name of its output Y. None: the only one there is, or the stack that all of them
            make, each fed by the one before.

    Returns:
        tg.GRU, tg.LSTM or tg.RNN; batch_first for layout=1, `reverse=True` for direction "reverse". Its output is
        (T, B, D*H), where Y is (T, D, B, H); a row of length 0 keeps its initial state, where onnxruntime returns 0.

    Raises:
        ConversionError: lists every attribute, input and shape at fault; or the file is no ONNX model, is damaged, or
            refers to data outside its folder.
        ImportError: onnx is missing: `pip install tidegate[convert]`.
    """
    source = f"from_onnx({model_or_path!r})" if isinstance(model_or_path, (str, os.PathLike)) else "from_onnx"
    model, folder = load(model_or_path, source)
    found = list(recurrent_nodes(model))
    chosen = [n for n in found if node in (None, n.name, n.output[0])]
    faults = Faults(source)
    if not chosen or (node is not None and len(chosen) > 1):
        names = ", ".join(f"{n.name or n.output[0]} ({n.op_type})" for n in found) or "none"
        faults.add(f"node={node!r}: {'not found' if not chosen else 'more than one'}; GRU, LSTM and RNN nodes: {names}")
    faults.raise_any()
    constants = Constants(model, folder)
    layers = [_read(faults, n, constants) for n in chosen]
    faults.raise_any()
    if len(layers) > 1:
        _check_stack(faults, model, chosen, layers)
    directions = [direction for layer in layers for direction in layer.directions]
    return build_layer(layers[0].cell, directions, len(layers), **layers[0].options)


def recurrent_nodes(model: Any) -> Iterator[Any]:
    """The GRU, LSTM and RNN nodes of the main graph, in order."""
    return (n for n in model.graph.node if n.op_type in CELLS and n.domain in ("", "ai.onnx"))


def _read(faults: Faults, node: Any, constants: Constants) -> _Layer:
    from onnx import helper

    label = f"{node.name or node.output[0]}: "
    cell = CELLS[node.op_type]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    for name in attributes.keys() - _ATTRIBUTES[node.op_type]:
        faults.option(label + name, attributes[name], f"known are {', '.join(sorted(_ATTRIBUTES[node.op_type]))}")
    direction = attributes.get("direction", b"forward").decode()
    if direction not in ("forward", "reverse", "bidirectional"):
        faults.option(label + "direction", direction, "forward, reverse or bidirectional")
    count = 2 if direction == "bidirectional" else 1
    inputs: dict[str, str] = dict(zip(_INPUTS, node.input, strict=False))
    directions = _weights(faults, label, cell, inputs, constants, count, attributes.get("hidden_size"))
    _check_states(faults, label, inputs, constants)
    names = [name.decode() for name in attributes.get("activations", [])]
    alphas, betas = attributes.get("activation_alpha", []), attributes.get("activation_beta", [])
    options: dict[str, Any] = {
        "activations": read_activations(faults, cell, names, alphas, betas, count),
        "batch_first": bool(attributes.get("layout", 0)),
        "reverse": direction == "reverse",
    }
    if "clip" in attributes:
        options["clip"] = float(attributes["clip"])
        if not options["clip"] > 0:
            faults.option(label + "clip", options["clip"], "a positive number")
    if cell is GRU:
        options["reset_after"] = bool(attributes.get("linear_before_reset", 0))
    if cell is LSTM:
        options["coupled"] = bool(attributes.get("input_forget", 0))
    return _Layer(cell, directions, options)


def _weights(
    faults: Faults,
    label: str,
    cell: Cell,
    inputs: dict[str, str],
    constants: Constants,
    count: int,
    hidden: int | None,
) -> list[Weights]:
    """Each direction's weights; none where one is at fault."""
    arrays: dict[str, Any] = {}
    for name in ("W", "R", "B", "P"):
        given = inputs.get(name, "")
        if not given or (name == "P" and cell is not LSTM):
            continue
        if given not in constants:
            faults.add(f"{label}{name} = {given!r} is no constant of the model; fold its constants first")
            continue
        arrays[name] = constants.read(faults, given)
    faults.lines += [f"{label}{name}: missing" for name in ("W", "R") if not inputs.get(name)]
    if any(value is None for value in arrays.values()) or not {"W", "R"} <= arrays.keys():
        return []
    gates = len(cell.gates)
    size = hidden or (arrays["R"].shape[2] if arrays["R"].ndim == 3 else None)
    rows = None if size is None else gates * size
    tensors: dict[str, Tensor] = {
        "W": faults.tensor(label + "W", arrays["W"], (count, rows, None), f"(D, {gates}*H, I)"),
        "R": faults.tensor(label + "R", arrays["R"], (count, rows, size), f"(D, {gates}*H, H)"),
    }
    if "B" in arrays:
        expected = None if rows is None else 2 * rows
        tensors["B"] = faults.tensor(label + "B", arrays["B"], (count, expected), f"(D, 2*{gates}*H)")
    if "P" in arrays:
        tensors["P"] = faults.tensor(label + "P", arrays["P"], (count, 3 * size if size else None), "(D, 3*H)")
    faults.same_dtype({label + name: tensor for name, tensor in tensors.items()})
    parts = ([tensor[k] for tensor in (tensors["W"], tensors["R"])] for k in range(count))
    b, p = tensors.get("B"), tensors.get("P")
    return [
        direction_weights(cell, w, r, None if b is None else b[k], None if p is None else p[k])
        for k, (w, r) in enumerate(parts)
    ]


def _check_states(faults: Faults, label: str, inputs: dict[str, str], constants: Constants) -> None:
    """Lengths and initial states are the caller's; one that the model holds as a constant would be lost."""
    if inputs.get("sequence_lens") in constants:
        faults.add(f"{label}sequence_lens is a constant: make it an input of the model; here it is lengths=")
    for name in ("initial_h", "initial_c"):
        if inputs.get(name) in constants:
            value = constants.read(faults, inputs[name])
            if value is not None and value.any():
                faults.add(f"{label}{name} is a constant that is not 0: make it an input of the model; here it is hx")


def _check_stack(faults: Faults, model: Any, nodes: list[Any], layers: list[_Layer]) -> None:
    """Several nodes are one layer of ours if each feeds the next and all are alike."""
    producers = {output: n for n in model.graph.node for output in n.output}
    for before, after in pairwise(nodes):
        name = after.input[0]
        while name in producers and producers[name].op_type in _LINKS:
            name = producers[name].input[0]
        if name != before.output[0]:
            faults.add(f"{after.name or after.output[0]} is not fed by {before.name or before.output[0]}")
    first = layers[0]
    width = len(first.directions) * first.directions[0]["weight_hh"].shape[1]
    rows = {name: weight.shape[0] for name, weight in first.directions[0].items()}
    for k, layer in enumerate(layers[1:], 1):
        alike = layer.cell is first.cell and layer.options == first.options
        alike = alike and layer.directions[0]["weight_ih"].shape[1] == width
        shapes = [{name: weight.shape[0] for name, weight in direction.items()} for direction in layer.directions]
        if not alike or shapes != [rows] * len(first.directions):
            faults.add(f"node {k} differs from the first in kind, options, biases or sizes")
    if faults.lines:
        names = ", ".join(n.name or n.output[0] for n in nodes)
        faults.add(f"several nodes that make no stack: choose one by node=, of {names}")
    faults.raise_any()
