# SPDX-License-Identifier: Apache-2.0
"""A .keras file: a zip of config.json and model.weights.h5, read without Keras. Nothing in it is run or unpacked.

The weights of the k-th layer of a class stand at layers/<class in snake case>[_k]/cell/vars/0.. in the HDF5 file, in
the order of the configuration; those of a model inside a model below that model's own place.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tidegate.convert.canonical import DAMAGED_ZIP, Faults, missing
from tidegate.errors import ConversionError

RECURRENT = ("SimpleRNN", "GRU", "LSTM", "RNN", "Bidirectional")
# Recurrent, but no layer of ours, or a wrapper that may hold one that is: named in messages.
_OTHERS = ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "CuDNNGRU", "CuDNNLSTM", "TimeDistributed")
# What a file may hold: far above any real one, far below what would exhaust a machine.
_MAX_CONFIG = 64 << 20
_MAX_RATIO = 20
_MAX_DEPTH = 32


class Entry(NamedTuple):
    """A recurrent layer of a file: its name, class, configuration and place in the HDF5 file.

    `refusal` says why it is none that can be read; "" if it can.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    place: str
    refusal: str = ""


def read_layer(path: str | os.PathLike[str], layer: str | None) -> tuple[str, dict[str, Any], list[Any]]:
    """Class name, configuration and weights of one recurrent layer of a .keras file."""
    content, weights = _unzip(path)
    found = list(_entries(_named(path), _configuration(path, content), ""))
    faults = Faults(_named(path))
    able = [entry for entry in found if not entry.refusal]
    chosen = [entry for entry in found if entry.name == layer] if layer is not None else able
    if len(chosen) != 1:
        names = ", ".join(f"{entry.name} ({entry.class_name})" for entry in able) or "none"
        asked = "layer=: needed" if layer is None else f"layer={layer!r}: {'more than one' if chosen else 'not found'}"
        faults.add(f"{asked}; the recurrent layers are {names}")
        faults.lines += [f"not read: {e.name} ({e.class_name}): {e.refusal}" for e in found if e.refusal]
    elif chosen[0].refusal:
        faults.add(f"{chosen[0].name} ({chosen[0].class_name}): {chosen[0].refusal}")
    faults.raise_any()
    return chosen[0].class_name, chosen[0].config, _arrays(path, weights, chosen[0])


def layers(path: str | os.PathLike[str]) -> list[Entry]:
    """The recurrent layers of a .keras file that can be read."""
    return [entry for entry in _entries(_named(path), _configuration(path, _unzip(path)[0]), "") if not entry.refusal]


def is_own(entry: Mapping[str, Any]) -> bool:
    """Whether a serialized object is of Keras' own classes, so that its class says what it does."""
    return str(entry.get("module") or "keras").split(".")[0] == "keras" and not entry.get("registered_name")


def _named(path: str | os.PathLike[str]) -> str:
    return f"from_keras({os.fspath(path)!r})"


def _unzip(path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """config.json and model.weights.h5 in memory, their sizes checked before they are read."""
    with open(path, "rb") as file:  # a path that cannot be opened is no damaged file
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
    if not zipfile.is_zipfile(path):
        kind = "an HDF5 file; save the model as .keras" if head == b"\x89HDF\r\n\x1a\n" else "no zip, or cut short"
        raise ConversionError(f"{_named(path)}: not a .keras file ({kind})")
    faults = Faults(_named(path))
    found: list[bytes] = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in ("config.json", "model.weights.h5"):
                if names.count(name) != 1:
                    faults.add(f"not a .keras file: {names.count(name)} entries {name}")
            if not faults.lines:
                entries = [archive.getinfo(name) for name in ("config.json", "model.weights.h5")]
                config, weights = (entry.file_size for entry in entries)
                if config > _MAX_CONFIG or config + weights > _MAX_RATIO * size + _MAX_CONFIG:
                    faults.add(f"a file of {size} bytes claims {config} for config.json and {weights} for "
                               "model.weights.h5")  # fmt: skip
                else:
                    # ZipFile.read stops at the size that the directory claims, which was checked.
                    found = [archive.read(entry) for entry in entries]
    except DAMAGED_ZIP as error:
        raise ConversionError(f"{_named(path)}: damaged: {error}") from error
    faults.raise_any()
    return found[0], found[1]


def _configuration(path: str | os.PathLike[str], content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{_named(path)}: config.json: no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise ConversionError(f"{_named(path)}: config.json: expected the configuration of a Keras model")
    return config


def _entries(source: str, model: Mapping[str, Any], place: str, depth: int = 0, refusal: str = "") -> Iterator[Entry]:
    """The recurrent layers of a model's configuration and of the models and wrappers inside it."""
    config = model.get("config")
    inner = config.get("layers") if isinstance(config, Mapping) else None
    if depth > _MAX_DEPTH or not isinstance(inner, list):
        return
    seen: dict[str, int] = {}
    for entry in inner:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), Mapping):
            raise ConversionError(f"{source}: config.json, {place or 'the model'}: no class_name and config: {entry!r}")
        name = _snake(str(entry.get("class_name")))
        count = seen.get(name, 0)
        seen[name] = count + 1
        yield from _entry(source, entry, f"{place}layers/{name}" + (f"_{count}" if count else ""), depth, refusal)


