# SPDX-License-Identifier: Apache-2.0
"""Layers of Keras 3: SimpleRNN, GRU, LSTM, and Bidirectional(concat) of them.

Letters: I input_size, H hidden_size (units). A kernel (I, G*H) multiplies from the right: it is our weight transposed,
its gates in Keras' order. One bias is our bias_ih, with bias_hh 0; a GRU's (2, 3H) is bias_ih and bias_hh.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tidegate.cells import GATE_ORDERS, GRU, LSTM, RNN, Cell, reordered
from tidegate.convert import keras_file
from tidegate.convert.canonical import Faults, Weights, activation, build_layer

_CELLS: dict[str, Cell] = {"SimpleRNN": RNN, "GRU": GRU, "LSTM": LSTM}
_SUPPORTED = f"one of {', '.join(_CELLS)}, or Bidirectional of one"
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
    weights: Weights
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
        tg.RNN, tg.GRU or tg.LSTM. It always returns the whole output and the final state, in the input's order of time,
        also of a layer with go_backwards (`reverse=True` here), and takes `lengths` for a mask that cuts off the end.
        `convert.keras_call` calls it as Keras would, with any mask.

    Raises:
        ConversionError: lists every option, weight and shape at fault; or the file is not a .keras file, is damaged, or
            claims sizes that it cannot have.
        ImportError: h5py is missing: `pip install tidegate[convert]`.
    """
    if config is not None:
        name = str(source)
    elif isinstance(source, (str, os.PathLike)):
        name, config, weights = keras_file.read_layer(source, layer)
    else:
        name, config, weights = type(source).__name__, dict(source.get_config()), source.get_weights()
    faults = Faults(f"from_keras({name})")
    if weights is None:
        faults.add("weights: missing; give what layer.get_weights() returns")
    if name != "Bidirectional" and name not in _CELLS:
        faults.option("class_name", name, _SUPPORTED)
    faults.raise_any()
    assert weights is not None
    if name == "Bidirectional":
        return _bidirectional(faults, config, weights, inference_only)
    found = _direction(faults, name, config, weights, inference_only, "")
    faults.raise_any()
    return build_layer(_CELLS[name], [found.weights], batch_first=True, reverse=found.backwards, **found.options)


def _bidirectional(faults: Faults, config: Mapping[str, Any], weights: Sequence[Any], inference_only: bool) -> Any:
    if config.get("merge_mode", "concat") != "concat":
        faults.option("merge_mode", config["merge_mode"], "'concat'; convert with it, then merge the output's halves")
    given = [config.get("layer"), config.get("backward_layer") or config.get("layer")]
    inner: list[dict[str, Any]] = [dict(entry) if isinstance(entry, Mapping) else {} for entry in given]
    names = [entry.get("class_name") for entry in inner]
    if names[0] != names[1] or names[0] not in _CELLS:
        faults.add(f"layer, backward_layer: {names[0]} and {names[1]} are not supported: two of one of {list(_CELLS)}")
    if len(weights) % 2:
        faults.add(f"weights: expected those of two layers, got {len(weights)}")
    faults.raise_any()
    half = len(weights) // 2
    found: list[_Direction] = []
    for entry, part, prefix in zip(inner, (weights[:half], weights[half:]), ("forward ", "backward "), strict=True):
        found.append(_direction(faults, str(names[0]), entry.get("config", {}), part, inference_only, prefix))
    forward, backward = found
    # Keras makes the backward layer from the forward one's config, where no config of its own is given.
    own = config.get("backward_layer") is not None
    if forward.backwards or (own and not backward.backwards):
        faults.add("go_backwards: expected False in layer and True in backward_layer")
    if forward.options != backward.options:
        faults.add(f"options differ: {forward.options} forward, {backward.options} backward; a layer has one set")
    shapes = [{name: tuple(w.shape) for name, w in direction.weights.items()} for direction in found]
    if shapes[0] != shapes[1]:
        faults.add(f"shapes differ: {shapes[0]} forward, {shapes[1]} backward")
    faults.raise_any()
    return build_layer(_CELLS[str(names[0])], [d.weights for d in found], batch_first=True, **forward.options)


def _direction(
    faults: Faults, name: str, config: Mapping[str, Any], arrays: Sequence[Any], inference_only: bool, prefix: str
) -> _Direction:
    """One layer's weights and options in our terms."""
    cell = _CELLS[name]
    _check_config(faults, config, inference_only, prefix)
    gates, order = len(cell.gates), GATE_ORDERS["keras"][cell.name]
    use_bias, reset_after = config.get("use_bias", True), config.get("reset_after", True)
    options = _options(faults, cell, config, prefix)
    names = ["kernel", "recurrent_kernel"] + ["bias"] * bool(use_bias)
    if len(arrays) != len(names):
        faults.add(f"{prefix}weights: expected {len(names)} ({', '.join(names)}), got {len(arrays)}")
        return _Direction({}, options, False)
    recurrent = faults.tensor(prefix + "recurrent_kernel", arrays[1], (config.get("units"), None), "(H, G*H)")
    hidden_size = recurrent.shape[0]
    if recurrent.shape[1] != gates * hidden_size:
        faults.add(f"{prefix}recurrent_kernel: expected (H, {gates}*H), got {tuple(recurrent.shape)}")
        return _Direction({}, options, False)
    kernel = faults.tensor(prefix + "kernel", arrays[0], (None, gates * hidden_size), f"(I, {gates}*H)")
    found: Weights = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    if use_bias:
        found |= _biases(faults, cell, arrays[2], hidden_size, bool(reset_after), prefix)
    faults.same_dtype({prefix + key: tensor for key, tensor in found.items()})
    return _Direction(
        {key: reordered(tensor, order, "".join(cell.gates)) for key, tensor in found.items()},
        options,
        bool(config.get("go_backwards", False)),
    )


def _biases(faults: Faults, cell: Cell, bias: Any, hidden_size: int, reset_after: bool, prefix: str) -> Weights:
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


def _check_config(faults: Faults, config: Mapping[str, Any], inference_only: bool, prefix: str) -> None:
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
        elif option not in _CALL | _IDLE | _MEANING:
            faults.option(prefix + option, value, f"known are {', '.join(sorted(_MEANING | _CALL))}")
