# SPDX-License-Identifier: Apache-2.0
"""The recurrent core of DreamerV3's world model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from tidegate.cells.parts import Device, ReadyCell, empty, zeros


class DreamerV3GRUCell(ReadyCell):
    """One step of DreamerV3's block GRU: input and h are projected, each block sees its own h and both projections.

        s = [silu(N(W_x x + b_x)), silu(N(W_h h + b_h))]
        d = silu(N(block linear of [h of the block, s])), num_layers times
        r, g, u = block linear of d
        h' = u' tanh(sigmoid(r) g) + (1 - u') h,  u' = sigmoid(u + update_bias)
        N: a root-mean-square norm with a scale

    Source: Hafner et al. 2023 (2301.04104) and its code; the meaning and the parameters' names are those of torchrl's
    DreamerV3BlockGRUCell, whose norms always compute in float32. Input is what the agent concatenates of its stochastic
    state and action.

    Args:
        input_size, hidden_size: I and H.
        projection_size: of both projections.
        num_blocks: a divisor of H.
        num_layers: block linear layers before the gates.
        update_bias: a constant, not learnt.
        norm_eps: of every norm.

    Parameters: input_linear, hidden_linear; input_norm, hidden_norm, .weight; dynamic_linears.{k} and gates, .weight
    (blocks, in, out) and .bias; dynamic_norms.{k}.weight. Initially weights are normal, cut at two deviations of
    1.1368 / sqrt(inputs), biases 0, norms 1.

    State: h (B, H).
    """

    reads = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        projection_size: int = 512,
        num_blocks: int = 8,
        num_layers: int = 1,
        update_bias: float = -1.0,
        norm_eps: float = 1e-4,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if num_blocks < 1 or hidden_size % num_blocks:
            raise ValueError(f"num_blocks: expected a divisor of hidden_size = {hidden_size}, got {num_blocks}")
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        self.state_size, self.num_blocks, self.update_bias = hidden_size, num_blocks, update_bias
        self.input_linear = torch.nn.Linear(input_size, projection_size, device=device, dtype=dtype)
        self.input_norm = RMSNorm(projection_size, norm_eps, device, dtype)
        self.hidden_linear = torch.nn.Linear(hidden_size, projection_size, device=device, dtype=dtype)
        self.hidden_norm = RMSNorm(projection_size, norm_eps, device, dtype)
        sizes = [hidden_size + 2 * projection_size * num_blocks, *(hidden_size,) * (num_layers - 1)]
        self.dynamic_linears = torch.nn.ModuleList(
            BlockLinear(size, hidden_size, num_blocks, device, dtype) for size in sizes
        )
        self.dynamic_norms = torch.nn.ModuleList(RMSNorm(hidden_size, norm_eps, device, dtype) for _ in sizes)
        self.gates = BlockLinear(hidden_size, 3 * hidden_size, num_blocks, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        for part in self.modules():
            if isinstance(part, (torch.nn.Linear, BlockLinear)):
                spread = 1.1368 / math.sqrt(part.in_features)
                torch.nn.init.trunc_normal_(part.weight, std=spread, a=-2 * spread, b=2 * spread)
                torch.nn.init.zeros_(part.bias)
            elif isinstance(part, RMSNorm):
                torch.nn.init.ones_(part.weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_blocks={self.num_blocks}, update_bias={self.update_bias:g}"

    def forward(self, input: Tensor, state: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (B, I).
            state: h; zeros if None.
            read: see ReadyCell.

        Returns:
            h'.
        """
        (h,) = zeros(input, self.hidden_size) if state is None else (state,)
        seen = h if read is None else read.flatten(1)  # the one gate's, if it is (B, 1, H)
        from_x = silu(self.input_norm(self.input_linear(input)))
        from_h = silu(self.hidden_norm(self.hidden_linear(seen)))
        shared = torch.cat((from_x, from_h), -1).unsqueeze(1).expand(-1, self.num_blocks, -1)
        d = torch.cat((seen.unflatten(1, (self.num_blocks, -1)), shared), -1)  # (B, blocks, H/blocks + 2 projections)
        for linear, norm in zip(self.dynamic_linears, self.dynamic_norms, strict=True):
            d = silu(norm(linear(d).flatten(1))).unflatten(1, (self.num_blocks, -1))
        r, g, u = (gate.flatten(1) for gate in self.gates(d).chunk(3, -1))
        r, u = torch.sigmoid(r), torch.sigmoid(u + self.update_bias)
        g = torch.tanh(r * g)
        return u * g + (1 - u) * h


class BlockLinear(torch.nn.Module):
    """A linear map for each block of features: (B, blocks, in / blocks) -> (B, blocks, out / blocks)."""

    def __init__(
        self, in_features: int, out_features: int, blocks: int, device: Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = empty(device, dtype, blocks, in_features // blocks, out_features // blocks)
        self.bias = empty(device, dtype, out_features)

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("bji,jik->bjk", input, self.weight) + self.bias.unflatten(0, (input.shape[1], -1))


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) times a scale."""

    def __init__(self, size: int, eps: float, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty(device, dtype, size)

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.rsqrt(input.square().mean(-1, keepdim=True) + self.eps) * self.weight
