# SPDX-License-Identifier: Apache-2.0
"""torch.compile without a break, torch.export with dynamic T and B: one operator per layer and direction."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from comparing import tensors_in
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import CompileCounterWithBackend

import tidegate as tg

LAYERS = {"rnn": tg.RNN, "lstm": tg.LSTM, "gru": tg.GRU}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def make_layer(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind](3, 4, num_layers=2, bidirectional=True, dtype=torch.float64, **options)


def assert_same_training_step(compiled: Any, layer: Any, x: Tensor, **extras: Any) -> None:
    results = []
    for module in (compiled, layer):
        layer.zero_grad()
        data = x.clone().requires_grad_()
        output, states = module(data, **extras)
        (output.square().sum() + sum(state.sum() for state in states)).backward()
        results.append([output.detach(), data.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_for_every_length_and_batch(kind: str) -> None:
    layer = make_layer(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for steps, batch in ((5, 2), (7, 3), (300, 4)):
        assert_same_training_step(compiled, layer, torch.rand(steps, batch, 3, dtype=torch.float64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    operators = [node for node in counter.graphs[-1].graph.nodes if str(node.target).startswith("tidegate.")]
    assert len(operators) == 4


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_resets_compile(kind: str) -> None:
    layer = make_layer(kind, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((5, 2), (7, 3)):
        x = torch.rand(batch, steps, 3, dtype=torch.float64)
        lengths = torch.arange(batch) + 2
        resets = torch.rand(batch, steps) < 0.3
        assert_same_training_step(compiled, layer, x, lengths=lengths, resets=resets)
    with pytest.raises(ValueError, match="lengths: expected values in"):
        compiled(x, lengths=torch.full((batch,), steps + 1))


def test_inductor_runs_a_whole_model() -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(11, 3)
            self.layer = tg.GRU(3, 4, bidirectional=True)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.layer(self.embedding(tokens))[0])

    torch.manual_seed(0)
    model = Tagger()
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.randint(0, 11, (6, 2))
    compiled(tokens).square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(tokens).square().sum().backward()
    for ours, expected in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_cells_compile(kind: str) -> None:
    torch.manual_seed(0)
    cell = getattr(tg, f"{kind.upper()}Cell")(3, 4)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3)
    torch.testing.assert_close(compiled(x), cell(x), rtol=0, atol=1e-6)


def test_a_compiled_layer_follows_the_named_backend() -> None:
    layer, x = make_layer("gru"), torch.rand(3, 2, 3, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for name in ("reference", "aten"):
        with tg.backend(name):
            compiled(x)
        assert f"'{name}'" in counter.graphs[-1].code
    # The compiler wraps the refusal in an error of its own.
    with tg.backend("aten"), pytest.raises(TorchRuntimeError, match="no backend named 'aten' runs gru"):
        torch.compile(layer, backend="aot_eager")(x, resets=torch.zeros(3, 2, dtype=torch.bool))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_export_with_dynamic_steps_and_batch(kind: str, strict: bool) -> None:
    layer = make_layer(kind)
    dims = {0: torch.export.Dim("T", min=1), 1: torch.export.Dim("B", min=1)}
    example = torch.rand(5, 2, 3, dtype=torch.float64)
    program = torch.export.export(layer, (example,), dynamic_shapes=(dims,), strict=strict)
    operators = [node for node in program.graph.nodes if str(node.target).startswith("tidegate.")]
    assert len(operators) == 4
    for steps, batch in ((1, 1), (400, 3)):
        x = torch.rand(steps, batch, 3, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "peepholes"])
def test_no_rule_of_speed_bounds_an_exported_size(kind: str, dtype: torch.dtype) -> None:
    """Few steps, many rows, large products may be left to torch: not where a graph would then hold for these alone."""
    made = tg.LSTM(8, 512, peepholes=True) if kind == "peepholes" else getattr(tg, kind)(8, 512)
    module = made.to(dtype)
    is_cell = kind.endswith("Cell")
    sizes = {0: torch.export.Dim("B")} if is_cell else {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    example = torch.randn(*(20, 8) if is_cell else (20, 20, 8), dtype=dtype)
    module = torch.export.export(module, (example,), dynamic_shapes=(sizes,)).module()
    for leading in [(2,), (70,)] if is_cell else [(3, 2), (2, 70)]:
        x = torch.randn(*leading, 8, dtype=dtype)
        for found, expected in zip(tensors_in(module(x)), tensors_in(made(x)), strict=True):
            # Another backend may have run it: 6e-8 and 2e-3 were seen, allowed are three times as much and one unit of
            # bfloat16 in numbers up to 1.
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-7 if dtype is torch.float32 else 4e-3)


def test_export_survives_saving(tmp_path: Any) -> None:
    layer = make_layer("lstm")
    x = torch.rand(5, 2, 3, dtype=torch.float64)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    found = torch.export.load(tmp_path / "layer.pt2").module()(x)
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-14)


def test_export_with_lengths() -> None:
    layer = make_layer("gru")
    x, lengths = torch.rand(5, 2, 3, dtype=torch.float64), torch.tensor([5, 2])
    dims: Any = {"input": {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}, "lengths": {0: torch.export.Dim("B")}}
    program = torch.export.export(layer, (x,), {"lengths": lengths}, dynamic_shapes=dims)
    x, lengths = torch.rand(9, 3, 3, dtype=torch.float64), torch.tensor([0, 9, 4])
    torch.testing.assert_close(program.module()(x, lengths=lengths), layer(x, lengths=lengths), rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated", "ignore:Converting a tensor to a Python bool")
@pytest.mark.parametrize("records", [False, True], ids=["bare", "recording"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_jit_trace(kind, records):
    """One registered operator for each layer and direction, at any length and batch; the tracer's own check passes."""
    layer = getattr(tg, kind)(4, 5, num_layers=2, bidirectional=True)
    with torch.set_grad_enabled(records):
        traced = torch.jit.trace(layer, torch.randn(3, 2, 4))
        x = torch.randn(7, 6, 4)
        torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=0)
    assert str(traced.graph).count(f"tidegate::{layer.cell.name}(") == 4
    assert len(list(traced.parameters())) == 16


@pytest.mark.parametrize("module", ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell"])
def test_a_process_may_begin_with_a_compiled_call(module: str) -> None:
    """What a first call computes once and keeps must be something that the compiler can follow."""
    code = f"""if True:
        import torch, tidegate as tg
        compiled = torch.compile(tg.{module}(3, 4), fullgraph=True, backend="aot_eager")
        compiled(torch.randn(2, 3) if {module.endswith("Cell")} else torch.randn(5, 2, 3))
    """
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
