# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as a model, and the tensors that it holds. Sizes and places are checked before anything is read."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

from tidegate.convert.canonical import Faults
from tidegate.errors import ConversionError

_MAX_BYTES = 2 << 30


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
    """The tensors that a model holds, by name: initializers, Constant nodes, and Identity of either."""

    def __init__(self, model: Any, folder: Path | None) -> None:
        self.folder = folder
        self.protos = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.protos.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
            elif node.op_type == "Identity" and node.input[0] in self.protos:
                self.protos[node.output[0]] = self.protos[node.input[0]]

    def read(self, faults: Faults, name: str) -> Any:
        """A NumPy array; None, and a fault, where it cannot be read."""
        from onnx import TensorProto, helper, numpy_helper

        proto = self.protos[name]
        if proto.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            faults.add(f"{name}: expected floating-point numbers, got {TensorProto.DataType.Name(proto.data_type)}")
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
        needed = prod(proto.dims) * width
        fields = (proto.raw_data, 1), (proto.float_data, 4), (proto.double_data, 8), (proto.int32_data, width)
        held = max(len(field) * size for field, size in fields)
        if min(proto.dims, default=1) < 0 or needed != held:
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
