# SPDX-License-Identifier: Apache-2.0
"""The closed-form continuous-time cell (CfC)."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.cells.parts import Device, ReadyCell, zeros

MODES = ("default", "no_gate", "pure")


class CfCCell(ReadyCell):
    """One step of the CfC: the solution of a liquid network's equation over a time t in closed form.

        s = backbone([x, h]),  each of its layers a(W s + b), a(v) = 1.7159 tanh(0.666 v)
        default:  p = sigmoid(time_a(s) t + time_b(s));  h' = (1 - p) tanh(ff1(s)) + p tanh(ff2(s))
        no_gate:  h' = tanh(ff1(s)) + p tanh(ff2(s))
        pure:     h' = A - A exp(-t (|w_tau| + |ff1(s)|)) ff1(s)

    Source: Hasani et al. 2022 (2106.13898); the meaning and the parameters' names are those of ncps.torch.CfCCell,
    whose argument ts is here a part of the input.

    Args:
        input_size, hidden_size: I and H.
        mode: "default", "no_gate" or "pure".
        backbone_units, backbone_layers: of the backbone; without layers s is [x, h].

    Parameters: backbone.{0, 2, 4, ...}, ff1, and ff2, time_a and time_b, or w_tau and A (1, H): .weight and .bias.
    Initially the weights are drawn by Xavier's uniform rule, the biases as torch.nn.Linear's, w_tau is 0 and A 1.

    Input: x (B, I), of a time step of 1; or (x, t), t (B, 1) the time since the last step.

    State: h (B, H).
    """

    reads = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mode: str = "default",
        *,
        backbone_units: int = 128,
        backbone_layers: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.state_size, self.mode = hidden_size, mode
        parts: list[torch.nn.Module] = []
        size = input_size + hidden_size
        for _ in range(backbone_layers):
            parts += [torch.nn.Linear(size, backbone_units, device=device, dtype=dtype), ScaledTanh()]
            size = backbone_units
        self.backbone = torch.nn.Sequential(*parts)
        self.ff1 = torch.nn.Linear(size, hidden_size, device=device, dtype=dtype)
        if mode == "pure":
            self.w_tau = torch.nn.Parameter(torch.empty(1, hidden_size, device=device, dtype=dtype))
            self.A = torch.nn.Parameter(torch.empty(1, hidden_size, device=device, dtype=dtype))
        else:
            self.ff2 = torch.nn.Linear(size, hidden_size, device=device, dtype=dtype)
            self.time_a = torch.nn.Linear(size, hidden_size, device=device, dtype=dtype)
            self.time_b = torch.nn.Linear(size, hidden_size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class says."""
        for part in self.modules():
            if isinstance(part, torch.nn.Linear):
                part.reset_parameters()
                torch.nn.init.xavier_uniform_(part.weight)
        if self.mode == "pure":
            torch.nn.init.zeros_(self.w_tau)
            torch.nn.init.ones_(self.A)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"

    def forward(
        self, input: Tensor | tuple[Tensor, Tensor], state: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """One step.

        Args:
            input: x, or (x, t).
            state: h; zeros if None.
            read: see ReadyCell.

        Returns:
            h'.
        """
        x, time = (input, None) if isinstance(input, Tensor) else input
        (h,) = zeros(x, self.hidden_size) if state is None else (state,)
        seen = h if read is None else read.flatten(1)  # the one gate's, if it is (B, 1, H)
        s = self.backbone(torch.cat([x, seen], -1))
        first = self.ff1(s)
        if self.mode == "pure":
            rate = self.w_tau.abs() + first.abs()
            return self.A - self.A * torch.exp(-(rate if time is None else time * rate)) * first
        speed = self.time_a(s)
        p = torch.sigmoid((speed if time is None else speed * time) + self.time_b(s))
        first, second = torch.tanh(first), torch.tanh(self.ff2(s))
        return first + p * second if self.mode == "no_gate" else (1 - p) * first + p * second


class ScaledTanh(torch.nn.Module):
    """LeCun's 1.7159 tanh(2/3 v), with the 0.666 that ncps has."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(0.666 * input)
