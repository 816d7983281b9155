# SPDX-License-Identifier: Apache-2.0
"""RNN, LSTM and GRU over sequences: torch.nn's layers, constructor for constructor, on tidegate's operators.

Letters: T steps, B rows, I input_size, H hidden_size, P proj_size of an LSTM that has one, else H; L num_layers,
D 2 if bidirectional, else 1. Row l * D + d of a state belongs to layer l, direction d (0 forward, 1 reverse).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tidegate import cells, ops, sequences
from tidegate.cells import Call, Cell, Form, Weights
from tidegate.nn import autocast
from tidegate.nn.initialization import initialize
from tidegate.nn.options import Extended, read_activations, read_clip, read_flag, read_init, read_nonlinearity
from tidegate.sequences import Sequences
from tidegate.streaming import Source, Stream


class RecurrentLayer(torch.nn.RNNBase, Extended):
    """What the three layers share. Construction, parameters, checks and repr are torch.nn.RNNBase's own.

    Args:
        reverse: the one direction runs from each row's last valid step to its first; output[t] belongs to input[t].
        clip: bound of every gate's pre-activation (ONNX's clip), or None.
        init: how the weights are drawn: "torch", "keras", "tf1" or "flax".
    """

    reverse: bool = False

    def __init__(
        self,
        mode: str,
        *args: Any,
        reverse: bool = False,
        clip: float | None = None,
        init: str = "torch",
        **kwargs: Any,
    ) -> None:
        self.reverse, self.clip, self.init = read_flag("reverse", reverse), read_clip("clip", clip), read_init(init)
        super().__init__(mode, *args, **kwargs)
        if self.reverse and self.bidirectional:
            raise ValueError("reverse: a bidirectional layer runs both ways already")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def _draw(self) -> None:
        for names in self._all_weights:
            initialize(self.init, self.cell, {_plain_name(name): getattr(self, name) for name in names})

    def extra_repr(self) -> str:
        return super().extra_repr() + self._extended_repr() + ", reverse=True" * self.reverse

    # Looked up at every use: a parametrization, pruning, tying or functional_call may have put another tensor there.
    @property
    def _flat_weights(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read the parameters where they are."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Any, hx: Any = None, *, lengths: Any = None, resets: Any = None
    ) -> tuple[Any, Any]:
        """Run the layers over a batch of sequences.

        Args:
            input: (T, B, I), with batch_first (B, T, I); unbatched (T, I); a PackedSequence; a list of (T_b, I); or a
                jagged nested tensor (B, T_b, I). Of the parameters' dtype, but under autocast.
            hx: initial state h_0 (L*D, B, P), for an LSTM (h_0, c_0) with c_0 (L*D, B, H); (L*D, P) if unbatched;
                zeros if None. Rows in the order of the input's.
            lengths: (B,) integers, any order, dtype and device, zeros allowed; for a padded batch. Past a row's length
                the output is 0, the returned state is the one after its last valid step (the initial one if the length
                is 0), and the reverse direction starts at the last valid step.
            resets: bool (T, B), with batch_first (B, T); unbatched (T,); for a list, a list of (T_b,). A mark at t
                makes t the first step of a new sequence: forward, the state entering t is zero; in reverse, the state
                entering t-1 is zero. Gradients do not cross it.

        Returns:
            output: of the input's form, with D*P features: the last layer's states, the forward direction's first.
            h_n: (L*D, B, P), for an LSTM (h_n, c_n): the state after the last valid step, in reverse after the first
                step. For full lengths, with batch_first False, h_n[-D] is output[-1, :, :P], and for D = 2 h_n[-1] is
                output[0, :, P:].

        Raises:
            ValueError, RuntimeError: as torch.nn raises them, in its words; for lengths, resets, lists and nested
                tensors, ValueError naming the argument.
            UnsupportedError: the backend that `tidegate.backend` names cannot run this call.
        """
        if resets is None and (found := self._short_way(input, hx, lengths)):
            return found[0], _one_or_tuple(tuple(found[1:]))
        batch, batch_sizes, data = self._read(input, lengths, resets)
        packed = input if isinstance(input, PackedSequence) else None
        unbatched = isinstance(input, Tensor) and input.dim() == 2
        states = self._read_states(data, batch_sizes, hx, unbatched)
        if hx is not None:
            states = self._permuted(states, packed and packed.sorted_indices)
        if batch.data.shape[0] == 0 and batch.lengths is None:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, finals = self._run(batch, states)
        if unbatched:
            finals = tuple(final.squeeze(1) for final in finals)
        finals = self._permuted(finals, packed and packed.unsorted_indices)
        return batch.restore(output), _one_or_tuple(finals)

    def _short_way(self, input: Any, hx: Any, lengths: Any) -> Sequence[Tensor]:
        """Output and final states at once, for a tensor through layers whose methods are torch.nn's; or nothing."""
        way = ops.short_way()
        if way is None or type(self) not in (RNN, LSTM, GRU):
            return ()
        if type(input) is not Tensor or input.is_nested or not (lengths is None or type(lengths) is Tensor):
            return ()
        if self.dropout and self.training and self.num_layers > 1:
            return ()
        form = Form(self.num_layers, self.bidirectional, self.reverse, self.batch_first, lengths)
        return self._call_shortly(way.layers, input, hx, self._flat_weights_names, form)

    def _read(self, input: Any, lengths: Any, resets: Any) -> tuple[Sequences, Tensor | None, Tensor]:
        """The input as Sequences, its batch sizes if packed, and the tensor that torch.nn's checks look at."""
        is_padded = isinstance(input, Tensor) and not input.is_nested and input.dim() == 3
        if lengths is not None and not is_padded:
            raise ValueError(
                "lengths: expected None but with a padded batch (3-D input); this input has its own lengths"
            )
        if isinstance(input, PackedSequence):
            if resets is not None:
                raise ValueError("resets: not for a PackedSequence; give a padded batch with lengths=, or a list")
            self.check_input(input.data, input.batch_sizes)
            return sequences.from_packed(input), input.batch_sizes, input.data
        if isinstance(input, list):
            batch = sequences.from_list(input, resets)
        elif not isinstance(input, Tensor):
            raise TypeError(
                f"input: expected a Tensor, a PackedSequence or a list of Tensors, got {type(input).__name__}"
            )
        elif input.is_nested:
            if resets is not None:
                raise ValueError("resets: not for a nested tensor; give a padded batch with lengths=, or a list")
            batch = sequences.from_nested(input)
        elif input.dim() == 3:
            return sequences.from_tensor(input, lengths, resets, self.batch_first), None, input
        elif input.dim() == 2:
            return sequences.from_unbatched(input, resets), None, input.unsqueeze(0 if self.batch_first else 1)
        else:
            name, tail = self.cell.name.upper(), " tensor instead" if self.cell is cells.RNN else " instead"
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tail}")
        return batch, None, batch.data.transpose(0, 1) if self.batch_first else batch.data

    def _read_states(self, data: Tensor, batch_sizes: Tensor | None, hx: Any, unbatched: bool) -> tuple[Tensor, ...]:
        """The initial states, checked as torch.nn checks them, each (L*D, B, .)."""
        sizes = [self.get_expected_hidden_size(data, batch_sizes)]
        if len(self.cell.states) > 1:
            sizes.append((*sizes[0][:2], self.hidden_size))
        if hx is None:
            states = tuple([torch.zeros(size, dtype=data.dtype, device=data.device) for size in sizes])
        else:
            states = read_states(self.cell, hx)
            if batch_sizes is None:
                self._check_rank(states, 2 if unbatched else 3)
            if unbatched:
                states = tuple(state.unsqueeze(1) for state in states)
        if batch_sizes is not None or not self._agree(data, states, sizes):
            self.check_forward_args(data, _one_or_tuple(states), batch_sizes)
            self._check_agreement(data, states)
        return states

    def _agree(self, data: Tensor, states: tuple[Tensor, ...], sizes: Sequence[tuple[int, ...]]) -> bool:
        """Whether the two checks need not be made: a quick look at nearly all that they look at, if they are ours."""
        if type(self) not in (RNN, LSTM, GRU):
            return False
        dtype, device = data.dtype, data.device
        weight = self._parameters.get(self._flat_weights_names[0])
        if weight is None or weight.dtype is not dtype or weight.device != device or data.size(-1) != self.input_size:
            return False
        for state, size in zip(states, sizes, strict=True):
            if state.shape != size or state.dtype is not dtype or state.device != device:
                return False
        return True

    def _check_agreement(self, data: Tensor, states: tuple[Tensor, ...]) -> None:
        """One device for all, one dtype for input and states, in the words of torch's own operators."""
        weight = getattr(self, self._flat_weights_names[0])
        for kind, tensor in (("parameter", weight), *(("hidden", state) for state in states)):
            if tensor.device != data.device:
                found = f"found input tensor at {data.device} and {kind} tensor at {tensor.device}"
                raise RuntimeError(f"Input and {kind} tensors are not at the same device, {found}")
        for state in states:
            if state.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
                found = f"found input tensor with {data.dtype} and hidden tensor with {state.dtype}"
                raise RuntimeError(f"Input and hidden tensors are not the same dtype, {found}")

    def _check_rank(self, states: tuple[Tensor, ...], expected: int) -> None:
        if all(state.dim() == expected for state in states):
            return
        form = "unbatched 2-D" if expected == 2 else "batched 3-D"
        came = ", ".join(f"{state.dim()}-D" for state in states)
        names, came = ("hx", f"{came} tensor") if len(states) == 1 else ("hx and cx", f"({came}) tensors")
        raise RuntimeError(f"For {form} input, {names} should also be {expected}-D but got {came}")

    def _permuted(self, states: tuple[Tensor, ...], permutation: Tensor | None) -> tuple[Tensor, ...]:
        if permutation is None and type(self) in (RNN, LSTM, GRU):
            return states
        permuted: Any = self.permute_hidden(_one_or_tuple(states), permutation)
        return permuted if len(states) > 1 else (permuted,)

    def _weights(self, k: int) -> Weights:
        """What layer k // D in direction k % D runs with, as it is now."""
        # torch.nn stores weight_hr after the biases, which may be absent: names, not places.
        weights: Weights = dict.fromkeys(self.cell.weights)
        for name in self._all_weights[k]:
            weights[_plain_name(name)] = self._weight(name)
        return weights

    def stream(self, batch_size: int | None = None, state: Any = None, dtype: torch.dtype | None = None) -> Stream:
        """Run the layer step by step, without gradients and without dropout.

        Args:
            batch_size: rows (sessions) to begin with; None for one row without a batch dimension, or for as many as
                `state` has.
            state: as `forward` takes and returns it; zeros if None.
            dtype: of the stream's input, state and weights; the parameters' if None.

        Returns:
            a Stream, with a copy of the weights as they are now.

        Raises:
            ValueError: the layer is bidirectional, or `state` does not fit.
            UnsupportedError: the backend that `tidegate.backend` names cannot run it.
        """
        if self.bidirectional:
            raise ValueError(
                "stream: expected bidirectional=False; the reverse direction begins at a sequence's last step, "
                "which a stream has not seen"
            )
        return Stream(
            Source(
                self.cell,
                self._options(),
                lambda: [self._weights(k) for k in range(self.num_layers)],
                layered=True,
                batch_first=self.batch_first,
            ),
            batch_size,
            state,
            dtype,
        )

    def _run(self, batch: Sequences, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layers by directions: each one call. Returns output (T, B, D*P) and the final states, each (L*D, B, .)."""
        directions = 2 if self.bidirectional else 1
        options = self._options()
        finals: list[list[Tensor]] = []
        output = batch.data
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for k in range(layer * directions, (layer + 1) * directions):
                call = Call(
                    self.cell,
                    output,
                    tuple([state[k] for state in states]),
                    self._weights(k),
                    batch.lengths,
                    batch.resets,
                    self.reverse or k % directions == 1,
                    options,
                )
                result, *last = autocast.recurrence(call, widens_on_cpu=self.cell is cells.GRU)
                outputs.append(result)
                finals.append(last)
            output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout > 0 and self.training and layer < self.num_layers - 1:
                output = batch.dropout(output, self.dropout)
        # Never a view, not even of one: FSDP2 warns of a module that returns one.
        return output, tuple(torch.stack(column) for column in zip(*finals, strict=True))


def _plain_name(name: str) -> str:
    """Of "weight_ih_l0_reverse" the part that a cell knows."""
    return name.rsplit("_l", 1)[0]


def read_states(cell: Cell, hx: Any) -> tuple[Tensor, ...]:
    """The user's state, h or (h, c), as a tuple.

    Raises:
        TypeError: a tuple where a tensor belongs, or the other way round.
        RuntimeError: not two tensors, in torch's words.
    """
    expects_pair = len(cell.states) > 1
    if isinstance(hx, Tensor) if expects_pair else not isinstance(hx, Tensor):
        expected = "a tuple (h_0, c_0) of Tensors" if expects_pair else "a Tensor"
        raise TypeError(f"hx: expected {expected}, got {type(hx).__name__}")
    states = tuple(hx) if expects_pair else (hx,)
    if len(states) != len(cell.states):
        raise RuntimeError(f"{cell.name} expects two hidden states")
    return states


class RNN(RecurrentLayer):
    """Elman RNN, h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu: torch.nn.RNN and more.

    Args:
        input_size, hidden_size, num_layers, nonlinearity ('tanh' or 'relu'), bias, batch_first, dropout, bidirectional,
            device, dtype: as torch.nn.RNN takes them, in this order.
        activations: a name in tidegate.activations, in place of nonlinearity.
        reverse, clip, init: as RecurrentLayer takes them.
    """

    cell = cells.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        activations: Any = None,
        **kwargs: Any,
    ) -> None:
        _reject_projection(kwargs)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity if activations is None else read_nonlinearity(activations)
        # torch.nn knows two modes and lays out the parameters of both alike.
        mode = "RNN_RELU" if self.nonlinearity == "relu" else "RNN_TANH"
        super().__init__(mode, input_size, hidden_size, num_layers, *args, **kwargs)
        self.mode = f"RNN_{self.nonlinearity.upper()}"


class LSTM(RecurrentLayer):
    """Long short-term memory, gates i, f, g, o: torch.nn.LSTM and more.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            torch.nn.LSTM takes them, in this order.
        peepholes: i and f also see w_i c and w_f c, o sees w_o c': weight_peephole_l{k} (3*H), rows i | f | o.
        activations: of the gates, the candidate g and the output, names in tidegate.activations.
        cell_clip: bound of c' (TensorFlow v1), or None.
        proj_clip: bound of the projected h' (TensorFlow v1), or None.
        coupled: f = 1 - i (ONNX's input_forget); the weights' f rows are not used.
        reverse, clip, init: as RecurrentLayer takes them.
    """

    cell = cells.LSTM
    activations: str = cell.options["activations"][1]
    cell_clip: float = 0.0
    proj_clip: float = 0.0
    coupled: bool = False
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        *args: Any,
        peepholes: bool = False,
        activations: Any = None,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        coupled: bool = False,
        **kwargs: Any,
    ) -> None:
        self.activations = read_activations(self.cell, activations)
        self.cell_clip, self.proj_clip = read_clip("cell_clip", cell_clip), read_clip("proj_clip", proj_clip)
        self.coupled = read_flag("coupled", coupled)
        super().__init__("LSTM", *args, **kwargs)
        if read_flag("peepholes", peepholes):
            self._add_peepholes()

    @property
    def peepholes(self) -> bool:
        return any(name.startswith("weight_peephole") for name in self._flat_weights_names)

    def _add_peepholes(self) -> None:
        for names in self._all_weights:
            like, suffix = getattr(self, names[0]), names[0].removeprefix("weight_ih")
            peephole = torch.nn.Parameter(like.new_empty(3 * self.hidden_size))
            bound = 1 / math.sqrt(self.hidden_size)
            names.append("weight_peephole" + suffix)
            self._flat_weights_names.append(names[-1])
            self.register_parameter(names[-1], peephole)
            torch.nn.init.uniform_(peephole, -bound, bound)
        self._draw()

    def extra_repr(self) -> str:
        return super().extra_repr() + ", peepholes=True" * self.peepholes


class GRU(RecurrentLayer):
    """Gated recurrent unit, gates r, z, n: torch.nn.GRU and more.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU
            takes them, in this order.
        reset_after: True for n = tanh(W_in x + b_in + r (W_hn h + b_hn)), torch.nn's and cuDNN's form; False for
            n = tanh(W_in x + b_in + W_hn (r h) + b_hn), the original (Cho et al. 2014) and TensorFlow v1's.
        activations: of the gates and the candidate n, names in tidegate.activations.
        reverse, clip, init: as RecurrentLayer takes them.
    """

    cell = cells.GRU
    reset_after: bool = True
    activations: str = cell.options["activations"][1]

    def __init__(self, *args: Any, reset_after: bool = True, activations: Any = None, **kwargs: Any) -> None:
        _reject_projection(kwargs)
        self.reset_after = read_flag("reset_after", reset_after)
        self.activations = read_activations(self.cell, activations)
        super().__init__("GRU", *args, **kwargs)


def _one_or_tuple(states: tuple[Tensor, ...]) -> Any:
    """States as torch.nn passes them: h alone, or (h, c)."""
    return states[0] if len(states) == 1 else states


def _reject_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
