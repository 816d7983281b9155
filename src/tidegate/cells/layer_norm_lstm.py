# SPDX-License-Identifier: Apache-2.0
"""The LSTM with layer normalization."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, product, recurrent_shape, zeros


class LayerNormLSTMCell(ReadyCell):
    """One step of an LSTM whose products and cell state are normalized over their features.

        i, f, g, o = LN(W x) + LN(R h) + b          together: LN(W x + R h) + b
        c' = sigmoid(f) c + sigmoid(i) tanh(g)      carry_normed: LN(...) of that, carried
        h' = sigmoid(o) tanh(LN(c'))                carry_normed: sigmoid(o) tanh(c')

    The norms of the products have a scale and no shift, which b would repeat; the norm of c has both.

    Source: Ba et al. 2016 (1607.06450). By default the meaning is theirs and haste's. With
    carry_normed=True it is that of torch's fastrnns benchmark (no b there), and of TensorFlow Addons'
    LayerNormLSTMCell, whose eps is 1e-3. Where a source has shifts in the norms of the products, b is their sum and its
    own bias; its gate orders are i, f, g, o in torch and TensorFlow Addons, i, g, f, o in haste.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there is b.
        together: one norm over the sum of the products, not one over each.
        carry_normed: the state c is the normed one.
        blocks: the recurrent weight is block-diagonal, of so many blocks.
        eps: of every norm.

    Parameters: weight_ih (4H, I) and weight_hh (4H, H), with blocks (4, blocks, H/blocks, H/blocks), of gates
    i | f | g | o; bias (4H); norm_ih and norm_hh, or together norm, .weight (4H); norm_c.weight and .bias (H). The
    weights are at first uniform in +-1/sqrt(H), the bias is 0, of the forget gate 1, the norms are 1 and 0.

    State: (h, c), each (B, H).
    """

    reads = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        together: bool = False,
        carry_normed: bool = False,
        blocks: int = 1,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size = (hidden_size, hidden_size)
        self.together, self.carry_normed, self.blocks, self.eps = together, carry_normed, blocks, eps
        size = 4 * hidden_size
        self.weight_ih = empty(device, dtype, size, input_size)
        self.weight_hh = empty(device, dtype, *recurrent_shape(4, hidden_size, blocks))
        self.bias = empty(device, dtype, size) if bias else None
        if together:
            self.norm = torch.nn.LayerNorm(size, eps, bias=False, device=device, dtype=dtype)
        else:
            self.norm_ih = torch.nn.LayerNorm(size, eps, bias=False, device=device, dtype=dtype)
            self.norm_hh = torch.nn.LayerNorm(size, eps, bias=False, device=device, dtype=dtype)
        self.norm_c = torch.nn.LayerNorm(hidden_size, eps, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        super().reset_parameters()
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()[self.hidden_size : 2 * self.hidden_size].fill_(1)

    def extra_repr(self) -> str:
        given = {"together": self.together, "carry_normed": self.carry_normed}
        shown = "".join(f", {name}=True" for name, value in given.items() if value)
        blocks = f", blocks={self.blocks}" if self.blocks > 1 else ""
        return f"{super().extra_repr()}{', bias=False' if self.bias is None else ''}{shown}{blocks}, eps={self.eps:g}"

    def forward(
        self, input: Tensor, state: tuple[Tensor, Tensor] | None = None, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (B, I).
            state: (h, c); zeros if None.
            read: see ReadyCell.

        Returns:
            (h', c').
        """
        h, c = zeros(input, self.hidden_size, self.hidden_size) if state is None else state
        from_x = linear(input, self.weight_ih)
        from_h = product(h if read is None else read, self.weight_hh, 4)
        gates = self.norm(from_x + from_h) if self.together else self.norm_ih(from_x) + self.norm_hh(from_h)
        if self.bias is not None:
            gates = gates + self.bias
        i, f, g, o = gates.chunk(4, -1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        if self.carry_normed:
            c = self.norm_c(c)
            h = o * torch.tanh(c)
        else:
            h = o * torch.tanh(self.norm_c(c))
        return h, c
