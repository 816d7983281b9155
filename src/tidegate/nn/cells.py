# SPDX-License-Identifier: Apache-2.0
"""RNNCell, LSTMCell and GRUCell: torch.nn's cells, one step a call, on tidegate's operators.

Letters: B rows, I input_size, H hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate import backends, cells, ops
from tidegate.cells import Call, Options, Weights
from tidegate.nn import autocast
from tidegate.nn.initialization import initialize
from tidegate.nn.layers import read_states
from tidegate.nn.options import Extended, read_activations, read_clip, read_flag, read_init, read_nonlinearity
from tidegate.streaming import Source, Stream


class RecurrentCell(torch.nn.RNNCellBase, Extended):
    """What the three cells share. Construction, parameters and repr are torch.nn's own."""

    proj_size: int = 0
    _weight_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    _extra_weights: tuple[str, ...] = ()

    def _extend(self, clip: float | None, init: str) -> None:
        self.clip, self.init = read_clip("clip", clip), read_init(init)
        self._draw()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def _draw(self) -> None:
        weights = {name: getattr(self, name, None) for name in self.cell.weights}
        initialize(self.init, self.cell, {name: weight for name, weight in weights.items() if weight is not None})

    def extra_repr(self) -> str:
        return super().extra_repr() + self._extended_repr()

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of each state: h, for an LSTM also c."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: len(self.cell.states)]

    def _step(self, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """One step: input (B, I) or (I,), states (B, H) or (H,) each, zeros if None."""
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
        if states is None:
            states = tuple([input.new_zeros(input.shape[0], size) for size in self.state_sizes])
        elif unbatched:
            states = tuple(state.unsqueeze(0) for state in states)
        self._check_sizes(input, states)
        stepped = self.sequence(input.unsqueeze(0), states)[1:]
        return tuple(state.squeeze(0) for state in stepped) if unbatched else stepped

    def sequence(self, input: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """The cell over (T, B, I) in one call: output (T, B, H) and the final states."""
        call = Call(self.cell, input, states, self._weights(), lengths, None, False, self._options())
        return autocast.recurrence(call, widens_on_cpu=self.cell is not cells.RNN)

    def _weights(self) -> Weights:
        weights: Weights = dict.fromkeys(self.cell.weights)
        for name in (*self._weight_names, *self._extra_weights):
            weights[name] = self._weight(name)
        return weights

    def stream(self, batch_size: int | None = None, state: Any = None, dtype: torch.dtype | None = None) -> Stream:
        """Run the cell step by step, without gradients: see `RecurrentLayer.stream`. States are h or (h, c)."""
        source = Source(self.cell, self._options(), lambda: [self._weights()], layered=False, batch_first=False)
        return Stream(source, batch_size, state, dtype)

    def _check_rank(self, input: Tensor) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._torch_name}: Expected input to be 1D or 2D, got {input.dim()}D instead")

    @property
    def _torch_name(self) -> str:
        return f"{self.cell.name.upper()}Cell"

    def _short_step(self, input: Any, hx: Any) -> Sequence[Tensor]:
        """The new states at once, or nothing."""
        way = ops.short_way()
        if way is None or type(input) is not Tensor or input.is_nested:
            return ()
        return self._call_shortly(way.step, input, hx, self._weight_names)

    def _check_sizes(self, input: Tensor, states: tuple[Tensor, ...]) -> None:
        """In the words of torch's own cells."""
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for k, (state, size) in enumerate(zip(states, self.state_sizes, strict=True)):
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}"
                )
            if state.size(1) != size:
                raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {size}")


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
        if stepped := self._short_step(input, hx):
            return stepped[0]
        self._check_rank(input)
        states = None if hx is None else read_states(self.cell, hx)
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{self._torch_name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return self._step(input, states)[0]


class RNNCell(_OneStateCell, torch.nn.RNNCell):
    """One step of an Elman RNN: torch.nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device, dtype), and
    `activations`, `clip`, `init` as in RNN.

    Where gradients are recorded and no backend is named, a step with torch.nn's equations is torch's own.
    """

    cell = cells.RNN

    # What `activations` gave; torch.nn's cell takes any nonlinearity and refuses an unknown one when it runs.
    _own_nonlinearity: str = ""

    def __init__(
        self, *args: Any, activations: Any = None, clip: float | None = None, init: str = "torch", **kwargs: Any
    ) -> None:
        torch.nn.RNNCell.__init__(self, *args, **kwargs)
        if activations is not None:
            self._own_nonlinearity = self.nonlinearity = read_nonlinearity(activations)
        self._extend(clip, init)

    def _short_step(self, input: Any, hx: Any) -> Sequence[Tensor]:
        # So small a step that a backward of our own costs more to call than it saves: 1.03 to 1.2 of torch.nn's time.
        if torch.is_grad_enabled() and self._is_torchs() and ops.short_way() is not None:
            return (torch.nn.RNNCell.forward(self, input, hx),)
        return super()._short_step(input, hx)

    def _is_torchs(self) -> bool:
        """It has torch.nn's equations, and nobody asked for a backend."""
        return self.nonlinearity in ("tanh", "relu") and not self.clip and not backends.named()

    def _options(self) -> Options:
        if self.nonlinearity not in ("tanh", "relu", self._own_nonlinearity):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return super()._options()


class GRUCell(_OneStateCell, torch.nn.GRUCell):
    """One step of a GRU: torch.nn.GRUCell(input_size, hidden_size, bias, device, dtype), and `reset_after`,
    `activations`, `clip`, `init` as in GRU."""

    cell = cells.GRU
    reset_after: bool = True
    activations: str = cell.options["activations"][1]

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        activations: Any = None,
        clip: float | None = None,
        init: str = "torch",
        **kwargs: Any,
    ) -> None:
        torch.nn.GRUCell.__init__(self, *args, **kwargs)
        self.reset_after = read_flag("reset_after", reset_after)
        self.activations = read_activations(self.cell, activations)
        self._extend(clip, init)


