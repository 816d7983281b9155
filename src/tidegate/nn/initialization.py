# SPDX-License-Identifier: Apache-2.0
"""How a recurrent layer's weights are drawn: as other frameworks draw them (their distributions, not their random
numbers), and by schemes of the literature.

Letters: I input_size, H hidden_size, G gates. A single bias of theirs is our bias_ih; bias_hh starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import init

from tidegate.cell import GRU, LSTM, Cell

Weights = dict[str, Tensor]


def _glorot(weight: Tensor, fan_in: int, fan_out: int) -> None:
    bound = math.sqrt(6 / (fan_in + fan_out))
    init.uniform_(weight, -bound, bound)


def _lecun(weight: Tensor, fan_in: int) -> None:
    """A normal cut at two standard deviations, widened so that the variance is 1/fan_in again."""
    deviation = math.sqrt(1 / fan_in) / 0.87962566103423978
    init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _orthogonal(weight: Tensor) -> None:
    """Drawn in float32 for a shorter dtype: QR decompositions know none."""
    drawn = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(init.orthogonal_(drawn))


def _zero(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            init.zeros_(tensor)


def _keras(cell: Cell, weights: Weights) -> None:
    """Glorot uniform, orthogonal over all gates together, zeros, and an LSTM's forget bias 1 (unit_forget_bias)."""
    weight_ih, weight_hh = weights["weight_ih"], weights["weight_hh"]
    _glorot(weight_ih, weight_ih.shape[1], weight_ih.shape[0])
    _orthogonal(weight_hh)
    _zero(weights.get("bias_ih"), weights.get("bias_hh"))
    _unit_forget_bias(cell, weights)


def _tf1(cell: Cell, weights: Weights) -> None:
    """Glorot uniform over a kernel [I+H, columns]: a GRU has one for r and z, one for n. A GRU's r and z have bias 1,
    an LSTM's forget_bias 1 is in the bias."""
    weight_ih, weight_hh = weights["weight_ih"], weights["weight_hh"]
    fan_in, hidden_size = weight_ih.shape[1] + weight_hh.shape[1], weight_hh.shape[0] // len(cell.gates)
    kernels = (2 * hidden_size, hidden_size) if cell is GRU else (weight_hh.shape[0],)
    for weight in (weight_ih, weight_hh):
        for block in weight.split(kernels):
            _glorot(block, fan_in, block.shape[0])
    _zero(weights.get("bias_ih"), weights.get("bias_hh"))
    if cell is GRU and "bias_ih" in weights:
        init.ones_(weights["bias_ih"][: 2 * hidden_size])
    _unit_forget_bias(cell, weights)


def _flax(cell: Cell, weights: Weights) -> None:
    """LeCun normal, orthogonal gate by gate, zeros."""
    weight_ih, weight_hh = weights["weight_ih"], weights["weight_hh"]
    _lecun(weight_ih, weight_ih.shape[1])
    for block in weight_hh.chunk(len(cell.gates)):
        _orthogonal(block)
    _zero(weights.get("bias_ih"), weights.get("bias_hh"))


def _unit_forget_bias(cell: Cell, weights: Weights) -> None:
    if cell is LSTM and "bias_ih" in weights:
        init.ones_(weights["bias_ih"].chunk(4)[1])


def _orthogonal_recurrence(cell: Cell, weights: Weights) -> None:
    """Orthogonal gate by gate, so that no gate's product shrinks or stretches h; Glorot uniform gate by gate; zeros.
    Saxe et al. 2014 (1312.6120)."""
    for gate_ih, gate_hh in zip(*(weights[name].chunk(len(cell.gates)) for name in _PRODUCTS), strict=True):
        _glorot(gate_ih, gate_ih.shape[1], gate_ih.shape[0])
        _orthogonal(gate_hh)
    _zero(weights.get("bias_ih"), weights.get("bias_hh"))


def _kaiming(cell: Cell, weights: Weights) -> None:
    """Kaiming uniform for a relu, He et al. 2015 (1502.01852), and zeros."""
    for name in _PRODUCTS:
        init.kaiming_uniform_(weights[name], nonlinearity="relu")
    _zero(weights.get("bias_ih"), weights.get("bias_hh"))


def _chrono(cell: Cell, weights: Weights, longest: int) -> None:
    """torch.nn's weights, and biases for time scales from 1 to `longest` steps, evenly: f or z log(u) with u in
    1..longest - 1, an LSTM's i the negative of it, the others 0. Tallec and Ollivier 2018 (1804.11188)."""
    if "bias_ih" not in weights:
        raise ValueError("init: expected bias=True with chrono, which is a choice of biases")
    bias = weights["bias_ih"]
    _zero(bias, weights["bias_hh"])
    blocks = dict(zip(cell.gates, bias.chunk(len(cell.gates)), strict=True))
    carries = blocks["f" if cell is LSTM else "z"]
    carries.copy_(init.uniform_(carries, 1, longest - 1).log())
    if cell is LSTM:
        blocks["i"].copy_(-carries)


_PRODUCTS = ("weight_ih", "weight_hh")
CHRONO = "chrono:"  # and the longest time scale in steps

# None: torch.nn's own, which the modules' constructors have drawn already.
SCHEMES: dict[str, Callable[[Cell, Weights], None] | None] = {
    "torch": None,
    "keras": _keras,
    "tf1": _tf1,
    "flax": _flax,
    "orthogonal": _orthogonal_recurrence,
    "kaiming": _kaiming,
}


def read_scheme(value: str, cell: Cell) -> str:
    """The argument `init`.

    Raises:
        ValueError: it is none of them, or none of this cell's.
    """
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"init: expected one of {', '.join(SCHEMES)}, chrono:784, got {value!r}")
    if value.startswith("chrono"):
        longest = value.removeprefix(CHRONO)
        if cell not in (LSTM, GRU):
            raise ValueError(f"init: chrono is for the gates of an LSTM or a GRU, got it for {cell.name}")
        if not (longest.isascii() and longest.isdecimal() and int(longest) > 2):
            hint = "chrono: and the longest dependency in steps, 3 or more, as chrono:784"
            raise ValueError(f"init: expected {hint}, got {value!r}")
    elif value not in SCHEMES:
        raise ValueError(f"init: expected one of {', '.join(SCHEMES)}, chrono:784, got {value!r}")
    return value


def set_gate_bias(cell: Cell, weights: Weights, value: float) -> None:
    """The bias of an LSTM's f or a GRU's z: bias_ih has it all."""
    place = cell.gates.index("f" if cell is LSTM else "z")
    with torch.no_grad():
        for name, filled in (("bias_ih", value), ("bias_hh", 0.0)):
            weights[name].chunk(len(cell.gates))[place].fill_(filled)


def initialize(scheme: str, cell: Cell, weights: Weights) -> None:
    """Draw one layer's or cell's weights anew, by name as in `Call.weights`."""
    if scheme.startswith(CHRONO):
        with torch.no_grad():
            _chrono(cell, weights, int(scheme.removeprefix(CHRONO)))
        return
    draw = SCHEMES[scheme]
    if draw is None:
        return
    with torch.no_grad():
        draw(cell, weights)
        for name in ("weight_hr", "weight_peephole"):
            weight = weights.get(name)
            if weight is not None and weight.dim() == 2:
                _glorot(weight, weight.shape[1], weight.shape[0])
            elif weight is not None:
                # A vector's glorot bound, as TensorFlow draws each w_*_diag (H): fan_in = fan_out = H.
                _glorot(weight, weight.shape[0] // 3, weight.shape[0] // 3)
