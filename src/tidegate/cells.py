# SPDX-License-Identifier: Apache-2.0
"""What a cell is: its gates and their order, its states, its parameters, its equations.

Letters: T time, B batch, I input_size, H hidden_size, P proj_size (LSTM; the size of h, elsewhere H itself),
G number of gates. Gate blocks are rows of `weight_ih` (G*H, I), `weight_hh` (G*H, P), `bias_ih` and `bias_hh` (G*H),
in the order of `Cell.gates`, which is torch.nn's. Kernels, converters and documentation follow this file.

Options beyond torch.nn's (activations, clips, peepholes, coupled gates) have defaults that mean torch.nn's equations;
`extensions(call)` names those in use, and a kernel that has only torch.nn's equations refuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidegate import activations

States = tuple[Tensor, ...]
Weights = dict[str, Any]  # Tensor, or None for an optional one
Options = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell.

    Attributes:
        name: the operator's name, `torch.ops.tidegate.<name>`.
        gates: row blocks of the weights, in order.
        states: "h" alone, or "h" and "c".
        weights: parameter names, in the operator's order; those in `optional_weights` may be None.
        options: name to its values' type and default, in the operator's order.
        activations: what the option `activations` gives a function for, in order; none for the RNN's `nonlinearity`.
        step: one step, `(gates_x (B, G*H), states, weights, options) -> new states`, where
            gates_x = x_t W_ih^T + b_ih. Plain torch operations, differentiable any number of times.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    weights: tuple[str, ...]
    options: dict[str, tuple[type, Any]]
    step: Callable[[Tensor, States, Weights, Options], States]
    activations: tuple[str, ...] = ()

    @property
    def optional_weights(self) -> tuple[str, ...]:
        return tuple(name for name in self.weights if name not in ("weight_ih", "weight_hh"))

    @property
    def default_options(self) -> Options:
        return {name: default for name, (_, default) in self.options.items()}


class Call(NamedTuple):
    """One layer in one direction over a whole sequence: all that a backend needs to know.

    Attributes:
        cell: RNN, LSTM or GRU below.
        input: (T, B, I), any strides.
        states: the initial states: h_0 (B, P), for an LSTM also c_0 (B, H).
        weights: by name: weight_ih (G*H, I), weight_hh (G*H, P), bias_ih (G*H) or None, bias_hh (G*H) or None,
            for an LSTM also weight_hr (P, H) or None and weight_peephole (3*H), rows i | f | o, or None.
        lengths: (B,) int64 on any device, each in 0..T, or None for T everywhere. Past a row's length the output is
            0 and the state stays; the reverse direction starts at the last valid step.
        resets: (T, B) bool, or None. `resets[t, b]` makes t the first step of a new sequence in row b: forward, the
            state entering t is zero; in reverse, the state entering t-1 is zero. A mark past a row's length means
            nothing.
        reverse: from the last valid step to the first; output[t] still belongs to input[t].
        options: the cell's options by name.
    """

    cell: Cell
    input: Tensor
    states: States
    weights: Weights
    lengths: Tensor | None
    resets: Tensor | None
    reverse: bool
    options: Options

    @property
    def hidden_size(self) -> int:
        return self.weights["weight_hh"].shape[0] // len(self.cell.gates)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be asked of, in the operator's order: input, states, weights."""
        return (self.input, *self.states, *self.weights.values())

    def with_tensors(self, tensors: Sequence[Any]) -> Call:
        """The same call on other tensors, given in the order of `tensors`."""
        split = 1 + len(self.states)
        weights = dict(zip(self.weights, tensors[split:], strict=True))
        return self._replace(input=tensors[0], states=tuple(tensors[1:split]), weights=weights)

    def without_steps(self) -> tuple[Tensor, ...]:
        """The results where no row has a step: zeros, and the initial states.

        They still depend on every tensor, so that its gradient is zero and not absent.
        """
        nothing = sum(tensor.flatten()[:0].sum() for tensor in self.tensors if tensor is not None)
        output = self.states[0].new_zeros((self.input.shape[0], *self.states[0].shape))
        return (output + nothing, *(state + nothing for state in self.states))

    def to(self, dtype: torch.dtype) -> Call:
        """The same call computed in `dtype`."""
        return self.with_tensors([None if tensor is None else tensor.to(dtype) for tensor in self.tensors])


