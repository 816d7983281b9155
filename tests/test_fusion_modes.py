# SPDX-License-Identifier: Apache-2.0
"""Fused cells under torch's rarer modes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import needs
import pytest
import torch
import torch._dynamo.testing
from comparing import assert_equal_f64
from fusing import FEATURES, B, Gate, H, T, randn, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tidegate as tg
from tidegate import fusion
from tidegate.cells import LayerNormLSTMCell, SLSTMCell
from tidegate.nn import over_time

pytestmark = needs.compiled_operators


def test_compiled_whole_with_any_length_and_batch():
    layer = tg.Recurrent(LayerNormLSTMCell(FEATURES, H))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=seen)
    for steps, batch in ((5, 3), (7, 2), (9, 4)):
        x = torch.randn(steps, batch, FEATURES)
        found, expected = compiled(x)[0], layer(x)[0]
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            *(torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (found, expected)), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert any("tidegate.loop" in str(node.target) for graph in seen.graphs for node in graph.graph.nodes)


def test_a_compiled_cells_changes_are_seen():
    cell = Gate()
    layer, x, h = tg.Recurrent(cell), randn(T, B, H), randn(B, H)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for offset in (0.5, -1.0, 0.25):
        cell.offset = offset
        assert_equal_f64(compiled(x, h)[0], layer(x, h)[0])


@pytest.mark.parametrize("strict", [True, False])
def test_exported_with_any_length(strict):
    layer, x = tg.Recurrent(SLSTMCell(FEATURES, H, 2), batch_first=True), torch.randn(B, T, FEATURES)
    steps = torch.export.Dim("steps", min=2, max=1000)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: steps},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (T, 11):
        x = torch.randn(B, count, FEATURES)
        torch.testing.assert_close(loaded(x)[0], layer(x)[0])


def test_gradients_of_gradients():
    layer = tg.Recurrent(Gate())
    names, values = zip(*layer.named_parameters(), strict=True)
    resets = torch.tensor([[1, 0], [0, 1], [0, 0]], dtype=torch.bool)

    def function(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, named, (x, h), {"resets": resets, "lengths": torch.tensor([3, 2])})

    given = [randn(3, 2, H).requires_grad_(), randn(2, H).requires_grad_(), *values]
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_gradients_that_come_many_at_once():
    cell, h = Gate(), randn(B, H)

    def function(x: Tensor) -> Tensor:
        return run(cell, h, x, lengths=torch.tensor([T, 2, 0]))[0].sum((1, 2))

    x = randn(T, B, H)
    found = torch.autograd.functional.jacobian(function, x, vectorize=True)
    assert_equal_f64(found, torch.autograd.functional.jacobian(function, x))


def test_torch_func_runs_the_cells_own_operations():
    layer, x = tg.Recurrent(Gate()), randn(T, B, H)
    h = randn(B, H)
    names, values = zip(*layer.named_parameters(), strict=True)
    two = [torch.stack([value, 1.1 * value]).detach() for value in values]

    def function(weights: list[Tensor]) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, h))[0]

    found = torch.func.vmap(function)(two)
    for k in range(2):
        assert_equal_f64(found[k], function([value[k] for value in two]))
    tangents = torch.func.jvp(lambda x: layer(x, h)[0].sum(), (x,), (torch.ones_like(x),))[1]
    assert_equal_f64(tangents, torch.func.grad(lambda x: layer(x, h)[0].sum())(x).sum())


def test_checkpointed_and_kept_by_hooks():
    layer, x = tg.Recurrent(Gate()), randn(T, B, H).requires_grad_()
    h = randn(B, H)
    expected = torch.autograd.grad(layer(x, h)[0].sin().sum(), x)[0]
    found = torch.autograd.grad(checkpoint(lambda x: layer(x, h)[0], x, use_reentrant=False).sin().sum(), x)[0]
    assert_equal_f64(found, expected)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x, h)[0]
    assert_equal_f64(torch.autograd.grad(y.sin().sum(), x)[0], expected)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max().detach() / exact.abs().max().detach())


class Cast(nn.Module):
    """Its state stays float32 under autocast; what it gives out does not."""

    state_size = (H, H)

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(FEATURES + H, 2 * H)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, total = state
        z, n = self.joint(torch.cat([x, h], -1)).chunk(2, -1)
        h = torch.sigmoid(z) * torch.tanh(n)
        return h, (h, 0.5 * total + h)


@pytest.mark.parametrize("cell", [lambda: LayerNormLSTMCell(FEATURES, H), Cast, lambda: nn.LSTMCell(FEATURES, H)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, [T, 0, 2]])
def test_autocast(cell, dtype, lengths):
    cell, x = cell(), torch.randn(T, B, FEATURES)
    layer, names = tg.Recurrent(cell), [name for name, _ in cell.named_parameters()]
    exact = copy.deepcopy(layer).double()

    def errors(fuse: bool | None) -> tuple[list[torch.dtype], list[float]]:
        """The dtypes of what comes, and how far it and the weights' gradients are from the exact ones."""
        state = (torch.zeros(B, H),) * 2
        given = None if lengths is None else torch.tensor(lengths)
        with torch.autocast("cpu", dtype):
            y, final = over_time.run(cell, x, state, given, fuse=fuse)
            y, final = over_time.run(cell, x, final, given, fuse=fuse)  # its state's dtypes may be others now
        found = [y, *final, *torch.autograd.grad(y.float().sin().sum(), list(cell.parameters()))]
        wide, of_wide = exact(x.double(), lengths=lengths)
        wide, of_wide = exact(x.double(), of_wide, lengths=lengths)
        weights = [exact.get_parameter(f"cells.0.{name}") for name in names]
        expected = [wide, *of_wide, *torch.autograd.grad(wide.sin().sum(), weights)]
        pairs = zip(found, expected, strict=True)
        return [value.dtype for value in found], [_relative(a, b) for a, b in pairs]

    dtypes, found = errors(None)
    of_loop, expected = errors(False)
    assert dtypes == of_loop
    assert all(a <= 2 * b + torch.finfo(dtype).eps for a, b in zip(found, expected, strict=True))
    if not isinstance(cell, nn.LSTMCell):
        with torch.autocast("cpu", dtype):
            assert tg.explain(layer, x).backend == "fused"


