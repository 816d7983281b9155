# SPDX-License-Identifier: Apache-2.0
"""torch.onnx.export of a model that contains tidegate's layers: each call of an operator becomes one node.

Letters: T steps, B rows, I input_size, H hidden_size, G gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tidegate import signature
from tidegate.cell import CELLS, Cell
from tidegate.cell import reordered as blocks_reordered
from tidegate.convert.canonical import Faults, missing
from tidegate.convert.onnx_names import PEEPHOLE_ORDER, gate_orders
from tidegate.convert.onnx_write import node_attributes


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export needs to write tidegate's operators:

        table = tg.convert.onnx_translations()
        torch.onnx.export(model, args, "model.onnx", dynamo=True, custom_translation_table=table)

    The nodes are GRU, LSTM and RNN; `lengths` become sequence_lens. Needs the package onnxscript.

    Raises:
        ConversionError: at the export, of a call that ONNX's nodes lack: `resets`, projections, TensorFlow's clips.
        ImportError: onnxscript is missing: `pip install tidegate[convert]`.
    """
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise missing("torch.onnx.export", error) from error

    return {signature.forward_operator(cell): _translation(cell, opset18) for cell in CELLS}


def _translation(cell: Cell, op: object) -> Callable[..., Any]:
    def translate(*arguments: object, **named: object) -> Any:
        names = [argument.name for argument in signature.forward_operator(cell)._schema.arguments]
        given = {**dict(zip(names, arguments, strict=False)), **named}
        return _node(op, cell, given)

    return translate


def _node(op: Any, cell: Cell, given: dict[str, Any]) -> Any:
    """The node, and what brings its inputs and results into our layout; the operator's own results in order."""
    faults = Faults(f"torch.onnx.export of tidegate::{cell.name}")
    attributes = node_attributes(faults, cell, {name: given[name] for name in cell.options}, 1)
    if given["resets"] is not None:
        faults.add("resets: ONNX's nodes cannot reset a state in mid-sequence")
    if given.get("weight_hr") is not None:
        faults.add("weight_hr: ONNX's LSTM has no projection")
    faults.raise_any()
    if given["reverse"]:
        attributes["direction"] = "reverse"
    gates = len(cell.gates)
    hidden_size = given["weight_hh"].shape[1]
    theirs, ours = gate_orders(cell)
    first = op.Constant(value_ints=[0])

    def reordered(tensor: Any, source: str, target: str) -> Any:
        if len(source) == 1:
            return tensor
        rows = torch.arange(len(source) * hidden_size)
        return op.Gather(tensor, op.Constant(value_ints=blocks_reordered(rows, source, target).tolist()), axis=0)

    def stacked(tensor: Any) -> Any:
        return op.Unsqueeze(tensor, first)

    biases = [given[name] for name in ("bias_ih", "bias_hh")]
    bias = None
    if any(value is not None for value in biases):
        zero = op.CastLike(op.Constant(value_floats=[0.0]), given["weight_hh"])
        zeros = op.Expand(zero, op.Constant(value_ints=[gates * hidden_size]))
        bias = stacked(op.Concat(*(zeros if b is None else reordered(b, ours, theirs) for b in biases), axis=0))
    lengths = None if given["lengths"] is None else op.Cast(given["lengths"], to=6)
    initial = [given[f"{state}_0"] for state in cell.states]
    peephole = given.get("weight_peephole")
    inputs = [
        given["input"],
        *(stacked(reordered(given[name], ours, theirs)) for name in ("weight_ih", "weight_hh")),
        bias,
    ]
    inputs += [lengths, *map(stacked, initial)]
    if peephole is not None:
        inputs.append(stacked(reordered(peephole, "ifo", PEEPHOLE_ORDER)))
    node = {"rnn": op.RNN, "lstm": op.LSTM, "gru": op.GRU}[cell.name]
    y, *finals = node(*inputs, hidden_size=hidden_size, **{k: v for k, v in attributes.items() if v is not None})
    finals = [op.Squeeze(final, first) for final in finals]
    if lengths is not None:
        # A row of length 0 keeps its state: ONNX's nodes return 0 for it.
        empty = op.Unsqueeze(op.Equal(given["lengths"], op.Constant(value_int=0)), op.Constant(value_ints=[1]))
        finals = [op.Where(empty, old, new) for new, old in zip(finals, initial, strict=True)]
    output = op.Squeeze(y, op.Constant(value_ints=[1]))
    return (output, *finals, op.Identity(output))
