# SPDX-License-Identifier: Apache-2.0
"""Random cells out of what a fused loop knows, for tests against the eager loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp of minus abs": lambda x: torch.exp(-x.abs()),
    "log1p of square": lambda x: torch.log1p(x * x),
    "root": lambda x: torch.sqrt(1 + x * x),
    "inverse root": lambda x: torch.rsqrt(1 + x**2),
    "log": lambda x: torch.log(1 + x.abs()),
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "expm1": lambda x: torch.expm1(torch.tanh(x)),
    "cube": lambda x: torch.tanh(x) ** 3,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1) / 4,
    "standardized": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1) if x.shape[-1] > 1 else x,
    "of the largest": lambda x: x - x.amax(-1, keepdim=True),
    "share of the sum": lambda x: x / (1 + x.abs().sum(-1, keepdim=True)),
    "reversed": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -1),
    "in place": lambda x: (x * 0.5).add_(1).mul_(0.5),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": lambda a, b: torch.sub(a, b, alpha=0.5),
    "mul": torch.mul,
    "div": lambda a, b: a / (1 + b * b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "gated": lambda a, b: torch.sigmoid(a) * torch.tanh(b),
    "mixed by a scalar of the row": lambda a, b: a * b.mean(-1, keepdim=True),
    "logaddexp": lambda a, b: torch.log(torch.exp(a.clamp(max=3)) + torch.exp(b.clamp(max=3))),
}
SHAPED = ("linear", "blocks", "norm", "group norm", "split", "cat", "outer", "bias", "peephole")


class RandomCell(nn.Module):
    """`(x_t, state) -> (y_t, state)`, x_t a tensor or a pair, the state a tensor or a tuple."""

    def __init__(self, sizes: list[int], inputs: list[int], plan: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.sizes, self.inputs, self.plan = sizes, inputs, plan
        self.weights = nn.ParameterDict()
        generator = torch.Generator().manual_seed(1)
        self.make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4)
        with torch.no_grad():
            example = (
                [torch.zeros(1, n, dtype=torch.float64) for n in inputs],
                [torch.zeros(1, n, dtype=torch.float64) for n in sizes],
            )
            self(*example)
        del self.make

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = self.make(*shape)
        return self.weights[name]

    def forward(self, x: Any, state: Any) -> Any:
        xs = list(x) if isinstance(x, (list, tuple)) else [x]
        states = list(state) if isinstance(state, (list, tuple)) else [state]
        values = [*xs, *states]
        for k, (what, first, second, number) in enumerate(self.plan):
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(self.step(f"{k}", what, a, b, number))
        leaving = [
            torch.tanh(self.fit(f"s{k}", values[-1 - k % len(values)], size)) * 0.9 + 0.1 * states[k]
            for k, size in enumerate(self.sizes)
        ]
        y = self.fit("y", values[-1], 3)
        return y, type(state)(leaving) if isinstance(state, (list, tuple)) else leaving[0]

    def fit(self, name: str, value: Tensor, size: int) -> Tensor:
        return value if value.shape[-1] == size else value @ self.weight(name, value.shape[-1], size)

    def step(self, name: str, what: str, a: Tensor, b: Tensor, number: int) -> Tensor:
        n = a.shape[-1]
        if what in UNARY:
            return UNARY[what](a)
        if what in BINARY:
            return BINARY[what](a, self.fit(name, b, n))
        if what == "linear":
            return F.linear(
                torch.cat([a, b], -1), self.weight(name, number, n + b.shape[-1]), self.weight(name + "b", number)
            )
        if what == "blocks":
            blocks = next(k for k in (3, 2, 1) if n % k == 0)
            weight = self.weight(name, blocks, n // blocks, 2)
            return torch.einsum("bhi,hij->bhj", a.view(-1, blocks, n // blocks), weight).flatten(1)
        if what == "norm":
            return F.layer_norm(a, (n,), self.weight(name, n), self.weight(name + "b", n))
        if what == "group norm":
            groups = next(k for k in (3, 2, 1) if n % k == 0)
            return F.layer_norm(a.unflatten(-1, (groups, -1)), (n // groups,)).flatten(1)
        if what == "split":
            left, right = a[..., : n // 2 + 1], a[..., n // 2 :]
            return torch.cat([torch.tanh(right), left], -1)
        if what == "cat":
            return torch.cat([a, b], -1)[..., :9]
        if what == "outer":
            matrix = torch.tanh(a[..., :3]).unsqueeze(-1) * b[..., :2].unsqueeze(-2)
            return (matrix @ torch.tanh(b[..., :2]).unsqueeze(-1)).squeeze(-1)
        if what == "bias":
            return a + self.weight(name, n)
        return a + self.weight(name, n).sigmoid() * self.fit(name + "f", b, n)


@st.composite
def cells(draw: st.DrawFn) -> RandomCell:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    inputs = draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
    operation = st.sampled_from([*UNARY, *BINARY, *SHAPED, "linear", "linear", "linear", "gated"])
    place = st.integers(0, 40)
    plan = draw(st.lists(st.tuples(operation, place, place, st.integers(1, 7)), min_size=1, max_size=12))
    return RandomCell(sizes, inputs, plan)
