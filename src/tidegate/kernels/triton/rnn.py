# SPDX-License-Identifier: Apache-2.0
"""The RNN: h' = tanh(x + a) or relu(x + a). Kept: nothing but the output. Source: cell.py."""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.triton.common import tanh


@triton.jit
def forward_tanh(xs, accs, h, c):
    new = tanh(xs[0] + accs[0])
    return new, c, (new,)


@triton.jit
def forward_relu(xs, accs, h, c):
    new = tl.maximum(xs[0] + accs[0], 0.0, propagate_nan=tl.PropagateNan.ALL)
    return new, c, (new,)


@triton.jit
def backward_tanh(dh, dc, kept, h_before, c_before):
    return (dh * (1.0 - kept[0] * kept[0]),), tl.zeros_like(dh), dc


@triton.jit
def backward_relu(dh, dc, kept, h_before, c_before):
    return (tl.where(kept[0] > 0, dh, 0.0),), tl.zeros_like(dh), dc
