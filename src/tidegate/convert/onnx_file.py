# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as a model, and the tensors that it holds. Sizes and places are checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from tidegate.convert.canonical import Faults, missing
from tidegate.errors import ConversionError

_MAX_BYTES = 2 << 30
_MAX_DEPTH = 64
# What exporters put between the weights that they hold and a node: rows moved about, nothing computed.
_MOVES = ("Identity", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Concat", "Gather", "Slice")


def load(model_or_path: object, source: str) -> tuple[Any, Path | None]:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise missing("reading ONNX", error) from error

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
    """The tensors that graphs hold, by name: initializers, Constant nodes, and what `_MOVES` make of them.

    Args:
        graphs: the main graph, then each that is inside the one before, to the one whose names are asked for; or a
            local function alone.
    """

    def __init__(self, graphs: Sequence[Any], folder: Path | None) -> None:
        self.folder = folder
        self.protos = {tensor.name: tensor for graph in graphs for tensor in getattr(graph, "initializer", ())}
        self.nodes: dict[str, Any] = {}
        self.moved: dict[str, Any] = {}
        depth: dict[str, int] = {}
        for node in (node for graph in graphs for node in graph.node if node.output):
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
        import numpy as np
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

    def integers(self, name: str) -> list[int] | None:
        """The numbers of a constant of integers; None where it is none, or cannot be read."""
        if name not in self:
            return None
        found = self._read(Faults(""), name)
        return found.ravel().tolist() if found is not None and found.dtype.kind in "iu" else None

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
        try:
            return numpy_helper.to_array(proto)
        except (ValueError, TypeError) as error:
            faults.add(f"{name}: of type {proto.data_type}, dimensions {list(proto.dims)}: {error}")
            return None

    def _external(self, faults: Faults, proto: Any) -> bytes | None:
        """The bytes of a tensor kept beside the model: in its folder, by a plain file, within that file's size."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        if self.folder is None:
            faults.add(f"{proto.name}: kept in {location!r}; give the model's path, or load it with its data")
            return None
        if not all(isinstance(text, str) for text in entries.values()) or "\0" in location:
            faults.add(f"{proto.name}: kept in {location!r}, which is no name of a file")
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
    """What a node of `_MOVES` makes of constant arrays; None stands for an optional input that is left out.

    Raises:
        ValueError, IndexError, TypeError: its attributes, inputs or sizes are none that it can have.
    """
    import numpy as np
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs: list[Any] = [*arrays, None, None]
    first, second, *rest = inputs
    if first is None:
        raise ValueError("its first input is left out")
    axis = int(attributes.get("axis", 0))
    if node.op_type == "Transpose":
        return np.transpose(first, attributes.get("perm"))
    if node.op_type == "Unsqueeze":
        return np.expand_dims(first, tuple(_numbers("axes", second, attributes)))
    if node.op_type == "Squeeze":
        left_out = second is None and "axes" not in attributes
        return np.squeeze(first, None if left_out else tuple(_numbers("axes", second, attributes)))
    if node.op_type == "Reshape":
        zero_is_zero = bool(attributes.get("allowzero", 0))
        shape = _numbers("shape", second, attributes)
        return np.reshape(first, [first.shape[k] if n == 0 and not zero_is_zero else n for k, n in enumerate(shape)])
    if node.op_type == "Slice":
        return _sliced(first, second, rest, attributes)
    if node.op_type == "Concat":
        if any(array is None for array in arrays) or "axis" not in attributes:
            raise ValueError("expected an axis, and no input left out")
        _bound(sum(array.nbytes for array in arrays), limit)
        return np.concatenate(arrays, axis)
    if node.op_type == "Gather":
        if second is None:
            raise ValueError("indices are left out")
        _bound(first.nbytes // max(first.shape[axis], 1) * second.size, limit)
        return np.take(first, second, axis)
    return first


def _sliced(data: Any, starts: object, rest: list[Any], attributes: dict[str, Any]) -> Any:
    """Slice: axes left out are the first ones, steps left out are 1."""
    ends, places, strides = (*rest, None, None, None)[:3]
    begin, end = _numbers("starts", starts, attributes), _numbers("ends", ends, attributes)
    axes = list(range(len(begin)))
    if places is not None or "axes" in attributes:
        axes = _numbers("axes", places, attributes)
    steps = [1] * len(begin) if strides is None else _numbers("steps", strides, attributes)
    distinct = {k % max(data.ndim, 1) for k in axes}
    if not len(begin) == len(end) == len(axes) == len(steps) == len(distinct):
        raise ValueError(f"starts {begin}, ends {end}, axes {axes}, steps {steps}")
    index = [slice(None)] * data.ndim
    for k, place in enumerate(axes):
        index[place] = slice(begin[k], end[k], steps[k])
    return data[tuple(index)]


def _numbers(name: str, array: object, attributes: dict[str, Any]) -> list[int]:
    """What is an input in newer operator sets and an attribute in older ones."""
    import numpy as np

    if array is None and name not in attributes:
        raise ValueError(f"{name} is left out")
    found = np.asarray(attributes[name] if array is None else array)
    if found.size and found.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {found.dtype}")
    return found.ravel().tolist()


def axes_of(node: Any, constants: Constants) -> list[int] | None:
    """The axes of a Squeeze or Unsqueeze; None where they are left out or no constant."""
    given = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "axes"), None)
    if given is not None or len(node.input) < 2:
        return given
    return constants.integers(node.input[1])


def _bound(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{size} bytes out of constants of {limit // 4}")
