# SPDX-License-Identifier: Apache-2.0
"""Pieces of C text: the runtime's sections, numbers, tables."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

_RUNTIME = Path(__file__).parent / "runtime"
_HEAD = re.compile(r"/\*: (\w+)(?: : ([\w, ]+))? \*/\n")
_A_LINE = 12  # numbers


@cache
def _sections() -> dict[str, tuple[list[str], str]]:
    """By name, what a section needs and its text; in an order in which they can stand."""
    found: dict[str, tuple[list[str], str]] = {}
    for name in ("vectors.c", "functions.c"):
        parts = _HEAD.split((_RUNTIME / name).read_text(encoding="utf-8"))
        for section, needs, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            found[section] = ([need.strip() for need in needs.split(",")] if needs else [], text.strip("\n"))
    return found


def runtime(wanted: Iterable[str], with_types: bool = True) -> str:
    """The sections that are wanted and those that they need."""
    sections, needed = _sections(), {"types"} if with_types else set[str]()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += sections[name][0]
    return "\n\n".join(text for name, (_, text) in sections.items() if name in needed)


def number(value: float) -> str:
    """The nearest float32 as C has it: nine digits give every one back."""
    value = as_float32(value)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def table(kind: str, name: str, values: Sequence[str]) -> str:
    """A constant array."""
    lines = [", ".join(values[k : k + _A_LINE]) for k in range(0, len(values), _A_LINE)]
    return f"static const {kind} {name}[{len(values)}] = {{\n    " + ",\n    ".join(lines) + "\n};"


def floats(values: Tensor) -> list[str]:
    """As `number`, of many."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"expected finite numbers, got {values[~values.isfinite()][0]}")
    numbers = values.tolist()
    texts: list[str] = [*("%.9gf " * len(numbers) % tuple(numbers)).split()]
    for k in (values == values.round()).nonzero().flatten().tolist():  # C wants a point or an exponent
        texts[k] = number(numbers[k])
    return texts


def as_float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
