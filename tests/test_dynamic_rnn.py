# SPDX-License-Identifier: Apache-2.0
"""dynamic_rnn over any cell: ours, torch.nn's, a user's; TensorFlow's meaning of sequence_length; nested states."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from comparing import CELLS, assert_same, outcome, randn, refusal, tensors_in, twins
from tolerances import assert_equal_f64
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import tidegate as tg

T, B = 6, 4
LENGTHS = [3, 6, 0, 1]


def _state(kind: str, seed: int = 5) -> Any:
    return (randn(B, 5, seed=seed), randn(B, 5, seed=seed + 1)) if kind == "LSTMCell" else randn(B, 5, seed=seed)


def _by_hand(cell: Any, x: Tensor, state: Any, lengths: list[int]) -> Any:
    """Row by row, step by step, (B, T, ...): what sequence_length means, written out. y_t is the state's first part."""
    rows, finals = [], []
    for b, length in enumerate(lengths):
        row_state = tuple(part[b : b + 1] for part in state) if isinstance(state, tuple) else state[b : b + 1]
        outputs = [torch.zeros(1, 5, dtype=x.dtype)] * x.shape[1]
        for t in range(length):
            row_state = cell(x[b : b + 1, t], row_state)
            outputs[t] = tensors_in(row_state)[0]
        rows.append(torch.stack(outputs, 1))
        finals.append(tensors_in(row_state))
    return torch.cat(rows), [torch.cat(column) for column in zip(*finals, strict=True)]


class Wrapped(torch.nn.Module):
    """A user's module: (x_t, state) -> state, or -> (y_t, state)."""

    def __init__(self, cell: torch.nn.Module, returns_pair: bool) -> None:
        super().__init__()
        self.cell, self.returns_pair = cell, returns_pair

    def forward(self, x: Tensor, state: Any) -> Any:
        state = self.cell(x, state)
        return (tensors_in(state)[0], state) if self.returns_pair else state


FORMS = {
    "ours": lambda ours, theirs: ours,
    "torch.nn's": lambda ours, theirs: theirs,
    "module -> state": lambda ours, theirs: Wrapped(ours, False),
    "module -> (y, state)": lambda ours, theirs: Wrapped(theirs, True),
}


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CELLS)
def test_equals_a_loop_by_hand(kind, form, lengths, time_major):
    theirs, ours = twins(kind, 3, 5)
    cell, x, state = FORMS[form](ours, theirs), randn(B, T, 3), _state(kind)
    inputs = {"x": x} | {f"state {k}": s for k, s in enumerate(tensors_in(state))}

    def run() -> Any:
        given = x.transpose(0, 1) if time_major else x
        length = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        output, final = tg.dynamic_rnn(cell, given, length, state, time_major)
        return output.transpose(0, 1) if time_major else output, final

    step = cell.cell if isinstance(cell, Wrapped) else cell
    expected = outcome(cell, lambda: _by_hand(step, x, state, lengths or [T] * B), inputs)
    assert_same(outcome(cell, run, inputs), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CELLS)
def test_past_its_length_a_row_is_zero_and_its_state_stays(kind, form):
    """Even where the padding holds NaN, gradients too."""
    theirs, ours = twins(kind, 3, 5)
    cell, state = FORMS[form](ours, theirs), _state(kind)
    x = randn(B, T, 3, grad=False)
    clean = outcome(cell, lambda: tg.dynamic_rnn(cell, x, LENGTHS, state), {})
    for b, length in enumerate(LENGTHS):
        x[b, length:] = float("nan")
    x.requires_grad_()
    found = outcome(cell, lambda: tg.dynamic_rnn(cell, x, LENGTHS, state), {"x": x})
    for b, length in enumerate(LENGTHS):
        assert found["output 0"][b, length:].eq(0).all()
        assert found["d x"][b, length:].eq(0).all()
    assert_equal_f64(found["output 1"][2], tensors_in(state)[0][2], "a row of length 0 keeps its state")
    del found["d x"]
    assert_same(found, clean)


