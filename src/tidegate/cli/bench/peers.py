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

from tidegate.cli.bench.latency import Step
from tidegate.cli.bench.onnx_models import onnx_model, onnx_step_model, state_names
from tidegate.cli.bench.shapes import Case

Arrays = dict[str, Any]
PeerCall = Callable[[], list[Any]]
"""Runs once; returns NumPy arrays: the output (T, B, D*H); in training then the gradients of layer 0's two weights, of
a cell over a sequence those of all."""


@dataclass(frozen=True)
class Peer:
    """A runtime: its package, the modes that it can run, how it builds a call and, for "stream", a step.

    Attributes:
        settles_in: seconds that its threads keep spinning after their last task, and so disturb whoever comes next.
    """

    name: str
    modes: tuple[str, ...]
    build: Callable[[Case, Arrays, Any, int], PeerCall]
    build_step: Callable[[Case, Arrays, int], Step] | None = None
    settles_in: float = 0.005


def _build_onnxruntime(case: Case, weights: Arrays, input: Any, threads: int) -> PeerCall:
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_model(case, weights), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": input})


def _build_onnxruntime_step(case: Case, weights: Arrays, threads: int) -> Step:
    """The model of one step, bound to buffers that stay: measured, that is quicker than handing states to `run`.

    Two bindings take turns, so that each step's new states are the next one's old states without a copy.
    """
    np: Any = import_module("numpy")
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = onnx_step_model(case, weights)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    batch, hidden_size = case.shape.batch, case.shape.hidden_size
    frame_buffer = np.zeros((1, batch, case.shape.input_size), np.float32)
    states = [{name: np.zeros((1, batch, hidden_size), np.float32) for name in state_names(case)} for _ in range(2)]

    def bind(before: Arrays, after: Arrays) -> Any:
        binding = session.io_binding()
        inputs = {"input": frame_buffer, **before}
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        for name, array in after.items():
            binding.bind_output(f"new_{name}", "cpu", 0, np.float32, array.shape, array.ctypes.data)
        return binding

    bindings = [bind(states[0], states[1]), bind(states[1], states[0])]
    output = f"h{case.num_layers - 1}"
    turn = 1

    def step(frame: Any) -> Any:
        nonlocal turn
        turn = 1 - turn
        frame_buffer[...] = frame
        session.run_with_iobinding(bindings[turn])
        # A copy, for the buffer is written again. `states` lives as long as this function: bindings hold addresses.
        return states[1 - turn][output].copy()

    return step


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
    from tidegate.cli.bench import jax_cells, jax_layers

    forward = jax_cells.forward if case.kind in jax_cells.STEPS else jax_layers.forward
    trained = tuple(weights) if case.kind in jax_cells.STEPS else ("weight_ih_l0", "weight_hh_l0")
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
        return [np.asarray(output), *(np.asarray(gradients[name]) for name in trained)]

    return train if case.mode == "train" else infer


PEERS = (
    Peer("onnxruntime", ("infer", "cell", "stream"), _build_onnxruntime, _build_onnxruntime_step, settles_in=0.06),
    Peer("openvino", ("infer", "cell"), _build_openvino),
    Peer("jax", ("infer", "train", "cell"), _build_jax),
)
