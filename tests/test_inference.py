# SPDX-License-Identifier: Apache-2.0
"""Calls without gradients on the compiled operators: one operator a call, and the reference's results."""

from __future__ import annotations

import copy
from unittest import mock

import needs
import pytest
import torch
from comparing import CELLS, LAYERS, tensors_in
from tolerances import assert_close

import tidegate as tg
from tidegate import dispatch
from tidegate.kernels import cpu

pytestmark = needs.compiled_operators

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BATCHES = (None, 1, 2, 3, 4, 7, 33, 70)
SIZES = ((1, 1), (5, 17), (40, 3), (33, 64))


@pytest.fixture(autouse=True)
def _bare():
    cpu.operators().poison_buffers(True)
    with torch.no_grad():
        yield
    cpu.operators().poison_buffers(False)
    cpu.operators().use_isa("")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def module(kind, *sizes, dtype=torch.float32, scale=3, **options):
    """Weights large enough for its gates to saturate; over many steps that would be chaos."""
    torch.manual_seed(0)
    made = getattr(tg, kind)(*sizes, dtype=torch.float64, **options)
    for parameter in made.parameters():
        parameter.mul_(scale)
    return made.to(dtype)


def by_reference(made, x, hx, **keywords):
    """The reference's results in float64, and in the module's own dtype."""
    wide = None if hx is None else torch.utils._pytree.tree_map(torch.Tensor.double, hx)
    with tg.backend("reference"):
        exact = tensors_in(copy.deepcopy(made).double()(x.double(), wide, **keywords))
        return exact, tensors_in(made(x, hx, **keywords))


def on_the_cpu(run):
    """Its results, by one compiled operator."""
    with tg.trace() as ran:
        results = run()
    assert [(one.backend, one.what, one.operators) for one in ran] == [("cpu", "forward", 1)]
    return results


def assert_same(made, x, hx, **keywords):
    got = tensors_in(on_the_cpu(lambda: made(x, hx, **keywords)))
    exact, same_dtype = by_reference(made, x, hx, **keywords)
    for ours, theirs, oracle in zip(got, same_dtype, exact, strict=True):
        assert ours.shape == oracle.shape
        assert_close(ours, theirs, oracle, type(made).__name__)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, given, dtype):
    for input_size, hidden_size in SIZES:
        for batch in BATCHES:
            made = module(kind, input_size, hidden_size, batch != 3, dtype=dtype)
            rows = () if batch is None else (batch,)
            h, c = randn(*rows, hidden_size, dtype=dtype), randn(*rows, hidden_size, dtype=dtype)
            hx = None if not given else (h, c) if kind == "LSTMCell" else h
            assert_same(made, randn(*rows, input_size, dtype=dtype), hx)


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch-first"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_of_layers(kind, given, batch_first):
    for layers, (input_size, hidden_size) in enumerate(SIZES, 1):
        for batch in BATCHES:
            made = module(kind, input_size, hidden_size, layers, bias=batch != 3, batch_first=batch_first)
            rows = () if batch is None else (batch,)
            x = randn(*rows, 1, input_size) if batch_first else randn(1, *rows, input_size)
            h, c = randn(layers, *rows, hidden_size), randn(layers, *rows, hidden_size)
            hx = None if not given else (h, c) if kind == "LSTM" else h
            assert_same(made, x, hx)


