# SPDX-License-Identifier: Apache-2.0
# They are what `Emit` says:
# pyright: reportUnknownLambdaType=false
"""torch's operations as instructions: one entry each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from tidegate.fusion.program import Argument, Operand
from tidegate.fusion.rows import aten

Emit = Callable[..., Operand]


class Writer(Protocol):
    """What an entry writes with: elementwise instructions on operands that are spread over the result already."""

    def emit(self, operation: str, *operands: Argument) -> Operand: ...


# The instruction of the same meaning.
NAMED: dict[Any, str] = {
    getattr(aten, name): name
    for name in (
        *("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "relu"),
        *("sin", "cos", "erf", "mul", "div", "maximum", "minimum", "gt", "ge", "lt", "le", "eq", "ne", "where"),
    )
} | {aten.sign: "sign", aten.sgn: "sign"}


def _add(w: Writer, a: Argument, b: Argument, alpha: float = 1.0) -> Operand:
    return w.emit("add", a, b if alpha == 1 else w.emit("mul", b, float(alpha)))


def _sub(w: Writer, a: Argument, b: Argument, alpha: float = 1.0) -> Operand:
    return w.emit("sub", a, b if alpha == 1 else w.emit("mul", b, float(alpha)))


def _pow(w: Writer, a: Argument, b: Argument) -> Operand:
    if b == 0.0:
        return w.emit("copy", 1.0)
    if b == 2.0:
        return w.emit("mul", a, a)
    if b == 3.0:
        return w.emit("mul", w.emit("mul", a, a), a)
    named = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal", 1.0: "copy"}
    if isinstance(b, float) and b in named:
        return w.emit(named[b], a)
    return w.emit("pow", a, b)


def _clamp(w: Writer, a: Argument, low: Argument | None = None, high: Argument | None = None) -> Operand:
    return w.emit("clamp", a, -math.inf if low is None else low, math.inf if high is None else high)


def _elu(w: Writer, a: Argument, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Operand:
    # expm1 of what is above 0 may overflow, and its gradient with it.
    is_above = w.emit("gt", a, 0.0)
    below = w.emit("where", is_above, 0.0, a)
    curved = w.emit("mul", w.emit("expm1", w.emit("mul", below, float(input_scale))), float(alpha * scale))
    return w.emit("where", is_above, w.emit("mul", a, float(scale)), curved)


# Unlike a clamp's, the gradients of these are 0 at their bounds, too.


def _hardtanh(w: Writer, a: Argument, low: float = -1.0, high: float = 1.0) -> Operand:
    is_inside = w.emit("mul", w.emit("gt", a, float(low)), w.emit("lt", a, float(high)))
    return w.emit("where", is_inside, a, w.emit("constant", w.emit("clamp", a, float(low), float(high))))


def _hardsigmoid(w: Writer, a: Argument) -> Operand:
    return w.emit("add", w.emit("mul", _hardtanh(w, a, -3.0, 3.0), 1 / 6), 0.5)


def _hardswish(w: Writer, a: Argument) -> Operand:
    inside = w.emit("mul", w.emit("mul", a, w.emit("add", a, 3.0)), 1 / 6)
    return w.emit("where", w.emit("le", a, -3.0), 0.0, w.emit("where", w.emit("lt", a, 3.0), inside, a))


def _gelu(w: Writer, a: Argument, approximate: str = "none") -> Operand:
    if approximate == "tanh":
        cube = w.emit("mul", w.emit("mul", a, a), a)
        inner = w.emit("mul", w.emit("add", a, w.emit("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
        return w.emit("mul", w.emit("mul", a, 0.5), w.emit("add", w.emit("tanh", inner), 1.0))
    inner = w.emit("erf", w.emit("mul", a, math.sqrt(0.5)))
    return w.emit("mul", w.emit("mul", a, 0.5), w.emit("add", inner, 1.0))


def _not(w: Writer, a: Argument) -> Operand:
    return w.emit("eq", a, 0.0)


def _truth(w: Writer, a: Argument) -> Operand:
    return w.emit("ne", a, 0.0)


def _masked_fill(w: Writer, a: Argument, mask: Argument, value: Argument) -> Operand:
    return w.emit("where", mask, value, a)


# Those that take several instructions: called with the operation's arguments, tensors as operands, in order.
COMPOSED: dict[Any, Emit] = {
    aten.add: _add,
    aten.sub: _sub,
    aten.rsub: lambda w, a, b, alpha=1.0: _sub(w, b, a, alpha),
    aten.pow: _pow,
    aten.square: lambda w, a: w.emit("mul", a, a),
    aten.clamp: _clamp,
    aten.hardtanh: _hardtanh,
    aten.hardsigmoid: _hardsigmoid,
    aten.hardswish: _hardswish,
    aten.clamp_min: lambda w, a, low: _clamp(w, a, low),
    aten.clamp_max: lambda w, a, high: _clamp(w, a, None, high),
    aten.relu6: lambda w, a: _hardtanh(w, a, 0.0, 6.0),
    aten.leaky_relu: lambda w, a, slope=0.01: w.emit("where", w.emit("gt", a, 0.0), a, w.emit("mul", a, float(slope))),
    aten.elu: _elu,
    aten.gelu: _gelu,
    aten.silu: lambda w, a: w.emit("mul", a, w.emit("sigmoid", a)),
    aten.exp2: lambda w, a: w.emit("exp", w.emit("mul", a, math.log(2))),
    aten.log2: lambda w, a: w.emit("mul", w.emit("log", a), 1 / math.log(2)),
    aten.log10: lambda w, a: w.emit("mul", w.emit("log", a), 1 / math.log(10)),
    aten.addcmul: lambda w, a, b, c, value=1.0: _add(w, a, w.emit("mul", b, c), value),
    aten.addcdiv: lambda w, a, b, c, value=1.0: _add(w, a, w.emit("div", b, c), value),
    aten.lerp: lambda w, a, b, t: w.emit("add", a, w.emit("mul", t, w.emit("sub", b, a))),
    aten.masked_fill: _masked_fill,
    aten.logical_not: _not,
    aten.bitwise_not: _not,
    aten.logical_and: lambda w, a, b: w.emit("mul", _truth(w, a), _truth(w, b)),
    aten.bitwise_and: lambda w, a, b: w.emit("mul", _truth(w, a), _truth(w, b)),
    aten.logical_or: lambda w, a, b: w.emit("maximum", _truth(w, a), _truth(w, b)),
    aten.bitwise_or: lambda w, a, b: w.emit("maximum", _truth(w, a), _truth(w, b)),
    aten.tan: lambda w, a: w.emit("div", w.emit("sin", a), w.emit("cos", a)),
    aten.sinh: lambda w, a: w.emit("mul", w.emit("sub", w.emit("exp", a), w.emit("exp", w.emit("neg", a))), 0.5),
    aten.cosh: lambda w, a: w.emit("mul", w.emit("add", w.emit("exp", a), w.emit("exp", w.emit("neg", a))), 0.5),
    aten.zeros_like: lambda w, a: w.emit("copy", 0.0),
    aten.ones_like: lambda w, a: w.emit("copy", 1.0),
    aten.full_like: lambda w, a, value: w.emit("copy", value),
}


_LIKE = (aten.zeros_like, aten.ones_like, aten.full_like)


def is_elementwise(kind: Any) -> bool:
    return kind in NAMED or kind in COMPOSED


def is_logical(kind: Any) -> bool:
    """On truth values alone: on integers these mean something else."""
    return kind in (aten.bitwise_not, aten.bitwise_and, aten.bitwise_or)


def write(w: Writer, kind: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Operand:
    if kind in NAMED:
        if named or (kind is aten.div and len(arguments) != 2):
            raise KeyError(kind)
        return w.emit(NAMED[kind], *arguments)
    if kind in _LIKE:
        named = {}  # dtype and device, which are the others'
    return COMPOSED[kind](w, *arguments, **named)


def number(node: fx.Node) -> float | None:
    """A constant that stands in the graph as a tensor."""
    kind = getattr(node.target, "overloadpacket", None)
    if kind is aten.full and isinstance(node.args[1], (bool, int, float)):
        return float(node.args[1])
    if kind is aten.scalar_tensor and isinstance(node.args[0], (bool, int, float)):
        return float(node.args[0])
    if kind in (aten.zeros, aten.ones):
        return float(kind is aten.ones)
    return None


def is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
