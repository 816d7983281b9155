# SPDX-License-Identifier: Apache-2.0
"""Recorded calls on the compiled operators: one operator forward and one backward a call, the reference's gradients."""

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


def on_the_cpu(run, calls=1):
    """Its results, by one compiled operator forward and one backward for each call."""
    with tg.trace() as ran:
        results = run()
    assert [one.what for one in ran] == ["forward"] * calls + ["backward"] * calls
    assert all((one.backend, one.operators) == ("cpu", 1) for one in ran)
    return results


def assert_same(made, x, hx, **options):
    got = on_the_cpu(lambda: gradients(made, x, hx, **options))
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
def test_cells(kind, given):
    for input_size, hidden_size in ((1, 1), (5, 17), (33, 64)):
        for batch in (None, 1, 3, 7):
            rows = () if batch is None else (batch,)
            hx = states(kind, *rows, hidden_size) if given else None
            assert_same(module(kind, input_size, hidden_size, batch != 3), randn(*rows, input_size), hx)


@pytest.mark.parametrize("form", [{}, {"batch_first": True}, {"reverse": True}], ids=["", "batch-first", "reverse"])
@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})],
)
def test_layers(kind, options, given, form):
    for batch, steps in ((None, 1), (1, 1), (3, 1), (None, 4), (1, 7), (3, 2), (5, 13)):
        made = module(kind, 5, 17, bias=batch != 3, **form, **options)
        rows = () if batch is None else (batch,)
        x = randn(*rows, steps, 5) if "batch_first" in form else randn(steps, *rows, 5)
        assert_same(made, x, states(kind, 1, *rows, 17) if given else None)


STACKS = {"two layers": (2, False), "two directions": (1, True), "three layers of two directions": (3, True)}


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch-first"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_stacks(kind, stack, batch_first):
    layers, bidirectional = STACKS[stack]
    depth = layers * (1 + bidirectional)
    for batch, steps in ((None, 4), (1, 1), (3, 7)):
        made = module(kind, 5, 9, layers, bidirectional=bidirectional, batch_first=batch_first)
        rows = () if batch is None else (batch,)
        x = randn(*rows, steps, 5) if batch_first else randn(steps, *rows, 5)
        for given in (True, False):
            assert_same(made, x, states(kind, depth, *rows, 9) if given else None)


