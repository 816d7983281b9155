# SPDX-License-Identifier: Apache-2.0
"""A layer in one safetensors file: its weights by their state_dict names, and in the header a JSON description of it.

The description, under the key "tidegate", is {"class": "GRU", "arguments": {the constructor's}}.
"""

from __future__ import annotations

import json
import os
from typing import Any

from tidegate import nn
from tidegate.convert.canonical import missing
from tidegate.errors import ConversionError

_CLASSES = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
_COMMON = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "reverse", "clip")
_ARGUMENTS = {
    "RNN": (*_COMMON, "activations"),
    "LSTM": (*_COMMON, "proj_size", "peepholes", "activations", "cell_clip", "proj_clip", "coupled"),
    "GRU": (*_COMMON, "reset_after", "activations"),
}


def describe(layer: Any) -> dict[str, Any]:
    """What `load` makes the same layer from: its class and its constructor's arguments."""
    kind = layer.cell.name.upper()
    arguments = {name: getattr(layer, name) for name in _ARGUMENTS[kind] if name != "activations"}
    arguments["activations"] = layer.nonlinearity if kind == "RNN" else layer.activations
    return {"class": kind, "arguments": arguments}


def save(layer: Any, path: str | os.PathLike[str]) -> None:
    """Write a tidegate layer as a safetensors file.

    Raises:
        ImportError: safetensors is missing: `pip install tidegate[convert]`.
    """
    torch_files = _safetensors()
    tensors = {name: weight.detach().contiguous().clone() for name, weight in layer.state_dict().items()}
    torch_files.save_file(tensors, os.fspath(path), {"tidegate": json.dumps(describe(layer))})


def load(path: str | os.PathLike[str]) -> Any:
    """The layer that `save` wrote.

    Raises:
        ConversionError: the file is no safetensors file, or none that `save` wrote, or its parts disagree.
        ImportError: safetensors is missing: `pip install tidegate[convert]`.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    source = f"load({os.fspath(path)!r})"
    try:
        with safe_open(os.fspath(path), "pt") as file:
            text = (file.metadata() or {}).get("tidegate", "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        description = json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ConversionError(f"{source}: no safetensors file of a layer, or damaged: {error}") from error
    if not isinstance(description, dict) or description.get("class") not in _CLASSES or not tensors:
        raise ConversionError(f"{source}: its header has no description of a tidegate layer")
    kind, arguments = description["class"], description.get("arguments")
    if not isinstance(arguments, dict) or not set(arguments) <= set(_ARGUMENTS[kind]):
        raise ConversionError(f"{source}: arguments of {kind}: expected some of {', '.join(_ARGUMENTS[kind])}")
    layers = arguments.get("num_layers", 1)
    if not isinstance(layers, int) or layers > len(tensors):
        raise ConversionError(f"{source}: num_layers={layers!r}, with {len(tensors)} weights")
    try:
        layer = _CLASSES[kind](**arguments, device="meta", dtype=next(iter(tensors.values())).dtype)
        layer.load_state_dict(tensors, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{source}: {error}") from error
    return layer


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing("reading or writing a safetensors file", error) from error
    return safetensors.torch
