# SPDX-License-Identifier: Apache-2.0
"""minGRU and minLSTM: gates without h, so that the recurrence has no product."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.cells.parts import Device, ReadyCell, zeros


class MinGRUCell(ReadyCell):
    """One step of the minGRU.

        z = sigmoid(W_z x),  h~ = W_h x                 positive: h~ = g(W_h x)
        h' = (1 - z) h + z h~
        g(a) = a + 0.5 where a >= 0, sigmoid(a) elsewhere

    Source: Feng et al. 2024 (2410.01201); positive=True is the form of its experiments, whose parallel scan in
    logarithms needs h~ > 0. Its listing also puts h_0 through g, which here is the caller's to do.

    Args:
        input_size, hidden_size: I and H.
        bias: whether the two linear maps have one.
        positive: h~ goes through g.

    Parameters: linear_z and linear_h, .weight (H, I) and .bias (H), initially as torch.nn.Linear's.

    State: h (B, H).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        positive: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size, self.positive = hidden_size, positive
        self.linear_z = torch.nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_h = torch.nn.Linear(input_size, hidden_size, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as torch.nn.Linear does."""
        self.linear_z.reset_parameters()
        self.linear_h.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{'' if self.positive else ', positive=False'}"

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (B, I).
            state: h; zeros if None.

        Returns:
            h'.
        """
        (h,) = zeros(input, self.hidden_size) if state is None else (state,)
        z = torch.sigmoid(self.linear_z(input))
        candidate = self.linear_h(input)
        return (1 - z) * h + z * (made_positive(candidate) if self.positive else candidate)


class MinLSTMCell(ReadyCell):
    """One step of the minLSTM, its two gates normalized to a sum of 1.

        f = sigmoid(W_f x),  i = sigmoid(W_i x),  h~ = W_h x        positive: h~ = g(W_h x), g of MinGRUCell
        h' = f / (f + i) h + i / (f + i) h~

    Source: Feng et al. 2024 (2410.01201); positive=True as for MinGRUCell.

    Args:
        input_size, hidden_size, bias, positive: as for MinGRUCell.

    Parameters: linear_f, linear_i and linear_h, .weight (H, I) and .bias (H), initially as torch.nn.Linear's.

    State: h (B, H).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        positive: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.state_size, self.positive = hidden_size, positive
        self.linear_f = torch.nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_i = torch.nn.Linear(input_size, hidden_size, bias, device, dtype)
        self.linear_h = torch.nn.Linear(input_size, hidden_size, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as torch.nn.Linear does."""
        for part in (self.linear_f, self.linear_i, self.linear_h):
            part.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{'' if self.positive else ', positive=False'}"

    def forward(self, input: Tensor, state: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (B, I).
            state: h; zeros if None.

        Returns:
            h'.
        """
        (h,) = zeros(input, self.hidden_size) if state is None else (state,)
        f, i = torch.sigmoid(self.linear_f(input)), torch.sigmoid(self.linear_i(input))
        candidate = self.linear_h(input)
        if self.positive:
            candidate = made_positive(candidate)
        return (f * h + i * candidate) / (f + i)


def made_positive(tensor: Tensor) -> Tensor:
    """The paper's g: continuous, and above 0."""
    return torch.where(tensor >= 0, tensor + 0.5, torch.sigmoid(tensor))
