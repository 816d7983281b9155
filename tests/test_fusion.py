# SPDX-License-Identifier: Apache-2.0
"""Fused cells: what is fused and why not, what is seen of a cell's changes, and torch's rarer modes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from itertools import pairwise
from typing import Any

import needs
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from comparing import assert_equal_f64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tidegate as tg
from tidegate import dispatch
from tidegate.cells import LayerNormLSTMCell, SLSTMCell
from tidegate.fusion.program import Program
from tidegate.kernels import cpu
from tidegate.nn import over_time

pytestmark = needs.compiled_operators

T, B, H = 6, 3, 8
FEATURES = 4
D = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def run(cell: Any, state: Any = None, x: Tensor | None = None, fuse: bool | None = True, **options: Any) -> Any:
    x = randn(T, B, H) if x is None else x
    state = randn(x.shape[1], H) if state is None else state
    return over_time.run(cell, x, state, fuse=fuse, **options)


def assert_fused_is_eager(cell: Any, state: Any = None, x: Tensor | None = None, **options: Any) -> None:
    x = randn(T, B, H) if x is None else x
    state = randn(x.shape[1], H) if state is None else state
    for a, b in zip(run(cell, state, x, **options), run(cell, state, x, fuse=False, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # float64, values near 1, six steps


class Gate(nn.Module):
    """A small cell with parts of every kind."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.norm = nn.Linear(2 * H, 2 * H, dtype=D), nn.LayerNorm(H, dtype=D)
        self.register_buffer("mask", torch.rand(H, dtype=D))
        self.offset = 0.5

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, n = self.joint(torch.cat([x, h], -1)).chunk(2, -1)
        z = torch.sigmoid(z + self.offset)
        return z * h + (1 - z) * torch.tanh(self.norm(n) * self.mask) * self.scale


# Refusals: what is said, and the line that it names


def looks_at_values(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + h) if h.sum() > 0 else x + h


def draws(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + h) * torch.rand_like(h)


def drops(x: Tensor, h: Tensor) -> Tensor:
    return F.dropout(torch.tanh(x + h), 0.5)


def normalizes_the_batch(x: Tensor, h: Tensor) -> Tensor:
    return F.batch_norm(x + h, None, None, training=True)


def mixes(x: Tensor, h: Tensor) -> Tensor:
    return h + x - x.mean(0)


