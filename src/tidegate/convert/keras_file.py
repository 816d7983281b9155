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

RECURRENT = ("SimpleRNN", "GRU", "LSTM", "Bidirectional")
# What a file may hold: far above any real one, far below what would exhaust a machine.
_MAX_CONFIG = 64 << 20
_MAX_RATIO = 20
_MAX_DEPTH = 32


class Entry(NamedTuple):
    """A recurrent layer of a file: its name, class, configuration and place in the HDF5 file."""

    name: str
    class_name: str
    config: dict[str, Any]
    place: str


def read_layer(path: str | os.PathLike[str], layer: str | None) -> tuple[str, dict[str, Any], list[Any]]:
    """Class name, configuration and weights of one recurrent layer of a .keras file."""
    content, weights = _unzip(path)
    found = list(_entries(_configuration(content), ""))
    names = ", ".join(f"{entry.name} ({entry.class_name})" for entry in found) or "none"
    chosen = [entry for entry in found if layer in (None, entry.name)]
    if len(chosen) != 1:
        asked = "layer=: needed" if layer is None else f"layer={layer!r}: {'more than one' if chosen else 'not found'}"
        raise ConversionError(f"{_named(path)}: {asked}; the recurrent layers are {names}")
    entry = chosen[0]
    return entry.class_name, entry.config, _arrays(path, weights, entry)


def layers(path: str | os.PathLike[str]) -> list[Entry]:
    """The recurrent layers of a .keras file."""
    return list(_entries(_configuration(_unzip(path)[0]), ""))


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


def _configuration(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"config.json: no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise ConversionError("config.json: expected the configuration of a Keras model")
    return config


def _entries(model: Mapping[str, Any], place: str, depth: int = 0) -> Iterator[Entry]:
    """The recurrent layers of a model's configuration and of the models inside it."""
    config = model.get("config")
    inner = config.get("layers") if isinstance(config, Mapping) else None
    if depth > _MAX_DEPTH or not isinstance(inner, list):
        return
    seen: dict[str, int] = {}
    for entry in inner:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), Mapping):
            raise ConversionError("config.json: a layer without class_name and config")
        name = _snake(str(entry.get("class_name")))
        count = seen.get(name, 0)
        seen[name] = count + 1
        here = f"{place}layers/{name}" + (f"_{count}" if count else "")
        own = str(entry.get("module") or "keras").split(".")[0] == "keras" and not entry.get("registered_name")
        if own and entry.get("class_name") in RECURRENT:
            layer = dict(entry["config"])
            yield Entry(str(layer.get("name")), str(entry["class_name"]), layer, here)
        else:
            yield from _entries(entry, f"{here}/", depth + 1)


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

    parts = ("forward_layer/", "backward_layer/") if entry.class_name == "Bidirectional" else ("",)
    found: list[Any] = []
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            for part in parts:
                group = _hard(h5py, file, f"{entry.place}/{part}cell/vars")
                found += [_read(h5py, group, str(k), len(content)) for k in range(len(group))]
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ConversionError(f"{_named(path)}: model.weights.h5, layer {entry.name}: {error}") from error
    return found


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
