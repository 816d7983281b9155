# SPDX-License-Identifier: Apache-2.0
"""`explain` and `trace` on cells over time: fused or step by step, and why."""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
from torch import Tensor

import tidegate as tg
from tidegate import cells

pytestmark = needs.compiled_operators

T, B, I, H = 6, 3, 4, 5  # noqa: E741


class Gated(torch.nn.Module):
    """A cell of nobody's, which tells its size."""

    state_size = H

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(I + H, H)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.cat((x, h), -1)))


class Branching(Gated):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if h.sum() > 100:
            h = h * 0.5
        return super().forward(x, h)


class Sorting(Gated):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return super().forward(x, h.sort(-1).values)


def data() -> Tensor:
    return torch.randn(B, T, I)


def test_a_bare_cell_over_a_sequence_is_fused_and_its_program_shown() -> None:
    found = tg.explain(Gated(), data())
    (call,) = found.calls
    assert found.backend == call.backend == "fused"
    assert call.call == f"Gated(T={T}, B={B}, float32, cpu)"
    assert call.reasons == {"fused": []}
    lines = str(found).splitlines()
    assert lines[0] == f"{call.call}: fused"
    assert all(line in call.program.splitlines() for line in (line.strip() for line in lines[1:]))
    assert "  state s0 5" in lines
    assert any("tanh" in line for line in lines)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Branching, "control flow on values cannot be traced, at test_explain_cells.py:{}: if h.sum() > 100:"),
        (Sorting, "sort has no instruction, at test_explain_cells.py:{}: return super().forward(x, h.sort(-1).values)"),
    ],
)
def test_what_prevents_it_is_said_with_its_line(make: Any, reason: str) -> None:
    found = tg.explain(make(), data())
    (call,) = found.calls
    assert found.backend == "step by step"
    assert call.program == ""
    line = make.forward.__code__.co_firstlineno + 1
    assert call.reasons["fused"][0].endswith(reason.format(line))
    assert str(found) == f"{call.call}: step by step\n  not fused: {call.reasons['fused'][0]}"


def test_every_reason_is_said() -> None:
    cell = Sorting()
    cell.half()
    found = tg.explain(tg.dynamic_rnn, cell, data().half(), fuse=False)
    reasons = "\n".join(found.calls[0].reasons["fused"])
    for words in ("fuse is False", "sort has no instruction"):
        assert words in reasons


def test_hooks_are_a_reason_and_see_no_trace() -> None:
    cell, seen = Gated(), []
    cell.register_forward_hook(lambda *given: seen.append(given[1][0].shape))
    found = tg.explain(cell, data())
    assert "hooks" in found.calls[0].reasons["fused"][0]
    assert set(seen) <= {torch.Size((B, I))}
    assert len(seen) <= 1


def test_a_single_step_is_left_to_the_cell() -> None:
    found = tg.explain(Gated(), data()[:, :1])
    assert "a single step is quicker" in found.calls[0].reasons["fused"][0]
    assert found.calls[0].program
    assert tg.explain(tg.dynamic_rnn, Gated(), data()[:, :1], fuse=True).backend == "fused"


def test_every_layer_and_direction_of_a_stack() -> None:
    stack = tg.Recurrent([(Gated(), Branching()), tg.GRUCell(2 * H, H), cells.LayerNormLSTMCell(H, 7)])
    found = tg.explain(stack, data().transpose(0, 1), lengths=[T, 2, 0])
    assert [call.backend for call in found.calls] == ["fused", "step by step", found.calls[2].backend, "fused"]
    assert found.calls[2].call.startswith("gru(")
    assert found.calls[3].call.startswith("LayerNormLSTMCell(")


def test_a_function_that_calls_them() -> None:
    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state
        return torch.cat((h, x), -1), (torch.tanh(x.sum(-1, keepdim=True) + c), h)

    shapes: list[torch.Size] = []

    def model(x: Tensor) -> Tensor:
        y, (h, _) = tg.dynamic_rnn(step, x, initial_state=(torch.ones(B, H), torch.ones(B, H)))
        shapes.extend((y.shape, h.shape))
        return tg.GRU(H + I, 2, batch_first=True)(y)[0]

    found = tg.explain(model, data())
    assert shapes == [(B, T, H + I), (B, H)]
    assert [call.call.partition("(")[0] for call in found.calls] == [step.__qualname__, "gru"]
    assert found.calls[0].backend == "fused"


def test_calls_inside_a_step_are_told_once() -> None:
    class Outer(torch.nn.Module):
        state_size = H

        def __init__(self) -> None:
            super().__init__()
            self.cell = tg.GRUCell(I, H)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.cell(x, h).sort(-1).values

    found = tg.explain(Outer(), data())
    assert [call.call.partition("(")[0] for call in found.calls] == ["Outer", "gru"]
    assert "T=1" in found.calls[1].call
    # Fused, it makes no calls of its own.
    Outer.forward = lambda self, x, h: self.cell(x, h)
    assert [call.backend for call in tg.explain(Outer(), data()).calls] == ["fused"]


def test_noise_is_not_drawn_and_nothing_is_learned() -> None:
    cell = cells.Zoneout(cells.LayerNormLSTMCell(I, H), 0.3)
    before = torch.get_rng_state()
    assert tg.explain(cell, data_of(before)).backend == "fused"
    assert torch.equal(torch.get_rng_state(), before)


def data_of(rng_state: Tensor) -> Tensor:
    """An input that leaves the generator as it was."""
    x = data()
    torch.set_rng_state(rng_state)
    return x


def test_a_cell_of_one_step_is_still_one_step() -> None:
    found = tg.explain(tg.GRUCell(I, H), torch.randn(B, I))
    assert found.calls[0].call.startswith("gru(T=1")
    assert tg.explain(cells.MGUCell(I, H), torch.randn(B, I)).calls == ()
    assert tg.explain(tg.GRUCell(I, H), data()).calls[0].call.startswith(f"gru(T={T}, B={B}")


def test_no_call_says_how_a_cell_is_asked_about() -> None:
    assert str(tg.explain(torch.nn.Linear(I, H), data())) == "no recurrent call of tidegate's"
    text = str(tg.explain(lambda x, h=None: x, data()))
    assert text == "no recurrent call of tidegate's"


def test_no_steps() -> None:
    found = tg.explain(Gated(), data()[:, :0])
    assert found.backend == "fused"
    assert "T=0" in found.calls[0].call


def test_a_trace_shows_a_fused_run() -> None:
    cell = Gated()
    with tg.trace() as ran:
        output, _ = tg.dynamic_rnn(cell, data())
    assert [(entry.backend, entry.what, entry.call) for entry in ran] == [
        ("fused", "forward", f"Gated(T={T}, B={B}, float32, cpu)")
    ]
    assert output.requires_grad
    with tg.trace() as ran:
        tg.dynamic_rnn(Sorting(), data())
    assert ran == []


@pytest.mark.parametrize(
    "step",
    [
        lambda x, h: torch.where(h.abs().amax(-1, keepdim=True) > 1, h * 0.5, h) + x,
        lambda x, h: torch.stack((torch.tanh(x), h), 1).sum(1),
        lambda x, h: torch.tanh(x - h.amax(-1, keepdim=True)),
        lambda x, h: torch.tanh(x + h).to(x.dtype),
        lambda x, h: torch.nn.functional.rms_norm(x + h, (I,)),
    ],
)
def test_the_remedies_of_the_page_are_fused(step: Any) -> None:
    found = tg.explain(tg.dynamic_rnn, step, data(), initial_state=torch.zeros(B, I))
    assert found.backend == "fused", str(found)