def shifts_rows(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(h.roll(1, 0) + x)


def pairs_rows(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh((h @ h.T) @ x)


def counts_rows(x: Tensor, h: Tensor) -> Tensor:
    return h * 0.1 + x / x.shape[0]


def branches_on_rows(x: Tensor, h: Tensor) -> Tensor:
    return h * 0.1 + x if x.shape[0] > 2 else h


def sorts(x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(h + x).sort(-1)[0]


def changes_dtype(x: Tensor, h: Tensor) -> Tensor:
    return (h * 0.1 + x).float()


def changes_its_state(x: Tensor, h: Tensor) -> Tensor:
    h.mul_(0.5)
    return h + x


REFUSED = {
    looks_at_values: "looks at values",
    draws: "rand_like draws random numbers",
    drops: "draws random numbers",
    normalizes_the_batch: "native_batch_norm mixes the rows",
    mixes: "mean mixes the rows",
    shifts_rows: "how many rows there are",
    pairs_rows: "pairs rows with rows",
    counts_rows: "how many rows there are",
    branches_on_rows: "how many rows there are",
    sorts: "sort has no instruction",
    changes_dtype: "becomes one of",
}


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.__name__)
def test_a_refusal_names_the_operation_and_the_line(cell):
    with pytest.raises(tg.UnsupportedError, match=REFUSED[cell]) as raised:
        run(cell)
    assert f"test_fusion.py:{cell.__code__.co_firstlineno + 1}: return" in str(raised.value)


@pytest.mark.parametrize("cell", [*REFUSED, changes_its_state], ids=lambda cell: cell.__name__)
def test_what_is_refused_is_looped(cell):
    torch.manual_seed(1)
    x, h = randn(T, B, H), randn(B, H)
    torch.manual_seed(2)
    found = run(cell, h.clone(), x, fuse=None) if cell is not changes_dtype else None
    torch.manual_seed(2)
    expected = run(cell, h.clone(), x, fuse=False) if cell is not changes_dtype else None
    if found is not None and expected is not None:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_cell_that_changes_what_it_keeps():
    class Buffer(Gate):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.mask += 1
            return super().forward(x, h)

    cell = Buffer()
    before = cell.mask.clone()
    with pytest.raises(tg.UnsupportedError, match="changes a tensor that the cell keeps"):
        run(cell)
    assert torch.equal(cell.mask, before)


def test_a_cell_that_counts_its_steps_is_traced_once_and_looped():
    calls = []

    class Counts(Gate):
        steps = 0

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            self.steps += 1
            calls.append(type(x))
            return super().forward(x, h)

    cell = Counts()
    with pytest.raises(tg.UnsupportedError, match="sets attributes of its own"):
        run(cell)
    assert cell.steps == 0  # a trace leaves nothing behind
    traced = len(calls)
    run(cell, fuse=None)
    assert (cell.steps, len(calls)) == (T, traced + T)


def test_a_trace_leaves_a_functions_lists_as_they_were():
    seen: list[Tensor] = []

    def cell(x: Tensor, h: Tensor) -> Tensor:
        seen.append(x)
        return torch.tanh(x + h)

    run(cell, fuse=None)
    assert len(seen) == T


def test_what_a_trace_registers_with_the_process_outlives_its_thread(monkeypatch):
    """A build of torch for CUDA without a GPU crashed in the first backward after a trace."""
    registering: list[threading.Thread] = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: registering.append(threading.current_thread()))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch.keep_stand_in_for_cuda.cache_clear()
    linear = nn.Linear(H, H, dtype=D)
    assert_fused_is_eager(lambda x, h: torch.tanh(linear(x + h)))
    assert registering[0].daemon
    assert registering[0].is_alive()


def test_wrong_result_structures_are_the_loops_error():
    with pytest.raises(ValueError, match=r"cell: expected \(y_t, state\) or state"):
        run(lambda x, h: (h, h, h), fuse=None)


# Changes of a cell are seen


def test_every_change_of_a_cell_is_seen():
    cell = Gate()
    x, h = randn(T, B, H), randn(B, H)
    changes: list[Any] = [
        lambda: None,
        lambda: setattr(cell, "offset", -1.0),
        lambda: setattr(cell, "scale", 2.0),
        lambda: cell.norm.weight.data.mul_(2),
        lambda: setattr(cell, "mask", torch.ones(H, dtype=D)),
        lambda: setattr(cell.joint, "weight", nn.Parameter(randn(2 * H, 2 * H))),
        lambda: setattr(cell.norm, "eps", 0.5),
        lambda: setattr(cell, "norm", nn.Identity()),
        lambda: setattr(cell, "forward", lambda x, h: torch.tanh(x + h)),
    ]
    seen: list[Tensor] = []
    for change in changes:
        change()
        assert_fused_is_eager(cell, h, x)
        seen.append(run(cell, h, x)[0])
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_what_a_function_reads_is_read_anew():
    weight, factor, layer = nn.Parameter(randn(H, H)), torch.tensor(2.0, dtype=D), nn.Linear(H, H, dtype=D)
    number = 0.5

    def cell(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ weight + layer(h) * factor.item() + number)

    x, h = randn(T, B, H), randn(B, H)
    for change in range(4):
        if change == 1:
            weight.data.mul_(3)
        elif change == 2:
            factor.fill_(-1)
        elif change == 3:
            number = -0.5
        assert_fused_is_eager(cell, h, x)
        gradients = [
            torch.autograd.grad(run(cell, h, x, fuse=fuse)[0].sum(), [weight, *layer.parameters()])
            for fuse in (True, False)
        ]
        for a, b in zip(*gradients, strict=True):
            assert_equal_f64(a, b)


def test_hooks_see_every_step():
    cell, calls = Gate(), []
    cell.norm.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(tg.UnsupportedError, match="has hooks"):
        run(cell)
    run(cell, fuse=None)
    assert len(calls) == T


def test_a_step_that_treats_one_row_in_a_way_of_its_own():
    def cell(x: Tensor, h: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else torch.tanh(x + h)

    assert_fused_is_eager(cell)
    x, h = randn(T, 1, H), randn(1, H)
    found, expected = run(cell, h, x, fuse=None), run(cell, h, x, fuse=False)
    assert torch.equal(found[0], expected[0])


def test_plans_do_not_keep_their_cells():
    cell = Gate()
    run(cell)
    gone = weakref.ref(cell)
    del cell
    gc.collect()
    assert gone() is None


def test_parametrized_and_tied_weights():
    cell = Gate()
    nn.utils.parametrizations.weight_norm(cell.joint)
    assert_fused_is_eager(cell)
    tied = nn.Sequential(nn.Linear(H, H, dtype=D), nn.Linear(H, H, dtype=D))
    tied[1].weight = tied[0].weight

    def step(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(tied[0](x) + tied[1](h))

    assert_fused_is_eager(step)
    a, b = (torch.autograd.grad(run(step, h, x, fuse=f)[0].sum(), tied[0].weight)[0]
            for x, h in [(randn(T, B, H), randn(B, H))] for f in (True, False))  # fmt: skip
    assert_equal_f64(a, b)


def test_functional_call():
    cell, other = Gate(), Gate()
    layer, x = tg.Recurrent(cell), randn(T, B, H)
    h = randn(B, H)
    found = torch.func.functional_call(layer, dict(tg.Recurrent(other).named_parameters()), (x, h))
    other.mask = cell.mask
    assert_equal_f64(found[0], tg.Recurrent(other)(x, h)[0])


# Forms of a state


@pytest.mark.parametrize("shape", [(H,), (2, 4), (2, 2, 2), ()], ids=str)
def test_states_of_any_shape(shape):
    def cell(x: Tensor, state: dict[str, Any]) -> tuple[Any, Any]:
        m, (s,) = state["m"], state["s"]
        m = torch.tanh(0.5 * m + x.mean(-1).view(-1, *(1,) * len(shape)))
        s = s * 0.5 + x
        return {"y": s, "positive": s > 0}, {"m": m, "s": (s,)}

    state = {"m": randn(B, *shape), "s": (randn(B, H),)}
    x = randn(T, B, H)
    lengths = torch.tensor([T, 0, 2])
    found, expected = (over_time.run(cell, x, state, lengths, fuse=fuse) for fuse in (True, False))
    leaves = [torch.utils._pytree.tree_leaves(result) for result in (found, expected)]
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_products_after_the_loop_see_rows_past_the_end_as_zero():
    head = nn.Linear(H, 5, dtype=D)

    def cell(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x + h)
        return head(h).softmax(-1), h

    x = randn(T, B, H)
    lengths = torch.tensor([0, T, 3])
    x[lengths[2] :, 2] = float("nan")
    assert_fused_is_eager(cell, x=x, lengths=lengths)


# torch's modes


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


def test_autocast_and_halves():
    layer, x = tg.Recurrent(LayerNormLSTMCell(FEATURES, H)), torch.randn(T, B, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = layer(x)
    assert found.dtype == over_time.run(layer.cells[0], x, (torch.zeros(B, H),) * 2, fuse=False)[0].dtype
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


# Programs


@pytest.mark.parametrize("isa", needs.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 33, 130])
def test_every_instruction_set_with_poisoned_buffers(isa, dtype, size):
    cell, threads = SLSTMCell(5, size).to(dtype), torch.get_num_threads()
    x, operators = torch.randn(4, 9, 5, dtype=dtype), cpu.operators()
    state = tuple(torch.zeros(9, size, dtype=dtype) for _ in range(4))
    lengths = torch.tensor([4, 0, 1, 3, 4, 2, 4, 1, 4])
    expected = over_time.run(cell, x, state, lengths, fuse=False)
    operators.use_isa(isa)
    operators.poison_buffers(True)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = over_time.run(cell, x, state, lengths, fuse=True)
            torch.testing.assert_close(found, expected)
    finally:
        operators.use_isa("")
        operators.poison_buffers(False)
        torch.set_num_threads(threads)


def test_a_program_reads_as_it_is_written():
    explained = tg.explain(tg.Recurrent(LayerNormLSTMCell(FEATURES, H)), torch.randn(T, B, FEATURES))
    text = str(Program.parse(PROGRAM))
    assert text == PROGRAM
    assert "product m0 s0" in str(explained)


PROGRAM = """\
state s0 2, s1 2
input i0 8
vector p0 2
matrix m0 1x8x2
v0 8 = product m0 s0
v1 8 = add i0 v0
v2 2 = sigmoid v1[0:2]
v3 4 = gather v1 at 7*2,0:2
v4 2 = muladd v2 s1 p0
v5 2 = clamp v4 -0.5 0.5
v6 4 = concat v5 v2
v7 2 = mean v3 groups 2
next v7, v5
output v6
through resets 1"""


@pytest.mark.parametrize("line", ["v0 8 = nonsense s0", "v0 8 = add s0 i7", "state", "v0 x = add s0 s0"])
def test_an_unreadable_program(line):
    with pytest.raises(ValueError, match=f"program: cannot read the line '{line}'"):
        Program.parse(f"state s0 8\n{line}\nnext s0\noutput s0")


def test_numbers_that_are_no_program_are_refused():
    """Whatever is put in their place, nothing is read beyond its memory."""
    from tidegate.fusion.encode import encode

    code, constants = encode(PROGRAM, torch.float32)
    given = ([torch.zeros(2, 1, 8)], [torch.zeros(1, 2)] * 2, [torch.zeros(2)], [torch.zeros(1, 8, 2)])
    run_program = cpu.operators().run_program
    run_program(code, constants, *given, None, None, 2, 1, False)
    refused = 0
    for k in range(len(code)):
        for value in (-1, 1, 7, 1 << 20, 1 << 62):
            changed = code.clone()
            changed[k] = value
            try:
                run_program(changed, constants, *given, None, None, 2, 1, False)
            except (RuntimeError, ValueError):
                refused += 1
    assert refused > len(code)
