# SPDX-License-Identifier: Apache-2.0
"""from_onnx against onnxruntime's own numbers, float32 to 1e-6; to_onnx against our own, run by onnxruntime."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import tidegate as tg
import vectors

CASES = vectors.names("ort")
ORDER = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def model_of(op, tensors, attributes, order=ORDER, opset=14):
    """A model of one node whose W, R, B and P are constants and whose other inputs are the model's."""
    names = [name if name in tensors else "" for name in order]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "Y_h", "Y_c"] if op == "LSTM" else ["Y", "Y_h"]
    node = helper.make_node(op, names, outputs, name="recurrent", **attributes)
    held = [onnx.numpy_helper.from_array(tensors[name], name) for name in ("W", "R", "B", "P") if name in tensors]
    given = [name for name in names if name and name not in ("W", "R", "B", "P")]
    kinds = {name: onnx.TensorProto.INT32 if name == "sequence_lens" else onnx.TensorProto.FLOAT for name in given}
    inputs = [helper.make_tensor_value_info(name, kinds[name], tensors[name].shape) for name in given]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "graph", inputs, results, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def run(layer, inputs):
    """Y, Y_h and, of an LSTM, Y_c as ONNX lays them out."""
    states = [torch.tensor(inputs[name]) for name in ("initial_h", "initial_c") if name in inputs]
    given = None if not states else states[0] if len(states) == 1 else tuple(states)
    output, final = layer(torch.tensor(inputs["X"]), given, lengths=inputs.get("sequence_lens"))
    directions = 2 if layer.bidirectional else 1
    y = output.unflatten(-1, (directions, -1)).transpose(1, 2)
    return [y, *(final if isinstance(final, tuple) else (final,))]


def close(found, expected, name="", tolerance=1e-6):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_node_gives_onnxruntimes_numbers(name):
    case = vectors.load("ort")[name]
    inputs, outputs = vectors.part(case, "in/"), vectors.part(case, "out/")
    attributes = {key: value for key, value in case["meta"].items() if key != "op"}
    layer = tg.from_onnx(model_of(case["meta"]["op"], inputs, attributes))
    for (key, value), found in zip(outputs.items(), run(layer, inputs), strict=True):
        close(found, value, key)
