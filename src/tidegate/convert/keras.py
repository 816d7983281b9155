# SPDX-License-Identifier: Apache-2.0
"""Layers of Keras 3: SimpleRNN, GRU, LSTM, RNN of their cells or of a stack of them, and Bidirectional(concat).

Letters: I input_size, H hidden_size (units). A kernel (I, G*H) multiplies from the right: it is our weight transposed,
its gates in Keras' order. One bias is our bias_ih, with bias_hh 0; a GRU's (2, 3H) is bias_ih and bias_hh.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from tidegate.cell import GATE_ORDERS, GRU, LSTM, RNN, Cell, reordered
from tidegate.convert import keras_file
from tidegate.convert.canonical import Faults, Weights, activation, build_layer, class_name
from tidegate.errors import ConversionError

_CELLS: dict[str, Cell] = {"SimpleRNN": RNN, "GRU": GRU, "LSTM": LSTM}
_SUPPORTED = f"{', '.join(_CELLS)}, RNN of their cells, or Bidirectional of one of these"
# What a class that is not supported is, and what to do about it.
_REFUSALS = {
    "TimeDistributed": "it runs what is inside along another axis: convert that, from_keras(config['layer']"
    "['class_name'], config['layer']['config'], weights), and run it on the rows and outer steps together",
    "StackedRNNCells": "it is a cell: give the config of the RNN around it",
    **dict.fromkeys((f"{name}Cell" for name in _CELLS), "it is a cell: give the config of the RNN around it"),
    **dict.fromkeys(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), "its cell convolves; there is none like it here"),
    **dict.fromkeys(("CuDNNGRU", "CuDNNLSTM"), "load the model in Keras and save it again: it becomes GRU or LSTM"),
}
_SAME = ("tanh", "relu", "sigmoid", "linear", "softplus", "softsign", "selu", "elu", "exponential")
_ACTIVATIONS = {
    **{name: name for name in (*_SAME, "gelu", "silu", "mish", "relu6", "log_sigmoid", "hard_tanh")},
    "swish": "silu",
    "leaky_relu": "leaky_relu(0.2)",
    "hard_sigmoid": f"hard_sigmoid({1 / 6!r},0.5)",
}
# How a layer is called, initialized or run: nothing that its weights mean depends on these.
_CALL = {"return_sequences", "return_state", "stateful", "unroll", "zero_output_for_mask", "go_backwards"}
_IDLE = {
    *("name", "trainable", "dtype", "seed", "implementation", "use_cudnn", "unit_forget_bias", "batch_input_shape"),
    *("kernel_initializer", "recurrent_initializer", "bias_initializer", "input_shape", "build_config"),
}
_MEANING = {"units", "activation", "recurrent_activation", "use_bias", "reset_after"}
_TRAINING = {
    *(f"{part}_{what}" for part in ("kernel", "recurrent", "bias") for what in ("regularizer", "constraint")),
    *("dropout", "recurrent_dropout", "activity_regularizer"),
}


class _Direction(NamedTuple):
    """One direction's layers, from the lowest up; of nothing but a stack more than one."""

    cell: Cell
    layers: list[Weights]
    options: dict[str, Any]
    backwards: bool


