# SPDX-License-Identifier: Apache-2.0
"""Matrices by vectors in C, and how their weights lie.

The rows of a matrix are taken in panels of 32, then one of 16, of 8 and of 4 of those that are left. A panel's numbers
lie column by column, so that a column is a few vectors, whatever their width, and each number of the operand is read
once for a panel. The last one to three rows lie one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tidegate.export.text import runtime

WIDTHS = (32, 16, 8, 4)
_SUMS = 8  # in registers at once: what a machine with two multipliers of four cycles' latency wants


def panels(rows: int) -> list[int]:
    """The widths of a matrix's panels, the single rows at the end as 1."""
    found = [32] * (rows // 32)
    rest = rows % 32
    return [*found, *(width for width in (16, 8, 4) if rest & width), *[1] * (rest % 4)]


def laid_out(matrix: Tensor) -> Tensor:
    """(rows, columns) in the order in which it is read."""
    first, pieces = 0, list[Tensor]()
    for width in panels(matrix.shape[0]):
        pieces.append(matrix[first : first + width].t().flatten())
        first += width
    return torch.cat(pieces)


class Form(NamedTuple):
    """How a matrix's numbers are stored, as C.

    Attributes:
        suffix: of the functions' names.
        kind: of a number.
        vector: some of them, as a vector of floats.
        single: one, as a float.
    """

    suffix: str
    kind: str
    vector: str
    single: str


FLOAT = Form("", "float", "*(const near_vec{lanes} *)({at})", "{at}")
HALF = Form("_half", "uint16_t", "((vec{lanes})WIDE{lanes}({at}))", "wide({at})")


def source(form: Form, rows: Sequence[int]) -> str:
    """The C of `product` for matrices of so many rows."""
    widths = sorted({width for count in rows for width in panels(count)} - {1}, reverse=True)
    has_single = any(count % 4 for count in rows)
    parts: list[str] = []
    if form is HALF:
        single = runtime(["half"], with_types=False)
        parts.append(single if has_single else f"#if LANES == 1\n{single}\n#endif")
    if widths:
        for place, lanes in enumerate((16, 8, 4)):
            condition = f"#if LANES == {lanes}" if place == 0 else f"#elif LANES == {lanes}"
            parts.append("\n\n".join([condition, *(_panel(form, width, min(width, lanes)) for width in widths)]))
        parts.append(_filled(_PLAIN, form))
    calls = [_filled(_WIDEST if width == 32 else _CALL, form).replace("@WIDTH@", str(width)) for width in widths]
    body = "\n".join(["#if LANES > 1", *calls, "#else", _filled(_PLAIN_CALLS, form), "#endif"]) + "\n" if widths else ""
    single = (_SINGLE_HALF if form is HALF else _SINGLE) if has_single else ""
    parts.append(_filled(_PRODUCT, form).replace("@BODY@", body).replace("@SINGLE@", single))
    return "\n\n".join(parts)


def _filled(text: str, form: Form) -> str:
    text = text.replace("@SUFFIX@", form.suffix).replace("@KIND@", form.kind)
    for k in range(4):
        text = text.replace(f"@W{k}@", form.single.format(at=f"w[{k}]"))
    return text


def _panel(form: Form, width: int, lanes: int) -> str:
    """A panel's sums in registers, over several columns at once where a column alone has too few."""
    count = width // lanes
    columns = max(1, _SUMS // count)
    vec, near = f"vec{lanes}", f"near_vec{lanes}"
    sums = [f"s{r}" for r in range(count)]

    def at(offset: int) -> str:
        return form.vector.format(lanes=lanes, at=f"w + {offset}" if offset else "w")

    lines = [
        f"static inline void rows_{width}{form.suffix}(const {form.kind} *w, const float *x, int n,",
        "                           const float *x2, int n2, const float *bias, float *y)",
        "{",
        f"    const {vec} zero = {{0}};",
    ]
    names = [*sums, *(f"{s}_{c}" for c in range(1, columns) for s in sums)]
    lines.append(f"    {vec} {', '.join(f'{name} = zero' for name in names)};")
    lines.append("    if (bias) {")
    lines += [f"        {s} = *(const {near} *)(bias + {r * lanes});" for r, s in enumerate(sums)]
    lines.append("    }")
    lines.append("    for (int piece = 0; piece < 2; ++piece, x = x2, n = n2) {")
    lines.append("        int j = 0;")
    if columns > 1:
        lines.append(f"        for (; j + {columns} <= n; j += {columns}, w += {columns * width}) {{")
        for c in range(columns):
            for r, s in enumerate(sums):
                name = f"{s}_{c}" if c else s
                lines.append(f"            {name} += x[j + {c}] * {at(c * width + r * lanes)};")
        lines.append("        }")
    lines.append(f"        for (; j < n; ++j, w += {width}) {{")
    lines += [f"            {s} += x[j] * {at(r * lanes)};" for r, s in enumerate(sums)]
    lines += ["        }", "    }"]
    for r, s in enumerate(sums):
        terms = [s, *(f"{s}_{c}" for c in range(1, columns))]
        while len(terms) > 1:
            terms = [f"({a} + {b})" for a, b in zip(terms[::2], terms[1::2], strict=True)]
        lines.append(f"    *({near} *)(y + {r * lanes}) = {terms[0]};")
    return "\n".join([*lines, "}"])


_PLAIN = """\
#else
/* Four rows of a panel. */
static void rows_4@SUFFIX@(const @KIND@ *w, int width, const float *x, int n, const float *x2, int n2,
                   const float *bias, float *y)
{
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    if (bias) s0 = bias[0], s1 = bias[1], s2 = bias[2], s3 = bias[3];
    for (int piece = 0; piece < 2; ++piece, x = x2, n = n2) {
        for (int j = 0; j < n; ++j, w += width) {
            const float value = x[j];
            s0 += value * @W0@;
            s1 += value * @W1@;
            s2 += value * @W2@;
            s3 += value * @W3@;
        }
    }
    y[0] = s0;
    y[1] = s1;
    y[2] = s2;
    y[3] = s3;
}
#endif"""

_WIDEST = """\
    for (; r + @WIDTH@ <= rows; r += @WIDTH@, w += @WIDTH@ * columns)
        rows_@WIDTH@@SUFFIX@(w, x, n, x2, n2, bias ? bias + r : bias, y + r);"""

_CALL = """\
    if (r + @WIDTH@ <= rows) {
        rows_@WIDTH@@SUFFIX@(w, x, n, x2, n2, bias ? bias + r : bias, y + r);
        r += @WIDTH@;
        w += @WIDTH@ * columns;
    }"""

_PLAIN_CALLS = """\
    for (int width = 32; width >= 4; width /= 2)
        for (; r + width <= rows; w += width * columns)
            for (int part = 0; part < width; part += 4, r += 4)
                rows_4@SUFFIX@(w + part, width, x, n, x2, n2, bias ? bias + r : bias, y + r);"""

_SINGLE = """\
    for (int left = rows % 4; left > 0; --left, ++r, w += columns)
        y[r] = dot_of(w, x, n) + dot_of(w + n, x2, n2) + (bias ? bias[r] : 0.0f);
"""

_SINGLE_HALF = """\
    for (int left = rows % 4; left > 0; --left, ++r, w += columns) {
        float sum = bias ? bias[r] : 0.0f;
        for (int j = 0; j < columns; ++j) sum += (j < n ? x[j] : x2[j - n]) * wide(w[j]);
        y[r] = sum;
    }
"""

_PRODUCT = """\
/* y = W [x; x2] + bias, of n and n2 numbers; bias may be 0. */
static void product@SUFFIX@(const @KIND@ *w, const float *x, int n, const float *x2, int n2, const float *bias,
                    float *y, int rows)
{
    const int columns = n + n2;
    int r = 0;
@BODY@@SINGLE@}"""
