# SPDX-License-Identifier: Apache-2.0
"""GRU, LSTM and RNN nodes of an ONNX model. The model is read, never run.

Letters as in onnx_names.py.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from tidegate.cell import GRU, LSTM, Cell
from tidegate.convert.canonical import Faults, Weights, build_layer
from tidegate.convert.onnx_file import Constants, load
from tidegate.convert.onnx_graph import Place, Wiring, is_recurrent, places
from tidegate.convert.onnx_names import CELLS, direction_weights, read_activations

_INPUTS: tuple[str, ...] = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
# Of each attribute the field of its AttributeProto.
_ATTRIBUTES = {
    "RNN": {
        "activation_alpha": "FLOATS",
        "activation_beta": "FLOATS",
        "activations": "STRINGS",
        "clip": "FLOAT",
        "direction": "STRING",
        "hidden_size": "INT",
        "layout": "INT",
    },
}
_ATTRIBUTES["GRU"] = {**_ATTRIBUTES["RNN"], "linear_before_reset": "INT"}
_ATTRIBUTES["LSTM"] = {**_ATTRIBUTES["RNN"], "input_forget": "INT"}
# What passes a state on, larger or in another form.
_SPREADS = ("Expand", "Tile", "Identity", "Cast", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Gather")


class _Layer(NamedTuple):
    """One node in our terms."""

    cell: Cell
    directions: list[Weights]
    options: dict[str, Any]
    takes_lengths: bool


def from_onnx(model_or_path: object, node: str | None = None, *, batch_first: bool | None = None) -> Any:
    """A tidegate layer with the weights and meaning of a GRU, LSTM or RNN node.

    Args:
        model_or_path: an onnx.ModelProto, or the path of an .onnx file; needs the package onnx.
        node: the node's name, or the name of its output Y; where names repeat in branches and bodies, with its place
            before it, "If_0.then_branch/name". None: the only one there is, or the stack that all of them make, each
            fed by the one before.
        batch_first: whether the layer takes and returns (B, T, ...). None: as the Transposes around the node and its
            attribute layout say; where they disagree, it must be given.

    Returns:
        tg.GRU, tg.LSTM or tg.RNN; `reverse=True` for direction "reverse". Its output is (T, B, D*H), where Y is
        (T, D, B, H), or (B, T, D*H); its states are (L*D, B, H), with layout=1 too. A row of length 0 keeps its initial
        state, where onnxruntime returns 0. Lengths and initial states that the model computes are the caller's to give;
        Dropout between the nodes, which does nothing but in training, is left out.

    Raises:
        ConversionError: lists every attribute, input and shape at fault; or the file is no ONNX model, is damaged, or
            refers to data outside its folder.
        ImportError: onnx is missing: `pip install tidegate[convert]`.
    """
    source = f"from_onnx({model_or_path!r})" if isinstance(model_or_path, (str, os.PathLike)) else "from_onnx"
    model, folder = load(model_or_path, source)
    faults = Faults(source)
    chosen = choose(faults, model, node)
    wiring = Wiring(folder)
    layers = [_read(faults, place, wiring) for place in chosen]
    faults.raise_any()
    if len(layers) > 1:
        _check_stack(faults, wiring, chosen, layers)
    if batch_first is None:
        batch_first = wiring.batch_first(faults, _label(chosen[0]), chosen[0], chosen[-1])
    faults.raise_any()
    directions = [direction for layer in layers for direction in layer.directions]
    return build_layer(layers[0].cell, directions, len(layers), batch_first=batch_first, **layers[0].options)


def choose(faults: Faults, model: object, name: str | None) -> list[Place]:
    """The recurrent nodes of this name, wherever they stand; of no name, all.

    Raises:
        ConversionError: there is none, or there are several of the name; the message says what there is, and where.
    """
    every = list(places(model))
    for place in every:
        node = place.node
        names = (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
        # protobuf hands out as bytes what is no UTF-8.
        if not all(isinstance(text, str) for text in names):
            faults.add(f"a node of {place.path or 'the main graph'}: its names are no text in UTF-8: damaged")
            faults.raise_any()
    found = [place for place in every if is_recurrent(place.node)]
    chosen = [place for place in found if place.is_named(name)]
    if not chosen or (name is not None and len(chosen) > 1):
        names = ", ".join(map(str, found)) or "none"
        faults.add(f"node={name!r}: {'not found' if not chosen else 'more than one'}; GRU, LSTM and RNN nodes: {names}")
        others = [str(p) for p in every if not is_recurrent(p.node) and any(kind in p.node.op_type for kind in CELLS)]
        if others:
            faults.add(f"not of ONNX's own operators, and not read: {', '.join(others)}")
        if not found:
            faults.add("a recurrence that is written out in other operators is not recognized")
    if name is None and len(chosen) > 1 and any(place.path for place in chosen):
        names = ", ".join(map(str, chosen))
        faults.add(f"several nodes, not all of them in the main graph: choose one by node=, of {names}")
    faults.raise_any()
    return chosen


def _label(place: Place) -> str:
    return f"{place.full_name}: "


def _attributes(faults: Faults, label: str, node: Any) -> dict[str, Any]:
    """The node's attributes, each of the type that the standard gives it; strings as str."""
    from onnx import AttributeProto, helper

    known = _ATTRIBUTES[node.op_type]
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        name = attribute.name
        if name not in known:
            has_value = attribute.type and not attribute.ref_attr_name
            value = helper.get_attribute_value(attribute) if has_value else None
            faults.option(label + name, value, f"known are {', '.join(sorted(known))}")
        elif attribute.ref_attr_name:
            faults.add(f"{label}{name} is the function's attribute {attribute.ref_attr_name!r}: inline the function, "
                       "onnx.inliner.inline_local_functions")  # fmt: skip
        elif attribute.type != AttributeProto.AttributeType.Value(known[name]):
            kind = AttributeProto.AttributeType.Name(attribute.type)
            faults.add(f"{label}{name}: expected an attribute of type {known[name]}, got {kind}")
        else:
            value = helper.get_attribute_value(attribute)
            texts = [value] if known[name] == "STRING" else value if known[name] == "STRINGS" else []
            decoded = [text.decode("utf-8", "backslashreplace") for text in texts]
            found[name] = value if not texts else decoded if known[name] == "STRINGS" else decoded[0]
    return found


