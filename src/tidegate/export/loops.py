# SPDX-License-Identifier: Apache-2.0
"""Instructions that share a loop, as C."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tidegate.export.stages import Stages
from tidegate.export.text import number
from tidegate.fusion.program import Argument, Instruction, Operand

# Of one operand or more, as C; the runtime's function of the same name but for those with a form of their own.
_OPERATORS = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "muladd": "{} * {} + {}"}
_FORMS = {
    **_OPERATORS,
    "copy": "{}",
    "constant": "{}",
    "neg": "-{}",
    "reciprocal": "1.0f / {}",
    "abs": "absolute({})",
    "relu": "choose({0} <= 0.0f, SPLAT(0.0f), {0})",
    "maximum": "maximum({}, {})",
    "minimum": "minimum({}, {})",
    "where": "choose({} != 0.0f, {}, {})",
    "sign": "sign_({})",
    "pow": "pow_({}, {})",
    **{name: f"{name}_({{}})" for name in ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sigmoid", "tanh")},
    **{name: f"{name}_({{}})" for name in ("sin", "cos", "erf")},
    **{
        name: f"truth({{}} {sign} {{}})"
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("eq", "=="), ("ne", "!="))
    },
}
_PLAIN = {*_OPERATORS, "copy", "constant", "neg", "reciprocal"}  # those that are the same for one number
_SECTIONS = {"abs": "absolute", **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), "truth")}
_NAMED = {
    *("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sigmoid", "tanh", "sin", "cos", "erf", "pow", "sign"),
    *("maximum", "minimum"),
}


class Values(Protocol):
    """What a loop asks of the step that it is in."""

    stages: Stages

    def address(self, operand: Operand) -> str: ...

    def parameter(self, operand: Operand) -> Tensor: ...


class Loop:
    """What its instructions read is loaded first, what stays is stored last.

    Attributes:
        each: how many numbers a group has.
        sections: of the runtime, that it needs.
    """

    def __init__(self, values: Values, stage: list[int]) -> None:
        self.values, self.stage = values, stage
        self.instructions = {k: node for k in stage if isinstance(node := values.stages.nodes[k], Instruction)}
        self.head = self.instructions[stage[0]]
        self.each = self.head.size // self.head.groups
        operations = {instruction.operation for instruction in self.instructions.values()}
        self.is_scalar = self.each == 1 and operations <= _PLAIN
        self.sections = {_SECTIONS.get(name, name) for name in operations if name in _NAMED or name in _SECTIONS}
        if "clamp" in operations:
            self.sections |= {"maximum", "minimum"}
        if not self.is_scalar:
            self.sections.add("access")
        self.loads: list[str] = []
        self.names: dict[tuple[Operand, bool], str] = {}

    def lines(self) -> list[str]:
        kind = "float" if self.is_scalar else "vec"
        body = [f"const {kind} v{k} = {self._expression(self.instructions[k])};" for k in self.stage]
        homes = self.values.stages.homes
        stores = [self._store(k) for k in self.stage if k in homes]
        inside = [*self.loads, *body, *stores]
        groups, each = self.head.groups, self.each
        if not self.is_scalar:
            if each > 1:
                inside = [f"for (int i = 0; i < {each}; i += LANES) {{", *_indented(inside), "}"]
            else:
                inside = ["{", *_indented(inside), "}"]
        elif groups == 1:
            inside = ["{", *_indented(inside), "}"]
        if groups > 1:
            inside = [f"for (int g = 0; g < {groups}; ++g) {{", *_indented(inside), "}"]
        return _indented(inside)

    def _index(self, of_each: int) -> str:
        terms = [f"g * {of_each}" if of_each > 1 else "g"] if self.head.groups > 1 else []
        terms += ["i"] if of_each > 1 else []
        return " + ".join(terms)

    def _store(self, k: int) -> str:
        place = self.values.stages.homes[k]
        index = self._index(self.each)
        address = f"{place.base} + {place.offset}" + (f" + {index}" if index else "")
        if self.is_scalar:
            return f"*({address}) = v{k};"
        return f"store({address}, v{k}, {self._left()});"

    def _left(self) -> str:
        return f"{self.each} - i" if self.each > 1 else "1"

    def _value(self, argument: Argument) -> str:
        if not isinstance(argument, Operand):
            return self._spread(number(argument))
        if argument.bank == "v" and argument.number in self.stage:
            return f"v{argument.number}"
        whole = argument.size == self.head.size and self.head.size > 1
        of_group = not whole and argument.size == self.head.groups and self.head.groups > 1
        if not whole and not of_group and argument.bank == "p":
            return self._spread(number(float(self.values.parameter(argument))))
        key = (argument, whole)
        if key not in self.names:
            self.names[key] = f"{argument.bank}{argument.number}_{argument.offset}{'' if whole else '_one'}"
            self.loads.append(self._load(argument, whole, of_group))
        return self.names[key]

    def _load(self, operand: Operand, whole: bool, of_group: bool) -> str:
        name, address = self.names[(operand, whole)], self.values.address(operand)
        if self.is_scalar:
            index = self._index(1) if whole or of_group else "0"
            return f"const float {name} = ({address})[{index or '0'}];"
        if whole and self.each > 1:
            return f"const vec {name} = load({address} + {self._index(self.each)}, {self._left()});"
        index = self._index(1) if whole or of_group else ""
        return f"const vec {name} = SPLAT(({address})[{index or '0'}]);"

    def _spread(self, value: str) -> str:
        return value if self.is_scalar else f"SPLAT({value})"

    def _expression(self, instruction: Instruction) -> str:
        if instruction.operation == "clamp":
            value, low, high = instruction.operands
            text = self._value(value)
            if low != float("-inf"):
                text = f"maximum({text}, {self._value(low)})"
            return text if high == float("inf") else f"minimum({text}, {self._value(high)})"
        return _FORMS[instruction.operation].format(*map(self._value, instruction.operands))


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