class LSTMCell(RecurrentCell, torch.nn.LSTMCell):
    """One step of an LSTM: torch.nn.LSTMCell(input_size, hidden_size, bias, device, dtype), and `proj_size`,
    `peepholes`, `activations`, `clip`, `cell_clip`, `proj_clip`, `coupled`, `init` as in LSTM."""

    cell = cells.LSTM
    activations: str = cell.options["activations"][1]
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    coupled: bool = False

    def __init__(
        self,
        *args: Any,
        proj_size: int = 0,
        peepholes: bool = False,
        activations: Any = None,
        clip: float | None = None,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        coupled: bool = False,
        init: str = "torch",
        **kwargs: Any,
    ) -> None:
        torch.nn.LSTMCell.__init__(self, *args, **kwargs)
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        self.activations = read_activations(self.cell, activations)
        self.cell_clip, self.proj_clip = read_clip("cell_clip", cell_clip), read_clip("proj_clip", proj_clip)
        self.coupled = read_flag("coupled", coupled)
        self.proj_size = proj_size
        if proj_size:
            self.weight_hh = self._drawn(4 * self.hidden_size, proj_size)
            self.weight_hr = self._drawn(proj_size, self.hidden_size)
            self._extra_weights += ("weight_hr",)
        if read_flag("peepholes", peepholes):
            self.weight_peephole = self._drawn(3 * self.hidden_size)
            self._extra_weights += ("weight_peephole",)
        self._extend(clip, init)

    def _drawn(self, *shape: int) -> torch.nn.Parameter:
        bound = 1 / math.sqrt(self.hidden_size)
        return torch.nn.Parameter(torch.nn.init.uniform_(self.weight_ih.new_empty(shape), -bound, bound))

    @property
    def peepholes(self) -> bool:
        return "weight_peephole" in self._extra_weights

    def extra_repr(self) -> str:
        projection = f", proj_size={self.proj_size}" if self.proj_size else ""
        return super().extra_repr() + projection + ", peepholes=True" * self.peepholes

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
        if not self._extra_weights and (stepped := self._short_step(input, hx)):
            return stepped[0], stepped[1]
        self._check_rank(input)
        states = None if hx is None else read_states(self.cell, hx)
        for k, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
        h, c = self._step(input, states)
        return h, c
