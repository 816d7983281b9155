# SPDX-License-Identifier: Apache-2.0
"""RNNCell, LSTMCell and GRUCell: torch.nn's cells, one step a call, on tidegate's operators.

Letters: B rows, I input_size, H hidden_size, P proj_size of an LSTM that has one, else H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tidegate import backends, dispatch, ops
from tidegate import cell as kinds
from tidegate.call import FORWARD, STEP, UNBATCHED_STEP, Call, Layer, new_call
from tidegate.checks import check_layer
from tidegate.nn import autocast, initialization
from tidegate.nn.options import ACCELERATED, Device, Extended, Plan, make_plan, read_flag, read_nonlinearity
from tidegate.scope import scope
from tidegate.streaming import Source, Stream


class RecurrentCell(torch.nn.RNNCellBase, Extended):
    """One step of a cell. What torch.nn's constructor takes is stored by torch.nn's own; the parameters are those that
    the cell declares.

    A subclass sets `cell`. Its constructor takes torch.nn's arguments and the cell's options.

    Args:
        init: how the weights are drawn, as in RecurrentLayer.
        options: the cell's options, by name; `proj_size` and the flags of its optional parameters.
    """

    proj_size: int = 0
    peepholes: bool = False
    _is_declared: bool = False
    # torch.nn's cell, whose own forward runs a step that is left to torch's operators anyway.
    _torchs: Any
    _plan: Plan  # of a module that is torch.nn's own, if it has none itself

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "cell"):
            torchs = [name if p.when in ("", "bias") else None for name, p in cls.cell.parameters.items()]
            cls._plan = make_plan(torchs)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: str = "torch",
        **options: object,
    ) -> None:
        init = initialization.read_scheme(init, self.cell)
        torch.nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 1, device="meta")
        self.init = init
        for name in {parameter.when for parameter in self.cell.parameters.values()} & options.keys():
            value = options.pop(name)
            setattr(self, name, value if name == "proj_size" else read_flag(name, value))
        if self.proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        self._read_options(options)
        self._declare(device, dtype)
        self._is_declared = True
        self.reset_parameters()

    def _declare(self, device: Device, dtype: torch.dtype | None) -> None:
        """Make the parameters that the cell declares."""
        self._parameters.clear()
        sizes = {"I": self.input_size, "H": self.hidden_size, "P": self.proj_size or self.hidden_size}
        for name, parameter in self.cell.parameters.items():
            weight = None
            if not parameter.when or getattr(self, parameter.when):
                shape = self.cell.shape(name, sizes)
                weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            if weight is not None or parameter.when == "bias":
                self.register_parameter(name, weight)
        self._plan = make_plan([name if name in self._parameters else None for name in self.cell.parameters])

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `init` says."""
        if not self._is_declared and ACCELERATED not in self.__dict__:
            return
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for weight in self.parameters():
            torch.nn.init.uniform_(weight, -bound, bound)
        weights = {name: getattr(self, name, None) for name in self.cell.parameters}
        self._initialize({name: weight for name, weight in weights.items() if weight is not None})

    def extra_repr(self) -> str:
        projected = 0 if ACCELERATED in self.__dict__ else self.proj_size
        projection = f", proj_size={projected}" if projected else ""
        return super().extra_repr() + projection + self._extended_repr()

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of each state: h, for an LSTM also c."""
        projected = 0 if ACCELERATED in self.__dict__ else self.proj_size
        sizes = {"H": self.hidden_size, "P": projected or self.hidden_size}
        return tuple(sizes[letter] for letter in self.cell.states.values())

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step.

        Args:
            input: (B, I) or (I,).
            hx: the state, or a tuple of them, each (B, size) or (size,); zeros if None.

        Returns:
            the new state like hx.
        """
        if dispatch.is_symbolic(input):
            return dispatch.leaf(self, input, hx)
        states = self._step(input, hx)
        return states[0] if len(states) == 1 else tuple(states)

    def _is_left_to_torch(self, input: Tensor) -> bool:
        """Whether to call torch.nn's own forward, to which `ops.run` would only come by a longer way.

        After a large product that way is in no cache of the processor, and takes 0.1 ms.
        """
        return (
            not dispatch.is_compiling()
            and self._is_quicker_in_torch(input)
            and (ACCELERATED in self.__dict__ or self._has_torchs_equations())
            and scope.is_clear()
            and dispatch.is_bare()
            and not dispatch.is_autocast()
        )

    def _is_quicker_in_torch(self, input: Tensor) -> bool:
        weight = self._parameters.get("weight_ih")
        if weight is None:
            return False
        if self.cell is not kinds.GRU and weight.requires_grad and torch.is_grad_enabled():
            return True
        if input.dim() != 2:
            return False
        if input.is_cuda:
            return True
        is_float = input.dtype is torch.float32 and input.is_cpu
        return is_float and backends.leaves_step(self.cell.name, input.size(0), self.hidden_size)

    def _has_torchs_equations(self) -> bool:
        return (
            not (self.proj_size or self.peepholes)
            and (self.cell.name, self.cell.read_options(self)) in kinds.TORCHS_STEPS
        )

    def _step(self, input: Tensor, hx: object) -> Sequence[Tensor]:
        """One step: input (B, I) or (I,), states (B, size) or (size,) each, zeros if None."""
        cell, dims = self.cell, input.dim()
        states = self._states(hx)
        if dims not in (1, 2):
            raise ValueError(f"{cell.name.upper()}Cell: Expected input to be 1D or 2D, got {dims}D instead")
        layout = STEP if dims == 2 else UNBATCHED_STEP
        weights, options = self._read_tensors(self._plan), self._option_values()
        call = new_call((cell, options, input, states, weights, None, None, 1, FORWARD, layout, None))
        if dispatch.is_autocast():
            return autocast.run(call, self._find_faults, cell is not kinds.RNN)
        return ops.run(call, self._find_faults)

    def _sequence(
        self,
        input: Tensor,
        states: tuple[Any, ...],
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, ...]:
        """The cell over (T, B, I) in one call: output (T, B, P) and the final states."""
        weights = dict(zip(self.cell.parameters, self._weights(), strict=True))
        return run_sequence(Layer(self.cell, input, states, weights, lengths, resets, reverse, self._options()))

    def stream(self, batch_size: int | None = None, state: object = None, dtype: torch.dtype | None = None) -> Stream:
        """Run the cell step by step, without gradients: see `RecurrentLayer.stream`. States are h or (h, c)."""
        return Stream(Source(self, 1, layered=False, batch_first=False), batch_size, state, dtype)

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self._read_tensors(self._plan)

    def _find_faults(self, call: Call) -> None:
        """Raise what torch's own cells would raise, in their words."""
        input, given = call.input, [state for state in call.states if state is not None]
        for k, state in enumerate(given):
            if state.dim() not in (1, 2):
                name, which = f"{self.cell.name.upper()}Cell", "hidden" if len(call.states) == 1 else f"hx[{k}]"
                raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")
        if input.dim() == 1:
            input, given = input.unsqueeze(0), [state.unsqueeze(0) for state in given]
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for k, (state, size) in enumerate(zip(given, self.state_sizes, strict=False)):
            if state.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}"
                )
            if state.size(1) != size:
                raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {size}")


