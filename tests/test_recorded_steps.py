# SPDX-License-Identifier: Apache-2.0
"""One step that is recorded: the short way gives the reference's results and gradients, and takes only what it can."""

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
def answers(monkeypatch):
    """How many results each call of the short way gave."""
    given: list[int] = []
    operator = cpu._operator

    def counted(*arguments):
        results = operator("recorded_step")(*arguments)
        given.append(len(results))
        return results

    monkeypatch.setattr(cpu, "_operator", lambda name: counted if name == "recorded_step" else operator(name))
    return given


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def module(kind, *arguments, **options):
    torch.manual_seed(0)
    return getattr(tg, kind)(*arguments, dtype=torch.float64, **options)


def states(kind, *shape):
    return (randn(*shape), randn(*shape)) if kind.startswith("LSTM") else randn(*shape)


def close(ours, theirs):
    """Sums in another order: at most 3.7e-15 apart, on every instruction set."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def gradients(made, x, hx, used=slice(None), **options):
    """Results and the gradients of all leaves, of some results only."""
    results = tensors_in(made(x, hx))
    torch.manual_seed(1)
    loss = sum((result * torch.randn_like(result)).sum() for result in results[used])
    leaves = [x, *(tensors_in(hx) if hx is not None else ()), *made.parameters()]
    return results, torch.autograd.grad(loss, leaves, allow_unused=True, **options)


def assert_same(made, x, hx, answers, **options):
    answers.clear()
    got = gradients(made, x, hx, **options)
    assert len(answers) == 1
    assert answers[0] > 0, "the short way did not run"
    with tg.backend("reference"):
        expected = gradients(made, x, hx, **options)
    for ours, theirs in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        if ours is None or theirs is None:  # the reference's zeros, or the other way round: nothing flows
            assert all(gradient is None or not gradient.any() for gradient in (ours, theirs))
            continue
        close(ours, theirs)


@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, given, answers):
    for input_size, hidden_size in ((1, 1), (5, 17), (33, 64)):
        for batch in (None, 1, 3, 7):
            rows = () if batch is None else (batch,)
            hx = states(kind, *rows, hidden_size) if given else None
            assert_same(module(kind, input_size, hidden_size, batch != 3), randn(*rows, input_size), hx, answers)


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch-first"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, given, batch_first, answers):
    for batch in (None, 1, 3):
        made = module(kind, 5, 17, bias=batch != 3, batch_first=batch_first)
        rows = () if batch is None else (batch,)
        x = randn(*rows, 1, 5) if batch_first else randn(1, *rows, 5)
        assert_same(made, x, states(kind, 1, *rows, 17) if given else None, answers)


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

    found = outcome()
    assert len(answers) == 2
    assert all(answers)
    with tg.backend("reference"):
        for ours, right in zip(found, outcome(), strict=True):
            close(ours, right)


@pytest.mark.parametrize("kind", KINDS)
def test_each_result_alone(kind, answers):
    shape = (2, 4) if kind in CELLS else (1, 2, 4)
    count = len(tensors_in(module(kind, 3, 4)(randn(*shape[:-1], 3))))
    for k in range(count):
        x, hx = randn(*shape[:-1], 3), states(kind, *shape)
        assert_same(module(kind, 3, 4), x, hx, answers, used=slice(k, k + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind, answers):
    shape = (2, 4) if kind in CELLS else (1, 2, 4)
    made, pair = module(kind, 3, 4), kind.startswith("LSTM")

    def run(x, *hx):
        return tuple(tensors_in(made(x, hx if pair else hx[0])))

    inputs = (randn(*shape[:-1], 3), *tensors_in(states(kind, *shape)))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert all(answers)


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
    "a reset before the product": ("GRUCell", {"reset_after": False}, lambda m, x: m(x)),
    "a projection": ("LSTMCell", {"proj_size": 2}, lambda m, x: m(x)),
    "a clip": ("RNNCell", {"clip": 0.5}, lambda m, x: m(x)),
    "other strides": ("GRUCell", {}, lambda m, x: m(x.t().contiguous().t())),
    "no rows": ("GRUCell", {}, lambda m, x: m(x[:0])),
    "a meta device": ("GRUCell", {"device": "meta"}, lambda m, x: m(x.to("meta"))),
    "two layers": ("GRU", {"num_layers": 2}, lambda m, x: m(x[None])),
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
