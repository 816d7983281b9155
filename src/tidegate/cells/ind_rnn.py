# SPDX-License-Identifier: Apache-2.0
"""The IndRNN: each unit reads of h only itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, zeros


class IndRNNCell(ReadyCell):
    """One step of the independently recurrent network.

        h' = relu(W x + u * h + b), elementwise in h; or tanh

    Source: Li et al. 2018 (1803.04831).

    Args:
        input_size, hidden_size: I and H.
        bias: whether there is b.
        nonlinearity: "relu" or "tanh".

    Parameters: weight_ih (H, I), weight_hh (H), bias (H). Initially weight_ih and bias are uniform in +-1/sqrt(I), and
    weight_hh in 0..1, the paper's for relu and short sequences: for T steps keep it under 2^(1/T), of the last layer
    near 1.

    State: h (B, H).
    """

    reads = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"nonlinearity: expected 'relu' or 'tanh', got {nonlinearity!r}")
        self.state_size, self.nonlinearity = hidden_size, nonlinearity
        self.weight_ih = empty(device, dtype, hidden_size, input_size)
        self.weight_hh = empty(device, dtype, hidden_size)
        self.bias = empty(device, dtype, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        bound = 1 / math.sqrt(self.input_size)
        torch.nn.init.uniform_(self.weight_ih, -bound, bound)
        torch.nn.init.uniform_(self.weight_hh, 0, 1)
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        bias = ", bias=False" if self.bias is None else ""
        return f"{super().extra_repr()}{bias}, nonlinearity={self.nonlinearity!r}"

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
        gate = linear(input, self.weight_ih, self.bias) + self.weight_hh * seen
        return torch.relu(gate) if self.nonlinearity == "relu" else torch.tanh(gate)
