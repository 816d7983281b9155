# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels under Triton's interpreter against the reference in float64, with NaN in every new buffer.

The interpreter runs one program after another in NumPy. It shows the numbers; it shows neither races nor limits, and
of bfloat16 only that its path works: products are taken of values widened to float32. `benchmarks/gpu.py` runs the same
matrix where there is a GPU.
"""

from __future__ import annotations

import needs
import pytest
import torch
from calls import VARIANTS
from kernel_cases import assert_right, backward, cases, computed, forward, grads_for, make_call
from test_backends import run_python

import tidegate as tg
from tidegate import backends
from tidegate.kernels import triton as kernels
from tidegate.kernels.triton import plan

pytestmark = needs.interpreted_triton

OURS = [variant for variant in VARIANTS if variant != "lstm-proj"]
SEQUENCE = ["resident", "streamed", "persistent", "per_step"]
EMPTY = [(0, 3, 2, 5), (3, 0, 2, 5), (0, 0, 1, 1)]


@pytest.fixture(autouse=True)
def _poisoned_buffers():
    """torch fills what `torch.empty` and its like return with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernel", SEQUENCE)
@pytest.mark.parametrize("variant", OURS)
def test_agrees_with_the_reference(variant, kernel, recompute):
    """Two chunks of units, two steps of the product's inner dimension, two batch tiles, each with an edge."""
    chosen = range(recompute, 8, 2) if kernel in ("resident", "streamed") else (1, 4 + 3 * recompute)
    batch = 3 if recompute else 17  # the gates that are computed again know no tiles of the loop's
    for i, call in enumerate(cases((3, batch, 2, 19), variant, torch.float64)):
        if i in chosen:
            with plan.using(kernel, recompute):
                assert_right(call, backend=backends.TRITON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", SEQUENCE)
@pytest.mark.parametrize("variant", OURS)
def test_lower_dtypes(variant, kernel, dtype):
    call = make_call(variant, (3, 3, 5, 17), dtype=dtype, lengths=True, resets=True, reverse=kernel == "streamed")
    with plan.using(kernel, recompute=kernel == "resident"):
        assert_right(call, backend=backends.TRITON)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 37), *EMPTY], ids=str)
@pytest.mark.parametrize("variant", OURS)
def test_edges(variant, shape):
    for kernel in ("resident", "streamed"):
        with plan.using(kernel):
            assert_right(make_call(variant, shape, dtype=torch.float64, batch_first=True), backend=backends.TRITON)
            call = make_call(variant, shape, dtype=torch.float64, lengths=True, resets=True, reverse=True)
            assert_right(call, backend=backends.TRITON)


# Without float16 for relu: what torch rounds before the kernel may fall on the kink's other side.
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float64) for variant in OURS]
    + [(variant, torch.float16) for variant in OURS if variant != "rnn-relu"],
    ids=str,
)
def test_one_step_after_torch_s_products(variant, dtype):
    for shape, biases in [((1, 3, 4, 5), (True, False)), ((1, 17, 2, 259), (True,))]:
        for bias in biases:
            call = make_call(variant, shape, dtype=dtype, bias=bias)
            assert plan.choose(plan.size_of(call), plan.Device(True)).kernel == "step"
            for recompute in (False, True):
                with plan.using(recompute=recompute):
                    assert_right(call, backend=backends.TRITON)
    *kept, _ = forward(call, True, backends.TRITON)
    *dropped, saved = forward(call, False, backends.TRITON)
    assert saved.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))


@pytest.mark.parametrize("kernel", ["resident", "streamed"])
@pytest.mark.parametrize("variant", OURS)
def test_without_saving_the_same_bits(variant, kernel):
    call = make_call(variant, (3, 2, 4, 17), dtype=torch.float32, resets=True)
    with plan.using(kernel):
        *kept, _ = forward(call, True, backends.TRITON)
        *dropped, saved = forward(call, False, backends.TRITON)
    assert saved.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))


@pytest.mark.parametrize("variant", OURS)
def test_programs_that_share_a_tile_give_the_same_bits(variant):
    """K3's arithmetic does not depend on how many programs there are."""
    call = make_call(variant, (2, 3, 4, 40), dtype=torch.float32, lengths=True)
    grads = grads_for(call)
    results = []
    for programs in (1, 2, 3):
        with plan.using("per_step", programs=programs):
            results.append(computed(call, grads, backends.TRITON))
    with plan.using("streamed"):
        results.append(computed(call, grads, backends.TRITON))
    for result in results[1:]:
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("variant", OURS)
def test_only_what_is_needed_and_absent_gradients_are_zero(variant):
    call = make_call(variant, (3, 2, 4, 6), lengths=True)
    grads = grads_for(call)
    *outputs, saved = forward(call, True, backends.TRITON)
    every = tuple(tensor is not None for tensor in call.tensors)
    all_grads = backward(call, outputs[0], saved, grads, every, backends.TRITON)
    for i in range(len(every)):
        needs = tuple(needed and j == i for j, needed in enumerate(every))
        some = backward(call, outputs[0], saved, grads, needs, backends.TRITON)
        for j, grad in enumerate(some):
            assert (grad is not None) == needs[j]
            assert grad is None or torch.equal(grad, all_grads[j])
    for present in range(len(grads)):
        some = [grad if i == present else None for i, grad in enumerate(grads)]
        zeros = [grad if i == present else torch.zeros_like(grad) for i, grad in enumerate(grads)]
        got = backward(call, outputs[0], saved, tuple(some), every, backends.TRITON)
        same = backward(call, outputs[0], saved, tuple(zeros), every, backends.TRITON)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, same, strict=True))


