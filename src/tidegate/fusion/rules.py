# SPDX-License-Identifier: Apache-2.0
# They are what `Rule` says:
# pyright: reportUnknownLambdaType=false
"""The gradient of each instruction on numbers: a rule for each operand."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.fusion.builder import Builder
from tidegate.fusion.program import Argument, Instruction, Operand


class Through:
    """What a rule reads: the instruction's operands, its result, the gradient `d` of that; and what it writes with.

    Args:
        value: what an operand of the forward's is in the backward.
    """

    def __init__(
        self,
        builder: Builder,
        value: Callable[[Argument], Argument],
        instruction: Instruction,
        result: Operand,
        d: Operand,
    ) -> None:
        self._builder, self._value, self._instruction, self._result = builder, value, instruction, result
        self.d = d

    @property
    def a(self) -> Argument:
        return self._value(self._instruction.operands[0])

    @property
    def b(self) -> Argument:
        return self._value(self._instruction.operands[1])

    @property
    def c(self) -> Argument:
        return self._value(self._instruction.operands[2])

    @property
    def y(self) -> Argument:
        return self._value(self._result)

    def emit(self, operation: str, *operands: Argument) -> Operand:
        """Of the size of the instruction, unless all operands are smaller."""
        size, groups = self._instruction.size, self._instruction.groups
        builder = self._builder
        sizes = {operand.size for operand in operands if isinstance(operand, Operand)}
        if sizes <= {1}:
            return builder.emit(operation, *operands, size=1)
        if size not in sizes and sizes <= {1, groups}:
            return builder.emit(operation, *operands, size=groups)
        return builder.emit(operation, *operands, size=size, groups=groups)


Rule = Callable[[Through], Operand]


def _where(s: Through, condition: Argument, value: Argument) -> Operand:
    """The gradient where a condition holds, else 0."""
    return s.emit("where", condition, value, 0.0)


def _scaled(operation: str, other: Callable[[Through], Argument]) -> Rule:
    return lambda s: s.emit(operation, s.d, other(s))


def _tie(s: Through, mine: Argument, other: Argument, comparison: str) -> Operand:
    """Of the larger (smaller) of two: half of the gradient where they are equal."""
    half = s.emit("mul", s.emit("eq", mine, other), 0.5)
    return s.emit("mul", s.d, s.emit("add", s.emit(comparison, mine, other), half))


def _pow_base(s: Through) -> Operand:
    if isinstance(s.b, float):
        return s.emit("mul", s.d, s.emit("mul", s.emit("pow", s.a, s.b - 1.0), s.b))
    slope = s.emit("mul", s.emit("pow", s.a, s.emit("sub", s.b, 1.0)), s.b)
    return s.emit("where", s.emit("eq", s.b, 0.0), 0.0, s.emit("mul", s.d, slope))


def _pow_exponent(s: Through) -> Operand:
    is_flat = s.emit("mul", s.emit("eq", s.a, 0.0), s.emit("ge", s.b, 0.0))
    return s.emit("where", is_flat, 0.0, s.emit("mul", s.d, s.emit("mul", s.y, s.emit("log", s.a))))


_INVERSE_ROOT_PI = 1.1283791670955126  # 2 / sqrt(pi)

# For each operand of an instruction, what its gradient is; None for none.
RULES: dict[str, tuple[Rule | None, ...]] = {
    "copy": (lambda s: s.d,),
    "neg": (lambda s: s.emit("neg", s.d),),
    "abs": (lambda s: s.emit("mul", s.d, s.emit("sign", s.a)),),
    "exp": (_scaled("mul", lambda s: s.y),),
    "expm1": (lambda s: s.emit("mul", s.d, s.emit("add", s.y, 1.0)),),
    "log": (_scaled("div", lambda s: s.a),),
    "log1p": (lambda s: s.emit("div", s.d, s.emit("add", s.a, 1.0)),),
    "sqrt": (lambda s: s.emit("div", s.d, s.emit("add", s.y, s.y)),),
    "rsqrt": (lambda s: s.emit("mul", s.d, s.emit("mul", s.emit("mul", s.y, s.emit("mul", s.y, s.y)), -0.5)),),
    "reciprocal": (lambda s: s.emit("neg", s.emit("mul", s.d, s.emit("mul", s.y, s.y))),),
    "sigmoid": (_scaled("sigmoid_gradient", lambda s: s.y),),
    "tanh": (_scaled("tanh_gradient", lambda s: s.y),),
    # A NaN passes its gradient, as torch has it.
    "relu": (lambda s: s.emit("where", s.emit("le", s.y, 0.0), 0.0, s.d),),
    "sin": (lambda s: s.emit("mul", s.d, s.emit("cos", s.a)),),
    "cos": (lambda s: s.emit("neg", s.emit("mul", s.d, s.emit("sin", s.a))),),
    "erf": (
        lambda s: s.emit(
            "mul", s.d, s.emit("mul", s.emit("exp", s.emit("neg", s.emit("mul", s.a, s.a))), _INVERSE_ROOT_PI)
        ),
    ),
    "add": (lambda s: s.d, lambda s: s.d),
    "sub": (lambda s: s.d, lambda s: s.emit("neg", s.d)),
    "mul": (_scaled("mul", lambda s: s.b), _scaled("mul", lambda s: s.a)),
    "div": (
        _scaled("div", lambda s: s.b),
        lambda s: s.emit("neg", s.emit("mul", s.d, s.emit("div", s.y, s.b))),
    ),
    "maximum": (lambda s: _tie(s, s.a, s.b, "gt"), lambda s: _tie(s, s.b, s.a, "gt")),
    "minimum": (lambda s: _tie(s, s.a, s.b, "lt"), lambda s: _tie(s, s.b, s.a, "lt")),
    "pow": (_pow_base, _pow_exponent),
    "sigmoid_gradient": (
        lambda s: s.emit("sigmoid_gradient", s.d, s.b),  # the slope y (1 - y) times d
        lambda s: s.emit("mul", s.emit("mul", s.d, s.a), s.emit("sub", 1.0, s.emit("add", s.b, s.b))),
    ),
    "tanh_gradient": (
        lambda s: s.emit("tanh_gradient", s.d, s.b),
        lambda s: s.emit("mul", s.emit("mul", s.d, s.a), s.emit("mul", s.b, -2.0)),
    ),
    "where": (
        None,
        lambda s: _where(s, s.a, s.d),
        lambda s: s.emit("where", s.a, 0.0, s.d),
    ),
    "clamp": (
        lambda s: _where(s, s.emit("mul", s.emit("ge", s.a, s.b), s.emit("le", s.a, s.c)), s.d),
        None,
        None,
    ),
    "muladd": (_scaled("mul", lambda s: s.b), _scaled("mul", lambda s: s.a), lambda s: s.d),
    **dict.fromkeys(("sign", "constant"), (None,)),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), (None, None)),
}