@pytest.mark.parametrize("form", [{}, {"batch_first": True}, {"bidirectional": True}, {"reverse": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths(kind, form):
    for lengths in ([5, 1, 4], [0, 2, 0], [0, 0, 0], [6, 6, 6]):
        made = module(kind, 5, 9, **form)
        x = randn(3, 6, 5) if "batch_first" in form else randn(6, 3, 5)
        assert_same(made, x, states(kind, 1 + made.bidirectional, 3, 9), lengths=torch.tensor(lengths))


def assert_same_outcome(outcome, calls=1):
    found = on_the_cpu(outcome, calls)
    with tg.backend("reference"):
        for ours, right in zip(found, outcome(), strict=True):
            close(ours, right)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_that_lie_apart(batch_first, steps):
    """An input that is a part of a larger one, and an output of which a part is used, transposed."""
    made, wide = module("GRU", 5, 6, batch_first=batch_first), randn(1 + steps, 3, 9)
    x = wide[1:, :, 2:7]

    def outcome():
        output, h_n = made(x)
        loss = output.transpose(0, 1)[1:].square().sum() + output.sum() + h_n[0, 0].square().sum()
        return torch.autograd.grad(loss, [wide, *made.parameters()])

    assert_same_outcome(outcome)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", CELLS)
def test_a_row_of_a_larger_tensor(kind):
    """Input and states that begin inside their storage, gradients that come expanded or from a slice."""
    made = module(kind, 5, 6)
    frames, given = randn(3, 2, 5), states(kind, 3, 2, 6)
    hx = tuple(state[1] for state in given) if isinstance(given, tuple) else given[1]

    def outcome():
        after = tensors_in(made(frames[2], hx))
        after = tensors_in(made(frames[1], tuple(after) if len(after) > 1 else after[0]))
        loss = torch.stack(after).transpose(0, 2)[1:].pow(2).sum() + after[0].sum()
        return torch.autograd.grad(loss, [frames, *tensors_in(given), *made.parameters()])

    assert_same_outcome(outcome, calls=2)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", KINDS)
def test_each_result_alone(kind):
    shape = (2, 4) if kind in CELLS else (1, 2, 4)
    count = len(tensors_in(module(kind, 3, 4)(randn(*shape[:-1], 3))))
    for k in range(count):
        x, hx = randn(*shape[:-1], 3), states(kind, *shape)
        assert_same(module(kind, 3, 4), x, hx, used=slice(k, k + 1))


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind):
    shape, steps = ((2, 4), ()) if kind in CELLS else ((1, 2, 4), (3,))
    made, pair = module(kind, 3, 4), kind.startswith("LSTM")

    def run(x, *hx):
        return tuple(tensors_in(made(x, hx if pair else hx[0])))

    inputs = (randn(*steps, 2, 3), *tensors_in(states(kind, *shape)))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_may_be_used_again(kind):
    shape = (2, 4) if kind in CELLS else (1, 2, 4)
    made, x = module(kind, 3, 4), randn(*shape[:-1], 3)
    loss = tensors_in(made(x, states(kind, *shape)))[0].square().sum()
    leaves = [x, *made.parameters()]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


FORMS_OF_INPUT = {
    "other strides": ("GRUCell", {}, lambda m, x: m(x.t().contiguous().t())),
    "no rows": ("GRUCell", {}, lambda m, x: m(x[:0])),
    "resets": ("GRU", {}, lambda m, x: m(x[None], resets=torch.zeros(1, len(x), dtype=torch.bool))),
    "a projected layer": ("LSTM", {"proj_size": 2}, lambda m, x: m(x[None])),
    "a nested tensor": (
        "GRU",
        {"batch_first": True},
        lambda m, x: m(torch.nested.nested_tensor([x[:1]], layout=torch.jagged))[1],
    ),
}


@pytest.mark.parametrize("form", FORMS_OF_INPUT)
def test_every_form_is_one_operator(form):
    kind, options, run = FORMS_OF_INPUT[form]
    made, x = module(kind, 6, 4, **options), randn(3, 6)

    def outcome():
        return torch.autograd.grad(tensors_in(run(made, x))[0].square().sum(), [*made.parameters()], allow_unused=True)

    assert_same_outcome(outcome)


ELSEWHERE = {
    "a projection": ("LSTMCell", {"proj_size": 2}, lambda m, x: m(x)),
    "a clip": ("RNNCell", {"clip": 0.5}, lambda m, x: m(x)),
    "a meta device": ("GRUCell", {"device": "meta"}, lambda m, x: m(x.to("meta"))),
    "peepholes": ("LSTM", {"peepholes": True}, lambda m, x: m(x[None])),
}


@pytest.mark.parametrize("why", ELSEWHERE)
def test_what_the_kernels_do_not_know(why):
    kind, options, run = ELSEWHERE[why]
    with tg.trace() as ran:
        assert tensors_in(run(module(kind, 6, 4, **options), randn(3, 6)))
    assert not any(one.operators for one in ran)


def test_dropout_between_layers_is_one_operator_a_layer():
    made = module("GRU", 6, 4, num_layers=2, dropout=0.5)
    on_the_cpu(lambda: made(randn(3, 1, 6))[0].sum().backward(), calls=2)


def test_an_empty_state_is_refused():
    with pytest.raises(RuntimeError):
        module("GRUCell", 3, 4)(randn(2, 3), torch.empty(0, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        module("GRU", 3, 4)(randn(1, 2, 3), torch.empty(0, dtype=torch.float64))
    # No number of dimensions stands for an absent state.
    for empty in (torch.empty(0, 7, 1, 2), torch.empty(0, 0, 0, 0)):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            module("GRU", 3, 4)(randn(1, 2, 3), empty.double())
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            module("LSTM", 3, 4)(randn(1, 2, 3), (empty.double(), randn(1, 2, 4)))


@pytest.mark.parametrize("given", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize(
    ("kind", "options"), [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {})]
)
def test_so_little_a_step_that_torchs_own_is_the_quicker(kind, options, given):
    """To the bit the same."""
    made = module(kind, 5, 6, **options)
    twin = getattr(torch.nn, kind)(5, 6, **options, dtype=torch.float64)
    twin.load_state_dict(made.state_dict())
    x, hx = randn(3, 5), states(kind, 3, 6) if given else None
    with tg.trace() as ran:
        found = gradients(made, x, hx)
    assert [one.backend for one in ran] == ["aten"]
    assert tg.explain(made, x, hx).backend == "aten"
    for ours, theirs in zip(found, gradients(twin, x, hx), strict=True):
        assert all(map(torch.equal, ours, theirs))
    made(x[0], None if hx is None else tuple(h[0] for h in hx) if kind == "LSTMCell" else hx[0])
    assert tensors_in(module(kind, 5, 6, clip=0.1)(x))[0].abs().max() < 1


@pytest.mark.usefixtures("named")
def test_an_lstm_cells_h_depends_on_its_c():
    """On the kernels, too."""
    h, c = module("LSTMCell", 5, 6)(randn(3, 5))
    (found,) = torch.autograd.grad(h.sum(), c)
    o = h / c.tanh()
    close(found, (o * (1 - c.tanh().square())).detach())
