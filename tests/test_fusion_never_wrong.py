# SPDX-License-Identifier: Apache-2.0
"""Steps that are more than their operations: fused or not, results and gradients are the loop's, and nothing raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import needs
import numpy as np
import pytest
import torch
from torch import Tensor

import tidegate as tg

pytestmark = needs.compiled_operators

T, B, H = 5, 3, 4


class Step(torch.nn.Module):
    """A step that is given its cell; `held` and `itself` are how modules of packages keep what is theirs."""

    state_size = H

    def __init__(self, function: Callable[[Step, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(H, H, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.function(self, x, h)


def without_gradient(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.sigmoid(h @ cell.w)
    return torch.tanh(x + h @ cell.w) * mask


def with_a_hook(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    y = torch.tanh(x + h @ cell.w)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.5)
    return y


def by_grad_mode(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + h @ cell.w) * (2.0 if torch.is_grad_enabled() else 1.0)


def through_numpy(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x @ cell.w + torch.from_numpy(np.tanh(h.detach().numpy())))


def held_twice(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    held = cell.__dict__.setdefault("held", {"w": cell.w})
    return torch.tanh(x * held["w"].sum(0) + h @ held["w"])


def holding_itself(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(x + h @ cell.__dict__["itself"][0].w)


def running_sums(cell: Step, x: Tensor, h: Tensor) -> Tensor:
    halves = torch.tanh(x + h @ cell.w).view(-1, 2, H // 2)
    return (halves.cumsum(-1) / 2 + halves.flip(-1)).flatten(1).cumsum(1) / 2


STEPS: dict[str, Callable[[Step, Tensor, Tensor], Tensor]] = {
    "detach": lambda cell, x, h: torch.tanh(x + h.detach() @ cell.w),
    "data": lambda cell, x, h: torch.tanh(x + h @ cell.w) + h.data,
    "straight through": lambda cell, x, h: torch.tanh(x + ((h > 0).to(h) + h - h.detach()) @ cell.w),
    "no_grad": without_gradient,
    "a hook": with_a_hook,
    "grad mode": by_grad_mode,
    "numpy": through_numpy,
    "prod": lambda cell, x, h: torch.tanh(x + h @ cell.w) * h.prod(-1, keepdim=True),
    "stack in front of the rows": lambda cell, x, h: torch.stack((torch.tanh(x), h @ cell.w, h)).sin().mean(0),
    "a running sum": running_sums,
    "group norm": lambda cell, x, h: torch.nn.functional.group_norm(x + h @ cell.w, 2),
    "batch norm": lambda cell, x, h: torch.nn.functional.batch_norm(x + h @ cell.w, *torch.full((2, H), 0.5).to(x)),
    "variance and mean": lambda cell, x, h: torch.tanh(
        x + torch.stack(torch.var_mean(h @ cell.w, -1), -1).sum(-1, True)
    ),
    "argmax": lambda cell, x, h: torch.tanh(x + h @ cell.w) * h.argmax(-1, keepdim=True),
    "held twice": held_twice,
    "holding itself": holding_itself,
}


def results(function: Callable[[Step, Tensor, Tensor], Tensor], fuse: bool | None) -> list[Tensor]:
    torch.manual_seed(0)
    cell = Step(function)
    if function is held_twice:
        cell.__dict__["held"] = {"w": cell.w}
    if function is holding_itself:
        cell.__dict__["itself"] = [cell]
    x = torch.randn(B, T, H, dtype=torch.float64, requires_grad=True)
    h = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    y, final = tg.dynamic_rnn(cell, x, initial_state=h, fuse=fuse)
    loss = (y * torch.linspace(0.5, 1.5, H, dtype=torch.float64)).sum() + final.sum()
    wanted: list[Any] = [x, h, cell.w]
    return [y, final, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_more_than_its_operations_is_not_fused_wrongly(name: str) -> None:
    for found, expected in zip(results(STEPS[name], None), results(STEPS[name], False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_states_may_be_stacked_in_front_of_their_rows() -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        return torch.stack((torch.tanh(x), h)).sum(0)

    found = tg.explain(tg.dynamic_rnn, step, torch.randn(B, T, H), initial_state=torch.zeros(B, H))
    assert found.backend == "fused"


@pytest.mark.parametrize(
    "name", ["stack in front of the rows", "a running sum", "group norm", "batch norm", "variance and mean"]
)
def test_these_are_fused(name: str) -> None:
    results(STEPS[name], True)


def test_a_running_sum_sees_nothing_of_what_comes_later() -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        return (x + h).cumsum(-1)

    x = torch.randn(B, T, H)
    x[0, 1, 2], x[1, 2, 1] = float("nan"), float("inf")
    found, expected = (tg.dynamic_rnn(step, x, initial_state=torch.zeros(B, H), fuse=fuse) for fuse in (True, False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_random_numbers_that_meet_a_pole_are_no_other_computation() -> None:
    """Next to a pole roundings decide: a plan that is tried there is tried on other numbers, too."""

    size = 130

    class Pole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            _input, state = (torch.randn(3, size, generator=generator) for _ in range(2))
            self.register_buffer("pole", state[0].double().exp() * (1 + 2.5e-7))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(x) * 1e-6 / (torch.exp(h) - self.pole.float())

    cell, x, h = Pole(), torch.randn(B, T, size), torch.zeros(B, size)
    found, expected = (tg.dynamic_rnn(cell, x, initial_state=h, fuse=fuse) for fuse in (True, False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "measure",
    [
        lambda h: h.std(-1, keepdim=True),
        lambda h: h.norm(dim=-1, keepdim=True),
        lambda h: torch.linalg.vector_norm(h, 1, -1, keepdim=True),
        lambda h: torch.linalg.vector_norm(h, torch.inf, -1, keepdim=True),
    ],
    ids=["std", "norm", "sum", "largest"],
)
def test_what_measures_zero_has_torchs_gradient(measure: Callable[[Tensor], Tensor]) -> None:
    def step(x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x + h / (1 + measure(h)))

    found: list[list[Tensor]] = []
    for fuse in (True, False):
        x = torch.linspace(-1, 1, B * T * H, dtype=torch.float64).view(B, T, H).requires_grad_()
        h = torch.zeros(B, H, dtype=torch.float64, requires_grad=True)
        y, _ = tg.dynamic_rnn(step, x, initial_state=h, fuse=fuse)
        found.append([y, *torch.autograd.grad(y.sin().sum(), (x, h))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


F = torch.nn.functional
AT_THEIR_KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(F, name)
        for name in ("relu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "leaky_relu", "elu")
    },
    **{name: getattr(F, name) for name in ("selu", "celu", "softplus", "hardshrink", "softshrink", "logsigmoid")},
    "abs": torch.abs,
    "clamp": lambda v: v.clamp(-1, 1),
    "threshold": lambda v: F.threshold(v, 0.5, 0.0),
    "maximum": lambda v: torch.maximum(v, torch.zeros_like(v)),
    "power": lambda v: v.abs() ** 1.5 + v**0.0 + v**3,
    "power of itself": lambda v: v.abs() ** v,
    "largest": lambda v: v - v.amax(-1, keepdim=True),
    "normalize": lambda v: F.normalize(v, dim=-1),
}


@pytest.mark.parametrize("name", AT_THEIR_KINKS)
def test_gradients_where_a_function_has_a_kink(name: str) -> None:
    kinks = torch.tensor([-6, -3, -1, -0.5, 0, 0.5, 1, 3, 6, 0], dtype=torch.float64)

    def step(x: Tensor, h: Tensor) -> Tensor:
        return AT_THEIR_KINKS[name](x + 0 * h)

    found: list[list[Tensor]] = []
    for fuse in (True, False):
        x = torch.stack((kinks, 0 * kinks)).expand(2, 2, 10).clone().requires_grad_()
        y, _ = tg.dynamic_rnn(step, x, initial_state=0 * kinks.expand(2, 10), fuse=fuse)
        (gradient,) = torch.autograd.grad((y * torch.linspace(1, 2, 10, dtype=torch.float64)).sum(), x)
        found.append([y, gradient])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, equal_nan=True)  # torch's hardsigmoid has 1/6 in float32


def test_batch_norm_is_fused_in_eval_and_sees_its_statistics_change() -> None:
    class Cell(torch.nn.Module):
        state_size = H

        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(H, dtype=torch.float64)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.norm(x + h))

    cell, x = Cell().eval(), torch.randn(B, T, H, dtype=torch.float64)
    for _ in range(2):
        found, expected = (tg.dynamic_rnn(cell, x, fuse=fuse)[0] for fuse in (True, False))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        cell.train()(x[:, 0], x[:, 1])
        cell.eval()


@pytest.mark.parametrize("what", ["batch norm", "a buffer"])
def test_a_reason_names_the_users_line(what: str) -> None:
    class Cell(torch.nn.Module):
        state_size = H

        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(H)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            if what == "batch norm":
                return self.norm(x + h)
            self.count += 1
            return x + h * self.count

    (reason,) = tg.explain(Cell(), torch.randn(B, T, H)).calls[0].reasons["fused"]
    assert "test_fusion_never_wrong.py:" in reason
