# SPDX-License-Identifier: Apache-2.0
"""The sLSTM of the xLSTM: an LSTM with exponential gates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from tidegate.cells.parts import Device, ReadyCell, empty, product, zeros


class SLSTMCell(ReadyCell):
    """One step of the sLSTM, in its stabilized form, heads with recurrent weights of their own.

        i~, f~, z~, o~ = W x + R h + b
        m' = max(log sigmoid(f~) + m, i~), and i~ where n = 0, as in the first step
        i = exp(i~ - m'),  f = exp(log sigmoid(f~) + m - m'),  both at most 1
        c' = f c + i tanh(z~),  n' = f n + i,  h' = sigmoid(o~) c' / n'

    Source: Beck et al. 2024 (2405.04517), with sigmoid for the forget gate's activation; the meaning
    is that of the xlstm package's vanilla backend, whose step begins anew where n = 0 in all rows at once. There W is
    applied outside the cell.

    Args:
        input_size, hidden_size: I and H.
        num_heads: J, a divisor of H: the units of a head read no other head's h.

    Parameters: weight_ih (4H, I), rows i | f | z | o; recurrent_kernel (J, H/J in, 4, H/J out) and bias (J, 4, H/J), as
    in xlstm. Initially weight_ih and recurrent_kernel are uniform in +-1/sqrt(H), the bias is 0 and of the forget gates
    rises from 3 to 6 within a head (xlstm's "small_init").

    State: (h, c, n, m), each (B, H).
    """

    reads = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_heads: int = 1,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size = {hidden_size}, got {num_heads}")
        self.state_size, self.num_heads = (hidden_size,) * 4, num_heads
        size = hidden_size // num_heads
        self.weight_ih = empty(device, dtype, 4 * hidden_size, input_size)
        self.recurrent_kernel = empty(device, dtype, num_heads, size, 4, size)
        self.bias = empty(device, dtype, num_heads, 4, size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        super().reset_parameters()
        rise = torch.linspace(3, 6, self.bias.shape[-1], device=self.bias.device, dtype=self.bias.dtype)
        with torch.no_grad():
            self.bias.zero_()[:, 1] = rise

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_heads={self.num_heads}"

    def forward(
        self, input: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step.

        Args:
            input: (B, I).
            state: (h, c, n, m); zeros if None.
            read: see ReadyCell.

        Returns:
            (h', c', n', m').
        """
        h, c, n, m = zeros(input, *(self.hidden_size,) * 4) if state is None else state
        kernel = self.recurrent_kernel.permute(2, 0, 3, 1)  # gate, head, out, in
        from_h = product(h if read is None else read, kernel, 4)
        i, f, z, o = (linear(input, self.weight_ih, self.bias.transpose(0, 1).flatten()) + from_h).chunk(4, -1)
        f = logsigmoid(f) + m
        m = torch.where(n == 0, i, torch.maximum(i, f))
        # f - m is above 0 only where n and c are 0: bounded before exp, so that no infinity meets them.
        i, f = torch.exp(i - m), torch.exp((f - m).clamp(max=0))
        z, o = torch.tanh(z), torch.sigmoid(o)
        c = f * c + i * z
        n = f * n + i
        h = o * c / n
        return h, c, n, m