FORMS = {
    "one layer": ((9, 33), {}),
    "two directions": ((9, 33), {"bidirectional": True}),
    "a stack": ((9, 33, 4), {}),
    "a reversed stack": ((40, 17, 3), {"reverse": True}),
    "a stack of two directions": ((9, 17, 3), {"bidirectional": True}),
    "no bias": ((9, 17, 2), {"bias": False}),
    "one unit": ((1, 1, 3), {"bidirectional": True}),
}
OPTIONS = {
    "RNN": [{}, {"nonlinearity": "relu"}],
    "LSTM": [{}, {"proj_size": 3}],
    "GRU": [{}, {"reset_after": False}],
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_sequences(kind, form, threads):
    """Layers and directions side by side or one by one, at any thread count: to the same bits."""
    sizes, options = FORMS[form]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for extra in OPTIONS[kind]:
            if extra.get("proj_size", 0) >= sizes[1]:
                continue
            for i, dtype in enumerate(DTYPES):
                batch_first = i % 2 == 1
                made = module(kind, *sizes, dtype=dtype, scale=1, batch_first=batch_first, **options, **extra)
                for batch, steps in ((None, 40), (1, 33), (3, 70), (16, 9), (17, 2), (40, 5)):
                    for lengths in (None,) if batch is None else (None, torch.randint(0, steps + 1, (batch,))):
                        assert_right(made, batch, steps, lengths, dtype)
    finally:
        torch.set_num_threads(before)


def assert_right(made, batch, steps, lengths, dtype):
    rows = () if batch is None else (batch,)
    shape = (*rows, steps, made.input_size) if made.batch_first else (steps, *rows, made.input_size)
    x = randn(*shape, dtype=dtype)
    for given in (True, False):
        depth = made.num_layers * (1 + made.bidirectional)
        h = randn(depth, *rows, made.proj_size or made.hidden_size, dtype=dtype)
        c = randn(depth, *rows, made.hidden_size, dtype=dtype)
        hx = None if not given else (h, c) if made.mode == "LSTM" else h
        got = assert_same(made, x, hx, lengths=lengths)
        # Layers and directions side by side give the bits of one after another.
        with mock.patch.object(tg.nn.RecurrentLayer, "_between", return_value=lambda output: output):
            one_by_one = tensors_in(made(x, hx, lengths=lengths))
        if made.num_layers > 1:
            assert all(map(torch.equal, got, one_by_one))


@pytest.mark.parametrize("isa", needs.ISAS)
def test_every_instruction_set(isa):
    cpu.operators().use_isa(isa)
    for kind in CELLS:
        for dtype in DTYPES:
            for batch in (1, 5):
                h, c = randn(batch, 37, dtype=dtype), randn(batch, 37, dtype=dtype)
                hx = (h, c) if kind == "LSTMCell" else h
                x = randn(batch, 21, dtype=dtype)
                assert_same(module(kind, 21, 37, dtype=dtype), x, hx)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in CELLS:
            x, h, c = randn(9, 200), randn(9, 260), randn(9, 260)
            assert_same(module(kind, 200, 260), x, (h, c) if kind == "LSTMCell" else h)
    finally:
        torch.set_num_threads(before)


def test_state_given_is_state_kept():
    """What comes back shares no memory with what went in, nor with one another."""
    x, h, c = randn(1, 2, 3), randn(1, 2, 4), randn(1, 2, 4)
    output, (h_n, c_n) = on_the_cpu(lambda: module("LSTM", 3, 4)(x, (h, c)))
    assert len({t.data_ptr() for t in (x, h, c, output, h_n, c_n)}) == 6
    assert torch.equal(output, h_n)


@pytest.mark.parametrize("kind", CELLS + LAYERS)
def test_rows_that_lie_apart(kind):
    """One step of an input that is a part of a larger one."""
    x = randn(3, 9)[:, 2:7] if kind in CELLS else randn(2, 3, 9)[1:, :, 2:7]
    assert_same(module(kind, 5, 4), x, None)


FORMS_OF_INPUT = {
    "a reset before the product": ("GRUCell", {"reset_after": False}, lambda m, x: m(x)),
    "a projection": ("LSTMCell", {"proj_size": 2}, lambda m, x: m(x)),
    "other strides": ("GRUCell", {}, lambda m, x: m(x.t().contiguous().t())),
    "no rows": ("GRUCell", {}, lambda m, x: m(x[:0])),
    "lengths that are not int64": ("GRU", {}, lambda m, x: m(x[None], lengths=[1] * len(x))),
    "resets": ("GRU", {}, lambda m, x: m(x[None], resets=torch.zeros(1, len(x), dtype=torch.bool))),
    "a list": ("GRU", {}, lambda m, x: m([x])),
    "a packed sequence": ("GRU", {}, lambda m, x: m(torch.nn.utils.rnn.pack_sequence([x]))),
}


@pytest.mark.parametrize("form", FORMS_OF_INPUT)
def test_every_form_is_one_operator(form):
    kind, options, run = FORMS_OF_INPUT[form]
    made, x = module(kind, 6, 4, **options), randn(3, 6)
    result = tensors_in(on_the_cpu(lambda: run(made, x)))
    with tg.backend("reference"):
        for ours, right in zip(result, tensors_in(run(made, x)), strict=True):
            torch.testing.assert_close(ours, right)


ELSEWHERE = {
    "autocast": ("GRUCell", {}, lambda m, x: torch.autocast("cpu", torch.bfloat16)(m)(x)),
    "torch.func": ("GRUCell", {}, lambda m, x: torch.func.vmap(m)(x)),
    "peepholes": ("LSTMCell", {"peepholes": True}, lambda m, x: m(x)),
    "a clip": ("RNNCell", {"clip": 0.5}, lambda m, x: m(x)),
    "another activation": ("GRUCell", {"activations": ("hard_sigmoid", "tanh")}, lambda m, x: m(x)),
    "a layer's peepholes": ("LSTM", {"peepholes": True}, lambda m, x: m(x[None])),
    "dropout in training": ("GRU", {"num_layers": 2, "dropout": 0.5}, lambda m, x: m(x[None])),
}


@pytest.mark.parametrize("why", ELSEWHERE)
def test_what_the_kernels_do_not_know(why):
    kind, options, run = ELSEWHERE[why]
    result = tensors_in(run(module(kind, 6, 4, **options), randn(3, 6)))
    assert all(tensor.isfinite().all() for tensor in result)


@pytest.mark.parametrize(
    ("kind", "x", "hx", "message"),
    [
        ("GRUCell", torch.zeros(2, 7), None, "input has inconsistent input_size: got 7 expected 6"),
        ("GRUCell", torch.zeros(2, 6), torch.zeros(3, 4), "Input batch size 2 doesn't match hidden0 batch size 3"),
        ("LSTMCell", torch.zeros(2, 6), (torch.zeros(2, 4), torch.zeros(2, 5)), "hidden1 has inconsistent hidden_size"),
        ("GRU", torch.zeros(1, 2, 7), None, "input.size.-1. must be equal to input_size. Expected 6, got 7"),
        ("LSTM", torch.zeros(1, 2, 6), (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)), r"Expected hidden\[1\] size"),
        ("GRU", torch.zeros(1, 2, 6), torch.zeros(1, 4), "For batched 3-D input, hx should also be 3-D"),
        ("GRU", torch.zeros(3, 2, 6), torch.zeros(0, 2, 4), r"Expected hidden size \(1, 2, 4\), got \[0, 2, 4\]"),
        ("GRU", torch.zeros(0, 2, 6), None, "Expected sequence length to be larger than 0"),
        ("GRUCell", torch.zeros(6), torch.zeros(0), "hidden0 has inconsistent hidden_size"),
        ("GRUCell", torch.zeros(2, 6, device="meta"), None, "device"),
        ("GRUCell", torch.zeros(2, 6), torch.zeros(2, 4).half(), "dtype"),
    ],
)
def test_errors_are_torchs(kind, x, hx, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        module(kind, 6, 4)(x, hx)


def test_parameters_are_read_at_every_call():
    cell = module("GRUCell", 5, 6)
    x, h = randn(2, 5), randn(2, 6)
    torch.nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    first = on_the_cpu(lambda: cell(x, h))
    cell.parametrizations.weight_hh.original0.mul_(2)
    cell.bias_ih.data.add_(1)
    second = on_the_cpu(lambda: cell(x, h))
    with tg.backend("reference"):
        torch.testing.assert_close(cell(x, h), second)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", [None, "aten", "reference"])
def test_a_parametrization_is_computed_once(name):
    class Counting(torch.nn.Module):
        count = 0

        def forward(self, weight):
            Counting.count += 1
            return weight

    for made, x in ((module("GRUCell", 5, 6), randn(2, 5)), (module("LSTM", 5, 6, 2), randn(3, 2, 5))):
        parameter = "weight_hh" if hasattr(made, "weight_hh") else "weight_hh_l1"
        torch.nn.utils.parametrize.register_parametrization(made, parameter, Counting())
        Counting.count = 0
        with tg.backend(name):
            made(x)
        assert Counting.count == 1


def test_what_torch_multiplies_faster_is_left_to_it(monkeypatch):
    layer, x = module("GRU", 6, 256, dtype=torch.bfloat16), randn(3, 256, 6, dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "multiplies_matrices", lambda: False)
    on_the_cpu(lambda: layer(x))
    monkeypatch.setattr(dispatch, "multiplies_matrices", lambda: True)
    with tg.trace() as ran:
        layer(x)
    assert [one.backend for one in ran] == ["aten"]


def test_lengths_are_refused_by_name():
    with pytest.raises(ValueError, match="lengths"):
        module("GRU", 6, 4)(torch.zeros(3, 2, 6), lengths=torch.tensor([4, 1]))
