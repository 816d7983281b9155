# SPDX-License-Identifier: Apache-2.0
"""The three layers as a jax scan, as a user of jax would write them: input product hoisted, torch.nn's gate order.

Letters: T steps, B batch, I input_size, H hidden_size, G gates.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tidegate.cli.bench.shapes import Case


def forward(case: Case, parameters: dict[str, Any], x: Any) -> Any:
    """(T, B, I) to (T, B, directions * H)."""
    jnp: Any = import_module("jax.numpy")
    for layer in range(case.num_layers):
        suffixes = [f"l{layer}", f"l{layer}_reverse"] if case.bidirectional else [f"l{layer}"]
        outputs = [_run(case.kind, parameters, suffix, x) for suffix in suffixes]
        x = jnp.concatenate(outputs, axis=-1)
    return x


def _run(kind: str, parameters: dict[str, Any], suffix: str, x: Any) -> Any:
    jax: Any = import_module("jax")
    jnp: Any = import_module("jax.numpy")
    weight_hh, bias_hh = parameters[f"weight_hh_{suffix}"], parameters[f"bias_hh_{suffix}"]
    gates_x = x @ parameters[f"weight_ih_{suffix}"].T + parameters[f"bias_ih_{suffix}"]  # (T, B, G*H)

    def step(states: Any, gates_x: Any) -> Any:
        h = states[0]
        gates_h = h @ weight_hh.T + bias_hh
        if kind == "rnn":
            states = (jnp.tanh(gates_x + gates_h),)
        elif kind == "lstm":
            i, f, g, o = jnp.split(gates_x + gates_h, 4, axis=-1)
            c = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            states = (jax.nn.sigmoid(o) * jnp.tanh(c), c)
        else:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = (jnp.split(gates, 3, axis=-1) for gates in (gates_x, gates_h))
            z = jax.nn.sigmoid(x_z + h_z)
            n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
            states = ((1 - z) * n + z * h,)
        return states, states[0]

    zeros = jnp.zeros((x.shape[1], weight_hh.shape[1]))
    _, output = jax.lax.scan(step, (zeros, zeros) if kind == "lstm" else (zeros,), gates_x, reverse="reverse" in suffix)
    return output
