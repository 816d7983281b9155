# SPDX-License-Identifier: Apache-2.0
"""What all converters share: faults collected and raised once, arrays checked and read, modules built from weights.

A direction's weights are a dict by the names of `Cell.parameters`, absent or None where there is none.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate import nn
from tidegate.cell import GRU, LSTM, RNN, Cell
from tidegate.errors import ConversionError
from tidegate.nn.cells import RecurrentCell
from tidegate.nn.layers import RecurrentLayer
from tidegate.nn.options import GATE_BIASES

Weights = dict[str, Any]

_LAYERS: dict[str, type[RecurrentLayer]] = {RNN.name: nn.RNN, LSTM.name: nn.LSTM, GRU.name: nn.GRU}
_CELLS: dict[str, type[RecurrentCell]] = {RNN.name: nn.RNNCell, LSTM.name: nn.LSTMCell, GRU.name: nn.GRUCell}


# What zipfile raises for a damaged archive, beside its own error.
DAMAGED_ZIP = (zipfile.BadZipFile, EOFError, ValueError, IndexError, RuntimeError, OSError, struct.error, zlib.error)


class Faults:
    """What cannot be represented here, one line each; raised together."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    def option(self, name: str, value: object, supported: str) -> None:
        self.add(f"{name}={value!r} is not supported: {supported}")

    def raise_any(self) -> None:
        """
        Raises:
            ConversionError: there was a fault; the message lists all.
        """
        if self.lines:
            raise ConversionError("\n  ".join([f"{self.source}:", *self.lines]))

    def tensor(self, name: str, value: object, expected: Sequence[int | None], letters: str) -> Tensor:
        """An array as a tensor of its own memory; None in `expected` fits any size. A fault where it disagrees."""
        try:
            tensor = as_tensor(value)
        except (TypeError, ValueError) as error:
            self.add(f"{name}: expected an array of floating-point numbers, got {type(value).__name__} ({error})")
            return torch.zeros([size or 1 for size in expected])
        fits = len(expected) == tensor.dim() and all(
            e in (None, s) for e, s in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in expected)
            self.add(f"{name}: expected {letters} = ({sizes}), got {tuple(tensor.shape)}")
            return torch.zeros([size or 1 for size in expected], dtype=tensor.dtype)
        if not tensor.numel():
            self.add(f"{name}: expected {letters}, none of them 0, got {tuple(tensor.shape)}")
            return torch.zeros([size or 1 for size in tensor.shape], dtype=tensor.dtype)
        return tensor

    def names(self, argument: str, value: object) -> None:
        """A fault where an argument is no mapping by names."""
        if not isinstance(value, Mapping):
            self.add(f"{argument}: expected arrays by name, got {type(value).__name__}")
        else:
            keys: list[Any] = list(value)
            self.lines += [
                f"{argument}: expected names, got the key {key!r}" for key in keys if not isinstance(key, str)
            ]

    def same_dtype(self, tensors: Mapping[str, Any]) -> None:
        """A fault where the arrays of one layer differ in dtype."""
        dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
        if len(set(dtypes.values())) > 1:
            self.add("arrays of different dtypes: " + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items()))


def missing(purpose: str, error: ImportError) -> ImportError:
    """The error that names the package `purpose` lacks: the one that was asked for, or one that it needs itself."""
    name = (error.name or "").split(".")[0]
    package = {"google": "protobuf", "": "that it names"}.get(name, name)
    words = f"{purpose} needs the package {package}: pip install tidegate[convert] ({error})"
    return ImportError(words, name=error.name, path=error.path)


def as_tensor(value: object) -> Tensor:
    """A floating-point array of any framework as a tensor of its own memory.

    Raises:
        TypeError, ValueError: it is no array of floating-point numbers.
        ImportError: NumPy is missing, and it is no tensor.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().clone()
    else:
        try:
            import numpy as np
        except ImportError as error:
            raise missing("reading an array", error) from error
        array: Any = np.asarray(value)
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        elif array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise TypeError(f"dtype {array.dtype}")
        else:
            tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if not tensor.is_floating_point():
        raise TypeError(f"dtype {tensor.dtype}")
    return tensor.contiguous()


def class_name(cell_class: object) -> str:
    """A class by its name, or the name itself; `GRUCell` of any module."""
    return cell_class if isinstance(cell_class, str) else getattr(cell_class, "__name__", type(cell_class).__name__)


def activation(faults: Faults, option: str, value: object, names: Mapping[str, str]) -> str:
    """Our text of an activation that is given by name or as a function of that name; a fault if there is none."""
    name = value if isinstance(value, str) else getattr(value, "__name__", repr(value))
    if name not in names:
        faults.option(option, name, f"one of {', '.join(sorted(names))}")
        return "tanh"
    return names[name]


def complete(weights: Weights) -> Weights:
    """One bias given: the other is zero, as torch.nn's kernels take both or none."""
    found = {name: tensor for name, tensor in weights.items() if tensor is not None}
    for name, other in (("bias_ih", "bias_hh"), ("bias_hh", "bias_ih")):
        if name in found and other not in found:
            found[other] = torch.zeros_like(found[name])
    return found