def run_sequence(layer: Layer) -> tuple[Tensor, ...]:
    """A cell's weights over (T, B, I) in one call: output (T, B, P) and the final states, (B, .) each."""

    def find_faults(call: Call) -> None:
        check_layer(layer)

    if dispatch.is_autocast():
        output, *finals = autocast.run(layer.call(), find_faults, layer.cell is not kinds.RNN)
    else:
        output, *finals = ops.run(layer.call(), find_faults)
    return (output, *(final.squeeze(0) for final in finals))


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
        if dispatch.is_symbolic(input):
            return dispatch.leaf(self, input, hx)
        if self._is_left_to_torch(input):
            self._states(hx)
            return self._torchs.forward(self, input, hx)
        return self._step(input, hx)[0]

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class RNNCell(_OneStateCell, torch.nn.RNNCell):
    """One step of an Elman RNN: torch.nn.RNNCell(input_size, hidden_size, bias, nonlinearity, device, dtype), and
    `activations`, `clip`, `init` as in RNN."""

    cell = kinds.RNN
    _torchs = torch.nn.RNNCell
    clip: float = 0.0

    # What `activations` gave; torch.nn's cell takes any nonlinearity and refuses an unknown one when it runs.
    _own_nonlinearity: str = ""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str | Sequence[str] | None = None,
        clip: float | None = None,
        init: str = "torch",
    ) -> None:
        if activations is not None:
            nonlinearity = read_nonlinearity(activations)
        super().__init__(input_size, hidden_size, bias, device, dtype, init=init, nonlinearity=nonlinearity, clip=clip)
        if activations is not None:
            self._own_nonlinearity = nonlinearity

    def _option_values(self) -> tuple[Any, ...]:
        if self.nonlinearity not in ("tanh", "relu", self._own_nonlinearity):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return super()._option_values()


class GRUCell(_OneStateCell, torch.nn.GRUCell):
    """One step of a GRU: torch.nn.GRUCell(input_size, hidden_size, bias, device, dtype), and `reset_after`,
    `activations`, `clip`, `update_bias`, `init` as in GRU."""

    cell = kinds.GRU
    _torchs = torch.nn.GRUCell
    reset_after: bool = True
    activations: str = kinds.GRU.options["activations"][1]
    clip: float = 0.0
    update_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        activations: str | Sequence[str] | None = None,
        clip: float | None = None,
        init: str = "torch",
        update_bias: float | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, device, dtype,
            init=init, update_bias=update_bias, reset_after=reset_after, activations=activations, clip=clip,
        )  # fmt: skip


class LSTMCell(RecurrentCell, torch.nn.LSTMCell):
    """One step of an LSTM: torch.nn.LSTMCell(input_size, hidden_size, bias, device, dtype), and `proj_size`,
    `peepholes`, `activations`, `clip`, `cell_clip`, `proj_clip`, `coupled`, `forget_bias`, `init` as
    in LSTM."""

    cell = kinds.LSTM
    _torchs = torch.nn.LSTMCell
    activations: str = kinds.LSTM.options["activations"][1]
    clip: float = 0.0
    forget_bias: float | None = None
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    coupled: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
        peepholes: bool = False,
        activations: str | Sequence[str] | None = None,
        clip: float | None = None,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        coupled: bool = False,
        init: str = "torch",
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, device, dtype,
            init=init, forget_bias=forget_bias, proj_size=proj_size, peepholes=peepholes, activations=activations,
            clip=clip, cell_clip=cell_clip, proj_clip=proj_clip, coupled=coupled,
        )  # fmt: skip

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (B, I) or (I,).
            hx: (h, c), each (B, P) and (B, H) or (P,) and (H,); zeros if None.

        Returns:
            (h', c').

        Raises:
            ValueError, RuntimeError: as torch.nn raises them, in its words.
        """
        if dispatch.is_symbolic(input):
            return dispatch.leaf(self, input, hx)
        if self._is_left_to_torch(input):
            self._states(hx)
            return self._torchs.forward(self, input, hx)
        h, c = self._step(input, hx)
        return h, c

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]: ...