def _entry(source: str, entry: Mapping[str, Any], place: str, depth: int, refusal: str) -> Iterator[Entry]:
    kind, config = str(entry.get("class_name")), dict(entry["config"])
    found = Entry(str(config.get("name")), kind, config, place, refusal)
    if is_own(entry) and kind in RECURRENT:
        yield found
    elif is_own(entry) and kind in _OTHERS and kind != "TimeDistributed":
        yield found._replace(refusal="no layer here is like it")
    elif not is_own(entry) and kind in (*RECURRENT, *_OTHERS):
        yield found._replace(refusal="a class of the model's own; what it computes is not known")
    elif kind == "TimeDistributed" and isinstance(config.get("layer"), Mapping):
        reason = f"inside {found.name} (TimeDistributed), along another axis: save a model of it alone"
        inner: Any = config["layer"]
        if isinstance(inner.get("config"), Mapping) and depth < _MAX_DEPTH:
            yield from _entry(source, inner, f"{place}/layer", depth + 1, reason)
    else:
        yield from _entries(source, entry, f"{place}/", depth + 1, refusal)


def _snake(name: str) -> str:
    """Keras' own spelling of a class in the weights file: SimpleRNN is simple_rnn."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _arrays(path: str | os.PathLike[str], content: bytes, entry: Entry) -> list[Any]:
    try:
        import h5py
    except ImportError as error:
        raise missing("reading a .keras file", error) from error

    found: list[Any] = []
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            for part in _groups(entry.class_name, entry.config):
                group = _hard(h5py, file, f"{entry.place}/{part}/vars")
                found += [_read(h5py, group, str(k), len(content)) for k in range(len(group))]
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ConversionError(f"{_named(path)}: model.weights.h5, layer {entry.name}: {error}") from error
    return found


def _groups(kind: str, config: object) -> Iterator[str]:
    """Where a layer's cells have their weights, in the order of layer.get_weights()."""
    config = config if isinstance(config, Mapping) else {}
    if kind == "Bidirectional":
        for place in ("layer", "backward_layer"):
            inner: Any = config.get(place) or config.get("layer")
            inner = inner if isinstance(inner, Mapping) else {}
            side = "forward_layer" if place == "layer" else place
            if inner.get("class_name") == kind:
                raise ValueError("a Bidirectional inside a Bidirectional")
            yield from (f"{side}/{part}" for part in _groups(str(inner.get("class_name")), inner.get("config")))
        return
    cell: Any = config.get("cell") if kind == "RNN" else None
    cells: Any = cell.get("config") if isinstance(cell, Mapping) else None
    stacked = isinstance(cells, Mapping) and cells.get("cells")
    if not isinstance(stacked, list):
        yield "cell"
        return
    seen: dict[str, int] = {}
    for inner in stacked:
        name = _snake(str(inner.get("class_name")) if isinstance(inner, Mapping) else "")
        count = seen.get(name, 0)
        seen[name] = count + 1
        yield f"cell/cells/{name}" + (f"_{count}" if count else "")


def _hard(h5py: Any, node: Any, place: str) -> Any:
    """The group at `place`, by links inside this file alone."""
    for name in place.split("/"):
        if not isinstance(node, h5py.Group) or name not in node:
            raise KeyError(f"no {place}")
        if not isinstance(node.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link to another place")
        node = node[name]
    return node


def _read(h5py: Any, group: Any, name: str, size: int) -> Any:
    dataset = _hard(h5py, group, name)
    plain = isinstance(dataset, h5py.Dataset) and not dataset.is_virtual and dataset.external is None
    # An array that is stored has as many bytes as its shape says: no filter, no fill value, nothing outside the file.
    if not plain or dataset.dtype.kind != "f":
        raise ValueError(f"{group.name}/{name} is no plain array inside the file")
    if dataset.nbytes > size or dataset.id.get_storage_size() != dataset.nbytes:
        raise ValueError(f"{group.name}/{name} claims {dataset.nbytes} bytes")
    return dataset[()]