def from_keras(
    source: Any,
    config: Mapping[str, Any] | None = None,
    weights: Sequence[Any] | None = None,
    *,
    layer: str | None = None,
    inference_only: bool = False,
) -> Any:
    """A batch-first tidegate layer with a Keras 3 layer's weights and meaning.

    Args:
        source: a layer (built, on any Keras backend); the name of its class, with config and weights; or the path of a
            .keras file, which needs h5py and not Keras.
        config: what `layer.get_config()` returns, or as much of it as differs from Keras' defaults.
        weights: what `layer.get_weights()` returns: kernel (I, G*H), recurrent_kernel (H, G*H), and with a bias (G*H,),
            for a GRU with reset_after (2, 3H); of a Bidirectional the forward layer's, then the backward layer's.
        layer: the name of the layer in the file; not needed if one alone is recurrent.
        inference_only: leave out what acts in training alone: dropout, regularizers, constraints.

    Returns:
        tg.RNN, tg.GRU or tg.LSTM; of an RNN with a stack of like cells, as many layers. It always returns the whole
        output and the final state, in the input's order of time, also of a layer with go_backwards (`reverse=True`
        here), and takes `lengths` for a mask that cuts off the end. `convert.keras_call` calls it as Keras would, with
        any mask.

    Raises:
        ConversionError: lists every option, weight and shape at fault; or the file is not a .keras file, is damaged, or
            claims sizes that it cannot have.
        ImportError: h5py is missing: `pip install tidegate[convert]`.
    """
    if config is not None:
        name = class_name(source)
    elif isinstance(source, (str, os.PathLike)):
        name, config, weights = keras_file.read_layer(source, layer)
    else:
        name = type(source).__name__
        if type(source).__module__.split(".")[0] not in ("keras", "tf_keras", "tensorflow"):
            raise ConversionError(
                f"from_keras: expected a layer of Keras' own, the name of its class with its config, or a path, got "
                f"{name} of the module {type(source).__module__}"
            )
        config, weights = source.get_config(), source.get_weights()
    faults = Faults(f"from_keras({name})")
    given: Any = config
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        faults.add(f"config: expected what layer.get_config() returns, got {type(given).__name__} {given!r}")
    if weights is None:
        faults.add("weights: missing; give what layer.get_weights() returns")
    elif not isinstance(weights, (list, tuple)):
        faults.add(f"weights: expected a list, as layer.get_weights() returns, got {type(weights).__name__}")
    if name != "Bidirectional" and name not in keras_file.RECURRENT:
        faults.option("class_name", name, _REFUSALS.get(name, f"one of {_SUPPORTED}"))
    faults.raise_any()
    assert config is not None
    assert weights is not None
    if name == "Bidirectional":
        return _bidirectional(faults, config, weights, inference_only)
    found = _direction(faults, name, config, weights, inference_only, "")
    faults.raise_any()
    return _built(found.cell, found.layers, found, reverse=found.backwards)


def _built(cell: Cell, directions: Sequence[Weights], like: _Direction, **options: object) -> Any:
    return build_layer(cell, directions, len(like.layers), batch_first=True, **like.options, **options)


def _bidirectional(faults: Faults, config: Mapping[str, Any], weights: Sequence[Any], inference_only: bool) -> Any:
    known = {"merge_mode", "layer", "backward_layer", *_IDLE}
    for option in config.keys() - known:
        faults.option(option, config[option], "known are merge_mode, layer, backward_layer")
    if config.get("merge_mode", "concat") != "concat":
        faults.option("merge_mode", config["merge_mode"], "'concat'; convert with it, then merge the output's halves")
    given = {"layer": config.get("layer"), "backward_layer": config.get("backward_layer") or config.get("layer")}
    inner = {place: _entry(faults, place, entry) for place, entry in given.items()}
    if len(weights) % 2:
        faults.add(f"weights: expected those of two layers, got {len(weights)}")
    names = [name for name, _ in inner.values()]
    if not set(names) <= {*_CELLS, "RNN", ""}:
        seen = f"{names[0]} and {names[1]}"
        faults.add(f"layer, backward_layer: {seen} are not supported: {', '.join(_CELLS)}, or RNN of their cells")
    faults.raise_any()
    half = len(weights) // 2
    found: list[_Direction] = []
    for (name, own), part, prefix in zip(
        inner.values(), (weights[:half], weights[half:]), ("forward ", "backward "), strict=True
    ):
        found.append(_direction(faults, name, own, part, inference_only, prefix))
    faults.raise_any()
    forward, backward = found
    # Keras makes the backward layer from the forward one's config, where no config of its own is given.
    own = config.get("backward_layer") is not None
    if forward.backwards or (own and not backward.backwards):
        faults.add("go_backwards: expected False in layer and True in backward_layer")
    if len(forward.layers) > 1 or len(backward.layers) > 1:
        faults.add("a stack in each direction, joined at its end; here directions are joined after each layer: convert "
                   "layer and backward_layer apart, each with its half of the weights")  # fmt: skip
    if forward.cell is not backward.cell or forward.options != backward.options:
        faults.add(f"options differ: {_words(forward)} forward, {_words(backward)} backward; a layer has one set")
    shapes = [{name: tuple(w.shape) for name, w in direction.layers[0].items()} for direction in found]
    if shapes[0] != shapes[1]:
        faults.add(f"shapes differ: {shapes[0]} forward, {shapes[1]} backward")
    faults.raise_any()
    return _built(forward.cell, [forward.layers[0], backward.layers[0]], forward)


