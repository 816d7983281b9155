# SPDX-License-Identifier: Apache-2.0
"""One step's pointwise part by itself, over any number of rows: after torch's products, for cells called step by step
and for gates that a backward computes again from all h_{t-1} at once.

Grid: (row tiles, unit tiles). Rows are N: B, or T*B.
"""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.triton.common import load_blocks, store_blocks
from tidegate.kernels.triton.gru import gates_before, state_before


@triton.jit(do_not_specialize=["N"])
def forward(
    x, a, h, c, out, c_n, kept, N, H,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, HAS_C: tl.constexpr, ACC: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x, a (N, G*H): the input's and the recurrent product, biases added; h, c (N, H) before; out, c_n after."""
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    units = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < N) & (units < H)
    xs = load_blocks(x, rows * (GATES * H) + units, mask, H, GATES, ACC)
    accs = load_blocks(a, rows * (GATES * H) + units, mask, H, GATES, ACC)
    at = rows * H + units
    old_h = tl.load(h + at, mask=mask, other=0.0).to(ACC)
    old_c = old_h
    if HAS_C:
        old_c = tl.load(c + at, mask=mask, other=0.0).to(ACC)
    new_h, new_c, keep = CELL(xs, accs, old_h, old_c)
    store_blocks(out, at, mask, H, (new_h,), 1)
    if HAS_C:
        store_blocks(c_n, at, mask, H, (new_c,), 1)
    store_blocks(kept, rows * (KEPT * H) + units, mask, H, keep, KEPT)


@triton.jit(do_not_specialize=["N"])
def reset_before(
    x, a, h, out, kept, N, H,
    SECOND: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The GRU with the reset before the product, in two parts. First: a (N, 2*H), out becomes r h, kept (N, 3*H)
    receives r and z. Second: a (N, H), out becomes h', kept gives z and receives n."""
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    units = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < N) & (units < H)
    wide = rows * (3 * H) + units
    old = tl.load(h + rows * H + units, mask=mask, other=0.0).to(ACC)
    if SECOND:
        (x_n,) = load_blocks(x, wide + 2 * H, mask, H, 1, ACC)
        (a_n,) = load_blocks(a, rows * H + units, mask, H, 1, ACC)
        (z,) = load_blocks(kept, wide + H, mask, H, 1, ACC)
        new, n = state_before(x_n, a_n, z, old)
        store_blocks(kept, wide + 2 * H, mask, H, (n,), 1)
    else:
        x_r, x_z = load_blocks(x, wide, mask, H, 2, ACC)
        a_r, a_z = load_blocks(a, rows * (2 * H) + units, mask, H, 2, ACC)
        r, z = gates_before(x_r, x_z, a_r, a_z)
        store_blocks(kept, wide, mask, H, (r, z), 2)
        new = r * old
    store_blocks(out, rows * H + units, mask, H, (new,), 1)
