# SPDX-License-Identifier: Apache-2.0
"""What every kernel of this package shares: activations, which rows are live at a step, loads, products.

Letters as in cell.py: T steps, B rows, H hidden_size, G gates; also K kept values a unit, D columns of gate gradients
a unit. Every (T, B, n*H) tensor is contiguous. A tile is rows (BLOCK_B) by units (BLOCK_N or BLOCK_H), masked at the
edges, so H need be no power of two. Values are computed in ACC (float32) and fed to the matrix unit in the tensors'
dtype. Offsets into (T, B, n*H) are 64-bit.

A cell is three functions over tuples of tiles, in its own file:

    forward(xs, accs, h, c) -> (new h, new c, kept)
    backward(dh, dc, kept, h_before, c_before) -> (dgates, dh_before without the product, dc_before)

xs: the G gates' input products; accs: their recurrent products with bias_hh; dgates: D tiles, the last G of them those
of the input products; those of the recurrent products are at `recurrent_column`. A cell without c passes it through.
"""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never above 1
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x >= 0, far, -far)
    if x.dtype == tl.float64:
        return far
    # 1 - e cancels near 0: there the series, whose next term is below 2e-8 of the value.
    y = x * x
    near = -0.3333333333 + y * (0.1333333333 + y * (-0.05396825397 + y * (0.02186948854 - y * 0.008863235530)))
    return tl.where(tl.abs(x) < 0.35, x + x * y * near, far)


@triton.jit
def own_rows(lengths, T, B, BLOCK_B: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """This program's rows, their valid steps, 0 for rows past B, and the longest: the steps that it has to take."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    if HAS_LENGTHS:
        valid = tl.load(lengths + rows, mask=rows < B, other=0).to(tl.int32)
    else:
        valid = tl.where(rows < B, T, 0)
    return rows, valid, tl.max(valid, 0)


@triton.jit
def tile_of(rows, units, B, H):
    """Which elements of rows by units there are, and where they lie in (B, H)."""
    return (rows < B)[:, None] & (units < H)[None, :], rows[:, None] * H + units[None, :]


@triton.jit
def time_of(step, last, REVERSE: tl.constexpr):
    """The time index of a tile's step number `step` out of `last`. The backward walks in the other direction."""
    if REVERSE:
        t = last - 1 - step
    else:
        t = step
    return t


@triton.jit
def fresh_rows(resets, t, rows, valid, B, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr):
    """Rows whose state entering step t is zero: marked at t or, in reverse, marked at t + 1 within their length."""
    if HAS_RESETS:
        marked = t + REVERSE
        mark = tl.load(resets + marked.to(tl.int64) * B + rows, mask=(rows < B) & (marked < valid), other=0)
        fresh = (mark != 0) & (t < valid)
    else:
        fresh = rows < 0
    return fresh


@triton.jit
def rows_at(t, rows, valid, resets, B, H, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr):
    """Which rows have a step at time t and which are fresh there, a column each; where they begin in (T, B, H)."""
    fresh = fresh_rows(resets, t, rows, valid, B, HAS_RESETS, REVERSE)
    return (t < valid)[:, None], fresh[:, None], (t * B + rows).to(tl.int64) * H


@triton.jit
def load_blocks(pointer, offsets, mask, H, COUNT: tl.constexpr, ACC: tl.constexpr):
    """COUNT tiles, H columns apart, in ACC."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(pointer + offsets + i * H, mask=mask, other=0.0).to(ACC),)
    return tiles


@triton.jit
def store_blocks(pointer, offsets, mask, H, tiles, COUNT: tl.constexpr, SKIP=0):
    """COUNT tiles after the first SKIP, H columns apart."""
    for i in tl.static_range(COUNT):
        tl.store(pointer + offsets + i * H, tiles[SKIP + i].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def biases(bias, units, H, ROWS: tl.constexpr, GATES: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """The accumulators before the recurrent product: bias_hh of each gate, (ROWS, units)."""
    tiles = ()
    for g in tl.static_range(GATES):
        tile = tl.zeros((ROWS, units.shape[0]), ACC)
        if HAS_BIAS:
            tile += tl.load(bias + g * H + units, mask=units < H, other=0.0).to(ACC)[None, :]
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a @ b, both in the tensors' dtype. WIDEN: the interpreter multiplies bfloat16 as the integers it keeps."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.constexpr_function
def recurrent_column(gate, gates, columns):
    """Which of the gate gradients is that of a gate's recurrent product: of the GRU's four the last gate's is first."""
    return gate if columns == gates else (gate + 1) % gates


@triton.jit
def poll(flags):
    """An acquiring load: what was written before the release that it sees is visible after it."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [flags], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def trap(value):
    """Ends the kernel with an error."""
    tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def synchronise(
    flags, program, done, PROGRAMS: tl.constexpr, FLAGS: tl.constexpr, SYNC: tl.constexpr, SPINS: tl.constexpr
):
    """Make what the programs of one batch group wrote before it visible to all of them after it.

    SYNC: "launch", the end of the kernel does it; "block", one program a group, so that the barrier among its threads
    does; "flags", the programs run at once, and each tells the others by a counter of its own, `flags[program]`,
    how many times it was here: released by one thread after the barrier, acquired by all. It waits for SPINS looks at
    most and then traps; for none under the interpreter, which runs one program at a time.
    """
    if SYNC != "launch":
        tl.debug_barrier()
    if SYNC == "flags":
        tl.atomic_xchg(flags + program, done, sem="release", scope="gpu")
        if SPINS > 0:
            others = flags + tl.minimum(tl.arange(0, FLAGS), PROGRAMS - 1)
            lowest = tl.min(poll(others), 0)
            spins = 0
            while lowest < done:
                lowest = tl.min(poll(others), 0)
                spins += 1
                if spins == SPINS:
                    trap(spins)
        # No thread may run ahead of another's acquire.
        tl.debug_barrier()
