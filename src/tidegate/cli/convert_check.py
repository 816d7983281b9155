# SPDX-License-Identifier: Apache-2.0
"""What `tidegate convert` checks: both sides on the same random input, where the other side's runtime is installed."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidegate.convert import keras_call, keras_file, store
from tidegate.errors import ConversionError

_STEPS, _BATCH = 7, 3
# Of the largest entry: two float32 implementations of a few steps are far closer.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def against_source(kind: str, source: Path, name: str | None, layer: Any) -> str:
    """Run the source's own layer and `layer`; say how they compare, or why they were not compared.

    Raises:
        ConversionError: they differ.
    """
    checks = {"Keras": _keras, "ONNX": _onnx, "torch": _torch}
    if kind not in checks:
        return "not run: it is a file of ours"
    return checks[kind](source, name, layer)


def target(path: Path, layer: Any) -> str:
    """Read or run what was written, and compare.

    Raises:
        ConversionError: it differs.
    """
    if path.suffix == ".safetensors":
        back = store.load(path)
        same = all(torch.equal(a, b) for a, b in zip(back.parameters(), layer.parameters(), strict=True))
        if not same or repr(back) != repr(layer):
            raise ConversionError(f"{path}: reads back as another layer")
        return "read back, bit for bit the same"
    if find_spec("onnxruntime") is None:
        return "not run: onnxruntime is not installed"
    x = _input(layer)
    lengths = torch.full((_BATCH,), _STEPS)
    lengths[-1] = 2
    states = _states(layer)
    feed = {"input": x, "lengths": lengths.int()} | dict(zip(("h_0", "c_0"), states, strict=False))
    theirs = _run_onnx(path.read_bytes(), feed)
    output, final = layer(x, states[0] if len(states) == 1 else states, lengths=lengths)
    return "onnxruntime: " + _compared([output, *(final if len(states) > 1 else (final,))], theirs)


def _keras(source: Path, name: str | None, layer: Any) -> str:
    if find_spec("keras") is None:
        return "not run: Keras is not installed"
    if find_spec("tensorflow") is None:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    keras: Any = importlib.import_module("keras")
    entries = keras_file.layers(source)
    entry = next(entry for entry in entries if name in (None, entry.name))
    model = keras.models.load_model(source, compile=False)
    theirs = _find(model, entry.name)
    x = _input(layer)
    results = theirs(x.numpy())
    # With return_state the states follow.
    result = keras.ops.convert_to_numpy(results[0] if isinstance(results, (list, tuple)) else results)
    ours = keras_call(layer, x, return_sequences=bool(theirs.return_sequences))
    return f"Keras ({keras.backend.backend()}): " + _compared([ours], [torch.tensor(result)])


def _find(model: Any, name: str) -> Any:
    for layer in model.layers:
        if layer.name == name:
            return layer
        found = _find(layer, name) if hasattr(layer, "layers") else None
        if found is not None:
            return found
    return None


def _onnx(source: Path, name: str | None, layer: Any) -> str:
    if find_spec("onnxruntime") is None:
        return "not run: onnxruntime is not installed"
    from tidegate.convert.canonical import Faults
    from tidegate.convert.onnx_file import load
    from tidegate.convert.onnx_graph import Wiring
    from tidegate.convert.onnx_read import choose

    model, folder = load(source, str(source))
    faults = Faults(str(source))
    places, wiring = choose(faults, model, name), Wiring(folder)
    if any(attribute.name == "layout" and attribute.i for place in places for attribute in place.node.attribute):
        return "not run: onnxruntime has no layout=1"
    x = _input(layer)
    y = x.transpose(0, 1).contiguous() if layer.batch_first else x
    for place in places:
        held = wiring.constants(place.graphs)
        y = _run_onnx(_single(model, place, held, faults, y), {"X": y})[0].transpose(1, 2).flatten(2)
    return "onnxruntime: " + _compared([layer(x)[0]], [y.transpose(0, 1) if layer.batch_first else y])


def _single(model: Any, place: Any, held: Any, faults: Any, x: Tensor) -> bytes:
    """A model of one node on zero states, its weights constants."""
    from onnx import TensorProto, helper, numpy_helper

    node = place.node
    alone = type(node)()
    alone.CopyFrom(node)
    names = ["X", *node.input[1:4], *[""] * 3, *node.input[7:8]][: max(len(node.input), 4)]
    del alone.input[:], alone.output[:]
    while not names[-1]:
        names.pop()
    alone.input.extend(names)
    alone.output.extend(["Y"])
    constants = [numpy_helper.from_array(held.read(faults, name), name) for name in {*names[1:]} - {""}]
    kind = TensorProto.DOUBLE if x.dtype == torch.float64 else TensorProto.FLOAT
    info = helper.make_tensor_value_info
    graph = helper.make_graph([alone], "node", [info("X", kind, x.shape)], [info("Y", kind, None)], constants)
    # A local function has its own.
    opsets = [o for o in getattr(place.graphs[0], "opset_import", model.opset_import) if o.domain in ("", "ai.onnx")]
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version).SerializeToString()


def _torch(source: Path, name: str | None, layer: Any) -> str:
    kind = layer.cell.name.upper()
    plain = not layer.clip and not getattr(layer, "peepholes", False) and getattr(layer, "reset_after", True)
    if not plain or (kind == "RNN" and layer.nonlinearity not in ("tanh", "relu")):
        return f"not run: torch.nn.{kind} has no such layer"
    options = {key: getattr(layer, key) for key in ("num_layers", "bias", "batch_first", "bidirectional")}
    if kind == "LSTM":
        options["proj_size"] = layer.proj_size
    if kind == "RNN":
        options["nonlinearity"] = layer.nonlinearity
    theirs = getattr(torch.nn, kind)(layer.input_size, layer.hidden_size, **options).to(layer.weight_ih_l0.dtype)
    theirs.load_state_dict(layer.state_dict())
    x = _input(layer)
    return f"torch.nn.{kind}: " + _compared([layer(x)[0]], [theirs.eval()(x)[0]])


def _input(layer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_BATCH, _STEPS) if layer.batch_first else (_STEPS, _BATCH)
    return torch.randn(*shape, layer.input_size, generator=generator).to(layer.weight_ih_l0.dtype)


def _states(layer: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    states = (torch.randn(rows, _BATCH, layer.hidden_size, generator=generator) for _ in layer.cell.states)
    return tuple(state.to(layer.weight_ih_l0.dtype) for state in states)


def _run_onnx(model: bytes, feed: dict[str, Tensor]) -> list[Tensor]:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(result) for result in session.run(None, {key: x.numpy() for key, x in feed.items()})]


def _compared(ours: list[Tensor], theirs: list[Tensor]) -> str:
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        scale = max(float(b.detach().abs().max()), 1.0)
        worst = max(worst, float((a.detach() - b.detach()).abs().max()) / scale)
    if not worst <= _TOLERANCE[ours[0].dtype]:
        raise ConversionError(f"the two sides differ by {worst:.3g}: please report this")
    return f"run on random input, the largest difference is {worst:.2g}"
