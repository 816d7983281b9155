# SPDX-License-Identifier: Apache-2.0
"""RNN, LSTM and GRU over sequences: torch.nn's layers, constructor for constructor.

What a call takes and returns is in `RecurrentLayer.forward`; to a type checker each form of input has its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tidegate import cell as kinds
from tidegate.nn.layers import RecurrentLayer
from tidegate.nn.options import Device, read_nonlinearity
from tidegate.sequences import Lengths

if TYPE_CHECKING:
    _States = TypeVar("_States")

    class _TypedLayer(RecurrentLayer, Generic[_States]):
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: _States | None = None,
            *,
            lengths: Lengths = None,
            resets: Tensor | None = None,
            return_states: Literal[False] = False,
        ) -> tuple[Tensor, _States]: ...
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: _States | None = None,
            *,
            lengths: Lengths = None,
            resets: Tensor | None = None,
            return_states: Literal[True],
        ) -> tuple[Tensor, _States, _States]: ...
        @overload
        def __call__(self, input: PackedSequence, hx: _States | None = None) -> tuple[PackedSequence, _States]: ...
        @overload
        def __call__(
            self, input: list[Tensor], hx: _States | None = None, *, resets: list[Tensor] | None = None
        ) -> tuple[list[Tensor], _States]: ...
        def __call__(self, *args: object, **kwargs: object) -> Any: ...

        forward = __call__  # pyright: ignore[reportAssignmentType]  (whether or not the states come is in the type)

    _OneStateLayer = _TypedLayer[Tensor]
    _TwoStateLayer = _TypedLayer[tuple[Tensor, Tensor]]
else:
    _OneStateLayer = _TwoStateLayer = RecurrentLayer


class RNN(_OneStateLayer):
    """Elman RNN, h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu: torch.nn.RNN and more.

    Args:
        input_size, hidden_size, num_layers, nonlinearity ('tanh' or 'relu'), bias, batch_first, dropout, bidirectional,
            device, dtype: as torch.nn.RNN takes them, in this order.
        activations: a name in tidegate.activations, in place of nonlinearity.
        clip: bound of every gate's pre-activation (ONNX's clip), or None.
        reverse, init, checkpoint_every: as RecurrentLayer takes them.
    """

    cell = kinds.RNN
    _stands_for = torch.nn.RNN
    nonlinearity: str
    clip: float = 0.0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        _proj_size: int = 0,  # by its place alone, as torch.nn has it
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str | Sequence[str] | None = None,
        reverse: bool = False,
        clip: float | None = None,
        init: str = "torch",
        checkpoint_every: int | None = None,
        proj_size: None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, _proj_size, device, dtype,
            reverse=reverse, init=init, checkpoint_every=checkpoint_every, clip=clip,
            nonlinearity=nonlinearity if activations is None else read_nonlinearity(activations),
        )  # fmt: skip
        self.mode = f"RNN_{self.nonlinearity.upper()}"


class LSTM(_TwoStateLayer):
    """Long short-term memory, gates i, f, g, o: torch.nn.LSTM and more.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            torch.nn.LSTM takes them, in this order.
        peepholes: i and f also see w_i c and w_f c, o sees w_o c': weight_peephole_l{k} (3*H), rows i | f | o.
        activations: of the gates, the candidate g and the output, names in tidegate.activations.
        clip: bound of every gate's pre-activation (ONNX's clip), or None.
        cell_clip: bound of c' (TensorFlow v1), or None.
        proj_clip: bound of the projected h' (TensorFlow v1), or None.
        coupled: f = 1 - i (ONNX's input_forget); the weights' f rows are not used.
        forget_bias: the first value of f's bias, whatever `init` says; 1 keeps what is there to begin with. None for
            what `init` draws.
        reverse, init, checkpoint_every: as RecurrentLayer takes them.
    """

    cell = kinds.LSTM
    _stands_for = torch.nn.LSTM
    activations: str = kinds.LSTM.options["activations"][1]
    clip: float = 0.0
    forget_bias: float | None = None
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    coupled: bool = False
    peepholes: bool = False
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    # Of two states, where the base class's are of one: to mypy another type, in torch.nn.LSTM as well.
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        peepholes: bool = False,
        activations: str | Sequence[str] | None = None,
        reverse: bool = False,
        clip: float | None = None,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        coupled: bool = False,
        init: str = "torch",
        forget_bias: float | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype,
            reverse=reverse, init=init, forget_bias=forget_bias, checkpoint_every=checkpoint_every, peepholes=peepholes,
            activations=activations, clip=clip, cell_clip=cell_clip, proj_clip=proj_clip, coupled=coupled,
        )  # fmt: skip


class GRU(_OneStateLayer):
    """Gated recurrent unit, gates r, z, n: torch.nn.GRU and more.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU
            takes them, in this order.
        reset_after: True for n = tanh(W_in x + b_in + r (W_hn h + b_hn)), torch.nn's and cuDNN's form; False for
            n = tanh(W_in x + b_in + W_hn (r h) + b_hn), the original (Cho et al. 2014) and TensorFlow v1's.
        activations: of the gates and the candidate n, names in tidegate.activations.
        clip: bound of every gate's pre-activation (ONNX's clip), or None.
        update_bias: the first value of z's bias, whatever `init` says; 1 keeps what is there to begin with. None for
            what `init` draws.
        reverse, init, checkpoint_every: as RecurrentLayer takes them.
    """

    cell = kinds.GRU
    _stands_for = torch.nn.GRU
    reset_after: bool = True
    activations: str = kinds.GRU.options["activations"][1]
    clip: float = 0.0
    update_bias: float | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        _proj_size: int = 0,  # by its place alone, as torch.nn has it
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        activations: str | Sequence[str] | None = None,
        reverse: bool = False,
        clip: float | None = None,
        init: str = "torch",
        update_bias: float | None = None,
        checkpoint_every: int | None = None,
        proj_size: None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, _proj_size, device, dtype,
            reverse=reverse, init=init, update_bias=update_bias, checkpoint_every=checkpoint_every,
            reset_after=reset_after, activations=activations, clip=clip,
        )  # fmt: skip
