# SPDX-License-Identifier: Apache-2.0
"""The LSTM: c' = f c + i g; h' = o tanh(c'). Kept: i f g o c'. Source: cell.py."""

# Triton's language is untyped, and what its compiler does with a function is not what Python would.
# pyright: basic, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.triton.common import sigmoid, tanh


@triton.jit
def forward(xs, accs, h, c):
    i = sigmoid(xs[0] + accs[0])
    f = sigmoid(xs[1] + accs[1])
    g = tanh(xs[2] + accs[2])
    o = sigmoid(xs[3] + accs[3])
    new = f * c + i * g
    return o * tanh(new), new, (i, f, g, o, new)


@triton.jit
def backward(dh, dc, kept, h_before, c_before):
    i, f, g, o, c = kept
    squashed = tanh(c)
    dc += dh * o * (1.0 - squashed * squashed)
    dgates = (
        dc * g * i * (1.0 - i),
        dc * c_before * f * (1.0 - f),
        dc * i * (1.0 - g * g),
        dh * squashed * o * (1.0 - o),
    )
    return dgates, tl.zeros_like(dh), dc * f
