# SPDX-License-Identifier: Apache-2.0
"""`return_states`: what torch.nn's cells leave at every step; and other packages' marks as resets."""

from __future__ import annotations

import pytest
import torch

import tidegate as tg
from tidegate import rl

T, B, I, H = 9, 3, 4, 5  # noqa: E741


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"peepholes": True}, {"bias": False}, {"proj_size": 2}])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_every_state_goes_on_as_hx(kind: str, batch_first: bool, options: dict[str, object]) -> None:
    """From each step's state on, the rest of the sequence comes out as in the whole."""
    if kind != "LSTM" and options.keys() & {"peepholes", "proj_size"}:
        pytest.skip("an LSTM's option")
    layer = getattr(tg, kind)(I, H, 2, batch_first=batch_first, **options).double()
    x = torch.randn(T, B, I).double()
    given = x.transpose(0, 1) if batch_first else x
    output, last, states = layer(given, return_states=True)
    expected, expected_last = layer(given)
    torch.testing.assert_close((output, last), (expected, expected_last))
    time_major = output.transpose(0, 1) if batch_first else output
    for t in range(T):
        hx = tuple(s[t] for s in states) if kind == "LSTM" else states[t]
        rest = x[:t] if options.get("reverse") else x[t + 1 :]
        if len(rest) and not options.get("reverse"):
            goes_on, _ = layer(rest.transpose(0, 1) if batch_first else rest, hx)
            torch.testing.assert_close(goes_on.transpose(0, 1) if batch_first else goes_on, time_major[t + 1 :])
    ends = 0 if options.get("reverse") else -1
    for state, final in zip(states if kind == "LSTM" else (states,), last if kind == "LSTM" else (last,), strict=True):
        torch.testing.assert_close(state[ends], final)


def test_every_c_of_torchs_cell_and_its_gradient() -> None:
    """With resets and lengths, both directions: torch.nn.LSTMCell called at every step."""
    layer = tg.LSTM(I, H, bidirectional=True).double()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    lengths, resets = torch.tensor([T, 4, 1]), torch.zeros(T, B, dtype=torch.bool)
    resets[5, 0] = resets[2, 1] = True
    _, _, (all_h, all_c) = layer(x, lengths=lengths, resets=resets, return_states=True)
    assert all_h.shape == all_c.shape == (T, 2, B, H)
    found = torch.autograd.grad(all_c.square().sum() + all_h.sum(), [x, *layer.parameters()])

    total = torch.zeros((), dtype=torch.float64)
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        weights = {n.removesuffix(suffix): w for n, w in layer.named_parameters() if n.endswith(suffix)}
        cell = torch.nn.LSTMCell(I, H).double()
        for b in range(B):
            state = (torch.zeros(1, H).double(), torch.zeros(1, H).double())
            steps = range(int(lengths[b]))
            for t in reversed(steps) if direction else steps:
                fresh = t + 1 < len(steps) and resets[t + 1, b] if direction else resets[t, b]
                state = tuple(s * (not fresh) for s in state)
                state = torch.func.functional_call(cell, weights, (x[t, b : b + 1], state))
                torch.testing.assert_close((all_h[t, direction, b], all_c[t, direction, b]), (state[0][0], state[1][0]))
                total = total + state[1].square().sum() + state[0].sum()
    expected = torch.autograd.grad(total, [x, *layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not all_c[4:, :, 1].any()


def test_the_loop_is_fused_and_traced_once() -> None:
    layer, x = tg.LSTM(I, H), torch.randn(T, B, I)
    with tg.trace() as ran:
        layer(x, return_states=True)
        layer(x, return_states=True)
    if "cpu" in tg.explain(layer, x).backend:
        assert [one.backend for one in ran] == ["fused", "fused"]
    unbatched = layer(x[:, 0], return_states=True)[2]
    assert unbatched[1].shape == (T, 1, H)


def test_refused_of_other_forms() -> None:
    with pytest.raises(ValueError, match="return_states: expected False but with a padded batch or one sequence, got"):
        tg.LSTM(I, H)([torch.randn(3, I)], return_states=True)


def test_resets_of_marks() -> None:
    marks = torch.rand(B, T) < 0.4
    assert torch.equal(rl.resets_of_is_init(marks.unsqueeze(-1)), marks)
    assert torch.equal(rl.resets_of_is_init(marks), marks)
    assert torch.equal(rl.resets_of_episode_starts(marks.float().flatten(), B), marks.T)
    dones = torch.tensor([[False, True, False, False, True]])
    assert rl.resets_of_dones(dones, time=1).tolist() == [[True, False, True, False, False]]
    assert rl.resets_of_dones(dones.T, first=torch.tensor([False])).T.tolist() == [[False, False, True, False, False]]


@pytest.mark.parametrize(("call", "words"), [
    (lambda: rl.resets_of_is_init(torch.zeros(2, 3, 4)), r"is_init: expected \(B, T, 1\) or \(B, T\), got \(2, 3, 4\)"),
    (lambda: rl.resets_of_is_init(torch.full((2, 3), 0.5)), "is_init: expected True and False, or 1 and 0"),
    (lambda: rl.resets_of_episode_starts(torch.zeros(7), 2), r"episode_starts: expected \(B\*T,\), a multiple of seq"),
    (lambda: rl.resets_of_dones(torch.zeros(7)), r"dones: expected \(T, B\)"),
    (lambda: rl.resets_of_dones(torch.zeros(7, 2), torch.tensor([1, 2])), "first: expected True and False, or 1 and 0"),
    (
        lambda: rl.resets_of_dones(torch.zeros(7, 2), torch.zeros(3)),
        r"first: expected one mark, or \(B,\) = \(2,\), got \(3,\)",
    ),
    (lambda: rl.resets_of_episode_starts(torch.zeros(6), 0), "sequences: expected a number of rows, 1 or more, got 0"),
])  # fmt: skip
def test_refusals(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


def test_a_tensor_is_needed() -> None:
    with pytest.raises(TypeError, match="dones: expected a Tensor, got list"):
        rl.resets_of_dones([True])  # type: ignore[arg-type]
