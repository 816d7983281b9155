# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as a model, and the tensors that it holds. Sizes and places are checked before anything is read."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.convert.canonical import Faults
from tidegate.errors import ConversionError

_MAX_BYTES = 2 << 30
_MAX_DEPTH = 64
# What exporters put between the weights that they hold and a node: rows moved about, nothing computed.
_MOVES = ("Identity", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Concat", "Gather", "Slice")


def load(model_or_path: Any, source: str) -> tuple[Any, Path | None]:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError("reading ONNX needs the package onnx: pip install tidegate[convert]") from error

    if not isinstance(model_or_path, (str, os.PathLike)):
        if not isinstance(model_or_path, onnx.ModelProto):
            raise ConversionError(
                f"{source}: expected a path or an onnx.ModelProto, got {type(model_or_path).__name__}"
            )
        return model_or_path, None
    path = Path(model_or_path)
    if path.stat().st_size > _MAX_BYTES:
        raise ConversionError(f"{source}: {path.stat().st_size} bytes; no ONNX model is larger than {_MAX_BYTES}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ConversionError(f"{source}: no ONNX model, or damaged: {error}") from error
    if not model.graph.node:
        raise ConversionError(f"{source}: no ONNX model: it has no nodes")
    return model, path.parent


class Constants:
    """The tensors that a model holds, by name: initializers, Constant nodes, and what `_MOVES` make of them."""

    def __init__(self, model: Any, folder: Path | None) -> None:
        self.folder = folder
        self.protos = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: dict[str, Any] = {}
        self.moved: dict[str, Any] = {}
        depth: dict[str, int] = {}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._constant(node)
            elif node.op_type in _MOVES and all(not name or name in self for name in node.input):
                depth[node.output[0]] = 1 + max((depth.get(name, 0) for name in node.input), default=0)
                if depth[node.output[0]] < _MAX_DEPTH:
                    self.nodes[node.output[0]] = node
        # Moving rows about makes nothing larger than this; a file that says otherwise is refused.
        self.limit = (1 << 20) + 4 * sum(self._size(proto) for proto in self.protos.values())

    def __contains__(self, name: str | None) -> bool:
        return name in self.protos or name in self.nodes

    def _constant(self, node: Any) -> None:
        from onnx import helper, numpy_helper

        for attribute in node.attribute:
            if attribute.name == "value":
                self.protos[node.output[0]] = attribute.t
            elif attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
                kind = "int64" if "int" in attribute.name else "float32"
                value = np.asarray(helper.get_attribute_value(attribute), kind)
                self.protos[node.output[0]] = numpy_helper.from_array(value)

    def _size(self, proto: Any) -> int:
        from onnx import helper

        known = proto.data_type in helper.get_all_tensor_dtypes() and all(dim >= 0 for dim in proto.dims)
        return prod(proto.dims) * helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize if known else -1

    def read(self, faults: Faults, name: str) -> Any:
        """A NumPy array; None, and a fault, where it cannot be read."""
        found = self._read(faults, name)
        if found is None or found.dtype.name in ("float16", "bfloat16", "float32", "float64"):
            return found
        faults.add(f"{name}: expected floating-point numbers, got {found.dtype.name}")
        return None

    def _read(self, faults: Faults, name: str) -> Any:
        if name in self.moved:
            return self.moved[name]
        if name in self.nodes:
            self.moved[name] = None
            node = self.nodes[name]
            arrays = [self._read(faults, inner) if inner else None for inner in node.input]
            if any(array is None for array, inner in zip(arrays, node.input, strict=True) if inner):
                return None
            try:
                self.moved[name] = moved(node, arrays, self.limit)
                return self.moved[name]
            except (ValueError, IndexError, TypeError) as error:
                faults.add(f"{name}: {node.op_type}: {error}")
                return None
        return self._held(faults, name)

    def _held(self, faults: Faults, name: str) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        proto = self.protos[name]
        needed = self._size(proto)
        if needed < 0:
            faults.add(f"{name}: dimensions {list(proto.dims)} of type {proto.data_type}")
            return None
        if proto.data_location == TensorProto.EXTERNAL:
            data = self._external(faults, proto)
            if data is None:
                return None
            shown, proto = proto, TensorProto()
            proto.CopyFrom(shown)
            proto.ClearField("external_data")
            proto.ClearField("data_location")
            proto.raw_data = data
        width = helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
        fields = (proto.raw_data, 1), (proto.float_data, 4), (proto.double_data, 8), (proto.int64_data, 8)
        held = max(len(field) * size for field, size in (*fields, (proto.int32_data, width)))
        if needed != held:
            faults.add(f"{name}: dimensions {list(proto.dims)} need {needed} bytes, there are {held}")
            return None
        return numpy_helper.to_array(proto)

    def _external(self, faults: Faults, proto: Any) -> bytes | None:
        """The bytes of a tensor kept beside the model: in its folder, by a plain file, within that file's size."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        if self.folder is None:
            faults.add(f"{proto.name}: kept in {location!r}; give the model's path, or load it with its data")
            return None
        path = self.folder / location
        inside = path.resolve().parent.is_relative_to(self.folder.resolve())
        if not location or Path(location).is_absolute() or not inside or path.is_symlink() or not path.is_file():
            faults.add(f"{proto.name}: kept in {location!r}, which is no file in the model's folder")
            return None
        size = path.stat().st_size
        numbers = [entries.get("offset", "0"), entries.get("length", str(size))]
        offset, length = (int(n) if n.isdecimal() and len(n) < 19 else -1 for n in numbers)
        length = min(length, size - offset) if "length" not in entries else length
        if offset < 0 or length < 0 or offset + length > size or length > _MAX_BYTES:
            faults.add(f"{proto.name}: bytes {numbers[0]} + {numbers[1]} of {location!r}, which has {size}")
            return None
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def moved(node: Any, arrays: list[Any], limit: int) -> Any:
    """What a node of `_MOVES` makes of constant arrays.

    Raises:
        ValueError, IndexError, TypeError: its attributes or sizes are none that it can have.
    """
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    first, *rest = arrays
    axis = int(attributes.get("axis", 0))
    if node.op_type in ("Unsqueeze", "Squeeze"):
        axes = tuple(attributes.get("axes", ())) or tuple(int(n) for n in rest[0].ravel())
        return np.expand_dims(first, axes) if node.op_type == "Unsqueeze" else np.squeeze(first, axes)
    if node.op_type == "Transpose":
        return np.transpose(first, attributes.get("perm"))
    if node.op_type == "Reshape":
        return np.reshape(first, [first.shape[k] if n == 0 else int(n) for k, n in enumerate(rest[0])])
    if node.op_type == "Slice":
        starts, ends, axes = (rest[k].ravel().tolist() for k in range(3))
        steps = rest[3].ravel().tolist() if len(rest) > 3 else [1] * len(starts)
        index = [slice(None)] * first.ndim
        for start, end, place, step in zip(starts, ends, axes, steps, strict=True):
            index[place] = slice(start, end, step)
        return first[tuple(index)]
    if node.op_type == "Concat":
        _bound(sum(array.nbytes for array in arrays), limit)
        return np.concatenate(arrays, axis)
    if node.op_type == "Gather":
        _bound(first.nbytes // max(first.shape[axis], 1) * rest[0].size, limit)
        return np.take(first, rest[0], axis)
    return first


def _bound(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{size} bytes out of constants of {limit // 4}")