def test_autocast_is_looped_where_it_means_something_else():
    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + h) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)

    x, h = torch.randn(T, B, H), torch.zeros(B, H)
    torch.testing.assert_close(run(cell, h, x)[0], run(cell, h, x, fuse=False)[0])
    with torch.autocast("cpu"):
        reasons, _ = fusion.run(cell, x, h, None, None, None, False, False)
        assert torch.equal(run(cell, h, x, fuse=None)[0], run(cell, h, x, fuse=False)[0])
    assert reasons == ("its results or gradients are not what its operations say",)


def test_halves():
    layer, x = tg.Recurrent(LayerNormLSTMCell(FEATURES, H)), torch.randn(T, B, FEATURES)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        y, (h, c) = half(x.to(dtype))
        assert {y.dtype, h.dtype, c.dtype} == {dtype}
        exact = copy.deepcopy(half).double()(x.to(dtype).double())[0]
        # Rounded once, at the end, where a loop rounds at every operation.
        assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_copied_and_pickled():
    layer, x = tg.Recurrent(Gate()), randn(T, B, H)
    h = randn(B, H)
    expected = layer(x, h)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal_f64(other(x, h)[0], expected)


def test_a_nan_stays_in_its_row():
    x = randn(T, B, H)
    x[2, 1] = float("nan")
    y, final = run(Gate(), x=x)
    assert not y[:, [0, 2]].isnan().any()
    assert not y[:2].isnan().any()
    assert y[2:, 1].isnan().all()
    assert final[1].isnan().all()


def test_threads_at_once():
    cells = [Gate() for _ in range(3)]
    x, h = randn(40, B, H), randn(B, H)
    expected = [run(cell, h, x)[0] for cell in cells]
    wrong: list[int] = []

    def work(k: int) -> None:
        wrong.extend(k for _ in range(30) if not torch.equal(run(cells[k], h, x)[0], expected[k]))

    threads = [threading.Thread(target=work, args=(k % 3,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
