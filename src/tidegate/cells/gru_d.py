# SPDX-License-Identifier: Apache-2.0
"""The GRU-D for series with missing values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate.cells.parts import Device, ReadyCell, empty, gate_reads, zeros


class GRUDCell(ReadyCell):
    """One step of the GRU-D: what was seen last decays to the mean, and h to 0, by the time since then.

        gamma_x = exp(-relu(w_x * delta + b_x)),  gamma_h = exp(-relu(W_g delta + b_g))
        x^ = mask x + (1 - mask) (gamma_x x_last + (1 - gamma_x) x_mean),  h^ = gamma_h h
        z = sigmoid(W_z x^ + U_z h^ + V_z mask + b_z),  r likewise
        h' = (1 - z) h^ + z tanh(W x^ + U (r h^) + V mask + b)
        x_last' = mask x + (1 - mask) x_last

    Source: Che et al. 2018 (1606.01865). z is the share of the new: torch.nn's z is 1 - z.

    Args:
        input_size, hidden_size: I and H.
        x_mean: (I,), the mean of each variable in the training data; 0 if None. A buffer.

    Parameters: weight_ih, weight_mask (3H, I), weight_hh (3H, H) and bias (3H), rows r | z | h; weight_decay_x and
    bias_decay_x (I); weight_decay_h (H, I) and bias_decay_h (H). Initially uniform in +-1/sqrt(H), the biases 0.

    Input: (x, mask, delta), each (B, I): x may hold any number where mask is 0; mask is 1 where x was seen and 0
    elsewhere, of x's dtype; delta is the time since the variable was seen last, before this step.

    State: (h, x_last), (B, H) and (B, I). y_t is h'.
    """

    reads = 3
    x_mean: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        x_mean: Tensor | None = None,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size = (hidden_size, input_size)
        if x_mean is not None and tuple(x_mean.shape) != (input_size,):
            raise ValueError(f"x_mean: expected (input_size,) = ({input_size},), got {tuple(x_mean.shape)}")
        self.weight_ih = empty(device, dtype, 3 * hidden_size, input_size)
        self.weight_mask = empty(device, dtype, 3 * hidden_size, input_size)
        self.weight_hh = empty(device, dtype, 3 * hidden_size, hidden_size)
        self.bias = empty(device, dtype, 3 * hidden_size)
        self.weight_decay_x, self.bias_decay_x = (empty(device, dtype, input_size) for _ in range(2))
        self.weight_decay_h = empty(device, dtype, hidden_size, input_size)
        self.bias_decay_h = empty(device, dtype, hidden_size)
        mean = self.bias.new_zeros(input_size) if x_mean is None else x_mean.detach().to(self.bias)
        self.register_buffer("x_mean", mean)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        super().reset_parameters()
        for bias in (self.bias, self.bias_decay_x, self.bias_decay_h):
            torch.nn.init.zeros_(bias)

    def forward(
        self,
        input: tuple[Tensor, Tensor, Tensor],
        state: tuple[Tensor, Tensor] | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (x, mask, delta).
            state: (h, x_last); zeros if None.
            read: see ReadyCell; it decays as h does.

        Returns:
            (h', x_last').
        """
        x, mask, delta = input
        h, x_last = zeros(x, self.hidden_size, self.input_size) if state is None else state
        seen = mask > 0
        gamma_x = torch.exp(-torch.relu(self.weight_decay_x * delta + self.bias_decay_x))
        gamma_h = torch.exp(-torch.relu(linear(delta, self.weight_decay_h, self.bias_decay_h)))
        filled = torch.where(seen, x, gamma_x * x_last + (1 - gamma_x) * self.x_mean)
        from_x = linear(filled, self.weight_ih, self.bias) + linear(mask, self.weight_mask)
        r, z, candidate = from_x.chunk(3, -1)
        u_r, u_z, u_h = self.weight_hh.chunk(3)
        read_r, read_z, read_h = gate_reads(h if read is None else read, 3)
        r = torch.sigmoid(r + linear(gamma_h * read_r, u_r))
        z = torch.sigmoid(z + linear(gamma_h * read_z, u_z))
        candidate = torch.tanh(candidate + linear(r * gamma_h * read_h, u_h))
        return (1 - z) * gamma_h * h + z * candidate, torch.where(seen, x, x_last)
