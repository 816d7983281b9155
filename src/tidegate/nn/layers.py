# SPDX-License-Identifier: Apache-2.0
"""Layers of one cell over sequences: what torch.nn's layers take and give, on tidegate's operators.

Letters: T steps, B rows, I input_size, H hidden_size, P proj_size of an LSTM that has one, else H; L num_layers,
D 2 if bidirectional, else 1. Row l * D + d of a state belongs to layer l, direction d (0 forward, 1 reverse).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tidegate import backends, dispatch, ops, sequences, torchs_nodes
from tidegate import cell as kinds
from tidegate.call import BATCH_FIRST, BOTH, FORWARD, REVERSE, TIME_MAJOR, UNBATCHED, Call, Layout
from tidegate.nn import autocast, every_state, initialization, segments
from tidegate.nn.likeness import StandsFor
from tidegate.nn.options import ACCELERATED, Device, Extended, Plan, make_plan, own_attribute, read_flag
from tidegate.scope import scope
from tidegate.sequences import Lengths, Resets, Sequences
from tidegate.streaming import Source, Stream

# torch.nn lays out the attributes of these; of any other cell's mode it knows nothing.
_MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")  # of torch.nn's layers
_WEIGHTS = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"}
_CHECKS = ("check_input", "check_forward_args", "get_expected_hidden_size", "check_hidden_size")
_OVERRIDABLE = (*_CHECKS, "permute_hidden")


class RecurrentLayer(StandsFor, torch.nn.RNNBase, Extended):
    """Layers of one cell over sequences. What torch.nn's constructor takes and checks is checked by torch.nn's own; the
    parameters are those that the cell declares.

    A subclass sets `cell`. Its constructor takes torch.nn's arguments and the cell's options.

    Args:
        reverse: the one direction runs from each row's last valid step to its first; output[t] belongs to input[t].
        init: how the weights are drawn: "torch", "keras", "tf1" or "flax"; "orthogonal", of the recurrent weights, or
            "kaiming"; or "chrono:784", gates' biases for dependencies of up to so many steps.
        checkpoint_every: in training, states are kept every so many steps, and the gates between them computed again
            in the backward: for long sequences. None or 0 to keep everything. An attribute that may be set later.
        options: the cell's options, by name.
    """

    reverse: bool = False
    checkpoint_every: int = 0
    _is_declared: bool = False
    # Which of torch.nn's methods a user's subclass has in place of torch.nn's own.
    _overridden: frozenset[str] = frozenset()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        theirs = [{getattr(base, name, None) for base in (torch.nn.RNNBase, torch.nn.LSTM)} for name in _OVERRIDABLE]
        cls._overridden = frozenset(
            name for name, own in zip(_OVERRIDABLE, theirs, strict=True) if getattr(cls, name) not in own
        )

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
        reverse: bool = False,
        init: str = "torch",
        checkpoint_every: int | None = None,
        **options: object,
    ) -> None:
        reverse, init = read_flag("reverse", reverse), initialization.read_scheme(init, self.cell)
        # On the meta device: torch.nn's checks and attributes, without its parameters.
        mode = self.cell.name.upper()
        super().__init__(
            mode if mode in _MODES else "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device="meta",
        )  # fmt: skip
        self.mode = self.cell.name.upper()
        self.reverse, self.init = reverse, init
        self.checkpoint_every = segments.read_every(checkpoint_every)
        for name in {parameter.when for parameter in self.cell.parameters.values()} & options.keys():
            setattr(self, name, read_flag(name, options.pop(name)))
        self._read_options(options)
        if reverse and bidirectional:
            raise ValueError("reverse: a bidirectional layer runs both ways already")
        self._declare(device, dtype)
        self._is_declared = True
        self.flatten_parameters()
        self.reset_parameters()

    def _declare(self, device: Device, dtype: torch.dtype | None) -> None:
        """Make the parameters that the cell declares, of each layer and direction in turn."""
        self._parameters.clear()
        self._flat_weights_names, self._all_weights = [], []
        h_size, directions = self.proj_size or self.hidden_size, 1 + self.bidirectional
        for layer in range(self.num_layers):
            sizes = {
                "I": self.input_size if layer == 0 else h_size * directions,
                "H": self.hidden_size,
                "P": h_size,
            }
            for suffix in ("", "_reverse")[:directions]:
                names: list[str] = []
                for name, parameter in self.cell.parameters.items():
                    if parameter.when and not getattr(self, parameter.when):
                        continue
                    shape = self.cell.shape(name, sizes)
                    names.append(f"{name}_l{layer}{suffix}")
                    weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(names[-1], weight)
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `init` says."""
        if not self._is_declared and ACCELERATED not in self.__dict__:
            return
        super().reset_parameters()
        for names in self._all_weights:
            self._initialize({_plain_name(name): getattr(self, name) for name in names})

    def extra_repr(self) -> str:
        every = self._checkpoint_every()
        shown = super().extra_repr() + self._extended_repr() + ", reverse=True" * self._is_reverse()
        return f"{shown}, checkpoint_every={every}" if every else shown

    def _checkpoint_every(self) -> int:
        return 0 if ACCELERATED in self.__dict__ else self.checkpoint_every

    def _is_reverse(self) -> bool:
        return self.reverse and ACCELERATED not in self.__dict__

    # Looked up at every use: a parametrization, pruning, tying or functional_call may have put another tensor there.
    @property
    def _flat_weights(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        found = self._parameters
        return [found[name] if name in found else getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []
        if self._is_declared or ACCELERATED in self.__dict__:
            self.flatten_parameters()

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Move the parameters of torch.nn's layers into one piece of a GPU's memory, where cuDNN reads them.

        Do nothing elsewhere, as for parametrized weights and for those that torch.nn does not know, peepholes.
        """
        weights = [self._parameters.get(name) for name in self._flat_weights_names]
        on_gpu = [weight for weight in weights if weight is not None and weight.is_cuda]
        if not on_gpu or len(on_gpu) < len(weights) or self.mode not in _MODES:
            return
        if not {_plain_name(name) for name in self._flat_weights_names} <= _WEIGHTS:
            return
        if all(weight.dtype is torch.bfloat16 for weight in on_gpu):  # torch.nn leaves these, and copies at each call
            sizes = (self.hidden_size, self.proj_size, self.num_layers, self.batch_first, self.bidirectional)
            dispatch.flatten_for_cudnn(on_gpu, len(self._all_weights[0]), self.input_size, self.mode, *sizes)
        else:
            super().flatten_parameters()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: object,
        hx: Any = None,
        *,
        lengths: Lengths = None,
        resets: Resets = None,
        return_states: bool = False,
    ) -> Any:
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
            return_states: return the states of all steps as well, for a tensor. An LSTM's take about twice the time.

        Returns:
            output: of the input's form, with D*P features: the last layer's states, the forward direction's first.
            h_n: (L*D, B, P), for an LSTM (h_n, c_n): the state after the last valid step, in reverse after the first
                step. For full lengths, with batch_first False, h_n[-D] is output[-1, :, :P], and for D = 2 h_n[-1] is
                output[0, :, P:].
            states: with return_states alone: all h_t (T, L*D, B, P), for an LSTM (all h_t, all c_t (T, L*D, B, H)),
                time first whatever `batch_first`, so that [t] is what step t left as `hx` takes it; 0 past a row's
                length.

        Raises:
            ValueError, RuntimeError: as torch.nn raises them, in its words; for lengths, resets, lists and nested
                tensors, ValueError naming the argument.
            UnsupportedError: the backend that `tidegate.backend` names cannot run this call.
        """
        every = self._checkpoint_every()
        uncompiled = segments.uncompiled(self.forward, every) if every else None
        if uncompiled is not None:
            return uncompiled(input, hx, lengths=lengths, resets=resets, return_states=return_states)
        if (
            isinstance(input, Tensor)
            and (input.is_cuda or (self.hidden_size >= backends.LEAVES_UNITS and input.is_cpu))
            and self._is_left_to_torch(input, lengths, resets, return_states)
        ):
            return self._run_torchs(input, hx)
        if isinstance(input, Tensor) and not input.is_nested:
            batch, layout, lengths, resets = None, self._layout(input), *self._rows(input, lengths, resets)
            data = input
        elif dispatch.is_symbolic(input):
            return dispatch.leaf(self, input, hx, lengths=lengths, resets=resets, return_states=return_states or None)
        else:
            if return_states:
                came = type(input).__name__
                raise ValueError(f"return_states: expected False but with a padded batch or one sequence, got {came}")
            if sequences.is_opaque(input):
                outside: Any = torch.compiler.disable(self.forward)
                return outside(input, hx, lengths=lengths, resets=resets)
            batch = sequences.from_form(input, lengths, resets)
            data, lengths, resets, layout = batch.data, batch.lengths, batch.resets, TIME_MAJOR
        states = self._states(hx)
        packed = input if isinstance(input, PackedSequence) else None
        call = Call(
            self.cell,
            self._option_values(),
            data,
            states,
            self._weights(),
            lengths,
            resets,
            self.num_layers,
            BOTH if self.bidirectional else REVERSE if self._is_reverse() else FORWARD,
            layout,
            self._between(batch),
        )
        find_faults = self._find_faults if packed is None else partial(self._find_faults, packed=packed)
        if self._overridden:
            find_faults(call)
        permutes = packed is not None or "permute_hidden" in self._overridden
        if hx is not None and permutes:
            find_faults(call)  # before the states are indexed
            call = call._replace(states=self._permuted(states, packed and packed.sorted_indices))
        if return_states:
            output, finals, states = every_state.run(self, call, find_faults, every)
            finals = self._permuted(tuple(finals), None)
            return (output, finals, states) if len(states) > 1 else (output, next(iter(finals)), next(iter(states)))
        run = partial(segments.run, every=every) if every else ops.run
        if dispatch.is_autocast():
            output, *finals = autocast.run(call, find_faults, self.cell is kinds.GRU, run)
        else:
            output, *finals = run(call, find_faults)
        if permutes:
            finals = self._permuted(tuple(finals), packed and packed.unsorted_indices)
        last: Any = finals[0] if len(finals) == 1 else tuple(finals)
        return (output if batch is None else batch.restore(output)), last

    def _is_left_to_torch(self, input: Tensor, lengths: Lengths, resets: Resets, return_states: bool) -> bool:
        """Whether to call torch.nn's own forward, to which `ops.run` would only come by a longer way.

        A short call of cuDNN's takes less time than that way; on a CPU, after a large product, it is in no cache.
        """
        return (
            (lengths is None and resets is None and not return_states and input.dim() == 3)
            and not (dispatch.is_compiling() or dispatch.is_autocast())
            and not (self._overridden or self._checkpoint_every() or self._is_reverse())
            # cuDNN computes gradients in training mode alone; dropout is ours.
            and (not self.dropout if self.training else not torch.is_grad_enabled())
            and not own_attribute(self, "peepholes", False)
            and (self.cell.name, self._option_values()) in kinds.TORCHS_STEPS
            and self._parameters.keys() >= set(self._flat_weights_names)  # none is computed
            and scope.is_clear()
            and dispatch.is_bare()
            and self._is_quicker_in_torch(input)
        )

    def _is_quicker_in_torch(self, input: Tensor) -> bool:
        if input.is_cpu and torch.is_grad_enabled():
            return False
        if self.proj_size:
            return not input.is_cpu  # no kernel of ours on a GPU takes them
        rows, steps = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        cells = self.num_layers * (1 + self.bidirectional)
        return backends.leaves_sequence(self.cell, self._option_values(), steps, rows, self.hidden_size, cells, input)

    def _run_torchs(self, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
        self._states(hx)
        torchs: Any = self._stands_for
        output, last = torchs.forward(self, input, hx)
        if output.requires_grad:
            final = last if isinstance(last, Tensor) else last[0]
            weights, is_both = self._weights(), self.bidirectional
            torchs_nodes.complete(final, self.cell, self._option_values(), weights, self.num_layers, is_both)
        return output, last

    def _layout(self, input: Tensor) -> Layout:
        dims = input.dim()
        if dims == 3:
            return BATCH_FIRST if self.batch_first else TIME_MAJOR
        if dims == 2:
            return UNBATCHED
        tail = " tensor instead" if self.cell is kinds.RNN else " instead"
        raise ValueError(f"{self.cell.name.upper()}: Expected input to be 2D or 3D, got {dims}D{tail}")

    def _rows(self, input: Tensor, lengths: object, resets: object) -> tuple[Tensor | None, Tensor | None]:
        """lengths (B,) and resets (T, B) of a tensor."""
        if lengths is None and resets is None:
            return None, None
        if input.dim() == 2:
            return None, sequences.read_unbatched_marks(lengths, resets, input.shape[0], input.device)
        time, batch = (1, 0) if self.batch_first else (0, 1)
        steps, rows = input.shape[time], input.shape[batch]
        return sequences.read_marks(lengths, resets, steps, rows, self.batch_first, input.device)

    def _between(self, batch: Sequences | None) -> Callable[[Tensor], Tensor] | None:
        """Dropout between two layers."""
        if not (self.dropout > 0 and self.training and self.num_layers > 1):
            return None
        if batch is None:
            return partial(F.dropout, p=self.dropout)
        return partial(batch.dropout, p=self.dropout)

    def _weights(self) -> tuple[Tensor | None, ...]:
        """Of every layer and direction, as they are now, those that are absent as None."""
        plan = _plan if torch.compiler.is_compiling() else _cached_plan  # its tracer warns of caches
        return self._read_tensors(plan(self.cell.names, tuple(self._flat_weights_names)))

    def _find_faults(self, call: Call, packed: PackedSequence | None = None) -> None:
        """Raise what torch.nn would raise, in its words."""
        data, layout = call.input, call.layout
        states: tuple[Any, ...] = call.states
        batch_sizes = None if packed is None else packed.batch_sizes
        if packed is not None:
            data = packed.data
        elif layout is UNBATCHED:
            data = data.unsqueeze(0 if self.batch_first else 1)
        elif self.batch_first and layout is TIME_MAJOR:  # a list or a nested tensor
            data = data.transpose(0, 1)
        if packed is not None:
            self._check_input(data, batch_sizes)
        if states[0] is not None:
            if packed is None:
                self._check_rank(states, 2 if layout is UNBATCHED else 3)
            if layout is UNBATCHED:
                states = tuple(state.unsqueeze(1) for state in states)
        self._check_input(data, batch_sizes)
        if self._overridden & {"check_forward_args", "check_input"}:
            sizes = self._state_sizes(call, data, batch_sizes)
            given: Any = states if states[0] is not None else tuple(data.new_zeros(size) for size in sizes)
            self.check_forward_args(data, given[0] if len(given) == 1 else given, batch_sizes)
        if states[0] is not None:
            self._check_states(states, self._state_sizes(call, data, batch_sizes))
        self._check_agreement(data, states)
        if packed is None and call.lengths is None and data.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _check_input(self, data: Tensor, batch_sizes: Tensor | None) -> None:
        dtype = self._first_weight().dtype
        if data.dtype != dtype and not dispatch.is_autocast():
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({dtype}). Convert input: "
                f"input.to({dtype}), or convert model: model.to({data.dtype})"
            )
        expected = 3 if batch_sizes is None else 2
        if data.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {data.dim()}")
        if data.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.size(-1)}"
            )

    def _check_states(self, states: Sequence[Tensor], sizes: list[tuple[int, int, int]]) -> None:
        for k, (state, size) in enumerate(zip(states, sizes, strict=True)):
            name = "hidden" if len(states) == 1 else f"hidden[{k}]"
            self.check_hidden_size(state, size, f"Expected {name} size {{}}, got {{}}")

    def _state_sizes(self, call: Call, data: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int, int]]:
        if batch_sizes is not None and "get_expected_hidden_size" not in self._overridden:
            # torch.nn's reads a value of batch_sizes, which a compiler cannot.
            h = (call.layers * call.directions(), call.batch(), self.proj_size or self.hidden_size)
        else:
            h = self.get_expected_hidden_size(data, batch_sizes)
        return [h, *[(h[0], h[1], self.hidden_size)] * (len(self.cell.states) - 1)]

    def _first_weight(self) -> Tensor:
        """For its dtype and device: of a parametrization its original, so as not to compute it once more."""
        name = self._flat_weights_names[0]
        found = self._parameters.get(name)
        if found is not None:
            return found
        inside = getattr(self, "parametrizations", {})
        return next(inside[name].parameters()) if name in inside else getattr(self, name)

    def _check_agreement(self, data: Tensor, states: tuple[Any, ...]) -> None:
        """One device for all, one dtype for input and states, in the words of torch's own operators."""
        given = [state for state in states if state is not None]
        for kind, tensor in (("parameter", self._first_weight()), *(("hidden", state) for state in given)):
            if tensor.device != data.device:
                found = f"found input tensor at {data.device} and {kind} tensor at {tensor.device}"
                raise RuntimeError(f"Input and {kind} tensors are not at the same device, {found}")
        for state in given:
            if state.dtype != data.dtype and not dispatch.is_autocast():
                found = f"found input tensor with {data.dtype} and hidden tensor with {state.dtype}"
                raise RuntimeError(f"Input and hidden tensors are not the same dtype, {found}")

    def _check_rank(self, states: tuple[Any, ...], expected: int) -> None:
        if all(state.dim() == expected for state in states):
            return
        form = "unbatched 2-D" if expected == 2 else "batched 3-D"
        came = ", ".join(f"{state.dim()}-D" for state in states)
        names, came = ("hx", f"{came} tensor") if len(states) == 1 else ("hx and cx", f"({came}) tensors")
        raise RuntimeError(f"For {form} input, {names} should also be {expected}-D but got {came}")

    def _permuted(self, states: tuple[Any, ...], permutation: Tensor | None) -> tuple[Any, ...]:
        """Rows of states in another order."""
        if permutation is None and "permute_hidden" not in self._overridden:
            return states
        given: Any = states[0] if len(states) == 1 else states
        permuted: Any = self.permute_hidden(given, permutation)
        return permuted if len(states) > 1 else (permuted,)

    def stream(self, batch_size: int | None = None, state: object = None, dtype: torch.dtype | None = None) -> Stream:
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
        if self.bidirectional or self._is_reverse():
            option = "bidirectional=False" if self.bidirectional else "reverse=False"
            raise ValueError(
                f"stream: expected {option}; the reverse direction begins at a sequence's last step, "
                "which a stream has not seen"
            )
        return Stream(
            Source(self, self.num_layers, layered=True, batch_first=self.batch_first), batch_size, state, dtype
        )


def _plan(parameters: tuple[str, ...], names: tuple[str, ...]) -> Plan:
    """Of every layer and direction, the cell's parameters in its order, from torch.nn's flat names."""
    places: dict[str, list[str | None]] = {}
    for name in names:
        plain, _, suffix = name.rpartition("_l")
        places.setdefault(suffix, [None] * len(parameters))[parameters.index(plain)] = name
    return make_plan([name for layer in places.values() for name in layer])


_cached_plan = cache(_plan)


def _plain_name(name: str) -> str:
    """Of "weight_ih_l0_reverse" the part that a cell knows."""
    return name.rpartition("_l")[0]
