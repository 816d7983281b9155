# SPDX-License-Identifier: Apache-2.0
"""The LSTM with peepholes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, product, zeros


class PeepholeLSTMCell(ReadyCell):
    """One step of an LSTM whose gates see c.

        i, f, g, o = W x + R h + b
        i = sigmoid(i + w_i c),  f = sigmoid(f + w_f c)
        c' = f c + i tanh(g)
        h' = sigmoid(o + w_o c') tanh(c')

    Source: Gers et al. 2002 (Learning precise timing with LSTM recurrent networks); the meaning is that of TensorFlow
    v1's LSTMCell(use_peepholes=True), of ONNX, and of tg.LSTMCell(peepholes=True), in plain operations.

    Args:
        input_size, hidden_size: I and H.
        bias: whether there is b.

    Parameters: weight_ih (4H, I), weight_hh (4H, H) and bias (4H), rows i | f | g | o; weight_peephole (3H),
    i | f | o. Initially all are uniform in +-1/sqrt(H).

    State: (h, c), each (B, H).
    """

    reads = 4

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
        self.state_size = (hidden_size, hidden_size)
        self.weight_ih = empty(device, dtype, 4 * hidden_size, input_size)
        self.weight_hh = empty(device, dtype, 4 * hidden_size, hidden_size)
        self.bias = empty(device, dtype, 4 * hidden_size) if bias else None
        self.weight_peephole = empty(device, dtype, 3 * hidden_size)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', bias=False' if self.bias is None else ''}"

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
        from_h = product(h if read is None else read, self.weight_hh, 4)
        i, f, g, o = (linear(input, self.weight_ih, self.bias) + from_h).chunk(4, -1)
        w_i, w_f, w_o = self.weight_peephole.chunk(3)
        i, f, g = torch.sigmoid(i + w_i * c), torch.sigmoid(f + w_f * c), torch.tanh(g)
        c = f * c + i * g
        o = torch.sigmoid(o + w_o * c)
        h = o * torch.tanh(c)
        return h, c
