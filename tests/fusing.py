# SPDX-License-Identifier: Apache-2.0
"""What tests of fused cells share: sizes, a small cell, and a run beside the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn import over_time

T, B, H = 6, 3, 8
FEATURES = 4
D = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def run(cell: Any, state: Any = None, x: Tensor | None = None, fuse: bool | None = True, **options: Any) -> Any:
    x = randn(T, B, H) if x is None else x
    state = randn(x.shape[1], H) if state is None else state
    return over_time.run(cell, x, state, fuse=fuse, **options)


def assert_fused_is_eager(cell: Any, state: Any = None, x: Tensor | None = None, **options: Any) -> None:
    x = randn(T, B, H) if x is None else x
    state = randn(x.shape[1], H) if state is None else state
    for a, b in zip(run(cell, state, x, **options), run(cell, state, x, fuse=False, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # float64, values near 1, six steps


class Gate(nn.Module):
    """A small cell with parts of every kind."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.norm = nn.Linear(2 * H, 2 * H, dtype=D), nn.LayerNorm(H, dtype=D)
        self.register_buffer("mask", torch.rand(H, dtype=D))
        self.offset = 0.5

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, n = self.joint(torch.cat([x, h], -1)).chunk(2, -1)
        z = torch.sigmoid(z + self.offset)
        return z * h + (1 - z) * torch.tanh(self.norm(n) * self.mask) * self.scale
