# SPDX-License-Identifier: Apache-2.0
"""A call that is recorded: the short way gives the reference's results and gradients, and takes only what it can."""

from __future__ import annotations

import needs
import pytest
import torch
from comparing import CELLS, LAYERS, tensors_in

import tidegate as tg
from tidegate.kernels import cpu

pytestmark = needs.compiled_operators

KINDS = CELLS + LAYERS


@pytest.fixture(autouse=True)
def _poisoned():
    cpu.operators().poison_buffers(True)
    yield
    cpu.operators().poison_buffers(False)


@pytest.fixture
def named():
    """By itself, an RNN's cell runs torch's step where gradients are recorded."""
    with tg.backend("cpu"):
        yield


@pytest.fixture
def answers(monkeypatch):
    """How many results each call of the short way gave."""
    given: list[int] = []
    operator = cpu._operator

    def counted(*arguments):
        results = operator("recorded_forward")(*arguments)
        given.append(len(results))
        return results

    monkeypatch.setattr(cpu, "_operator", lambda name: counted if name == "recorded_forward" else operator(name))
    return given


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def module(kind, *arguments, **options):
    torch.manual_seed(0)
    return getattr(tg, kind)(*arguments, dtype=torch.float64, **options)


def states(kind, *shape):
    return (randn(*shape), randn(*shape)) if kind.startswith("LSTM") else randn(*shape)


def close(ours, theirs):
    """Sums in another order, of up to 65 terms: at most 6.4e-15 apart, of larger numbers than 1 relative to them, on
    every instruction set, torch's included."""
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=8e-15)


def gradients(made, x, hx, used=slice(None), **keywords):
    """Results and the gradients of all leaves, of some results only."""
    results = tensors_in(made(x, hx, **keywords))
    torch.manual_seed(1)
    loss = sum((result * torch.randn_like(result)).sum() for result in results[used])
    leaves = [x, *(tensors_in(hx) if hx is not None else ()), *made.parameters()]
    return results, torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(made, x, hx, answers, calls=1, **options):
    answers.clear()
    got = gradients(made, x, hx, **options)
    assert len(answers) == calls
    assert all(answers), "the short way did not run"
    with tg.backend("reference"):
        expected = gradients(made, x, hx, **options)
    for ours, theirs in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        if ours is None or theirs is None:  # the reference's zeros, or the other way round: nothing flows
            assert all(gradient is None or not gradient.any() for gradient in (ours, theirs))
            continue
        close(ours, theirs)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, given, answers):
    for input_size, hidden_size in ((1, 1), (5, 17), (33, 64)):
        for batch in (None, 1, 3, 7):
            rows = () if batch is None else (batch,)
            hx = states(kind, *rows, hidden_size) if given else None
            assert_same(module(kind, input_size, hidden_size, batch != 3), randn(*rows, input_size), hx, answers)


@pytest.mark.parametrize("form", [{}, {"batch_first": True}, {"reverse": True}], ids=["", "batch-first", "reverse"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})],
)
def test_layers(kind, options, given, form, answers):
    for batch, steps in ((None, 1), (1, 1), (3, 1), (None, 4), (1, 7), (3, 2), (5, 13)):
        made = module(kind, 5, 17, bias=batch != 3, **form, **options)
        rows = () if batch is None else (batch,)
        x = randn(*rows, steps, 5) if "batch_first" in form else randn(steps, *rows, 5)
        assert_same(made, x, states(kind, 1, *rows, 17) if given else None, answers)


STACKS = {"two layers": (2, False), "two directions": (1, True), "three layers of two directions": (3, True)}


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch-first"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_stacks(kind, stack, batch_first, answers):
    layers, bidirectional = STACKS[stack]
    depth = layers * (1 + bidirectional)
    for batch, steps in ((None, 4), (1, 1), (3, 7)):
        made = module(kind, 5, 9, layers, bidirectional=bidirectional, batch_first=batch_first)
        rows = () if batch is None else (batch,)
        x = randn(*rows, steps, 5) if batch_first else randn(steps, *rows, 5)
        for given in (True, False):
            assert_same(made, x, states(kind, depth, *rows, 9) if given else None, answers, calls=depth)


