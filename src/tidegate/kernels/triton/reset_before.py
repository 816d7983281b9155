# SPDX-License-Identifier: Apache-2.0
"""The GRU with the reset before the product: two products a step, the second of r h, in both kinds of kernel.

Grids, buffers and arguments as in resident.py and streamed.py. Streamed, r h is exchanged like h, in one buffer: who
writes it again has been through the synchronisation at the step's end. Backward, the gradient of r h is the product of
dn, that of h the product of dr and dz.
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
    rows_at,
    store_blocks,
    synchronise,
    tile_of,
    time_of,
)
from tidegate.kernels.triton.gru import backward_candidate, backward_reset, gates_before, state_before
from tidegate.kernels.triton.resident import weights
from tidegate.kernels.triton.streamed import by_gates, over_gates


@triton.jit(do_not_specialize=["T", "B"])
def resident_forward(
    x, w, bias, lengths, resets, h_0, h_n, out, kept,
    T, B, H,
    KEPT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr,
    REVERSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    units = tl.arange(0, BLOCK_H)
    mask, at = tile_of(rows, units, B, H)
    w_r, w_z, w_n = weights(w, H, 3, BLOCK_H, True)
    b_r, b_z, b_n = biases(bias, units, H, BLOCK_B, 3, HAS_BIAS, ACC)
    h = tl.load(h_0 + at, mask=mask, other=0.0).to(ACC)
    for step in range(0, last):
        t = time_of(step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        live = mask & active
        x_r, x_z, x_n = load_blocks(x, (place * 3)[:, None] + units[None, :], live, H, 3, ACC)
        entering = tl.where(fresh, 0.0, h)
        a = entering.to(w.dtype.element_ty)
        r, z = gates_before(x_r, x_z, product(a, w_r, b_r, PRECISION, WIDEN), product(a, w_z, b_z, PRECISION, WIDEN))
        a = (r * entering).to(w.dtype.element_ty)
        new, n = state_before(x_n, product(a, w_n, b_n, PRECISION, WIDEN), z, entering)
        store_blocks(out, place[:, None] + units[None, :], live, H, (new,), 1)
        store_blocks(kept, (place * KEPT)[:, None] + units[None, :], live, H, (r, z, n), KEPT)
        h = tl.where(active, new, h)
    store_blocks(h_n, at, mask, H, (h,), 1)


@triton.jit(do_not_specialize=["T", "B"])
def resident_backward(
    w, kept, h_before, dout, lengths, resets, dh_n, dgates, dh_0,
    T, B, H,
    HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    units = tl.arange(0, BLOCK_H)
    mask, at = tile_of(rows, units, B, H)
    w_r, w_z, w_n = weights(w, H, 3, BLOCK_H, False)
    dh = tl.load(dh_n + at, mask=mask, other=0.0).to(ACC)
    for step in range(0, last):
        t = time_of(last - 1 - step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        here = place[:, None] + units[None, :]
        live = mask & active
        r, z, n = load_blocks(kept, (place * 3)[:, None] + units[None, :], live, H, 3, ACC)
        before = tl.load(h_before + here, mask=live, other=0.0).to(ACC)
        dy = tl.load(dout + here, mask=live, other=0.0).to(ACC)
        dn, dz, direct = backward_candidate(dh + dy, z, n, before)
        dreset = product(dn.to(w.dtype.element_ty), w_n, tl.zeros_like(dh), PRECISION, WIDEN)
        dr, by_reset = backward_reset(dreset, r, before)
        store_blocks(dgates, (place * 3)[:, None] + units[None, :], live, H, (dr, dz, dn), 3)
        direct = product(dr.to(w.dtype.element_ty), w_r, direct + by_reset, PRECISION, WIDEN)
        direct = product(dz.to(w.dtype.element_ty), w_z, direct, PRECISION, WIDEN)
        dh = tl.where(active, tl.where(fresh, 0.0, direct), dh)
    store_blocks(dh_0, at, mask, H, (dh,), 1)


@triton.jit(do_not_specialize=["T", "B", "first", "count"])
def streamed_forward(
    x, w, bias, lengths, resets, carry_h, gate_z, exchange, reset_h, flags, out, kept,
    T, B, H, first, count,
    KEPT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr,
    REVERSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr, FLAGS: tl.constexpr, SYNC: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """gate_z (B, H) in ACC and reset_h (B, H) hold z and r h from a step's first part to its second. `first` and
    `count` are of half steps."""
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    program = tl.program_id(1)
    flags += tl.program_id(0) * PROGRAMS
    in_batch = (rows < B)[:, None]
    for half in range(first, tl.minimum(first + count, 2 * last)):
        step = half // 2
        t = time_of(step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        source = exchange + (step % 2) * B * H
        target = exchange + ((step + 1) % 2) * B * H
        in_product = in_batch & (fresh == 0)
        for chunk in range(program, tl.cdiv(H, BLOCK_N), PROGRAMS):
            units = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask, at = tile_of(rows, units, B, H)
            live = mask & active
            here = (place * 3)[:, None] + units[None, :]
            keep = (place * KEPT)[:, None] + units[None, :]
            old = tl.load(carry_h + at, mask=mask, other=0.0)
            entering = tl.where(fresh, 0.0, old)
            if half % 2 == 0:
                b_rz = biases(bias, units, H, BLOCK_B, 2, HAS_BIAS, ACC)
                a_r, a_z = by_gates(source, w, b_rz, rows * H, in_product, units, H, 2, BLOCK_K, SYNC, PRECISION, WIDEN)
                x_r, x_z = load_blocks(x, here, live, H, 2, ACC)
                r, z = gates_before(x_r, x_z, a_r, a_z)
                if KEPT > 0:
                    store_blocks(kept, keep, live, H, (r, z), 2)
                tl.store(gate_z + at, z, mask=mask)
                tl.store(reset_h + at, (r * entering).to(reset_h.dtype.element_ty), mask=mask)
            else:
                b_n = biases(bias + 2 * H, units, H, BLOCK_B, 1, HAS_BIAS, ACC)
                (a_n,) = by_gates(
                    reset_h, w + 2 * H * H, b_n, rows * H, in_product, units, H, 1, BLOCK_K, SYNC, PRECISION, WIDEN
                )
                (x_n,) = load_blocks(x, here + 2 * H, live, H, 1, ACC)
                new, n = state_before(x_n, a_n, tl.load(gate_z + at, mask=mask, other=0.0), entering)
                if KEPT > 0:
                    store_blocks(kept, keep + 2 * H, live, H, (n,), 1)
                store_blocks(out, place[:, None] + units[None, :], live, H, (new,), 1)
                new = tl.where(active, new, old)
                tl.store(carry_h + at, new, mask=mask)
                tl.store(target + at, new.to(exchange.dtype.element_ty), mask=mask)
        synchronise(flags, program, half + 1, PROGRAMS, FLAGS, SYNC, SPINS)


@triton.jit(do_not_specialize=["T", "B", "first", "count"])
def streamed_backward(
    w, kept, h_before, dout, lengths, resets, carry_h, dgates, dh_0, flags,
    T, B, H, first, count,
    HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr, FLAGS: tl.constexpr, SYNC: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    """Half steps: the product of the step before and what is pointwise down to dn and dz; then from dn to dr."""
    rows, valid, last = own_rows(lengths, T, B, BLOCK_B, HAS_LENGTHS)
    program = tl.program_id(1)
    flags += tl.program_id(0) * PROGRAMS
    in_batch = (rows < B)[:, None]
    for half in range(first, tl.minimum(first + count, 2 * last + 1)):
        step = half // 2
        t_done = time_of(last - step, last, REVERSE)
        cut = fresh_rows(resets, t_done, rows, valid, B, HAS_RESETS, REVERSE)[:, None]
        done = (t_done * B + rows).to(tl.int64) * (3 * H)  # dr and dz
        bound = tl.where(step > 0, H, 0)
        t = time_of(last - 1 - step, last, REVERSE)
        active, fresh, place = rows_at(t, rows, valid, resets, B, H, HAS_RESETS, REVERSE)
        for chunk in range(program, tl.cdiv(H, BLOCK_N), PROGRAMS):
            units = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask, at = tile_of(rows, units, B, H)
            live = mask & active
            here = (place * 3)[:, None] + units[None, :]
            acc = tl.zeros((BLOCK_B, BLOCK_N), ACC)
            dh = tl.load(carry_h + at, mask=mask, other=0.0)
            if half % 2 == 0:
                acc = over_gates(
                    dgates, w, acc, done, in_batch & (cut == 0), units, H, bound, 2, 2, BLOCK_K, SYNC, PRECISION, WIDEN
                )
                dh += acc
                if step < last:
                    z, n = load_blocks(kept, here + H, live, H, 2, ACC)
                    before = tl.load(h_before + place[:, None] + units[None, :], mask=live, other=0.0).to(ACC)
                    dy = tl.load(dout + place[:, None] + units[None, :], mask=live, other=0.0).to(ACC)
                    dn, dz, direct = backward_candidate(dh + dy, z, n, before)
                    store_blocks(dgates, here + 2 * H, live, H, (dn,), 1)
                    store_blocks(dgates, here + H, live, H, (dz,), 1)
                    tl.store(carry_h + at, tl.where(active, direct, dh), mask=mask)
                else:
                    tl.store(dh_0 + at, dh.to(dh_0.dtype.element_ty), mask=mask)
            else:
                of_candidate = (t * B + rows).to(tl.int64) * (3 * H) + 2 * H
                dreset = over_gates(
                    dgates, w + 2 * H * H, acc, of_candidate, in_batch & active, units, H, H,
                    1, 1, BLOCK_K, SYNC, PRECISION, WIDEN,
                )  # fmt: skip
                (r,) = load_blocks(kept, here, live, H, 1, ACC)
                before = tl.load(h_before + place[:, None] + units[None, :], mask=live, other=0.0).to(ACC)
                dr, by_reset = backward_reset(dreset, r, before)
                store_blocks(dgates, here, live, H, (dr,), 1)
                tl.store(carry_h + at, tl.where(active, tl.where(fresh, 0.0, dh + by_reset), dh), mask=mask)
        synchronise(flags, program, half + 1, PROGRAMS, FLAGS, SYNC, SPINS)