def test_through_the_front_door():
    torch.manual_seed(0)
    layer = tg.LSTM(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 0, 2])
    found = {}
    for name in ("triton", "reference"):
        with tg.backend(name):
            output, states = layer(x, lengths=lengths)
        total = output.square().sum() + sum(state.sum() for state in states)
        found[name] = (output.detach(), *torch.autograd.grad(total, [x, *layer.parameters()]))
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        # Sums in another order: 8.9e-16 apart, on each of torch's instruction sets.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the branch that is not taken overflows
def test_activations_near_zero_and_far_out():
    from triton_functions import both

    exponents = torch.linspace(-40, 6, 1017)
    x = torch.cat((2**exponents, torch.tensor([0.0, torch.inf, 0.35, 0.3499999, torch.nan, 1e-45, 88.0])))
    x = torch.cat((x, -x)).contiguous()
    s, t = torch.empty_like(x), torch.empty_like(x)
    both[(1,)](x, s, t, N=x.numel())
    for found, function in ((s, torch.sigmoid), (t, torch.tanh)):
        # 3 units in the last place, 1.8e-7, is the most, on each of the paths of NumPy, whose exponential it is here.
        # Denormals are exact.
        torch.testing.assert_close(found, function(x.double()).float(), rtol=2e-7, atol=0, equal_nan=True)


# Choosing


def test_under_the_interpreter_it_runs_only_when_named():
    call = make_call("gru", (3, 2, 4, 5), dtype=torch.float32)
    assert kernels.unsupported_reasons(call.call()) == []
    assert backends.select(call.call(), "triton") is backends.TRITON
    assert backends.select(call.call(), "") is not backends.TRITON
    layer, x = tg.GRU(4, 5), torch.rand(3, 2, 4)
    assert "triton: it runs only when named, as in tidegate.backend('triton'): Triton's" in str(tg.explain(layer, x))
    with tg.backend("triton"):
        found = tg.explain(layer, x)
    assert found.backend == "triton"
    assert found.calls[0].reasons["triton"] == []


def test_reasons(monkeypatch):
    call = make_call("gru", (2, 3, 4, 5), dtype=torch.float32)
    assert kernels.unsupported_reasons(make_call("lstm-proj", (2, 3, 4, 6)).call()) == [
        "LSTM with projections is not among the kernels"
    ]
    assert (
        "beyond torch.nn's equations"
        in kernels.unsupported_reasons(call._replace(options={**call.options, "clip": 1.0}).call())[0]
    )
    assert kernels.unsupported_reasons(call._replace(input=call.input.double()).call())[0] == (
        "h_0 is float32 on cpu, unlike input"
    )
    assert kernels.unsupported_reasons(call.to(torch.complex64).call()) == [
        "input is complex64, not float32, bfloat16 or float16"
    ]
    meta = call.with_tensors([None if tensor is None else tensor.to("meta") for tensor in call.tensors])
    assert kernels.unsupported_reasons(meta.call()) == ["input is on meta"]
    huge = call.input[:1, :1].expand(2**15, 2**15, 4)
    assert "T*B*hidden_size is 2**31 or more" in kernels.unsupported_reasons(call._replace(input=huge).call())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.unsupported_reasons(call.to(torch.float64).call()) == [
        "no CUDA device", "input is on cpu", "float64 runs under Triton's interpreter alone",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "reason"),
    [("3.5.1", "triton 3.5.1 is too old: 3.6 or later"), (None, "triton is not installed: torch's builds for CUDA")],
)
def test_versions(monkeypatch, found, reason):
    monkeypatch.setattr(kernels, "_version", lambda: found)
    kernels._missing.cache_clear()
    try:
        assert kernels.availability()[0].startswith(reason)
    finally:
        kernels._missing.cache_clear()


H200 = plan.Device(False, False, 132, (9, 0))


def size(batch: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16, kind: str = "gru") -> plan.Size:
    return plan.Size(
        kind,
        {"rnn_tanh": 1, "gru": 3, "lstm": 4, "gru_reset_before": 3}[kind],
        100,
        batch,
        hidden_size,
        dtype,
        "ieee",
        False,
    )