def build_cell(cell: Cell, weights: Weights, **options: object) -> Any:
    """A tidegate cell that holds `weights`, of their dtype."""
    return _filled(_CELLS[cell.name], cell, [complete(weights)], [""], options)


def build_layer(cell: Cell, directions: Sequence[Weights], num_layers: int = 1, **options: object) -> Any:
    """A tidegate layer that holds `directions`, layer by layer, forward before reverse, of their dtype."""
    per_layer = len(directions) // num_layers
    suffixes = [f"_l{k // per_layer}" + "_reverse" * (k % per_layer) for k in range(len(directions))]
    weights = [complete(direction) for direction in directions]
    has_bias = any("bias_ih" in direction for direction in weights)
    for direction in weights:
        if has_bias and "bias_ih" not in direction:
            zeros = direction["weight_ih"].new_zeros(direction["weight_ih"].shape[0])
            direction.update(bias_ih=zeros, bias_hh=zeros.clone())
    extra = {"num_layers": num_layers, "bidirectional": per_layer == 2}
    return _filled(_LAYERS[cell.name], cell, weights, suffixes, {**extra, **options})


def _filled(
    kind: type[torch.nn.Module], cell: Cell, directions: Sequence[Weights], suffixes: Sequence[str], options: Any
) -> torch.nn.Module:
    first = directions[0]
    weight_ih, weight_hh = first["weight_ih"], first["weight_hh"]
    options = {name: value for name, value in options.items() if value is not None}
    if "weight_hr" in first:
        options["proj_size"] = first["weight_hr"].shape[0]
    if "weight_peephole" in first:
        options["peepholes"] = True
    sizes = (weight_ih.shape[1], weight_hh.shape[0] // len(cell.gates))
    bias, dtype = "bias_ih" in first, weight_ih.dtype
    # On the meta device nothing is drawn: the global random numbers stay as they are.
    module = kind(*sizes, bias=bias, device="meta", dtype=dtype, **options)
    state = {name + suffix: w for suffix, d in zip(suffixes, directions, strict=True) for name, w in d.items()}
    module.load_state_dict({name: state[name].contiguous() for name in module.state_dict()}, assign=True)
    return module


def as_layer(cell: Any, reverse_cell: Any = None, *, batch_first: bool = False) -> Any:
    """The layer that runs a tidegate cell over a sequence, with a second cell the other way.

    Args:
        cell: tg.RNNCell, tg.LSTMCell or tg.GRUCell.
        reverse_cell: of the same kind, sizes and options: the reverse direction of a bidirectional layer.

    Raises:
        ConversionError: lists how the two cells differ, or what of the cell no layer has.
    """
    faults = Faults("as_layer")
    cells = [cell] if reverse_cell is None else [cell, reverse_cell]
    for given in cells:
        if not isinstance(given, RecurrentCell):
            faults.add(f"expected a tidegate cell, got {type(given).__name__}")
    faults.raise_any()
    options = cell._options()
    for name, value in cells[-1]._options().items():
        if cells[-1].cell is cell.cell and value != options[name]:
            faults.add(f"{name}: {options[name]!r} in one cell and {value!r} in the other; a layer has one")
    directions = [{name: getattr(given, name, None) for name in given.cell.parameters} for given in cells]
    shapes = [{name: tuple(w.shape) for name, w in d.items() if w is not None} for d in directions]
    if shapes[0] != shapes[-1]:
        faults.add(f"the cells' weights differ: {shapes[0]} and {shapes[-1]}")
    faults.same_dtype({f"cell {k}, {name}": w for k, d in enumerate(directions) for name, w in d.items()})
    drawn: dict[str, Any] = {}  # how the weights would be drawn anew
    gate_bias = GATE_BIASES.get(cell.cell.name)
    for name in ("init",) if gate_bias is None else ("init", gate_bias):
        drawn[name], other = getattr(cell, name), getattr(cells[-1], name, None)
        if other != drawn[name]:
            faults.add(f"{name}: {drawn[name]!r} in one cell and {other!r} in the other; a layer has one")
    if cell.proj_size >= cell.hidden_size:
        faults.option("proj_size", cell.proj_size, "a layer's is smaller than hidden_size; run it by tg.dynamic_rnn")
    faults.raise_any()
    copies = [{name: None if w is None else w.detach().clone() for name, w in d.items()} for d in directions]
    if "nonlinearity" in options:
        options["activations"] = options.pop("nonlinearity")
    return build_layer(cell.cell, copies, batch_first=batch_first, **drawn, **options)
