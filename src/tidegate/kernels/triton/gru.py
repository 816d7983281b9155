# SPDX-License-Identifier: Apache-2.0
"""The GRU: h' = (1 - z) n + z h, in both reset forms. Source: cell.py.

Reset after: n = tanh(x_n + r a_n). Kept: r z n a_n. Gate gradients: a_n r z n: those of the input's product
are the last three, those of the recurrent one the first three, each contiguous.

Reset before: n = tanh(x_n + W_hn (r h) + b_hn): two products a step, and two parts. Kept: r z n. Gate gradients: r z n.
"""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.triton.common import sigmoid, tanh


@triton.jit
def forward(xs, accs, h, c):
    r = sigmoid(xs[0] + accs[0])
    z = sigmoid(xs[1] + accs[1])
    n = tanh(xs[2] + r * accs[2])
    return tl.fma(z, h - n, n), c, (r, z, n, accs[2])


@triton.jit
def backward(dh, dc, kept, h_before, c_before):
    r, z, n, a_n = kept
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (h_before - n) * z * (1.0 - z)
    dr = dn * a_n * r * (1.0 - r)
    return (dn * r, dr, dz, dn), dh * z, dc


@triton.jit
def gates_before(x_r, x_z, a_r, a_z):
    """r and z, from the first product."""
    return sigmoid(x_r + a_r), sigmoid(x_z + a_z)


@triton.jit
def state_before(x_n, a_n, z, h):
    """h' and n, from the second product, W_hn (r h) + b_hn."""
    n = tanh(x_n + a_n)
    return tl.fma(z, h - n, n), n


@triton.jit
def backward_candidate(dh, z, n, h_before):
    """dn and dz, and what reaches h without a product."""
    return dh * (1.0 - z) * (1.0 - n * n), dh * (h_before - n) * z * (1.0 - z), dh * z


@triton.jit
def backward_reset(dreset, r, h_before):
    """From the gradient of r h: dr, and what reaches h by it."""
    return dreset * h_before * r * (1.0 - r), dreset * r