@pytest.mark.parametrize("form", [{}, {"batch_first": True}, {"bidirectional": True}, {"reverse": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths(kind, form, answers):
    for lengths in ([5, 1, 4], [0, 2, 0], [0, 0, 0], [6, 6, 6]):
        made = module(kind, 5, 9, **form)
        x = randn(3, 6, 5) if "batch_first" in form else randn(6, 3, 5)
        calls = 1 + made.bidirectional
        assert_same(made, x, states(kind, calls, 3, 9), answers, calls=calls, lengths=torch.tensor(lengths))


def assert_same_outcome(outcome, answers, calls):
    """The reference's, and each of so many calls went the short way."""
    found = outcome()
    assert len(answers) == calls
    assert all(answers)
    with tg.backend("reference"):
        for ours, right in zip(found, outcome(), strict=True):
            close(ours, right)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_that_lie_apart(batch_first, steps, answers):
    """An input that is a part of a larger one, and an output of which a part is used, transposed."""
    made, wide = module("GRU", 5, 6, batch_first=batch_first), randn(1 + steps, 3, 9)
    x = wide[1:, :, 2:7]

    def outcome():
        output, h_n = made(x)
        loss = output.transpose(0, 1)[1:].square().sum() + output.sum() + h_n[0, 0].square().sum()
        return torch.autograd.grad(loss, [wide, *made.parameters()])

    assert_same_outcome(outcome, answers, calls=1)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", CELLS)
def test_a_row_of_a_larger_tensor(kind, answers):
    """Input and states that begin inside their storage, gradients that come expanded or from a slice."""
    made = module(kind, 5, 6)
    frames, given = randn(3, 2, 5), states(kind, 3, 2, 6)
    hx = tuple(state[1] for state in given) if isinstance(given, tuple) else given[1]

    def outcome():
        after = tensors_in(made(frames[2], hx))
        after = tensors_in(made(frames[1], tuple(after) if len(after) > 1 else after[0]))
        loss = torch.stack(after).transpose(0, 2)[1:].pow(2).sum() + after[0].sum()
        return torch.autograd.grad(loss, [frames, *tensors_in(given), *made.parameters()])

    assert_same_outcome(outcome, answers, calls=2)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", KINDS)
def test_each_result_alone(kind, answers):
    shape = (2, 4) if kind in CELLS else (1, 2, 4)
    count = len(tensors_in(module(kind, 3, 4)(randn(*shape[:-1], 3))))
    for k in range(count):
        x, hx = randn(*shape[:-1], 3), states(kind, *shape)
        assert_same(module(kind, 3, 4), x, hx, answers, used=slice(k, k + 1))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind, answers):
    shape, steps = ((2, 4), ()) if kind in CELLS else ((1, 2, 4), (3,))
    made, pair = module(kind, 3, 4), kind.startswith("LSTM")

    def run(x, *hx):
        return tuple(tensors_in(made(x, hx if pair else hx[0])))

    inputs = (randn(*steps, 2, 3), *tensors_in(states(kind, *shape)))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert all(answers)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_may_be_used_again(kind, answers):
    shape = (2, 4) if kind in CELLS else (1, 2, 4)
    made, x = module(kind, 3, 4), randn(*shape[:-1], 3)
    loss = tensors_in(made(x, states(kind, *shape)))[0].square().sum()
    leaves = [x, *made.parameters()]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert len(answers) == 1
    assert answers[0]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


LONG = {
    "a projection": ("LSTMCell", {"proj_size": 2}, lambda m, x: m(x)),
    "a clip": ("RNNCell", {"clip": 0.5}, lambda m, x: m(x)),
    "other strides": ("GRUCell", {}, lambda m, x: m(x.t().contiguous().t())),
    "no rows": ("GRUCell", {}, lambda m, x: m(x[:0])),
    "a meta device": ("GRUCell", {"device": "meta"}, lambda m, x: m(x.to("meta"))),
    "dropout in training": ("GRU", {"num_layers": 2, "dropout": 0.5}, lambda m, x: m(x[None])),
    "resets": ("GRU", {}, lambda m, x: m(x[None], resets=torch.zeros(1, len(x), dtype=torch.bool))),
    "a projected layer": ("LSTM", {"proj_size": 2}, lambda m, x: m(x[None])),
    "peepholes": ("LSTM", {"peepholes": True}, lambda m, x: m(x[None])),
    "a nested tensor": (
        "GRU",
        {"batch_first": True},
        lambda m, x: m(torch.nested.nested_tensor([x[:1]], layout=torch.jagged))[1],
    ),
}


@pytest.mark.parametrize("why", LONG)
def test_the_long_way(why, answers):
    kind, options, run = LONG[why]
    result = tensors_in(run(module(kind, 6, 4, **options), randn(3, 6)))
    assert not any(answers), f"{why} went the short way"
    assert result


def test_an_empty_state_is_refused(answers):
    with pytest.raises(RuntimeError):
        module("GRUCell", 3, 4)(randn(2, 3), torch.empty(0, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        module("GRU", 3, 4)(randn(1, 2, 3), torch.empty(0, dtype=torch.float64))
    assert not any(answers)


@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_an_rnn_cell_is_torchs(nonlinearity, given, answers):
    """So small a step that torch's own, recorded, is the quicker: to the bit the same."""
    made = module("RNNCell", 5, 6, nonlinearity=nonlinearity)
    twin = torch.nn.RNNCell(5, 6, nonlinearity=nonlinearity, dtype=torch.float64)
    twin.load_state_dict(made.state_dict())
    x, hx = randn(3, 5), randn(3, 6) if given else None
    for ours, theirs in zip(gradients(made, x, hx), gradients(twin, x, hx), strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert not answers
    assert module("RNNCell", 5, 6, clip=0.1)(x).abs().max() < 1
