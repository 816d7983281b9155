# SPDX-License-Identifier: Apache-2.0
"""What a cell is: its gates and their order, its states, its parameters, its equations.

Letters: T time, B batch, I input_size, H hidden_size, P proj_size (LSTM; the size of h, elsewhere H itself),
G number of gates. Gate blocks are rows of `weight_ih` (G*H, I), `weight_hh` (G*H, P), `bias_ih` and `bias_hh` (G*H),
in the order of `Cell.gates`, which is torch.nn's. Kernels, converters and documentation follow this file.

Options beyond torch.nn's (activations, clips, peepholes, coupled gates) have defaults that mean torch.nn's equations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidegate import activations
from tidegate.quantization import linear

States = tuple[Tensor, ...]
Weights = dict[str, Any]  # Tensor, or None for an optional one
Options = dict[str, Any]


class Parameter(NamedTuple):
    """One tensor that a cell learns.

    Attributes:
        shape: its sizes in letters: I, H, P, or a number of them, "4*H".
        when: the module's attribute that has it, "bias" say; "" if it is always there.
        dtype: its own; None for the input's.
    """

    shape: tuple[str, ...]
    when: str = ""
    dtype: torch.dtype | None = None


Sizes = dict[str, int]


def _as_they_are(weights: Weights) -> Weights:
    return weights


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell: everything else about it is derived from this.

    Attributes:
        name: the operator's name, `torch.ops.tidegate.<name>`.
        gates: row blocks of the weights, in order.
        states: name to the letter of its size, "h" first.
        parameters: name to shape, in the operator's order.
        options: name to its values' type and default, in the operator's order. A module has each as an argument and
            an attribute of this name.
        step: one step, `(gates_x (B, G*H), states, weights, options) -> new states`, where
            gates_x = x_t W_ih^T + b_ih. Plain torch operations, differentiable any number of times.
        activations: what the option `activations` gives a function for, in order; none for the RNN's `nonlinearity`.
        plain: the values of options, beside the defaults, that every kernel of this cell knows.
        storage: "int8" or "bfloat16" if its matrices are stored so, by storage.py; else "".
        read_weights: the weights, by name, as the equations multiply by them.
        names: the parameters' names.
        axes: name to the factor and the letter of each of its sizes: 4 and "H" of "4*H".
        recurrent: the first parameter that is always there with H or a number of them rows, not weight_ih: "" if none.
        read_options: the values of the options, of a module that has them as attributes: quicker than one by one.
    """

    name: str
    gates: tuple[str, ...]
    states: dict[str, str]
    parameters: dict[str, Parameter]
    options: dict[str, tuple[type, Any]]
    step: Callable[[Tensor, States, Weights, Options], States]
    activations: tuple[str, ...] = ()
    plain: tuple[tuple[str, Any], ...] = ()
    storage: str = ""
    read_weights: Callable[[Weights], Weights] = _as_they_are
    names: tuple[str, ...] = field(init=False)
    axes: dict[str, tuple[tuple[int, str], ...]] = field(init=False)
    recurrent: str = field(init=False)
    _places: dict[str, tuple[tuple[str, int, int], ...]] = field(init=False, compare=False)
    read_options: Callable[[Any], tuple[Any, ...]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Not cached properties: these lock in Python 3.11, where torch.compile cannot follow.
        object.__setattr__(self, "names", tuple(self.parameters))
        axes = {name: tuple(map(_factor_of, parameter.shape)) for name, parameter in self.parameters.items()}
        object.__setattr__(self, "axes", axes)
        rows_of_h = (n for n in axes if axes[n][0][1] == "H" and n != "weight_ih" and not self.parameters[n].when)
        object.__setattr__(self, "recurrent", next(rows_of_h, ""))
        object.__setattr__(self, "_places", _places_of_letters(axes, self.states.values()))
        object.__setattr__(self, "read_options", _attribute_reader(tuple(self.options)))

    def gates_x(self, input: Tensor, weights: Weights) -> Tensor:
        """W_ih x + b_ih (..., G*H), as `step` takes it."""
        return linear(input, self.read_weights(weights)["weight_ih"], weights["bias_ih"])

    @property
    def default_options(self) -> Options:
        return {name: default for name, (_, default) in self.options.items()}

    def sizes(self, weights: Weights) -> Sizes:
        """What the letters stand for, by the shapes of a layer's weights. A letter of an optional parameter that is
        not there, as P without a projection, is H."""
        found: Sizes = {}
        absent: list[str] = []
        for letter, places in self._places.items():
            for name, axis, factor in places:
                weight = weights[name]
                if weight is not None and weight.dim() == len(self.axes[name]):
                    found[letter] = weight.shape[axis] // factor
                    break
            else:
                absent.append(letter)
        for letter in absent:
            found[letter] = found.get("H", 0)
        return found

    def hidden_size(self, weights: Weights) -> int:
        """H, as `sizes` finds it."""
        weight = weights[self.recurrent] if self.recurrent else None
        if weight is None or weight.dim() != len(self.axes[self.recurrent]):
            return self.sizes(weights)["H"]
        return weight.shape[0] // self.axes[self.recurrent][0][0]

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """The sizes of a parameter."""
        return tuple([factor * sizes[letter] for factor, letter in self.axes[name]])


def _places_of_letters(
    axes: dict[str, tuple[tuple[int, str], ...]], states: Iterable[str]
) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """Where each letter stands: parameter, axis, and the factor before it."""
    places: dict[str, list[tuple[str, int, int]]] = {letter: [] for letter in states}
    for name, letters in axes.items():
        for axis, (factor, letter) in enumerate(letters):
            places.setdefault(letter, []).append((name, axis, factor))
    return {letter: tuple(found) for letter, found in places.items()}


def _attribute_reader(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda module: tuple(getattr(module, name) for name in names)


def _factor_of(expression: str) -> tuple[int, str]:
    """Of "4*H" 4 and "H"."""
    factor, _, letter = expression.rpartition("*")
    return int(factor or 1), letter


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
    i, g = gate(_clipped(i, options)), candidate(_clipped(g, options))
    f = 1 - i if options["coupled"] else gate(_clipped(f, options))
    c = f * c + i * g
    if options["cell_clip"]:
        c = c.clamp(-options["cell_clip"], options["cell_clip"])
    if w_o is not None:
        o = o + w_o * c
    o = gate(_clipped(o, options))
    h = o * squash(c)
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


def _parameters(gates: int, h: str = "H") -> dict[str, Parameter]:
    rows = f"{gates}*H"
    return {
        "weight_ih": Parameter((rows, "I")),
        "weight_hh": Parameter((rows, h)),
        "bias_ih": Parameter((rows,), "bias"),
        "bias_hh": Parameter((rows,), "bias"),
    }


_CLIP = {"clip": (float, 0.0)}

RNN = Cell(
    "rnn",
    ("h",),
    {"h": "H"},
    _parameters(1),
    {"nonlinearity": (str, "tanh"), **_CLIP},
    _rnn_step,
    plain=(("nonlinearity", "relu"),),
)
LSTM = Cell(
    "lstm",
    ("i", "f", "g", "o"),
    {"h": "P", "c": "H"},
    {
        **_parameters(4, "P"),
        "weight_hr": Parameter(("P", "H"), "proj_size"),
        "weight_peephole": Parameter(("3*H",), "peepholes"),
    },
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
    {"h": "H"},
    _parameters(3),
    {"reset_after": (bool, True), "activations": (str, "sigmoid,tanh"), **_CLIP},
    _gru_step,
    ("gates", "candidate"),
    plain=(("reset_after", False),),
)

CELLS = (RNN, LSTM, GRU)

# A cell's name and its options' values where its step, without optional parameters, is torch.nn's.
TORCHS_STEPS = {(cell.name, tuple(cell.default_options.values())) for cell in CELLS} | {("rnn", ("relu", 0.0))}


def extensions(cell: Cell, options: tuple[Any, ...], weights: tuple[Tensor | None, ...]) -> list[str]:
    """What a call asks for beyond torch.nn's equations and `Cell.plain`: reasons for a kernel that has only those.

    Args:
        options: values, in the cell's order.
        weights: of one or more layers, in the cell's order.
    """
    if cell.storage:
        return [f"its weights are {cell.storage}"]
    if cell.name not in {known.name for known in CELLS}:
        return [f"{cell.name} is not among the cells that the kernels know"]
    return beyond_torch(cell, options, weights)


def beyond_torch(cell: Cell, options: tuple[Any, ...], weights: tuple[Tensor | None, ...]) -> list[str]:
    """The same, of a cell that the kernel knows."""
    found = [
        f"{name}={value!r} is beyond torch.nn's equations"
        for (name, (_, default)), value in zip(cell.options.items(), options, strict=True)
        if value != default and (name, value) not in cell.plain
    ]
    for k, (name, parameter) in enumerate(cell.parameters.items()):
        of_every_layer = weights[k :: len(cell.parameters)]
        if parameter.when not in ("", "bias", "proj_size") and any(weight is not None for weight in of_every_layer):
            found.append(f"{name}: {parameter.when} are beyond torch.nn's equations")
    return found


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
