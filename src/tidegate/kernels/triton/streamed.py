# SPDX-License-Identifier: Apache-2.0
"""A sequence with the weights read anew at each step, from the L2 cache: K2, and K3, which is K2 by several programs.

Grid: (batch tiles, PROGRAMS). The programs of a tile deal its chunks of BLOCK_N units among them. What a step's product
reads of all units is exchanged through memory: forward, h in the tensors' dtype, two buffers in turns; backward, the
gate gradients themselves, each written once. What only its own unit needs is carried in ACC by whoever owns it. So a
step is: product of what was exchanged, pointwise, exchange, and one `synchronise`. With two buffers no second one is
needed: who writes h_{t+1} over h_{t-1} has seen all others publish h_t, which they made of h_{t-1}.

`first` and `count` say which steps a launch takes: all, or one at a time (SYNC "launch").
"""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.triton.common import (
    biases,
    fresh_rows,
    load_blocks,
    own_rows,
    product,
    recurrent_column,
    rows_at,
    store_blocks,
    synchronise,
    tile_of,
    time_of,
)


@triton.jit
def by_gates(
    source, w, accs, offsets, in_rows, units, H,
    GATES: tl.constexpr, BLOCK_K: tl.constexpr, SYNC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """accs + a W^T, gate by gate: a (rows, H), which begins at `offsets` of `source`."""
    for k in range(0, H, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        a = tl.load(
            source + offsets[:, None] + ks[None, :], mask=in_rows & (ks < H)[None, :], other=0.0,
            cache_modifier=".cg" if SYNC == "flags" else "",
        )  # fmt: skip
        in_weights = (units < H)[None, :] & (ks < H)[:, None]
        sums = ()
        for g in tl.static_range(GATES):
            b = tl.load(w + (g * H + units)[None, :] * H + ks[:, None], mask=in_weights, other=0.0)
            sums = sums + (product(a, b, accs[g], PRECISION, WIDEN),)
        accs = sums
    return accs


@triton.jit
def over_gates(
    source, w, acc, offsets, in_rows, units, H, bound,
    GATES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    SYNC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc + the sum over gates of a_g W_g: a_g (rows, H), H columns apart from `offsets` on. None if bound is 0."""
    for k in range(0, bound, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        in_source = in_rows & (ks < H)[None, :]
        in_weights = (ks < H)[:, None] & (units < H)[None, :]
        for g in tl.static_range(GATES):
            a = tl.load(
                source + offsets[:, None] + (recurrent_column(g, GATES, COLUMNS) * H + ks)[None, :],
                mask=in_source, other=0.0,
                cache_modifier=".cg" if SYNC == "flags" else "",
            )  # fmt: skip
            b = tl.load(w + (g * H + ks)[:, None] * H + units[None, :], mask=in_weights, other=0.0)
            acc = product(a, b, acc, PRECISION, WIDEN)
    return acc


@triton.jit(do_not_specialize=["T", "B", "first", "count"])
def forward(
    x, w, bias, lengths, resets, carry_h, carry_c, exchange, flags, out, kept,
    T, B, H, first, count,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, SKIP: tl.constexpr, HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr, FLAGS: tl.constexpr, SYNC: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """x (T, B, G*H) is the input's product; carry_h, carry_c (B, H) hold the initial states, and then the final ones;
    exchange (2, B, H) holds h_0 in its first half; kept (T, B, K*H), not written if KEPT is 0."""
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    program = tl.program_id(1)
    flags += tl.program_id(0) * PROGRAMS
    in_batch = (rows < B)[:, None]
    for step in range(first, tl.minimum(first + count, last)):
        t = time_of(step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        source = exchange + (step % 2) * B * H
        target = exchange + ((step + 1) % 2) * B * H
        for chunk in range(program, tl.cdiv(H, BLOCK_N), PROGRAMS):
            units = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask, at = tile_of(rows, units, B, H)
            accs = biases(bias, units, H, BLOCK_B, GATES, HAS_BIAS, ACC)
            accs = by_gates(
                source, w, accs, rows * H, in_batch & (fresh == 0), units, H, GATES, BLOCK_K, SYNC, PRECISION, WIDEN
            )
            xs = load_blocks(x, (place * GATES)[:, None] + units[None, :], mask & active, H, GATES, ACC)
            old_h = tl.load(carry_h + at, mask=mask, other=0.0)
            old_c = old_h
            if HAS_C:
                old_c = tl.load(carry_c + at, mask=mask, other=0.0)
            h, c, keep = CELL(xs, accs, tl.where(fresh, 0.0, old_h), tl.where(fresh, 0.0, old_c))
            store_blocks(out, place[:, None] + units[None, :], mask & active, H, (h,), 1)
            store_blocks(kept, (place * KEPT)[:, None] + units[None, :], mask & active, H, keep, KEPT, SKIP)
            h = tl.where(active, h, old_h)
            tl.store(carry_h + at, h, mask=mask)
            tl.store(target + at, h.to(exchange.dtype.element_ty), mask=mask)
            if HAS_C:
                tl.store(carry_c + at, tl.where(active, c, old_c), mask=mask)
        synchronise(flags, program, step + 1, PROGRAMS, FLAGS, SYNC, SPINS)


@triton.jit(do_not_specialize=["T", "B", "first", "count"])
def backward(
    w, kept, h_before, c_before, dout, lengths, resets, carry_h, carry_c, dgates, dh_0, flags,
    T, B, H, first, count,
    CELL: tl.constexpr, GATES: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr, HAS_C: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr, FLAGS: tl.constexpr, SYNC: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """carry_h, carry_c (B, H) hold the final states' gradients; carry_c then that of c_0. dgates (T, B, D*H) is zero
    wherever a row has no step. Step `last` is one more product, which gives dh_0."""
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    program = tl.program_id(1)
    flags += tl.program_id(0) * PROGRAMS
    in_batch = (rows < B)[:, None]
    for step in range(first, tl.minimum(first + count, last + 1)):
        t_done = time_of(last - step, last, REVERSE)
        cut = fresh_rows(resets, t_done, rows, valid, B, HAS_RESETS, REVERSE)[:, None]
        done = (t_done * B + rows).to(tl.int64) * (COLUMNS * H)
        bound = tl.where(step > 0, H, 0)
        t = time_of(last - 1 - step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        for chunk in range(program, tl.cdiv(H, BLOCK_N), PROGRAMS):
            units = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask, at = tile_of(rows, units, B, H)
            acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
            acc = over_gates(
                dgates, w, acc, done, in_batch & (cut == 0), units, H, bound,
                GATES, COLUMNS, BLOCK_K, SYNC, PRECISION, WIDEN,
            )  # fmt: skip
            dh = tl.load(carry_h + at, mask=mask, other=0.0) + acc
            if step < last:
                live = mask & active
                here = place[:, None] + units[None, :]
                keep = load_blocks(kept, (place * KEPT)[:, None] + units[None, :], live, H, KEPT, ACC)
                before = tl.load(h_before + here, mask=live, other=0.0).to(ACC)
                dc = acc
                old_c = acc
                if HAS_C:
                    dc = tl.load(carry_c + at, mask=mask, other=0.0)
                    old_c = tl.load(c_before + here, mask=live, other=0.0).to(ACC)
                dy = tl.load(dout + here, mask=live, other=0.0).to(ACC)
                found, direct, dc_new = CELL(dh + dy, dc, keep, before, old_c)
                store_blocks(dgates, (place * COLUMNS)[:, None] + units[None, :], live, H, found, COLUMNS)
                tl.store(carry_h + at, tl.where(active, tl.where(fresh, 0.0, direct), dh), mask=mask)
                if HAS_C:
                    tl.store(carry_c + at, tl.where(active, tl.where(fresh, 0.0, dc_new), dc), mask=mask)
            else:
                tl.store(dh_0 + at, dh.to(dh_0.dtype.element_ty), mask=mask)
        synchronise(flags, program, step + 1, PROGRAMS, FLAGS, SYNC, SPINS)
