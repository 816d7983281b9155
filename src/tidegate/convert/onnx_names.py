# SPDX-License-Identifier: Apache-2.0
"""What reading and writing ONNX share: activations, gate orders, how its weights are laid out.

Letters: D directions, G gates, I input_size, H hidden_size. W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H): the biases of
W, then those of R; P (D, 3*H): peepholes i | o | f. Gates: LSTM i o f c, GRU z r h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from tidegate import activations
from tidegate.cell import GATE_ORDERS, GRU, LSTM, RNN, Cell, reordered
from tidegate.convert.canonical import Faults, Weights

CELLS: dict[str, Cell] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
PEEPHOLE_ORDER = "iof"
# ONNX's name: ours, whether it reads alpha, whether beta, their defaults (None: the file must say).
ACTIVATIONS: dict[str, tuple[str, bool, bool, tuple[float, ...] | None]] = {
    "Tanh": ("tanh", False, False, ()),
    "Relu": ("relu", False, False, ()),
    "Sigmoid": ("sigmoid", False, False, ()),
    "Softsign": ("softsign", False, False, ()),
    "Softplus": ("softplus", False, False, ()),
    "HardSigmoid": ("hard_sigmoid", True, True, (0.2, 0.5)),
    "Elu": ("elu", True, False, (1.0,)),
    "LeakyRelu": ("leaky_relu", True, False, (0.01,)),
    "ThresholdedRelu": ("thresholded_relu", True, False, (1.0,)),
    "ScaledTanh": ("scaled_tanh", True, True, None),
    "Affine": ("affine", True, True, None),
}
_OURS = {ours: name for name, (ours, *_) in ACTIVATIONS.items()}


def gate_orders(cell: Cell) -> tuple[str, str]:
    """ONNX's order and ours, in our letters."""
    return GATE_ORDERS["onnx"][cell.name], "".join(cell.gates)


def read_activations(
    faults: Faults, cell: Cell, names: Sequence[str], alphas: Sequence[float], betas: Sequence[float], directions: int
) -> str | None:
    """Our option from a node's attributes; None for the defaults. alpha, beta go in order to those that read one."""
    roles = max(len(cell.activations), 1)
    if not names:
        if alphas or betas:
            faults.add("activation_alpha, activation_beta: given without activations")
        return None
    if len(names) != roles * directions:
        faults.add(f"activations: expected {roles} for each of {directions} directions, got {list(names)}")
        return None
    found: list[str] = []
    alpha, beta = iter(alphas), iter(betas)
    # The names are case-insensitive in the standard.
    known = {name.lower(): entry for name, entry in ACTIVATIONS.items()}
    for name in names:
        if name.lower() not in known:
            faults.option("activations", name, f"one of {', '.join(ACTIVATIONS)}")
            continue
        ours, takes_alpha, takes_beta, defaults = known[name.lower()]
        parameters = [next(values, None) for values, takes in ((alpha, takes_alpha), (beta, takes_beta)) if takes]
        if defaults is None and None in parameters:
            faults.add(f"activations: {name} needs an activation_alpha and an activation_beta")
            defaults = (1.0, 1.0)
        # An attribute is a float32: 0.2 in one is the standard's 0.2.
        pairs = zip(parameters, defaults or parameters, strict=True)
        filled = (d if p is None or (d is not None and p == _float32(d)) else p for p, d in pairs)
        found.append(activations.write(ours, tuple(float(value or 0) for value in filled)))
    if next(alpha, None) is not None or next(beta, None) is not None:
        faults.add(f"activation_alpha, activation_beta: more values than {', '.join(names)} read")
    if len(found) == len(names) and found[:roles] != found[-roles:]:
        faults.add(f"activations: {found[:roles]} forward, {found[-roles:]} in reverse; a layer has one set")
    return ",".join(found[:roles])


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def write_activations(faults: Faults, text: str, directions: int) -> dict[str, Any]:
    """The node's attributes for our option."""
    names: list[str] = []
    alphas: list[float] = []
    betas: list[float] = []
    for word in activations.split(text) * directions:
        name, parameters = activations.read(word)
        if name == "linear":
            name, parameters = "affine", (1.0, 0.0)
        if name not in _OURS:
            faults.option("activations", word, f"ONNX has {', '.join(_OURS)}")
            continue
        names.append(_OURS[name])
        alphas += parameters[:1]
        betas += parameters[1:]
    return {"activations": names, "activation_alpha": alphas or None, "activation_beta": betas or None}


def default_activations(cell: Cell, text: str) -> bool:
    name = "nonlinearity" if cell is RNN else "activations"
    return text == cell.options[name][1]


def direction_weights(cell: Cell, w: Any, r: Any, b: Any, p: Any) -> Weights:
    """One direction's weights from its W, R, B, P, the last two perhaps None."""
    theirs, ours = gate_orders(cell)
    found: Weights = {"weight_ih": reordered(w, theirs, ours), "weight_hh": reordered(r, theirs, ours)}
    if b is not None:
        of_w, of_r = b.chunk(2)
        found |= {"bias_ih": reordered(of_w, theirs, ours), "bias_hh": reordered(of_r, theirs, ours)}
    if p is not None:
        found["weight_peephole"] = reordered(p, PEEPHOLE_ORDER, "ifo")
    return found
