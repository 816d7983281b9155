# SPDX-License-Identifier: Apache-2.0
"""The minimal gated unit: a GRU whose two gates are one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, gate_reads, zeros


class MGUCell(ReadyCell):
    """One step of the minimal gated unit.

        f = sigmoid(W_f x + U_f h + b_f)
        h' = (1 - f) h + f tanh(W_h x + U_h (f h) + b_h)

    Source: Zhou et al. 2016 (1603.09420). flax.linen.MGUCell is another: there the gate is applied after the
    product, and h' = f h + (1 - f) n.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there are b_f and b_h.

    Parameters: weight_ih (2H, I), weight_hh (2H, H) and bias (2H), rows f | h. Initially the weights are uniform in
    +-1/sqrt(H), the bias of f is 1 and that of h 0.

    State: h (B, H).
    """

    reads = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size = hidden_size
        self.weight_ih = empty(device, dtype, 2 * hidden_size, input_size)
        self.weight_hh = empty(device, dtype, 2 * hidden_size, hidden_size)
        self.bias = empty(device, dtype, 2 * hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        super().reset_parameters()
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()[: self.hidden_size].fill_(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', bias=False' if self.bias is None else ''}"

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
        f, candidate = linear(input, self.weight_ih, self.bias).chunk(2, -1)
        u_f, u_h = self.weight_hh.chunk(2)
        read_f, read_h = gate_reads(h if read is None else read, 2)
        f = torch.sigmoid(f + linear(read_f, u_f))
        candidate = torch.tanh(candidate + linear(f * read_h, u_h))
        return (1 - f) * h + f * candidate