class Form(NamedTuple):
    """How a module runs its cells over an input: what `Call`, one layer in one direction, does not know."""

    layers: int
    bidirectional: bool
    reverse: bool
    batch_first: bool
    lengths: Tensor | None


def extensions(call: Call) -> list[str]:
    """What a call asks for beyond torch.nn's equations and `reset_after`: reasons for a kernel that has only those."""
    if not is_extended(call):
        return []
    plain = _PLAIN[call.cell.name]
    found = [
        f"{name}={value!r} is beyond torch.nn's equations"
        for name, value in call.options.items()
        if all(value != options[name] for options in plain)
    ]
    if call.weights.get("weight_peephole") is not None:
        found.append("peepholes are beyond torch.nn's equations")
    return found


def is_extended(call: Call) -> bool:
    """Whether there are `extensions`: quick, for a kernel that is asked at every step of a stream."""
    return call.weights.get("weight_peephole") is not None or call.options not in _PLAIN[call.cell.name]


def _clipped(pre_activation: Tensor, options: Options) -> Tensor:
    """ONNX's clip: every gate's pre-activation into -clip..clip; 0 for none."""
    return pre_activation.clamp(-options["clip"], options["clip"]) if options["clip"] else pre_activation


def _rnn_step(gates_x: Tensor, states: States, weights: Weights, options: Options) -> States:
    """h' = act(W_ih x + b_ih + W_hh h + b_hh). Source: Elman 1990; torch.nn.RNN."""
    (h,) = states
    pre_activation = gates_x + linear(h, weights["weight_hh"], weights["bias_hh"])
    (act,) = activations.functions(options["nonlinearity"])
    return (act(_clipped(pre_activation, options)),)


def _lstm_step(gates_x: Tensor, states: States, weights: Weights, options: Options) -> States:
    """c' = f c + i g; h' = o tanh(c'), then h' = W_hr h' with a projection.

    With peepholes, i and f also see w_i c and w_f c, o sees w_o c'. `coupled`: f = 1 - i. `cell_clip` bounds c',
    `proj_clip` the projected h'.

    Source: Hochreiter and Schmidhuber 1997 with Gers et al. 2000's forget gate; projection, Sak et al. 2014
    (1402.1128); torch.nn.LSTM. Peepholes, Gers and Schmidhuber 2000; clips, tf.compat.v1.nn.rnn_cell.LSTMCell;
    `coupled` and `clip`, ONNX's LSTM.
    """
    h, c = states
    i, f, g, o = (gates_x + linear(h, weights["weight_hh"], weights["bias_hh"])).chunk(4, -1)
    gate, candidate, squash = activations.functions(options["activations"])
    w_o = None
    if weights["weight_peephole"] is not None:
        w_i, w_f, w_o = weights["weight_peephole"].chunk(3)
        i, f = i + w_i * c, f + w_f * c
    i = gate(_clipped(i, options))
    f = 1 - i if options["coupled"] else gate(_clipped(f, options))
    c = f * c + i * candidate(_clipped(g, options))
    if options["cell_clip"]:
        c = c.clamp(-options["cell_clip"], options["cell_clip"])
    if w_o is not None:
        o = o + w_o * c
    h = gate(_clipped(o, options)) * squash(c)
    if weights["weight_hr"] is not None:
        h = linear(h, weights["weight_hr"])
        if options["proj_clip"]:
            h = h.clamp(-options["proj_clip"], options["proj_clip"])
    return h, c


