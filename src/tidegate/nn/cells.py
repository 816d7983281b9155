# SPDX-License-Identifier: Apache-2.0
"""RNNCell, LSTMCell and GRUCell: torch.nn's cells, one step a call, on tidegate's operators.

Letters: B rows, I input_size, H hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidegate import cells
from tidegate.cells import Call, Cell, Options
from tidegate.nn import autocast
from tidegate.nn.layers import _read_flag, read_states


class RecurrentCell(torch.nn.RNNCellBase):
    """What the three cells share. Construction, parameters and repr are torch.nn's own."""

    cell: Cell

    def _options(self) -> Options:
        return {}

    def _step(self, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """One step: input (B, I) or (I,), states (B, H) or (H,) each, zeros if None."""
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
        if states is None:
            zeros = torch.zeros(input.shape[0], self.hidden_size, dtype=input.dtype, device=input.device)
            states = (zeros,) * len(self.cell.states)
        elif unbatched:
            states = tuple(state.unsqueeze(0) for state in states)
        self._check_sizes(input, states)
        stepped = self.sequence(input.unsqueeze(0), states)[1:]
        return tuple(state.squeeze(0) for state in stepped) if unbatched else stepped

    def sequence(self, input: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """The cell over (T, B, I) in one call: output (T, B, H) and the final states."""
        weights = dict.fromkeys(self.cell.weights)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weights[name] = getattr(self, name)
        call = Call(self.cell, input, states, weights, lengths, None, False, self._options())
        return autocast.recurrence(call, widens_on_cpu=self.cell is not cells.RNN)

    def _check_rank(self, input: Tensor) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._torch_name}: Expected input to be 1D or 2D, got {input.dim()}D instead")

    @property
    def _torch_name(self) -> str:
        return f"{self.cell.name.upper()}Cell"

    def _check_sizes(self, input: Tensor, states: tuple[Tensor, ...]) -> None:
        """In the words of torch's own cells."""
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for k, state in enumerate(states):
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )


class _OneStateCell(RecurrentCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (B, I) or (I,).
            hx: h (B, H) or (H,); zeros if None.

        Returns:
            h' like h.

        Raises:
            ValueError, RuntimeError: as torch.nn raises them, in its words.
        """
        self._check_rank(input)
        states = None if hx is None else read_states(self.cell, hx)
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{self._torch_name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return self._step(input, states)[0]


class RNNCell(_OneStateCell, torch.nn.RNNCell):
    """One step of an Elman RNN: torch.nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device, dtype)."""

    cell = cells.RNN

    def _options(self) -> Options:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return {"nonlinearity": self.nonlinearity}


class GRUCell(_OneStateCell, torch.nn.GRUCell):
    """One step of a GRU: torch.nn.GRUCell(input_size, hidden_size, bias, device, dtype) with GRU's `reset_after`."""

    cell = cells.GRU

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        torch.nn.GRUCell.__init__(self, *args, **kwargs)
        self.reset_after = _read_flag("reset_after", reset_after)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"reset_after": True, **state})

    def _options(self) -> Options:
        return {"reset_after": self.reset_after}

    def extra_repr(self) -> str:
        return super().extra_repr() + (", reset_after=False" if not self.reset_after else "")


class LSTMCell(RecurrentCell, torch.nn.LSTMCell):
    """One step of an LSTM: torch.nn.LSTMCell(input_size, hidden_size, bias, device, dtype)."""

    cell = cells.LSTM

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (B, I) or (I,).
            hx: (h, c), each (B, H) or (H,); zeros if None.

        Returns:
            (h', c').

        Raises:
            ValueError, RuntimeError: as torch.nn raises them, in its words.
        """
        self._check_rank(input)
        states = None if hx is None else read_states(self.cell, hx)
        for k, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
        h, c = self._step(input, states)
        return h, c
