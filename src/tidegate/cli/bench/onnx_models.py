# SPDX-License-Identifier: Apache-2.0
"""The ONNX models that peers run, made from torch.nn's weights. `onnx` is imported only when one is made.

Letters: T steps, B batch, I input_size, H hidden_size, G gates, D directions.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tidegate.cli.bench.shapes import GATES, Case

Arrays = dict[str, Any]
_ORDER = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2), "rnn": (0,)}  # torch.nn's gate blocks in ONNX's order: z r h; i o f c


def onnx_model(case: Case, weights: Arrays) -> bytes:
    """All layers over (T, B, I), zero states; the output is (T, B, D*H)."""
    np: Any = import_module("numpy")
    onnx: Any = import_module("onnx")
    directions = 1 + case.bidirectional
    nodes: list[Any] = []
    constants: list[Any] = [onnx.numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), "merged")]
    value = "input"
    for layer in range(case.num_layers):
        names, arrays = _constants(case, weights, layer)
        constants += arrays
        nodes += [
            onnx.helper.make_node(case.kind.upper(), [value, *names], [f"Y{layer}"], **_options(case)),
            onnx.helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]),
            onnx.helper.make_node("Reshape", [f"Z{layer}", "merged"], [f"out{layer}"]),
        ]
        value = f"out{layer}"
    sizes = (case.shape.steps, case.shape.batch)
    return _serialize(
        nodes,
        {"input": (*sizes, case.shape.input_size)},
        {value: (*sizes, directions * case.shape.hidden_size)},
        constants,
    )


def state_names(case: Case) -> list[str]:
    """The states of the model of one step: h0, h1, ... of the layers, and c0, c1, ... of an LSTM's."""
    return [f"{letter}{layer}" for letter in ("hc" if case.kind == "lstm" else "h") for layer in range(case.num_layers)]


def onnx_step_model(case: Case, weights: Arrays) -> bytes:
    """One step of all layers: "input" (1, B, I) and each state (1, B, H) to each state's "new_" one.

    The last layer's new h is the output. One layer's h has the next one's input's shape, so nothing stands between.
    """
    onnx: Any = import_module("onnx")
    nodes: list[Any] = []
    constants: list[Any] = []
    value = "input"
    for layer in range(case.num_layers):
        names, arrays = _constants(case, weights, layer)
        constants += arrays
        letters = "hc" if case.kind == "lstm" else "h"
        before = [f"{letter}{layer}" for letter in letters]
        after = [f"new_{name}" for name in before]
        inputs = [value, *names, "", *before]  # "": no lengths
        nodes.append(onnx.helper.make_node(case.kind.upper(), inputs, ["", *after], **_options(case)))
        value = after[0]
    state = (1, case.shape.batch, case.shape.hidden_size)
    inputs = {"input": (1, case.shape.batch, case.shape.input_size), **dict.fromkeys(state_names(case), state)}
    return _serialize(nodes, inputs, {f"new_{name}": state for name in state_names(case)}, constants)


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {"hidden_size": case.shape.hidden_size}
    options["direction"] = "bidirectional" if case.bidirectional else "forward"
    if case.kind == "gru":
        options["linear_before_reset"] = 1
    return options


def _constants(case: Case, weights: Arrays, layer: int) -> tuple[list[str], list[Any]]:
    """The names and tensors of one layer's W (D, G*H, I), R (D, G*H, H) and B (D, 2*G*H)."""
    np: Any = import_module("numpy")
    onnx: Any = import_module("onnx")

    def reorder(array: Any) -> Any:
        blocks = np.split(array, GATES[case.kind], axis=0)
        return np.concatenate([blocks[gate] for gate in _ORDER[case.kind]], axis=0)

    suffixes = [f"l{layer}", f"l{layer}_reverse"] if case.bidirectional else [f"l{layer}"]
    stacked = {
        f"W{layer}": [reorder(weights[f"weight_ih_{suffix}"]) for suffix in suffixes],
        f"R{layer}": [reorder(weights[f"weight_hh_{suffix}"]) for suffix in suffixes],
        f"B{layer}": [
            np.concatenate([reorder(weights[f"bias_ih_{suffix}"]), reorder(weights[f"bias_hh_{suffix}"])])
            for suffix in suffixes
        ],
    }
    arrays = [onnx.numpy_helper.from_array(np.stack(blocks), name) for name, blocks in stacked.items()]
    return list(stacked), arrays


def _serialize(
    nodes: list[Any], inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], constants: list[Any]
) -> bytes:
    onnx: Any = import_module("onnx")

    def describe(values: dict[str, tuple[int, ...]]) -> list[Any]:
        return [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes) for name, sizes in values.items()
        ]

    graph = onnx.helper.make_graph(nodes, "layers", describe(inputs), describe(outputs), constants)
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