@pytest.mark.parametrize("kind", CELLS)
def test_no_state_means_zeros(kind):
    for cell in twins(kind, 3, 5):
        x = randn(B, T, 3)
        zeros = torch.zeros(B, 5, dtype=x.dtype)
        found = tg.dynamic_rnn(cell, x)
        expected = tg.dynamic_rnn(cell, x, initial_state=(zeros, zeros) if kind == "LSTMCell" else zeros)
        for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
            assert_equal_f64(a, b)
        assert isinstance(found[1], tuple) == (kind == "LSTMCell")


def test_a_function():
    """A running sum, without a module in sight: (x_t, state) -> state and -> (y_t, state)."""
    x = randn(B, T, 3)
    zeros = torch.zeros(B, 3, dtype=x.dtype)
    output, state = tg.dynamic_rnn(lambda x_t, total: total + x_t, x, initial_state=zeros)
    assert_equal_f64(output, x.cumsum(1))
    assert_equal_f64(state, x.sum(1))
    output, state = tg.dynamic_rnn(lambda x_t, total: (2 * x_t, total + x_t), x, initial_state=zeros)
    assert_equal_f64(output, 2 * x)
    assert_equal_f64(state, x.sum(1))


class Counter(torch.nn.Module):
    """A nest of states, and a nest of outputs of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.state_size = {"sum": 3, "moments": (3, 3)}

    def forward(self, x: Tensor, state: Any) -> Any:
        first, second = state["moments"]
        state = {"sum": state["sum"] + x, "moments": (first + x, second + x.square())}
        return {"seen": state["sum"] > 0, "squares": second.unsqueeze(-1)}, state


def test_nested_states_and_outputs():
    x = randn(B, T, 3)
    output, state = tg.dynamic_rnn(Counter(), x, LENGTHS)
    valid = (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(-1)).unsqueeze(-1)
    sums = (x * valid).cumsum(1)
    assert output["seen"].dtype == torch.bool
    assert torch.equal(output["seen"], (sums > 0) & valid)
    assert output["squares"].shape == (B, T, 3, 1)
    assert list(state) == ["sum", "moments"]
    assert_equal_f64(state["sum"], sums[:, -1])
    assert_equal_f64(state["moments"][1], (x * valid).square().sum(1))
    explicit = {"sum": torch.ones(B, 3, dtype=x.dtype), "moments": (torch.zeros(B, 3, dtype=x.dtype),) * 2}
    _, later = tg.dynamic_rnn(Counter(), x, LENGTHS, explicit)
    assert_equal_f64(later["sum"], sums[:, -1] + 1)


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


@pytest.mark.parametrize("make", [Pair, lambda h, c: [h, c]], ids=["named tuple", "list"])
def test_the_final_state_is_like_the_initial_one(make):
    _, cell = twins("LSTMCell", 3, 5)
    h, c = _state("LSTMCell")
    _, state = tg.dynamic_rnn(cell, randn(B, T, 3), initial_state=make(h, c))
    _, expected = tg.dynamic_rnn(cell, randn(B, T, 3), initial_state=(h, c))
    assert type(state) is type(make(h, c))
    for a, b in zip(state, expected, strict=True):
        assert_equal_f64(a, b)


HOOKS = {
    "forward": lambda cell, hook: cell.register_forward_hook(hook),
    "forward pre": lambda cell, hook: cell.register_forward_pre_hook(hook),
    "backward": lambda cell, hook: cell.register_full_backward_hook(hook),
    "backward pre": lambda cell, hook: cell.register_full_backward_pre_hook(hook),
    "global": lambda cell, hook: register_module_forward_hook(hook),
}


@pytest.mark.parametrize("library", [torch.nn, tg])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS.keys())
def test_a_hook_sees_every_step(register, library):
    cell, seen = library.GRUCell(3, 5), []
    handle = register(cell, lambda module, *rest: seen.append(module))
    try:
        x = torch.zeros(B, T, 3, requires_grad=True)
        tg.dynamic_rnn(cell, x)[0].sum().backward()
    finally:
        handle.remove()
    assert seen == [cell] * T
    tg.dynamic_rnn(cell, x)
    assert len(seen) == T


def test_a_changed_cell_is_run_as_it_is():
    """A subclass, a parametrization, a forward put on one instance: each is seen, none replaced by our own cell."""

    class Doubled(torch.nn.GRUCell):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) * 2

    x = randn(B, T, 3)
    plain, _ = twins("GRUCell", 3, 5)
    torch.manual_seed(0)
    doubled = Doubled(3, 5, dtype=torch.float64)
    patched, _ = twins("GRUCell", 3, 5)
    patched.forward = lambda *args: plain(*args) * 2
    parametrized, _ = twins("GRUCell", 3, 5)
    parametrize.register_parametrization(parametrized, "weight_hh", torch.nn.Identity())
    for cell, factor in ((doubled, 2), (patched, 2), (parametrized, 1)):
        state = torch.zeros(B, 5, dtype=torch.float64)
        expected, _ = tg.dynamic_rnn(lambda x_t, h, f=factor: plain(x_t, h) * f, x, initial_state=state)
        assert_equal_f64(tg.dynamic_rnn(cell, x)[0], expected)


@pytest.mark.parametrize("kind", CELLS)
def test_torchs_cell_is_never_changed(kind):
    """The cell that runs in its place shares the parameters: gradients reach them, and nothing else is touched."""
    cell, _ = twins(kind, 3, 5)
    before = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(cell).items()}
    x = randn(B, T, 3)
    tg.dynamic_rnn(cell, x)[0].sum().backward()
    assert type(cell) is getattr(torch.nn, kind)
    assert vars(cell).keys() == before.keys()
    assert all(vars(cell)[key] == value for key, value in before.items() if key != "_parameters")
    assert all(cell._parameters[name] is p for name, p in before["_parameters"].items())
    assert all(p.grad is not None and p.grad.ne(0).any() for p in cell.parameters())
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.bias_ih.zero_()
    changed, _ = tg.dynamic_rnn(cell, x)
    zeros = torch.zeros(B, 5, dtype=x.dtype)
    looped, _ = tg.dynamic_rnn(Wrapped(cell, False), x, initial_state=(zeros, zeros) if kind == "LSTMCell" else zeros)
    assert_equal_f64(changed, looped)


def test_no_steps():
    _, cell = twins("GRUCell", 3, 5)
    state = _state("GRUCell")
    output, final = tg.dynamic_rnn(cell, randn(B, 0, 3), initial_state=state)
    assert tuple(output.shape) == (B, 0, 5)
    assert_equal_f64(final, state)


def test_no_steps_of_ones_own_cell():
    """The outputs' shape is that of y_t; no row is seen by autograd."""
    weight = torch.ones(3, 7, requires_grad=True)
    output, final = tg.dynamic_rnn(lambda x, h: ({"y": x @ weight}, h + x), X[:, :0], initial_state=H)
    assert tuple(output["y"].shape) == (B, 0, 7)
    assert final is H
    output, final = tg.dynamic_rnn(lambda x, h: (x @ weight, h + x), X[:0], initial_state=H[:0])
    assert tuple(output.shape) == (0, T, 7)


