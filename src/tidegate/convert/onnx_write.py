# SPDX-License-Identifier: Apache-2.0
"""An ONNX model of a layer: one GRU, LSTM or RNN node a layer, never unrolled.

Letters as in onnx_names.py; L num_layers, B rows, T steps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidegate.cell import CELLS, GRU, LSTM, RNN, Cell, Options, reordered
from tidegate.convert.canonical import Faults, missing
from tidegate.convert.onnx_names import PEEPHOLE_ORDER, default_activations, gate_orders, write_activations
from tidegate.nn.options import options_of, own_attribute

_OPSET = 17
_BFLOAT16_OPSET = 22  # the first whose recurrent nodes take it
_IR_VERSION = 9


def to_onnx(
    module: torch.nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    lengths: bool = False,
    states: bool = True,
    batch_size: int | None = None,
    steps: int | None = None,
) -> Any:
    """Write a layer as an ONNX model whose results in onnxruntime equal ours.

    Args:
        module: tg.GRU, tg.LSTM, tg.RNN or torch.nn's; any stack, directions and reset form. Dropout is left out.
        path: where to write; None to write nothing.
        lengths: an input `lengths` (B,) int32, as the layer's argument.
        states: inputs h_0, of an LSTM also c_0, (L*D, B, H), so that a stream can run; without, they are 0.
        batch_size, steps: B and T where they are fixed; None for dynamic ones.

    Returns:
        the onnx.ModelProto: inputs input (T, B, I), or (B, T, I) with batch_first, lengths, h_0, c_0; outputs output,
        h_n, of an LSTM also c_n.

    Raises:
        ConversionError: lists every option that ONNX's nodes lack: projections, TensorFlow's clips, some activations.
        ImportError: onnx is missing: `pip install tidegate[convert]`.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing("writing ONNX", error) from error

    faults = Faults(f"to_onnx({type(module).__name__})")
    cell = next((cell for cell in CELLS if getattr(module, "mode", "").lower().startswith(cell.name)), None)
    if cell is None or not isinstance(module, torch.nn.RNNBase):
        faults.add("expected a GRU, LSTM or RNN layer of tidegate or torch.nn; a model: torch.onnx.export, see docs")
        faults.raise_any()
    stored = getattr(getattr(module, "cell", None), "storage", "")
    if stored:
        faults.add(f"its weights are {stored}, which ONNX's recurrent nodes lack: write the float32 layer")
        faults.raise_any()
    assert cell is not None
    assert isinstance(module, torch.nn.RNNBase)
    graph = _Graph(module, cell, lengths, states)
    graph.attributes = node_attributes(faults, cell, options_of(module, cell), 2 if module.bidirectional else 1)
    if own_attribute(module, "reverse", False):
        graph.attributes["direction"] = "reverse"
    for name, size in (("batch_size", batch_size), ("steps", steps)):
        if size is not None and (type(size) is not int or size < 1):
            faults.option(name, size, "a positive integer, or None")
    faults.same_dtype(dict(module.named_parameters()))
    if any(parameter.is_meta for parameter in module.parameters()):
        faults.add("its parameters are on the meta device and have no numbers")
    if module.proj_size:
        faults.option("proj_size", module.proj_size, "0; ONNX's LSTM has no projection")
    faults.raise_any()
    model = graph.model(batch_size, steps)
    onnx.checker.check_model(model)
    if path is not None:
        Path(path).write_bytes(model.SerializeToString())
    return model


def node_attributes(faults: Faults, cell: Cell, options: Options, directions: int) -> dict[str, Any]:
    """A node's attributes from a cell's options; faults for what ONNX has none for."""
    rest = dict(options)
    text = rest.pop("nonlinearity" if cell is RNN else "activations")
    found: dict[str, Any] = {"direction": "bidirectional" if directions == 2 else "forward"}
    if not default_activations(cell, text):
        found |= write_activations(faults, text, directions)
    if clip := rest.pop("clip"):
        found["clip"] = clip
    if cell is GRU:
        found["linear_before_reset"] = int(rest.pop("reset_after"))
    if cell is LSTM:
        found["input_forget"] = int(rest.pop("coupled"))
    for name, value in rest.items():
        default = cell.options[name][1]
        if value != default:
            clips = "; ONNX's clip acts on the gates" if name.endswith("_clip") else ""
            faults.option(name, value, f"{default or None}{clips}")
    return found


