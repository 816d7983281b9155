# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU backend against the reference in float64, with NaN in every buffer before it is written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from typing import Any

import needs
import pytest
import torch
from calls import VARIANTS
from kernel_cases import FLOORS, assert_right, backward, cases, computed, forward, grads_for, make_call
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tidegate
from tidegate import reference
from tidegate.kernels import cpu

pytestmark = [needs.compiled_operators, pytest.mark.usefixtures("poisoned_buffers")]

SHAPES = [
    (1, 1, 1, 1), (4, 3, 1, 3), (7, 2, 5, 17), (3, 1, 100, 100), (2, 33, 7, 129), (5, 9, 40, 40), (1, 20, 16, 64),
    (2, 300, 2, 17), (2, 5, 3, 257),
]  # fmt: skip
EMPTY = [(3, 0, 2, 5), (1, 0, 1, 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NARROW = (torch.bfloat16, torch.float16)


def check_inference(call) -> None:
    """Without saving, the same bits; a single step, whose sums run in another order, is as good as the reference."""
    *kept, _ = forward(call, True)
    *dropped, saved = forward(call, False)
    assert saved.shape == (0,)
    if call.input.shape[0] == 1:
        assert_right(call, (*dropped, *computed(call, grads_for(call))[len(dropped) :]))
    else:
        assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_reference(variant, dtype, shape):
    for call in cases(shape, variant, dtype):
        assert cpu.unsupported_reasons(call.call()) == []
        assert_right(call)
        check_inference(call)


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_sequences(variant):
    assert_right(make_call(variant, (3000, 1, 2, 3), dtype=torch.float64))
    assert_right(make_call(variant, (400, 6, 8, 24), dtype=torch.float32, lengths=True, resets=True))


@pytest.mark.parametrize("isa", needs.ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    cpu.operators().use_isa(isa)
    assert cpu.operators().isa() == isa
    for variant in VARIANTS:
        for shape in [(3, 5, 4, 17), (2, 13, 33, 70), (1, 1, 3, 40)]:
            assert_right(make_call(variant, shape, dtype=dtype))
            assert_right(make_call(variant, shape, dtype=dtype, lengths=True, resets=True, reverse=True))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("isa", needs.ISAS)
def test_environment_forces_the_instruction_set(isa):
    result = run_python("from tidegate.kernels import cpu; print(cpu.operators().isa())", TIDEGATE_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_unknown_instruction_set_is_an_error():
    result = run_python("from tidegate.kernels import cpu; cpu.operators().isa()", TIDEGATE_CPU_ISA="avx1024")
    assert result.returncode != 0
    assert "TIDEGATE_CPU_ISA: 'avx1024' is no instruction set that this CPU has" in result.stderr
    with pytest.raises(RuntimeError, match="it has baseline"):
        cpu.operators().use_isa("avx1024")


# Threads


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("shape", [(40, 1, 64, 192), (20, 40, 97, 95), (30, 3, 128, 256)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_at_any_number_of_threads(variant, shape, dtype):
    call = make_call(variant, shape, dtype=dtype, lengths=True, resets=True)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(computed(call, grads_for(call)))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert_right(call, results[-1])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_among_any_number_of_rows(variant, dtype):
    call = make_call(variant, (5, 61, 7, 43), dtype=dtype)
    grads = grads_for(call)
    together, with_batch = computed(call, grads), 1 + 2 * len(call.states) + 1  # outputs, dinput, the states' gradients
    for rows in (slice(0, 1), slice(7, 9), slice(20, 33)):
        part = call._replace(input=call.input[:, rows], states=tuple(state[rows] for state in call.states))
        alone = computed(part, (grads[0][:, rows].contiguous(), *(grad[rows] for grad in grads[1:])))
        for a, b in zip(alone[:with_batch], together[:with_batch], strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b[:, rows] if b.dim() == 3 else b[rows])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_short_sequences_have_the_bits_of_long_ones(variant, dtype):
    """Though their weights, which must be large for that, are packed for each product instead of once."""
    long = make_call(variant, (11, 3, 5, 555), dtype=dtype)
    outputs = forward(long, False)[0]
    for steps in (2, 3):
        short = long._replace(input=long.input[:steps].contiguous())
        assert torch.equal(forward(short, False)[0], outputs[:steps])
    assert_right(long._replace(input=long.input[:2].contiguous()))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_turns_have_the_same_bits(kind: str, batch: int) -> None:
    """Every second step of a cell, or of its streams, reads weights of more than 1.1 MB from the last to the first: no
    sum is made in another order, so not a bit differs."""
    cell, x = getattr(tidegate, f"{kind}Cell")(7, 541), torch.randn(3, batch, 7)
    with torch.no_grad():
        steps = [cell(x[0]) for _ in range(3)]
    runs = [[stream.step(step) for step in x] for stream in (cell.stream(batch), cell.stream(batch))]
    for a, b in (*pairwise(steps), *zip(*runs, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_cpu_and_two_threads_do_not_hang():
    code = """
import os, sys, time, torch
sys.path.insert(0, "tests")
from kernel_cases import forward, make_call
from tidegate.kernels import cpu
call = make_call("gru", (300, 1, 128, 256), dtype=torch.float32)
cpu.operators()
torch.set_num_threads(2)
forward(call, False)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), os.sched_getaffinity(0))
start = time.perf_counter()
for _ in range(10):
    forward(call, False)
print(time.perf_counter() - start)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 20  # milliseconds alone; minutes if the spin never yielded


class _InWorker(Dataset[Tensor]):
    def __init__(self) -> None:
        self.call = make_call("gru", (20, 4, 64, 128), dtype=torch.float32)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return forward(self.call, False)[0]


def test_after_fork_in_a_loader():
    data = _InWorker()
    right = data[0]  # the parent's pool is running before the fork
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for output in loader:
        assert torch.equal(output, right)


def test_two_python_threads_at_once():
    calls = [make_call("lstm", (60, 3, 64, 128), dtype=torch.float32, seed=seed) for seed in range(2)]
    right = [forward(call, False) for call in calls]
    same: dict[int, bool] = {}

    def work(i: int) -> None:
        runs = [forward(calls[i], False) for _ in range(30)]
        same[i] = all(torch.equal(a, b) for run in runs for a, b in zip(run, right[i], strict=True))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert same == {0: True, 1: True}


def test_the_interpreter_runs_meanwhile():
    call = make_call("lstm", (2000, 32, 128, 256), dtype=torch.float32)
    thread = threading.Thread(target=forward, args=(call, False))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 5


# Values


@pytest.mark.parametrize("isa", needs.ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity_stay_in_their_row(variant, dtype, isa):
    """At the ends of rows of odd sizes, in the input and in h_0."""
    cpu.operators().use_isa(isa)
    call = make_call(variant, (4, 7, 5, 37), dtype=dtype)
    call.input[1, 1, 4] = torch.nan
    call.input[1, 2, 4] = torch.inf
    call.states[0][4, -1] = torch.nan
    call.states[0][5, -1] = -torch.inf
    right, found = reference.forward(call), forward(call, True)
    for a, b in zip(found, right, strict=False):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        finite = b.isfinite()
        assert (a[finite] - b[finite]).abs().max() <= FLOORS[dtype] * b[finite].abs().max()
    assert right[0][:, [1, 4]].isnan().any()
    assert not right[0][:, [0, 3, 6]].isnan().any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_comes_from_padding_or_across_a_reset(variant):
    call = make_call(variant, (9, 6, 4, 20), lengths=True, resets=True)
    clean = call._replace(input=call.input.nan_to_num(7.0))
    grads = grads_for(call)
    for a, b in zip(computed(call, grads), computed(clean, grads), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_is_needed(variant):
    call = make_call(variant, (5, 3, 4, 6))
    grads = grads_for(call)
    *outputs, saved = forward(call, True)
    every = tuple(tensor is not None for tensor in call.tensors)
    all_grads = backward(call, outputs[0], saved, grads, every)
    for i, needed in enumerate(every):
        needs = tuple(needed and j == i for j in range(len(every)))
        some = backward(call, outputs[0], saved, grads, needs)
        for j, grad in enumerate(some):
            assert (grad is not None) == needs[j]
            assert grad is None or torch.equal(grad, all_grads[j])


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_gradients_are_zero(variant):
    call = make_call(variant, (5, 3, 4, 6), lengths=True)
    grads = grads_for(call)
    *outputs, saved = forward(call, True)
    needs = tuple(tensor is not None for tensor in call.tensors)
    for present in range(len(grads)):
        some = [grad if i == present else None for i, grad in enumerate(grads)]
        zeros = [grad if i == present else torch.zeros_like(grad) for i, grad in enumerate(grads)]
        got = backward(call, outputs[0], saved, tuple(some), needs)
        same = backward(call, outputs[0], saved, tuple(zeros), needs)
        for a, b in zip(got, same, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_overwriting_what_the_forward_kept(variant, dtype):
    """The same bits; `saved` changes only where it is allowed to, and where the gates' gradients can take its place."""
    for lengths in (False, True):
        call = make_call(variant, (7, 5, 4, 19), dtype=dtype, lengths=lengths, resets=True, reverse=lengths)
        grads = grads_for(call)
        *outputs, saved = forward(call, True)
        before = saved.clone()
        needs = tuple(tensor is not None for tensor in call.tensors)
        apart = backward(call, outputs[0], saved, grads, needs)
        assert torch.equal(saved, before)
        whole = (grads[0], *(grad.unsqueeze(0) for grad in grads[1:]))
        in_place = cpu.backward(call.call(), (saved,), whole, needs, True)
        for a, b in zip(apart, in_place, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b if a.dim() == b.dim() else b.squeeze(0))
        can = variant.startswith(("gru", "lstm")) and variant != "lstm-proj" and dtype not in NARROW
        assert torch.equal(saved, before) != can


def gradients_of_layer(layer: torch.nn.Module, x: Tensor, passes: int) -> list[list[Tensor]]:
    """Of as many passes through one graph, which the last of them uses up."""
    loss = layer(x)[0].square().sum()
    leaves = [x, *layer.parameters()]
    return [list(torch.autograd.grad(loss, leaves, retain_graph=k < passes - 1)) for k in range(passes)]


@pytest.mark.parametrize("kind", [tidegate.GRU, tidegate.LSTM])
def test_a_graph_that_is_kept_keeps_what_the_forward_kept(kind):
    torch.manual_seed(0)
    layer, x = kind(5, 19), torch.randn(7, 3, 5, requires_grad=True)
    first, second, last = gradients_of_layer(layer, x, 3)
    assert all(torch.equal(a, b) for other in (second, last) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("kind", [tidegate.GRU, tidegate.LSTM])
def test_what_a_hook_keeps_is_not_overwritten(kind, copies):
    torch.manual_seed(0)
    layer, x = kind(5, 19), torch.randn(7, 3, 5, requires_grad=True)
    (right,) = gradients_of_layer(layer, x, 1)
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.clone() if copies else tensor.detach(), tensor.clone()))
        return kept[-1][0]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (found,) = gradients_of_layer(layer, x, 1)
    assert all(torch.equal(a, b) for a, b in zip(right, found, strict=True))
    assert len(kept) > 5
    assert all(torch.equal(a, b) for a, b in kept)


def test_release_memory_gives_back_what_calls_left():
    layer, x = tidegate.LSTM(256, 256), torch.randn(9, 4, 256)
    with torch.no_grad(), tidegate.backend("cpu"):
        right = [layer(x)[0] for _ in range(3)][-1]
        assert tidegate.release_memory() >= layer.weight_hh_l0.nbytes  # where it lay packed
        assert tidegate.release_memory() == 0
        assert torch.equal(layer(x)[0], right)


def worst_ulps(bits: Tensor) -> dict[str, float]:
    """The largest error of each function in units of the last place of the exact float32."""
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    worst = {"sigmoid": 0.0, "tanh": 0.0}
    if x.numel() == 0:
        return worst
    for name, function in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
        exact = function(x.double())
        rounded = exact.float().abs_().clamp_(min=torch.finfo(torch.float32).smallest_normal)
        unit = (rounded.view(torch.int32) & 0x7F800000).view(torch.float32).double().mul_(2**-23)
        error = cpu.operators().activate(x, name == "tanh").double().sub_(exact).abs_().div_(unit)
        worst[name] = error.max().item()
    return worst


@pytest.mark.parametrize("isa", needs.ISAS)
def test_sigmoid_and_tanh_within_4_ulp(isa):
    cpu.operators().use_isa(isa)
    generator = torch.Generator().manual_seed(0)
    every_exponent = torch.randint(-(2**31), 2**31, (2**19,), generator=generator, dtype=torch.int64)
    usual = (torch.rand(2**19, generator=generator) * 40 - 20).view(torch.int32)
    for bits in (every_exponent.to(torch.int32), usual):
        assert max(worst_ulps(bits).values()) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", needs.ISAS)
def test_sigmoid_and_tanh_at_the_edges(isa, dtype):
    cpu.operators().use_isa(isa)
    inf, tiny = torch.inf, torch.finfo(dtype).smallest_normal / 8
    x = torch.tensor([inf, -inf, torch.nan, 0.0, -0.0, tiny, -tiny, 1000.0, -1000.0], dtype=dtype)
    for hyperbolic, function in ((False, torch.sigmoid), (True, torch.tanh)):
        value = cpu.operators().activate(x, hyperbolic)
        torch.testing.assert_close(value, function(x), rtol=1e-15, atol=0, equal_nan=True)
    assert torch.equal(cpu.operators().activate(x, True).signbit()[3:5], torch.tensor([False, True]))


# Errors


def arguments_of(form: int, **changes: Any) -> tuple[Any, ...]:
    """Of the forward operator, for an LSTM over (4, 3, 5) with 6 units, some of them changed."""
    call = make_call("lstm", (4, 3, 5, 6), dtype=torch.float32)
    w, (h, c) = call.weights, (state.unsqueeze(0) for state in call.states)
    given = {
        "form": form, "weight_ih": w["weight_ih"], "weight_hh": w["weight_hh"], "bias_ih": w["bias_ih"],
        "bias_hh": w["bias_hh"], "rest": None, "input": call.input, "h_0": h, "c_0": c,
    }  # fmt: skip
    return tuple((given | changes).values())


LSTM_FORM = 2 + (1 << 17)
WITH_LENGTHS, WITH_RESETS, WITH_PROJECTION = 1 << 11, 1 << 12, 1 << 13


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (9 + (1 << 17), {}, "form: expected one of 5 kinds, got"),
        (2, {}, "form: expected a layout, a direction and at least one layer"),
        (LSTM_FORM + (7 << 4), {}, "form: expected a layout, a direction"),
        (LSTM_FORM + (1 << 17), {}, "rest: expected 4 weights of other cells, got 0"),
        (LSTM_FORM, {"input": torch.zeros(4, 2, 5)}, r"h_0: expected \(1, 2, 6\), got \(1, 3, 6\)"),
        (LSTM_FORM, {"input": torch.zeros(4, 3)}, "input: expected 3 dimensions, got 2"),
        (LSTM_FORM, {"input": torch.zeros(0, 3, 5)}, "input: expected at least one step"),
        (LSTM_FORM, {"input": torch.zeros(4, 3, 5).double()}, "weight_ih: expected the dtype of the other tensors"),
        (LSTM_FORM, {"input": torch.zeros(4, 3, 5).int()}, "input: expected float32, float64, bfloat16 or float16"),
        (LSTM_FORM, {"input": torch.zeros(4, 3, 5, device="meta")}, "input: expected a tensor on the cpu"),
        (LSTM_FORM, {"h_0": torch.zeros(1, 3, 7)}, r"h_0: expected \(1, 3, 6\), got \(1, 3, 7\)"),
        (LSTM_FORM, {"c_0": torch.zeros(1, 3, 5)}, r"c_0: expected \(1, 3, 6\), got \(1, 3, 5\)"),
        (3 + (1 << 17), {"weight_hh": torch.zeros(18, 6)}, r"weight_ih: expected \(18, 5\), got \(24, 5\)"),
        (LSTM_FORM, {"weight_ih": torch.zeros(24, 4)}, r"weight_ih: expected \(24, 5\), got \(24, 4\)"),
        (LSTM_FORM, {"weight_hh": torch.zeros(24, 5)}, "weight_hh: expected 6 columns, got 5"),
        (LSTM_FORM, {"weight_hh": torch.zeros(0, 6)}, "weight_hh: expected at least one hidden unit"),
        (LSTM_FORM, {"bias_hh": torch.zeros(23)}, r"bias_hh: expected \(24\), got \(23\)"),
        (LSTM_FORM + WITH_PROJECTION, {}, "rest: expected what the form says, got 0 tensors"),
        (LSTM_FORM + WITH_PROJECTION, {"rest": [torch.zeros(5, 6)]}, r"weight_hr: expected \(6, 6\), got \(5, 6\)"),
        (LSTM_FORM + WITH_LENGTHS, {"rest": [torch.tensor([1, 5, 2])]}, "lengths: expected 0 to 4, got 5"),
        (LSTM_FORM + WITH_LENGTHS, {"rest": [torch.tensor([1, -1, 2])]}, "lengths: expected 0 to 4, got -1"),
        (LSTM_FORM + WITH_LENGTHS, {"rest": [torch.tensor([1, 2, 2]).int()]}, "lengths: expected the dtype"),
        (LSTM_FORM + WITH_RESETS, {"rest": [torch.zeros(3, 3).bool()]}, r"resets: expected \(4, 3\), got \(3, 3\)"),
    ],
)
def test_wrong_arguments_are_named(form, changes, message):
    with pytest.raises(RuntimeError, match=message):
        cpu.operators().forward(*arguments_of(form, **changes))


def test_reasons():
    call = make_call("gru", (2, 3, 4, 5))
    whole, meta = call._replace(input=call.input.int()), call._replace(input=call.input.to("meta"))
    assert cpu.unsupported_reasons(whole.call()) == ["input is int32, not float32, float64, bfloat16 or float16"]
    assert "input is on meta" in cpu.unsupported_reasons(meta.call())
    none = call._replace(input=call.input[:0])
    assert cpu.unsupported_reasons(none.call()) == ["the kernels need at least one step"]