def test_a_nest_of_inputs():
    """Each step sees one slice of every tensor, whatever its dtype; padding of any is zeroed."""
    x, delta = randn(B, T, 3), torch.arange(B * T).view(B, T)
    seen = []

    def cell(inputs: Any, total: Tensor) -> Tensor:
        seen.append(inputs["delta"])
        return total + inputs["x"][0] * inputs["delta"].unsqueeze(-1)

    output, _ = tg.dynamic_rnn(cell, {"x": (x,), "delta": delta}, LENGTHS, torch.zeros(B, 3, dtype=x.dtype))
    valid = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(-1)
    assert torch.equal(torch.stack(seen, 1), delta * valid)
    assert_equal_f64(output, (x * delta.unsqueeze(-1)).cumsum(1) * valid.unsqueeze(-1))


def test_a_pair_whose_first_part_is_the_state():
    x = randn(B, T, 3)
    zeros = (torch.zeros(B, 3, dtype=x.dtype),) * 2
    output, state = tg.dynamic_rnn(lambda x_t, s: ((s[0] + x_t, s[1]), 2 * x_t), x, initial_state=zeros)
    assert_equal_f64(output, 2 * x)
    assert_equal_f64(state[0], x.sum(1))


class Told(torch.nn.Module):
    """A cell that tells hidden_size, of one state or of two."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.hidden_size, self.states = 3, states

    def forward(self, x: Tensor, state: Any) -> Any:
        if self.states == 1:
            return state + x
        return state[0] + x, state[1] + x


def test_hidden_size_tells_one_state():
    x = randn(2, T, 3)
    assert_equal_f64(tg.dynamic_rnn(Told(1), x)[0], x.cumsum(1))
    with pytest.raises(IndexError):  # the cell's own words: never a row of the batch for a state
        tg.dynamic_rnn(Told(2), x)


def test_fuse():
    x = randn(B, T, 3)
    cell = tg.GRUCell(3, 5, dtype=x.dtype)
    assert_equal_f64(tg.dynamic_rnn(cell, x, fuse=True)[0], tg.dynamic_rnn(cell, x, fuse=False)[0])
    with pytest.raises(tg.UnsupportedError):
        tg.dynamic_rnn(lambda x_t, h: print(x_t.sum().item()) or h, x, initial_state=H, fuse=True)


def _sum(x: Tensor, total: Tensor) -> Tensor:
    return total + x


X, H = torch.zeros(B, T, 3), torch.zeros(B, 3)
ERRORS = [
    (
        (_sum, X),
        "initial_state: needed, because a function does not tell its state's size; pass initial_state, or give "
        "the cell a state_size",
    ),
    ((_sum, torch.zeros(3)), "inputs: expected (B, T, ...) or time_major (T, B, ...), got 1 dimensions"),
    (
        (_sum, (X, X[:, :2]), None, H),
        "inputs: expected (B, T, ...) like the first, (4, 6), got (4, 2, 3)",
    ),
    ((_sum, [], None, H), "inputs: expected a tensor (B, T, ...) or a nest of them, got an empty list"),
    ((_sum, (X, 1.0), None, H), "inputs: expected a tensor (B, T, ...) or a nest of them, got float"),
    ((_sum, X, None, H[:1]), "initial_state: expected (B, ...) = (4, ...), got (1, 3)"),
    ((_sum, X, None, 0), "initial_state: expected a tensor (B, ...) or a nest of them, got int"),
    ((_sum, X, [1, 2], H), "sequence_length: expected one per row, (B,) = (4,), got (2,)"),
    ((_sum, X, [1.0] * B, H), "sequence_length: expected an integer dtype, got torch.float32"),
    ((_sum, X, [7] * B, H), "sequence_length: expected values in 0..T = 0..6, got 7"),
    ((_sum, X, [-1] * B, H), "sequence_length: expected values in 0..T = 0..6, got -1"),
    ((tg.GRUCell(3, 5), X, [7] * B), "sequence_length: expected values in 0..T = 0..6, got 7"),
    ((tg.GRUCell(4, 5), X), "inputs: expected 3 dimensions and input_size = 4 features, got shape (4, 6, 3)"),
    ((torch.nn.GRUCell(3, 5), X[0]), "inputs: expected 3 dimensions and input_size = 3 features, got shape (6, 3)"),
    ((tg.GRUCell(3, 5), X, None, torch.zeros(3, 5)), "h_0: expected (B, hidden_size) = (4, 5), got (3, 5)"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors(arguments, message):
    assert refusal(lambda: tg.dynamic_rnn(*arguments)) == (ValueError, message)


def test_a_state_of_the_wrong_count():
    zeros = torch.zeros(B, 5)
    raised, message = refusal(lambda: tg.dynamic_rnn(tg.LSTMCell(3, 5), X, initial_state=zeros))
    assert raised is ValueError
    assert message.startswith("initial_state: expected (h, c), got 1 tensors in ")
    raised, message = refusal(lambda: tg.dynamic_rnn(tg.GRUCell(3, 5), X, initial_state=(zeros, zeros)))
    assert raised is ValueError
    assert message.startswith("initial_state: expected one tensor, got 2 tensors in ")


def test_a_result_that_is_neither():
    raised, message = refusal(lambda: tg.dynamic_rnn(lambda x, h: (h, h, h), X, initial_state=H))
    assert raised is ValueError
    assert message.startswith("cell: expected (y_t, state) or state with the structure ")
    assert message.endswith("got tuple")
