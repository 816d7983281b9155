# SPDX-License-Identifier: Apache-2.0
"""Other runtimes, each able to build the same call from torch.nn's weights. Imported only in a worker process.

Letters: T steps, B batch, I input_size, H hidden_size, G gates, D directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from tidegate.cli.bench.shapes import GATES, Case

Arrays = dict[str, Any]
PeerCall = Callable[[], list[Any]]
"""Runs once; returns NumPy arrays: the output (T, B, D*H); in training then the gradients of layer 0's two weights."""


@dataclass(frozen=True)
class Peer:
    """A runtime: its package, the modes that it can run, and how it builds a call."""

    name: str
    modes: tuple[str, ...]
    build: Callable[[Case, Arrays, Any, int], PeerCall]


def _layer_names(case: Case, layer: int) -> list[str]:
    return [f"l{layer}", f"l{layer}_reverse"] if case.bidirectional else [f"l{layer}"]


def onnx_model(case: Case, weights: Arrays) -> bytes:
    """An ONNX model of the layers: gate blocks reordered from torch.nn's to ONNX's (z r h; i o f c)."""
    np: Any = import_module("numpy")
    onnx: Any = import_module("onnx")
    order = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2), "rnn": (0,)}[case.kind]

    def reorder(array: Any) -> Any:
        blocks = np.split(array, GATES[case.kind], axis=0)
        return np.concatenate([blocks[gate] for gate in order], axis=0)

    directions = 1 + case.bidirectional
    options: dict[str, Any] = {"hidden_size": case.shape.hidden_size}
    options["direction"] = "bidirectional" if case.bidirectional else "forward"
    if case.kind == "gru":
        options["linear_before_reset"] = 1
    nodes: list[Any] = []
    constants: list[Any] = [onnx.numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), "merged")]
    value = "input"
    for layer in range(case.num_layers):
        names = _layer_names(case, layer)
        stacked = {
            f"W{layer}": [reorder(weights[f"weight_ih_{name}"]) for name in names],
            f"R{layer}": [reorder(weights[f"weight_hh_{name}"]) for name in names],
            f"B{layer}": [
                np.concatenate([reorder(weights[f"bias_ih_{name}"]), reorder(weights[f"bias_hh_{name}"])])
                for name in names
            ],
        }
        constants += [onnx.numpy_helper.from_array(np.stack(arrays), name) for name, arrays in stacked.items()]
        nodes += [
            onnx.helper.make_node(case.kind.upper(), [value, *stacked], [f"Y{layer}"], **options),
            onnx.helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]),
            onnx.helper.make_node("Reshape", [f"Z{layer}", "merged"], [f"out{layer}"]),
        ]
        value = f"out{layer}"
    sizes = (case.shape.steps, case.shape.batch)
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "layers",
        [onnx.helper.make_tensor_value_info("input", float32, [*sizes, case.shape.input_size])],
        [onnx.helper.make_tensor_value_info(value, float32, [*sizes, directions * case.shape.hidden_size])],
        constants,
    )
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def _build_onnxruntime(case: Case, weights: Arrays, input: Any, threads: int) -> PeerCall:
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_model(case, weights), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": input})


def _build_openvino(case: Case, weights: Arrays, input: Any, threads: int) -> PeerCall:
    openvino: Any = import_module("openvino")
    core = openvino.Core()
    model = core.read_model(onnx_model(case, weights), b"")
    # By default the CPU plugin may compute in bf16, which the others here do not.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call() -> list[Any]:
        request.infer([input])
        return [request.get_output_tensor(0).data]

    return call


def _build_jax(case: Case, weights: Arrays, input: Any, threads: int) -> PeerCall:
    """A scan under jit. XLA takes its threads from the cores that the process may run on."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    jax: Any = import_module("jax")
    np: Any = import_module("numpy")
    from tidegate.cli.bench.jax_layers import forward

    parameters = {name: jax.numpy.asarray(array) for name, array in weights.items()}
    x = jax.numpy.asarray(input)
    run = jax.jit(partial(forward, case))

    def loss(parameters: Any, x: Any) -> Any:
        output = forward(case, parameters, x)
        return output.sum(), output

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def infer() -> list[Any]:
        return [np.asarray(run(parameters, x).block_until_ready())]

    def train() -> list[Any]:
        (gradients, _), output = jax.block_until_ready(step(parameters, x))
        return [np.asarray(output), *(np.asarray(gradients[f"{name}_l0"]) for name in ("weight_ih", "weight_hh"))]

    return train if case.mode == "train" else infer


PEERS = (
    Peer("onnxruntime", ("infer", "cell"), _build_onnxruntime),
    Peer("openvino", ("infer", "cell"), _build_openvino),
    Peer("jax", ("infer", "train", "cell"), _build_jax),
)
