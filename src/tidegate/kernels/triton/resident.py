# SPDX-License-Identifier: Apache-2.0
"""A sequence with the recurrent weights resident: K1, for small H.

Grid: (batch tiles,). A program has every unit of its rows, so that states and weights stay in its registers and shared
memory from the first step to the last, and nothing is exchanged with anyone.
"""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.triton.common import (
    biases,
    load_blocks,
    own_rows,
    product,
    recurrent_column,
    rows_at,
    store_blocks,
    tile_of,
    time_of,
)


@triton.jit
def weights(w, H, GATES: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Each gate's (H, H) block, or its transpose: what comes in by what goes out."""
    inner = tl.arange(0, BLOCK_H)[:, None]
    outer = tl.arange(0, BLOCK_H)[None, :]
    at = outer * H + inner if TRANSPOSED else inner * H + outer
    tiles = ()
    for g in tl.static_range(GATES):
        tiles = tiles + (tl.load(w + g * H * H + at, mask=(inner < H) & (outer < H), other=0.0),)
    return tiles


@triton.jit(do_not_specialize=["T", "B"])
def forward(
    x, w, bias, lengths, resets, h_0, c_0, h_n, c_n, out, kept,
    T, B, H,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, SKIP: tl.constexpr, HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """As streamed.forward, but that the states are read and written in the tensors' dtype, once."""
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    units = tl.arange(0, BLOCK_H)
    mask, at = tile_of(rows, units, B, H)
    blocks = weights(w, H, GATES, BLOCK_H, True)
    bias_tiles = biases(bias, units, H, BLOCK_B, GATES, HAS_BIAS, ACC)
    h = tl.load(h_0 + at, mask=mask, other=0.0).to(ACC)
    c = h
    if HAS_C:
        c = tl.load(c_0 + at, mask=mask, other=0.0).to(ACC)
    for step in range(0, last):
        t = time_of(step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        xs = load_blocks(x, (place * GATES)[:, None] + units[None, :], mask & active, H, GATES, ACC)
        entering = tl.where(fresh, 0.0, h)
        a = entering.to(w.dtype.element_ty)
        accs = ()
        for g in tl.static_range(GATES):
            accs = accs + (product(a, blocks[g], bias_tiles[g], PRECISION, WIDEN),)
        new_h, new_c, keep = CELL(xs, accs, entering, tl.where(fresh, 0.0, c))
        store_blocks(out, place[:, None] + units[None, :], mask & active, H, (new_h,), 1)
        store_blocks(kept, (place * KEPT)[:, None] + units[None, :], mask & active, H, keep, KEPT, SKIP)
        h = tl.where(active, new_h, h)
        if HAS_C:
            c = tl.where(active, new_c, c)
    store_blocks(h_n, at, mask, H, (h,), 1)
    if HAS_C:
        store_blocks(c_n, at, mask, H, (c,), 1)


@triton.jit(do_not_specialize=["T", "B"])
def backward(
    w, kept, h_before, c_before, dout, lengths, resets, dh_n, dc_n, dgates, dh_0, dc_0,
    T, B, H,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr, HAS_C: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dgates (T, B, D*H) is not written where a row has no step."""
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    units = tl.arange(0, BLOCK_H)
    mask, at = tile_of(rows, units, B, H)
    blocks = weights(w, H, GATES, BLOCK_H, False)
    dh = tl.load(dh_n + at, mask=mask, other=0.0).to(ACC)
    dc = tl.zeros_like(dh)
    if HAS_C:
        dc = tl.load(dc_n + at, mask=mask, other=0.0).to(ACC)
    for step in range(0, last):
        t = time_of(last - 1 - step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        here = place[:, None] + units[None, :]
        live = mask & active
        keep = load_blocks(kept, (place * KEPT)[:, None] + units[None, :], live, H, KEPT, ACC)
        before = tl.load(h_before + here, mask=live, other=0.0).to(ACC)
        old_c = before
        if HAS_C:
            old_c = tl.load(c_before + here, mask=live, other=0.0).to(ACC)
        dy = tl.load(dout + here, mask=live, other=0.0).to(ACC)
        found, direct, new_dc = CELL(dh + dy, dc, keep, before, old_c)
        store_blocks(dgates, (place * COLUMNS)[:, None] + units[None, :], live, H, found, COLUMNS)
        for g in tl.static_range(GATES):
            a = found[recurrent_column(g, GATES, COLUMNS)].to(w.dtype.element_ty)
            direct = product(a, blocks[g], direct, PRECISION, WIDEN)
        dh = tl.where(active, tl.where(fresh, 0.0, direct), dh)
        if HAS_C:
            dc = tl.where(active, tl.where(fresh, 0.0, new_dc), dc)
    store_blocks(dh_0, at, mask, H, (dh,), 1)
    if HAS_C:
        store_blocks(dc_0, at, mask, H, (dc,), 1)
