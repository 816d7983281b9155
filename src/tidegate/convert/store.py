# SPDX-License-Identifier: Apache-2.0
"""A layer or cell in one safetensors file: its weights by their state_dict names, in the header a JSON description.

The description, under the key "tidegate", is {"class": "GRU", "arguments": {the constructor's}}. As in a state_dict,
the device, the mode (training or not) and which parameters are frozen are not in it.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from tidegate import nn
from tidegate.cell import Cell
from tidegate.convert.canonical import Faults, missing
from tidegate.errors import ConversionError
from tidegate.nn.options import ACCELERATED, GATE_BIASES, OWN_OPTIONS

_CLASSES: dict[str, type[torch.nn.Module]] = {
    kind.__name__: kind for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
}
_NUMBER = (int, float)
_SIZES = {"input_size": int, "hidden_size": int, "bias": bool, "init": str}
_LAYER = {"num_layers": int, "batch_first": bool, "dropout": _NUMBER, "bidirectional": bool, "reverse": bool,
          "checkpoint_every": (int, type(None))}  # fmt: skip


def _argument_types(kind: type[Any]) -> dict[str, Any]:
    """Of each argument of a class's constructor what JSON holds; device and dtype are the weights'."""
    cell: Cell = kind.cell
    types: dict[str, Any] = {**_SIZES, **(_LAYER if issubclass(kind, nn.RecurrentLayer) else {})}
    for name, (value, _) in cell.options.items():
        types["activations" if name == "nonlinearity" else name] = _NUMBER if value is float else value
    if cell.name in GATE_BIASES:
        types[GATE_BIASES[cell.name]] = (*_NUMBER, type(None))
    flags = {parameter.when for parameter in cell.parameters.values()} - {"", "bias"}
    return types | {flag: int if flag == "proj_size" else bool for flag in flags}


ARGUMENTS: dict[str, dict[str, Any]] = {name: _argument_types(kind) for name, kind in _CLASSES.items()}


def describe(module: Any) -> dict[str, Any]:
    """What `load` makes the same layer or cell from: its class and its constructor's arguments."""
    kind = type(module).__name__
    options = {"activations" if name == "nonlinearity" else name: v for name, v in module._options().items()}
    # A module that was swapped in place has torch.nn's meaning, whatever its owner keeps on it by these names.
    known = dict(options)
    if ACCELERATED in vars(module):
        known |= OWN_OPTIONS if isinstance(module, nn.RecurrentLayer) else {**OWN_OPTIONS, "proj_size": 0}
    return {
        "class": kind,
        "arguments": {name: known[name] if name in known else getattr(module, name) for name in ARGUMENTS[kind]},
    }


def save(module: Any, path: str | os.PathLike[str]) -> None:
    """Write a tidegate layer or cell as a safetensors file.

    Raises:
        ConversionError: it is none of tidegate's own classes, or its parameters are not its own: a parametrization or
            pruning must be made permanent first.
        ImportError: safetensors is missing: `pip install tidegate[convert]`.
    """
    torch_files = _safetensors()
    faults = Faults("save")
    if type(module) not in _CLASSES.values():
        hint = "; make a parametrization permanent first" if hasattr(module, "parametrizations") else ""
        faults.add(f"expected one of tidegate's {', '.join(_CLASSES)}, got {type(module).__name__}{hint}")
    faults.raise_any()
    description = describe(module)
    tensors = {name: weight.detach().contiguous().clone() for name, weight in module.state_dict().items()}
    own = _made(description["class"], description["arguments"], None).state_dict()
    if other := sorted(set(tensors) ^ set(own)):
        faults.add(f"parameters: expected {', '.join(own)}, got {', '.join(tensors)}; {', '.join(other)}: make a "
                   "parametrization or pruning permanent first")  # fmt: skip
    faults.raise_any()
    torch_files.save_file(tensors, os.fspath(path), {"tidegate": json.dumps(description)})


def load(path: str | os.PathLike[str]) -> Any:
    """The layer or cell that `save` wrote, on the CPU.

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
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        description = json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ConversionError(f"{source}: no safetensors file of a layer, or damaged: {error}") from error
    faults = Faults(source)
    kind, arguments = _described(faults, description)
    for name, weight in tensors.items():
        if not weight.is_floating_point():
            faults.add(f"{name}: expected floating-point numbers, got {weight.dtype}")
    layers = arguments.get("num_layers", 1)
    # A layer is made before its weights are looked at: no more of it than the file can fill.
    if not faults.lines and layers > len(tensors):
        faults.add(f"arguments: num_layers={layers}, with {len(tensors)} weights")
    faults.raise_any()
    try:
        module = _made(kind, arguments, next(iter(tensors.values())).dtype)
        module.load_state_dict(tensors, assign=True)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConversionError(f"{source}: {error}") from error
    return module


def _described(faults: Faults, description: object) -> tuple[str, dict[str, Any]]:
    """Class and arguments from the header; faults for what is none."""
    if not isinstance(description, dict):
        faults.add(f'header: expected a description of a tidegate layer, {{"class", "arguments"}}, got {description!r}')
        return "", {}
    kind, arguments = description.get("class"), description.get("arguments")
    if not isinstance(kind, str) or kind not in _CLASSES:
        faults.add(f"header, class: expected one of {', '.join(_CLASSES)}, got {kind!r}")
        return "", {}
    if not isinstance(arguments, dict):
        faults.add(f"header, arguments: expected those of {kind} by name, got {arguments!r}")
        return kind, {}
    known = ARGUMENTS[kind]
    for name, value in arguments.items():
        if name not in known:
            faults.add(f"header, arguments: {name!r} is none of {kind}'s: {', '.join(known)}")
        elif type(value) not in (known[name] if isinstance(known[name], tuple) else (known[name],)):
            word = {int: "an integer", bool: "true or false", str: "a text"}.get(known[name], "a number")
            faults.add(f"header, arguments, {name}: expected {word}, got {value!r}")
    faults.lines += [f"header, arguments: no {name}" for name in ("input_size", "hidden_size") if name not in arguments]
    return kind, arguments


def _made(kind: str, arguments: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """The module without weights: on the meta device nothing is allocated or drawn."""
    return _CLASSES[kind](**arguments, device="meta", dtype=dtype)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise missing("reading or writing a safetensors file", error) from error
    return safetensors.torch