def _read(faults: Faults, place: Place, wiring: Wiring) -> _Layer:
    node, label = place.node, _label(place)
    cell = CELLS[node.op_type]
    constants = wiring.constants(place.graphs)
    attributes = _attributes(faults, label, node)
    direction = attributes.get("direction", "forward")
    if direction not in ("forward", "reverse", "bidirectional"):
        faults.option(label + "direction", direction, "forward, reverse or bidirectional")
    for name in ("layout", "linear_before_reset", "input_forget"):
        if attributes.get(name, 0) not in (0, 1):
            faults.option(label + name, attributes[name], "0 or 1")
    count = 2 if direction == "bidirectional" else 1
    inputs: dict[str, str] = dict(zip(_INPUTS, node.input, strict=False))
    if len(node.input) > (most := 8 if cell is LSTM else 6):
        faults.add(f"{label}expected at most {most} inputs, got {len(node.input)}")
    if attributes.get("hidden_size", 1) < 1:
        faults.option(label + "hidden_size", attributes.pop("hidden_size"), "a positive number")
    directions = _weights(faults, label, cell, inputs, constants, count, attributes.get("hidden_size"))
    _check_states(faults, label, inputs, wiring, place)
    alphas, betas = attributes.get("activation_alpha", []), attributes.get("activation_beta", [])
    options: dict[str, Any] = {
        "activations": read_activations(faults, cell, attributes.get("activations", []), alphas, betas, count),
        "reverse": direction == "reverse",
    }
    if "clip" in attributes:
        options["clip"] = attributes["clip"]
        if not 0 < options["clip"] < math.inf:
            faults.option(label + "clip", options["clip"], "a positive number")
    if cell is GRU:
        options["reset_after"] = bool(attributes.get("linear_before_reset", 0))
    if cell is LSTM:
        options["coupled"] = bool(attributes.get("input_forget", 0))
    return _Layer(cell, directions, options, bool(inputs.get("sequence_lens")))


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


def _check_states(faults: Faults, label: str, inputs: dict[str, str], wiring: Wiring, place: Place) -> None:
    """Lengths and initial states are the caller's; one that the model holds as a constant would be lost."""
    constants = wiring.constants(place.graphs)
    if inputs.get("sequence_lens") in constants:
        faults.add(f"{label}sequence_lens is a constant: make it an input of the model; here it is lengths=")
    for name in ("initial_h", "initial_c"):
        if any(_holds_a_number(faults, held, constants) for held in _origins(inputs.get(name, ""), wiring, place)):
            faults.add(f"{label}{name} is a constant that is not 0: make it an input of the model; here it is hx")


def _origins(name: str, wiring: Wiring, place: Place) -> list[str]:
    """The constants that a state is made of; nothing of what the model computes."""
    constants, producers = wiring.constants(place.graphs), wiring.producers(place.graphs)
    found: list[str] = []
    seen: set[str] = set()
    work = [name]
    while work:
        name = work.pop()
        node, _ = producers.get(name, (None, 0))
        if name in seen:
            continue
        seen.add(name)
        if name in constants or (node is not None and node.op_type == "ConstantOfShape"):
            found.append(name)
        elif node is not None and node.op_type in (*_SPREADS, "Concat") and node.input:
            work += node.input if node.op_type == "Concat" else node.input[:1]
    return [held for held in found if held in constants or _fills(producers[held][0])]


def _fills(node: Any) -> bool:
    """Whether a ConstantOfShape fills with anything but 0."""
    from onnx import numpy_helper

    return any(bool(numpy_helper.to_array(attribute.t).any()) for attribute in node.attribute)


def _holds_a_number(faults: Faults, name: str, constants: Constants) -> bool:
    if name not in constants:
        return True
    value = constants.read(faults, name)
    return value is not None and bool(value.any())


def _check_stack(faults: Faults, wiring: Wiring, nodes: list[Place], layers: list[_Layer]) -> None:
    """Several nodes are one layer of ours if each feeds the next and all are alike."""
    for before, after in pairwise(nodes):
        if not wiring.is_fed_by(after, before):
            faults.add(f"{after.full_name} is not fed by {before.full_name} as it is, rows and steps at their places")
    first = layers[0]
    width = len(first.directions) * first.directions[0]["weight_hh"].shape[1]
    rows = {name: weight.shape[0] for name, weight in first.directions[0].items()}
    for k, layer in enumerate(layers[1:], 1):
        alike = layer.cell is first.cell and layer.options == first.options
        alike = alike and layer.directions[0]["weight_ih"].shape[1] == width
        shapes = [{name: weight.shape[0] for name, weight in direction.items()} for direction in layer.directions]
        if not alike or shapes != [rows] * len(first.directions):
            faults.add(f"node {k} differs from the first in kind, options, biases or sizes")
        if layer.takes_lengths != first.takes_lengths:
            faults.add(f"node {k} and the first: one has an input sequence_lens and one has none")
    if faults.lines:
        faults.add(f"several nodes that make no stack: choose one by node=, of {', '.join(map(str, nodes))}")
    faults.raise_any()
