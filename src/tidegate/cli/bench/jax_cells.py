# SPDX-License-Identifier: Apache-2.0
"""Ready cells as a jax scan, as a user of jax would write them: input product hoisted, parameters by the cells' names.

Letters: T steps, B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tidegate.cli.bench.shapes import Case

Weights = dict[str, Any]


def forward(case: Case, weights: Weights, x: Any) -> Any:
    """(T, B, I) to (T, B, H), from a state of zeros."""
    jax: Any = import_module("jax")
    jnp: Any = import_module("jax.numpy")
    prepare, step, states = STEPS[case.kind]
    zeros = jnp.zeros((x.shape[1], case.shape.hidden_size), x.dtype)

    def scanned(state: tuple[Any, ...], from_x: Any) -> tuple[tuple[Any, ...], Any]:
        state = step(weights, from_x, state)
        return state, state[0]

    return jax.lax.scan(scanned, (zeros,) * states, prepare(weights, x))[1]


def _lstm_input(w: Weights, x: Any) -> Any:
    return x @ w["weight_ih"].T + w["bias_ih"] + w["bias_hh"]


def _lstm(w: Weights, from_x: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    h, c = state
    return _gated(from_x + h @ w["weight_hh"].T, c, lambda c: c)


def _layer_norm_lstm_input(w: Weights, x: Any) -> Any:
    return _normed(x @ w["weight_ih"].T, w["norm_ih.weight"]) + w["bias"]


def _layer_norm_lstm(w: Weights, from_x: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    h, c = state
    gates = from_x + _normed(h @ w["weight_hh"].T, w["norm_hh.weight"])
    return _gated(gates, c, lambda c: _normed(c, w["norm_c.weight"]) + w["norm_c.bias"])


def _slstm_input(w: Weights, x: Any) -> Any:
    return x @ w["weight_ih"].T + w["bias"].swapaxes(0, 1).reshape(-1)


def _slstm(w: Weights, from_x: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    jax: Any = import_module("jax")
    jnp: Any = import_module("jax.numpy")
    h, c, n, m = state
    kernel = w["recurrent_kernel"]  # head, in, gate, out
    heads = h.reshape(h.shape[0], kernel.shape[0], kernel.shape[1])
    from_h = jnp.einsum("bji,jigk->bgjk", heads, kernel).reshape(h.shape[0], -1)
    i, f, z, o = jnp.split(from_x + from_h, 4, axis=-1)
    f = jax.nn.log_sigmoid(f) + m
    m = jnp.where(n == 0, i, jnp.maximum(i, f))
    i, f = jnp.exp(i - m), jnp.exp(jnp.minimum(f - m, 0))
    c, n = f * c + i * jnp.tanh(z), f * n + i
    return jax.nn.sigmoid(o) * c / n, c, n, m


def _gated(gates: Any, c: Any, read: Callable[[Any], Any]) -> tuple[Any, ...]:
    jax: Any = import_module("jax")
    jnp: Any = import_module("jax.numpy")
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(read(c)), c


def _normed(x: Any, scale: Any) -> Any:
    jax: Any = import_module("jax")
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt((centered * centered).mean(-1, keepdims=True) + 1e-5) * scale


# Of each cell that `cells.load` names: what is made of all inputs at once, the step, and how many states it has.
STEPS: dict[str, tuple[Callable[[Weights, Any], Any], Callable[..., tuple[Any, ...]], int]] = {
    "LSTM": (_lstm_input, _lstm, 2),
    "LayerNormLSTM": (_layer_norm_lstm_input, _layer_norm_lstm, 2),
    "SLSTM": (_slstm_input, _slstm, 4),
}
