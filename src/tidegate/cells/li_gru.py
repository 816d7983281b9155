# SPDX-License-Identifier: Apache-2.0
"""The light GRU of speech recognition: no reset gate, a rectified candidate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, product, zeros


class LiGRUCell(ReadyCell):
    """One step of the Li-GRU.

        a, z = N(W x) + U h
        h' = sigmoid(z) h + (1 - sigmoid(z)) relu(a)

    Source: Ravanelli et al. 2018 (1803.10225); the meaning is SpeechBrain's LiGRU with
    normalization="layernorm". The paper's N is a batch norm: it mixes the rows of a batch, and a fold of its running
    statistics into W and a bias is what remains of it in inference: norm=False.

    Args:
        input_size, hidden_size: I and H.
        norm: N is a layer norm over both gates; else N(W x) = W x + b.
        eps: of the norm.

    Parameters: w (2H, I) and u (2H, H), rows a | z; norm.weight and norm.bias (2H), or bias (2H). Initially w is drawn
    as torch.nn.Linear's weight, u is orthogonal in each gate, the bias is 0, the norm 1 and 0.

    State: h (B, H).
    """

    reads = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        norm: bool = True,
        eps: float = 1e-5,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size, self.eps = hidden_size, eps
        self.w = empty(device, dtype, 2 * hidden_size, input_size)
        self.u = empty(device, dtype, 2 * hidden_size, hidden_size)
        self.bias = None if norm else empty(device, dtype, 2 * hidden_size)
        self.norm = torch.nn.LayerNorm(2 * hidden_size, eps, device=device, dtype=dtype) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        torch.nn.init.kaiming_uniform_(self.w, 5**0.5)
        for gate in self.u.detach().chunk(2):
            torch.nn.init.orthogonal_(gate)
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', norm=False' if self.norm is None else ''}"

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
        from_x = linear(input, self.w, self.bias)
        if self.norm is not None:
            from_x = self.norm(from_x)
        a, z = (from_x + product(h if read is None else read, self.u, 2)).chunk(2, -1)
        z, a = torch.sigmoid(z), torch.relu(a)
        return z * h + (1 - z) * a
