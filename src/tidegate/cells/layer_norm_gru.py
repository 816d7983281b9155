# SPDX-License-Identifier: Apache-2.0
"""The GRU with layer normalization, as the Dreamer agents have it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, product, recurrent_shape, zeros


class LayerNormGRUCell(ReadyCell):
    """One step of Dreamer's GRU: one norm over the joint product of [x, h], the reset gate on the candidate.

        r, g, u = LN(W [x, h] + b)                  W x + R h with W = [W, R]
        r = sigmoid(r),  u = sigmoid(u + update_bias)
        h' = u tanh(r g) + (1 - u) h

    Source: Hafner et al., DreamerV2 (2010.02193), its code's GRUCell; sheeprl's LayerNormGRUCell. u is the share of the
    new: torch.nn's z is 1 - u. The gate order is theirs, r, g, u. sheeprl's joint weight has the columns of h first.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there is b, before the norm; DreamerV2 has none.
        blocks: the recurrent weight is block-diagonal, of so many blocks (DreamerV3's idea; its present cell is
            DreamerV3GRUCell).
        update_bias: a constant, not learnt.
        eps: of the norm.

    Parameters: weight_ih (3H, I) and weight_hh (3H, H), with blocks (3, blocks, H/blocks, H/blocks), rows r | g | u;
    bias (3H); norm.weight, norm.bias (3H). Initially the weights are uniform in +-1/sqrt(H), the bias is 0, the norm 1
    and 0.

    State: h (B, H).
    """

    reads = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = False,
        *,
        blocks: int = 1,
        update_bias: float = -1.0,
        eps: float = 1e-3,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size = hidden_size
        self.blocks, self.update_bias, self.eps = blocks, update_bias, eps
        self.weight_ih = empty(device, dtype, 3 * hidden_size, input_size)
        self.weight_hh = empty(device, dtype, *recurrent_shape(3, hidden_size, blocks))
        self.bias = empty(device, dtype, 3 * hidden_size) if bias else None
        self.norm = torch.nn.LayerNorm(3 * hidden_size, eps, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        super().reset_parameters()
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        blocks = f", blocks={self.blocks}" if self.blocks > 1 else ""
        bias = ", bias=True" if self.bias is not None else ""
        return f"{super().extra_repr()}{bias}{blocks}, update_bias={self.update_bias:g}, eps={self.eps:g}"

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
        joint = linear(input, self.weight_ih, self.bias) + product(h if read is None else read, self.weight_hh, 3)
        r, g, u = self.norm(joint).chunk(3, -1)
        r, u = torch.sigmoid(r), torch.sigmoid(u + self.update_bias)
        g = torch.tanh(r * g)
        return u * g + (1 - u) * h