def _words(direction: _Direction) -> str:
    return f"{direction.cell.name.upper()} {direction.options}"


def _entry(faults: Faults, place: str, entry: object) -> tuple[str, dict[str, Any]]:
    """Class and config of what stands in another's config; faults where it is none of Keras' own."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config", {}), Mapping):
        faults.add(f"{place}: expected class_name and config, got {entry!r}")
        return "", {}
    name, config = entry.get("class_name"), entry.get("config", {})
    if not isinstance(name, str) or not all(isinstance(key, str) for key in config):
        faults.add(f"{place}: expected a class_name and a config by names, got {entry!r}")
        return "", {}
    if not keras_file.is_own(entry):
        whose = entry.get("registered_name") or entry.get("module")
        faults.add(f"{place}: {whose!r} is a class of the model's own; what its {name} computes is not known")
    return name, dict(config)


def _direction(
    faults: Faults, name: str, config: Mapping[str, Any], arrays: Sequence[Any], inference_only: bool, prefix: str
) -> _Direction:
    """One direction in our terms: a layer, or the cells of an RNN."""
    layers = _cells_of(faults, name, config, prefix)
    for option in _CALL & config.keys():
        if not isinstance(config[option], bool):
            faults.option(prefix + option, config[option], "True or False")
    if name == "RNN":
        _check_config(faults, config, inference_only, prefix, _CALL | _IDLE | {"cell"})
    counts = [2 + bool(own.get("use_bias", True)) for _, own, _ in layers]
    backwards = bool(config.get("go_backwards", False))
    if not layers:
        return _Direction(RNN, [{}], {}, backwards)
    if len(arrays) != sum(counts):
        names = "kernel, recurrent_kernel" + ", bias" * (sum(counts) > 2 * len(counts))
        each = f", of {len(layers)} cells" if len(layers) > 1 else ""
        faults.add(f"{prefix}weights: expected {sum(counts)} ({names}){each}, got {len(arrays)}")
        if not arrays:
            faults.add(f"{prefix}weights: a layer has none before it is built; call it once, or layer.build(shape)")
        counts = [0] * len(layers)
    found: list[tuple[Cell, Weights, dict[str, Any]]] = []
    given = iter(arrays)
    for (cell, own, place), count in zip(layers, counts, strict=True):
        found.append((cell, *_one(faults, cell, own, list(islice(given, count)), inference_only, place)))
    if not faults.lines:
        _check_alike(faults, prefix, found)
    return _Direction(found[0][0], [weights for _, weights, _ in found], found[0][2], backwards)


def _cells_of(
    faults: Faults, name: str, config: Mapping[str, Any], prefix: str
) -> list[tuple[Cell, Mapping[str, Any], str]]:
    """The cells of a layer, each with its config and what a message calls it."""
    if name in _CELLS:
        return [(_CELLS[name], config, prefix)]
    outer, own = _entry(faults, f"{prefix}cell", config.get("cell"))
    entries: list[tuple[str, dict[str, Any]]] = [(outer, own)]
    stacked = outer == "StackedRNNCells"
    if stacked:
        inner = own.get("cells")
        if not isinstance(inner, (list, tuple)) or not inner:
            faults.add(f"{prefix}cells: expected the cells of a StackedRNNCells, got {inner!r}")
            return []
        entries = [_entry(faults, f"{prefix}cell {k}", entry) for k, entry in enumerate(inner)]
    known = {f"{cell}Cell": kind for cell, kind in _CELLS.items()}
    for k, (kind, _) in enumerate(entries):
        if kind and kind not in known:
            faults.option(f"{prefix}cell {k}" if stacked else f"{prefix}cell", kind, f"one of {', '.join(known)}")
    if faults.lines:
        return []
    places = [f"{prefix}cell {k}: " if stacked else prefix for k in range(len(entries))]
    return [(known[kind], own, place) for (kind, own), place in zip(entries, places, strict=True)]


def _check_alike(faults: Faults, prefix: str, found: Sequence[tuple[Cell, Weights, dict[str, Any]]]) -> None:
    """The cells of a stack are one layer of ours if they are of one kind, size and set of options."""
    kinds = [
        (cell.name.upper(), weights["weight_hh"].shape[1], sorted(weights), options) for cell, weights, options in found
    ]
    if all(kind == kinds[0] for kind in kinds):
        return
    seen = "; ".join(f"{name}({size}), {options}" for name, size, _, options in kinds)
    faults.add(f"{prefix}cells that differ, {seen}: a layer here has cells of one kind, size and options; convert each "
               "by its class without 'Cell', its config and its weights, and run one after another")  # fmt: skip


def _one(
    faults: Faults, cell: Cell, config: Mapping[str, Any], arrays: Sequence[Any], inference_only: bool, prefix: str
) -> tuple[Weights, dict[str, Any]]:
    """One cell's weights and options in our terms."""
    _check_config(faults, config, inference_only, prefix, _CALL | _IDLE | _MEANING)
    for option in ("use_bias", "reset_after"):
        if not isinstance(config.get(option, True), bool):
            faults.option(prefix + option, config[option], "True or False")
    units = config.get("units")
    if units is not None and (type(units) is not int or units < 1):
        faults.option(prefix + "units", units, "a positive integer")
        units = None
    gates, order = len(cell.gates), GATE_ORDERS["keras"][cell.name]
    options = _options(faults, cell, config, prefix)
    if not arrays:
        return {}, options
    seen = len(faults.lines)
    recurrent = faults.tensor(prefix + "recurrent_kernel", arrays[1], (units, None), "(H, G*H)")
    hidden_size = recurrent.shape[0]
    if len(faults.lines) == seen and recurrent.shape[1] != gates * hidden_size:
        faults.add(f"{prefix}recurrent_kernel: expected (H, {gates}*H), got {tuple(recurrent.shape)}")
    if len(faults.lines) > seen:
        return {}, options
    kernel = faults.tensor(prefix + "kernel", arrays[0], (None, gates * hidden_size), f"(I, {gates}*H)")
    found: Weights = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    if len(arrays) > 2:
        found |= _biases(faults, cell, arrays[2], hidden_size, bool(config.get("reset_after", True)), prefix)
    faults.same_dtype({prefix + key: tensor for key, tensor in found.items()})
    return {key: reordered(tensor, order, "".join(cell.gates)) for key, tensor in found.items()}, options


