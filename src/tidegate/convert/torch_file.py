# SPDX-License-Identifier: Apache-2.0
"""A recurrent layer from a file that torch.save wrote of a state_dict. Only tensors are unpickled, never code.

Letters: G gates, H hidden_size, P proj_size or H.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tidegate.cell import CELLS
from tidegate.convert.canonical import DAMAGED_ZIP, Faults, build_layer
from tidegate.errors import ConversionError

# What torch.load raises for a damaged file, beside its own words: the pickle machine has no checks of its own.
_DAMAGED = (pickle.UnpicklingError, KeyError, TypeError, AttributeError, AssertionError, OverflowError, *DAMAGED_ZIP)
_NAME = re.compile(r"(.*?)(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr|weight_peephole)_l(\d+)(_reverse)?")


def from_torch_file(path: str | os.PathLike[str], layer: str | None = None, **options: object) -> Any:
    """A tidegate layer from a saved state_dict that holds one of torch.nn's or tidegate's recurrent layers.

    Args:
        layer: what stands before its weights' names, "encoder.rnn"; not needed if there is one alone.
        options: what a state_dict does not say: batch_first, reset_after, activations (an RNN's is needed), and the
            other options of the layer that is made.

    Raises:
        ConversionError: lists every fault; or the file is none of torch.save's, is damaged, or holds other things than
            tensors.
    """
    source = f"from_torch_file({os.fspath(path)!r})"
    faults = Faults(source)
    groups = _groups(_state_dict(path, source))
    chosen = [name for name in groups if layer is None or name == layer]
    if len(chosen) != 1:
        faults.add(f"layer={layer!r}: {len(chosen)} fit; the recurrent layers are {list(groups)}")
    faults.raise_any()
    places = groups[chosen[0]]
    first = places.get((0, ""), {})
    num_layers = 1 + max(number for number, _ in places)
    suffixes = ["", "_reverse"] if (0, "_reverse") in places else [""]
    wanted = [(number, suffix) for number in range(min(num_layers, len(places))) for suffix in suffixes]
    if len(wanted) != len(places) or set(wanted) != set(places):
        faults.add(f"expected {num_layers} layers of {len(suffixes)} directions, got {sorted(places)}")
    read = {f"{name}_l{k}{suffix}": w for (k, suffix), weights in places.items() for name, w in weights.items()}
    for (number, suffix), weights in places.items():
        if not {"weight_ih", "weight_hh"} <= weights.keys() or weights.keys() != first.keys():
            faults.add(f"layer {number}{suffix}: expected the weights {', '.join(first)}, got {', '.join(weights)}")
    for name, weight in read.items():
        expected = 1 if name.startswith(("bias", "weight_peephole")) else 2
        if weight.dim() != expected or not weight.is_floating_point() or not weight.numel():
            found = f"{weight.dtype} {tuple(weight.shape)}"
            faults.add(f"{name}: expected {expected} dimensions of floating-point numbers, none of them 0, got {found}")
    faults.same_dtype(read)
    for option in {"num_layers", "bidirectional", "bias", "proj_size", "peepholes", "device", "dtype"} & options.keys():
        faults.option(option, options[option], "a state_dict says it itself")
    faults.raise_any()
    hidden_size = first["weight_hr"].shape[1] if "weight_hr" in first else first["weight_hh"].shape[1]
    rows = first["weight_hh"].shape[0]
    cell = next((cell for cell in CELLS if len(cell.gates) * hidden_size == rows), None)
    if cell is None:
        faults.add(f"weight_hh: {tuple(first['weight_hh'].shape)} is no RNN's, GRU's or LSTM's")
    elif len(cell.gates) == 1 and options.get("activations") is None:
        faults.add("an RNN's state_dict does not say which activation it has: give tanh or relu")
    faults.raise_any()
    assert cell is not None
    try:
        return build_layer(cell, [places[place] for place in wanted], num_layers, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{source}: {error}") from error


def _groups(state: Mapping[str, Tensor]) -> dict[str, dict[tuple[int, str], dict[str, Tensor]]]:
    """{what stands before the names: {(layer, suffix): {name: weight}}}."""
    groups: dict[str, dict[tuple[int, str], dict[str, Tensor]]] = {}
    for name, weight in state.items():
        match = _NAME.fullmatch(name)
        if match and len(match[3]) < 6:
            places = groups.setdefault(match[1].removesuffix("."), {})
            places.setdefault((int(match[3]), match[4] or ""), {})[match[2]] = weight
    return groups


def _state_dict(path: str | os.PathLike[str], source: str) -> Mapping[str, Tensor]:
    with open(path, "rb") as file:  # a path that cannot be opened is no damaged file
        size = os.fstat(file.fileno()).st_size
    try:
        claimed = _claimed(path)
        state = torch.load(path, map_location="cpu", weights_only=True) if claimed <= size else None
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{source}: no state_dict of torch.save, or damaged: {reason}") from error
    if claimed > size:
        raise ConversionError(f"{source}: its entries claim {claimed} bytes, the file has {size}")
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ConversionError(f"{source}: expected a state_dict, got {type(state).__name__}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _claimed(path: str | os.PathLike[str]) -> int:
    """The bytes that a zip's entries unpack to: torch.save does not compress, so they are no more than the file's."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())