class _Graph:
    """The nodes and constants of one layer's model, as they are added."""

    def __init__(self, module: torch.nn.RNNBase, cell: Cell, lengths: bool, states: bool) -> None:
        from onnx import helper, numpy_helper

        self.helper, self.numpy_helper = helper, numpy_helper
        self.module, self.cell, self.lengths, self.states = module, cell, lengths, states
        self.directions = 2 if module.bidirectional else 1
        self.attributes: dict[str, Any] = {}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, op: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: object) -> Any:
        outputs = [output] if isinstance(output, str) else list(output)
        attributes = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(self.helper.make_node(op, list(inputs), outputs, name=outputs[0], **attributes))
        return output

    def constant(self, name: str, value: object) -> str:
        """An initializer: a tensor of floating-point numbers, or a list of int64."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
        self.constants[name] = _tensor_proto(self.helper, name, tensor)
        return name

    def model(self, batch_size: int | None, steps: int | None) -> Any:
        module, helper = self.module, self.helper
        x = "input" if not module.batch_first else self.add("Transpose", ["input"], "steps_first", perm=[1, 0, 2])
        finals: list[list[str]] = []
        for layer in range(module.num_layers):
            x, last = self._layer(x, layer)
            finals.append(last)
        self.nodes[-1].output[0] = "output"
        if module.batch_first:
            self.nodes[-1].output[0] = "output_steps_first"
            self.add("Transpose", ["output_steps_first"], "output", perm=[1, 0, 2])
        for state, parts in zip(self.cell.states, zip(*finals, strict=True), strict=True):
            self.add("Concat", parts, f"{state}_n", axis=0)
        kind = helper.np_dtype_to_tensor_dtype(_numpy_dtype(next(module.parameters())))
        batch, time = batch_size or "batch", steps or "steps"
        rows = module.num_layers * self.directions
        order = (batch, time) if module.batch_first else (time, batch)
        info = helper.make_tensor_value_info
        inputs = [info("input", kind, (*order, module.input_size))]
        inputs += [info("lengths", 6, (batch,))] if self.lengths else []
        outputs = [info("output", kind, (*order, self.directions * module.hidden_size))]
        for state in self.cell.states:
            inputs += [info(f"{state}_0", kind, (rows, batch, module.hidden_size))] if self.states else []
            outputs.append(info(f"{state}_n", kind, (rows, batch, module.hidden_size)))
        constants = list(self.constants.values())
        graph = helper.make_graph(self.nodes, type(module).__name__, inputs, outputs, constants)
        opset = _BFLOAT16_OPSET if next(module.parameters()).dtype == torch.bfloat16 else _OPSET
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=max(_IR_VERSION, 10 if opset == _BFLOAT16_OPSET else 0),
            producer_name="tidegate",
        )

    def _layer(self, x: str, layer: int) -> tuple[str, list[str]]:
        """One node and what brings its results into our layout: output (T, B, D*H) last, and its final states."""
        initial = [self._initial(state, layer) if self.states else "" for state in self.cell.states]
        w, r, b, p = self._weights(layer)
        inputs = [x, w, r, b, "lengths" if self.lengths else "", *initial, p]
        while not inputs[-1]:
            inputs.pop()
        last = [f"{state}_last_{layer}" for state in self.cell.states]
        self.add(
            self.cell.name.upper(),
            inputs,
            [f"y_{layer}", *last],
            hidden_size=self.module.hidden_size,
            **self.attributes,
        )
        if self.lengths and self.states:
            last = [self._kept(new, old) for new, old in zip(last, initial, strict=True)]
        if self.directions == 1:
            return self.add("Squeeze", [f"y_{layer}", self.constant("axis_1", [1])], f"output_{layer}"), last
        # (T, D, B, H) -> (T, B, D*H)
        by_row = self.add("Transpose", [f"y_{layer}"], f"by_row_{layer}", perm=[0, 2, 1, 3])
        shape = self.constant("features", [0, 0, self.directions * self.module.hidden_size])
        return self.add("Reshape", [by_row, shape], f"output_{layer}"), last

    def _initial(self, state: str, layer: int) -> str:
        if self.module.num_layers == 1:
            return f"{state}_0"
        begin = layer * self.directions
        bounds = [
            self.constant(f"begin_{layer}", [begin]),
            self.constant(f"end_{layer}", [begin + self.directions]),
            self.constant("axis_0", [0]),
        ]
        return self.add("Slice", [f"{state}_0", *bounds], f"{state}_first_{layer}")

    def _kept(self, new: str, old: str) -> str:
        """A row of length 0 keeps its state: ONNX's nodes return 0 for it."""
        if "empty" not in [node.output[0] for node in self.nodes]:
            self.constants["zero"] = self.helper.make_tensor("zero", 6, [], [0])
            self.add("Equal", ["lengths", "zero"], "empty_rows")
            self.add("Unsqueeze", ["empty_rows", self.constant("state_axes", [0, 2])], "empty")  # (1, B, 1)
        return self.add("Where", ["empty", old, new], f"{new}_kept")

    def _weights(self, layer: int) -> list[str]:
        """The names of W, R, B and P; "" for one that there is not."""
        theirs, ours = gate_orders(self.cell)
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: self.directions]

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(self.module, name + suffix).detach().cpu() for suffix in suffixes])

        def gates(name: str) -> Tensor:
            return torch.stack([reordered(block, ours, theirs) for block in stacked(name)])

        names = [
            self.constant(f"W_{layer}", gates("weight_ih")),
            self.constant(f"R_{layer}", gates("weight_hh")),
            self.constant(f"B_{layer}", torch.cat([gates("bias_ih"), gates("bias_hh")], 1)) if self.module.bias else "",
        ]
        if not hasattr(self.module, "weight_peephole" + suffixes[0]):
            return [*names, ""]
        peepholes = torch.stack([reordered(p, "ifo", PEEPHOLE_ORDER) for p in stacked("weight_peephole")])
        return [*names, self.constant(f"P_{layer}", peepholes)]


def _numpy_dtype(tensor: Tensor) -> Any:
    from onnx import TensorProto, helper

    if tensor.dtype == torch.bfloat16:
        return helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    return tensor.detach()[:0].cpu().numpy().dtype


def _tensor_proto(helper: Any, name: str, tensor: Tensor) -> Any:
    """Raw little-endian bytes: exact in every dtype, bfloat16 too."""
    kind = helper.np_dtype_to_tensor_dtype(_numpy_dtype(tensor))
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return helper.make_tensor(name, kind, list(tensor.shape), data, raw=True)