def _biases(faults: Faults, cell: Cell, bias: object, hidden_size: int, reset_after: bool, prefix: str) -> Weights:
    columns = len(cell.gates) * hidden_size
    if cell is not GRU or not reset_after:
        return {"bias_ih": faults.tensor(prefix + "bias", bias, (columns,), f"({len(cell.gates)}*H,)")}
    # CuDNNGRU kept the same two rows in one vector.
    shape = (2, columns) if getattr(bias, "ndim", 2) == 2 else (2 * columns,)
    both = faults.tensor(prefix + "bias", bias, shape, "(2, 3*H)").reshape(2, columns)
    return {"bias_ih": both[0], "bias_hh": both[1]}


def _options(faults: Faults, cell: Cell, config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Our options from the config's activations and reset_after."""
    acts: list[str] = []
    for option, default in (("recurrent_activation", "sigmoid"), ("activation", "tanh")):
        value = config.get(option, default)
        if value == "hard_sigmoid" and "implementation" in config:
            faults.add(f"{prefix}{option}='hard_sigmoid' of Keras 2 is clip(0.2 x + 0.5), of Keras 3 clip(x/6 + 0.5): "
                       "this config is Keras 2's; drop 'implementation' from it to read it as Keras 3's")  # fmt: skip
        value = "linear" if value is None else value
        acts.append(activation(faults, prefix + option, value, _ACTIVATIONS))
    gate, act = acts
    if cell is RNN:
        return {"activations": act}
    if cell is LSTM:
        return {"activations": f"{gate},{act},{act}"}
    return {"activations": f"{gate},{act}", "reset_after": bool(config.get("reset_after", True))}


def _check_config(
    faults: Faults, config: Mapping[str, Any], inference_only: bool, prefix: str, known: set[str]
) -> None:
    """Faults for what acts in training alone, and for what is unknown."""
    for option, value in config.items():
        if option in _TRAINING:
            if value and not inference_only:
                faults.option(prefix + option, value, "it acts in training; inference_only=True leaves it out")
        elif option == "time_major":
            if value:
                faults.option(prefix + option, value, "False")
        elif option == "quantization_config":
            if value:
                faults.option(prefix + option, value, "None")
        elif option not in known:
            faults.option(prefix + option, value, f"known are {', '.join(sorted(known - _IDLE))}")