def test_which_kernel_is_planned():
    for hidden_size, kernel in [
        (1, "resident"),
        (124, "resident"),
        (129, "streamed"),
        (255, "streamed"),
        (257, "persistent"),
        (8, "held"),
        (1024, "held"),
        (2048, "persistent"),
    ]:
        assert plan.choose(size(16, hidden_size), H200).kernel == kernel
    assert plan.choose(size(16, 128, torch.float32), H200).kernel == "streamed"
    assert plan.choose(size(16, 512, kind="gru_reset_before"), H200).kernel == "persistent"


@pytest.mark.parametrize("batch", [1, 16, 17, 64, 200, 256])
@pytest.mark.parametrize("hidden_size", [8, 64, 200, 512, 1000, 1024])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_held_plan_fits_the_device(batch, hidden_size, kind):
    """Its programs wait for each other: all must run at once."""
    sizes = size(batch, hidden_size, kind=kind)
    reasons = plan.reasons("held", sizes, H200)
    if reasons:
        assert reasons == ["the weights do not fit into the registers of the device's multiprocessors"]
        return
    with plan.using("held"):
        config = plan.choose(sizes, H200).config
    assert -(-batch // config.block_b) * config.programs <= H200.processors
    assert config.programs * config.block_n >= hidden_size


def test_crowded_programs_leave_a_call_to_the_persistent_kernel_or_to_cudnn():
    for kind, dtype, batch, hidden_size, kernel, is_cudnns in [
        ("gru", torch.bfloat16, 256, 512, "held", False),
        ("gru", torch.bfloat16, 256, 1024, "persistent", False),
        ("lstm", torch.bfloat16, 512, 512, "persistent", False),
        ("rnn_tanh", torch.float16, 256, 1024, "persistent", False),
        ("lstm", torch.bfloat16, 256, 1024, "held", True),
        ("gru", torch.float16, 256, 1024, "held", True),
    ]:
        sizes = size(batch, hidden_size, dtype, kind=kind)
        assert plan.choose(sizes, H200).kernel == kernel
        assert bool(plan.slower_reasons(sizes, 1, H200)) == is_cudnns


def test_what_is_not_held_has_a_reason():
    for sizes, device, reason in [
        (size(16, 100), H200, "hidden_size is 100, no multiple of 8"),
        (size(16, 256, torch.float32), H200, "it takes tf32"),
        (size(16, 256, kind="gru_reset_before"), H200, "is not among its cells"),
        (size(16, 256), plan.Device(False, False, 80, (7, 0)), "it needs compute capability 8.0"),
        (size(4096, 1024), H200, "do not fit into the registers of the device's multiprocessors"),
        (size(16, 256), plan.Device(True), "CUDA C++ does not run under Triton's interpreter"),
    ]:
        assert any(reason in found for found in plan.reasons("held", sizes, device)), reason


@pytest.mark.parametrize("batch", [1, 16, 17, 64, 200, 256])
@pytest.mark.parametrize("hidden_size", [257, 500, 1001, 1020])
def test_a_persistent_plan_fits_the_device(batch, hidden_size):
    chosen = plan.choose(size(batch, hidden_size), H200)
    config = chosen.config
    assert chosen.kernel == "persistent"
    assert -(-batch // config.block_b) * config.programs <= H200.processors
    assert config.programs * config.block_n >= hidden_size


def test_what_cannot_run_at_once_has_a_reason_and_is_streamed():
    chosen = plan.choose(size(4096, 1024), H200)
    assert chosen.kernel == "streamed"
    assert chosen.reasons["persistent"] == [
        "the device has 132 multiprocessors: its programs could not all run at once, and they wait for each other"
    ]
    with plan.using("persistent"), pytest.raises(ValueError, match="could not all run at once"):
        plan.choose(size(4096, 1024), H200)
    old = plan.choose(size(16, 1024), plan.Device(False, False, 132, (6, 1)))
    assert old.reasons["persistent"] == ["it needs compute capability 7.0"]


def test_the_kernels_names():
    with pytest.raises(ValueError, match=r"kernel: expected one of step, resident, .* got 'fast'"), plan.using("fast"):
        pass
    with plan.using("resident"), pytest.raises(ValueError, match="do not stay resident, those of 128 do"):
        plan.choose(size(1, 129), H200)


def test_tf32_where_torch_allows_it():
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        for allowed in ("tf32", "ieee"):
            rnn.fp32_precision = allowed
            assert plan.precision(torch.float32) == allowed
            assert plan.precision(torch.bfloat16) == "ieee"
    finally:
        rnn.fp32_precision = before


def test_without_triton_nothing_imports_it():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import tidegate as tg; layer, x = tg.GRU(3, 4), torch.rand(5, 2, 3)\n"
        "layer(x)[0].sum().backward(); print(tg.explain(layer, x).calls[0].reasons['triton'])"
    )
    done = run_python(code, TRITON_INTERPRET="0")
    assert "'no CUDA device', 'input is on cpu'" in done.stdout, done.stderr