def _gru_step(gates_x: Tensor, states: States, weights: Weights, options: Options) -> States:
    """h' = (1 - z) n + z h, with r and z sigmoids of W_i x + b_i + W_h h + b_h, and

    reset_after:     n = tanh(W_in x + b_in + r (W_hn h + b_hn))
    not reset_after: n = tanh(W_in x + b_in + W_hn (r h) + b_hn)

    Source: Cho et al. 2014 (1406.1078v3), the reset before the matmul, as in TensorFlow v1; the reset-after form,
    1406.1078v1 and cuDNN, torch.nn.GRU.
    """
    (h,) = states
    hidden_size = h.shape[-1]
    weight_hh, bias_hh = weights["weight_hh"], weights["bias_hh"]
    gate, candidate = activations.functions(options["activations"])
    if options["reset_after"]:
        x_r, x_z, x_n = gates_x.chunk(3, -1)
        h_r, h_z, h_n = linear(h, weight_hh, bias_hh).chunk(3, -1)
        r, z = gate(_clipped(x_r + h_r, options)), gate(_clipped(x_z + h_z, options))
        n = candidate(_clipped(x_n + r * h_n, options))
    else:
        x_rz, x_n = gates_x.split([2 * hidden_size, hidden_size], -1)
        w_rz, w_n = weight_hh.split([2 * hidden_size, hidden_size], 0)
        b_rz, b_n = (None, None) if bias_hh is None else bias_hh.split([2 * hidden_size, hidden_size], 0)
        r, z = gate(_clipped(x_rz + linear(h, w_rz, b_rz), options)).chunk(2, -1)
        n = candidate(_clipped(x_n + linear(r * h, w_n, b_n), options))
    return ((1 - z) * n + z * h,)


_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

_CLIP = {"clip": (float, 0.0)}

RNN = Cell("rnn", ("h",), ("h",), _PARAMETERS, {"nonlinearity": (str, "tanh"), **_CLIP}, _rnn_step)
LSTM = Cell(
    "lstm",
    ("i", "f", "g", "o"),
    ("h", "c"),
    (*_PARAMETERS, "weight_hr", "weight_peephole"),
    {
        "activations": (str, "sigmoid,tanh,tanh"),
        **_CLIP,
        "cell_clip": (float, 0.0),
        "proj_clip": (float, 0.0),
        "coupled": (bool, False),
    },
    _lstm_step,
    ("gates", "candidate", "output"),
)
GRU = Cell(
    "gru",
    ("r", "z", "n"),
    ("h",),
    _PARAMETERS,
    {"reset_after": (bool, True), "activations": (str, "sigmoid,tanh"), **_CLIP},
    _gru_step,
    ("gates", "candidate"),
)

CELLS = (RNN, LSTM, GRU)

# The options that mean torch.nn's equations, and those of `reset_after`.
_PLAIN: dict[str, list[Options]] = {
    RNN.name: [RNN.default_options, {**RNN.default_options, "nonlinearity": "relu"}],
    LSTM.name: [LSTM.default_options],
    GRU.name: [GRU.default_options, {**GRU.default_options, "reset_after": False}],
}

# Other frameworks' block order, in our letters: Keras' z r h and i f c o, ONNX's i o f c, TensorFlow v1's i j f o.
# TensorFlow v1's GRU has r and u in one kernel and the candidate in another; Flax names its blocks.
GATE_ORDERS = {
    "keras": {"rnn": "h", "lstm": "ifgo", "gru": "zrn"},
    "onnx": {"rnn": "h", "lstm": "iofg", "gru": "zrn"},
    "tf1": {"rnn": "h", "lstm": "igfo", "gru": "rzn"},
}


def reordered(tensor: Tensor, source: str, target: str) -> Tensor:
    """Row blocks named by the letters of `source`, put into the order of `target`."""
    blocks = dict(zip(source, tensor.chunk(len(source)), strict=True))
    return torch.cat([blocks[letter] for letter in target])
