# SPDX-License-Identifier: Apache-2.0
"""The ready cells against their equations, written out in float64 row by row; and their gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from comparing import randn, tensors_in
from ready_cells import CELLS, B, H, I, T, every_cell, input_of, made, state_of
from tolerances import assert_equal_f64
from torch import Tensor, sigmoid, tanh
from torch._decomp import core_aten_decompositions
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import tidegate as tg
from tidegate import cells

# The equations, each product written as a sum over one gate's rows.


def _normed(v: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    v = (v - v.mean(-1, True)) / ((v - v.mean(-1, True)).square().mean(-1, True) + eps).sqrt()
    v = v if weight is None else v * weight
    return v if bias is None else v + bias


def _dense(weight: Tensor) -> Tensor:
    """(G, J, H/J, H/J) as (G*H, H)."""
    return weight if weight.dim() == 2 else torch.cat([torch.block_diag(*gate) for gate in weight])


def _layer_norm_lstm(p: Any, cell: Any, x: Tensor, state: Any) -> Any:
    h, c = state
    from_x, from_h = x @ p["weight_ih"].T, h @ _dense(p["weight_hh"]).T
    if cell.together:
        gates = _normed(from_x + from_h, 1e-5, p["norm.weight"])
    else:
        gates = _normed(from_x, 1e-5, p["norm_ih.weight"]) + _normed(from_h, 1e-5, p["norm_hh.weight"])
    i, f, g, o = (gates + p.get("bias", 0)).split(H, -1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    seen = _normed(c, 1e-5, p["norm_c.weight"], p["norm_c.bias"])
    return sigmoid(o) * tanh(seen), seen if cell.carry_normed else c


def _layer_norm_gru(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    joint = torch.cat([x, h], -1) @ torch.cat([p["weight_ih"], _dense(p["weight_hh"])], 1).T + p.get("bias", 0)
    r, g, u = _normed(joint, 1e-3, p["norm.weight"], p["norm.bias"]).split(H, -1)
    u = sigmoid(u - 1)
    return u * tanh(sigmoid(r) * g) + (1 - u) * h


def _dreamer_v3(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    def norm(v: Tensor, name: str) -> Tensor:
        v = v / (v.square().mean(-1, True) + 1e-4).sqrt() * p[f"{name}.weight"]
        return v * sigmoid(v)

    def blocks(parts: list[Tensor], name: str) -> list[Tensor]:
        bias = p[f"{name}.bias"].view(2, -1)
        return [part @ p[f"{name}.weight"][j] + bias[j] for j, part in enumerate(parts)]

    from_x = norm(x @ p["input_linear.weight"].T + p["input_linear.bias"], "input_norm")
    from_h = norm(h @ p["hidden_linear.weight"].T + p["hidden_linear.bias"], "hidden_norm")
    d = [torch.cat([part, from_x, from_h], -1) for part in h.split(2, -1)]
    for k in range(2):
        d = list(norm(torch.cat(blocks(d, f"dynamic_linears.{k}"), -1), f"dynamic_norms.{k}").split(2, -1))
    gates = [part.split(2, -1) for part in blocks(d, "gates")]
    r, g, u = (torch.cat(column, -1) for column in zip(*gates, strict=True))
    u = sigmoid(u - 1)
    return u * tanh(sigmoid(r) * g) + (1 - u) * h


def _slstm(p: Any, cell: Any, x: Tensor, state: Any) -> Any:
    """Without a stabilizer: i and f are exponentials of numbers near 0, and c, n are scaled by exp(m)."""
    h, c, n, m = state
    kernel, bias = p["recurrent_kernel"], p["bias"]
    gates = []
    for gate in range(4):
        from_h = torch.cat([h[:, 2 * j : 2 * j + 2] @ kernel[j, :, gate] for j in range(2)], -1)
        gates.append(x @ p["weight_ih"][gate * H : gate * H + H].T + from_h + bias[:, gate].flatten())
    i, f, z, o = gates
    plain_c = sigmoid(f) * c * m.exp() + i.exp() * tanh(z)
    plain_n = sigmoid(f) * n * m.exp() + i.exp()
    m = torch.maximum(torch.log(sigmoid(f)) + m, i)
    return sigmoid(o) * plain_c / plain_n, plain_c / m.exp(), plain_n / m.exp(), m


def _linear(p: Any, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _g(v: Tensor) -> Tensor:
    return (v >= 0) * (v + 0.5) + (v < 0) * sigmoid(v)


def _min_gru(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    z, candidate = sigmoid(_linear(p, "linear_z", x)), _linear(p, "linear_h", x)
    return (1 - z) * h + z * (_g(candidate) if cell.positive else candidate)


def _min_lstm(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    f, i = sigmoid(_linear(p, "linear_f", x)), sigmoid(_linear(p, "linear_i", x))
    candidate = _linear(p, "linear_h", x)
    return f / (f + i) * h + i / (f + i) * (_g(candidate) if cell.positive else candidate)


def _li_gru(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    from_x = x @ p["w"].T
    from_x = from_x + p["bias"] if "bias" in p else _normed(from_x, 1e-5, p["norm.weight"], p["norm.bias"])
    a, z = (from_x + h @ p["u"].T).split(H, -1)
    return sigmoid(z) * h + (1 - sigmoid(z)) * a.clamp(min=0)


def _mgu(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    w, u, b = p["weight_ih"].split(H), p["weight_hh"].split(H), p["bias"].split(H)
    f = sigmoid(x @ w[0].T + h @ u[0].T + b[0])
    return (1 - f) * h + f * tanh(x @ w[1].T + (f * h) @ u[1].T + b[1])


def _ind_rnn(p: Any, cell: Any, x: Tensor, h: Tensor) -> Tensor:
    gate = x @ p["weight_ih"].T + h @ p["weight_hh"].diag() + p.get("bias", 0)
    return tanh(gate) if cell.nonlinearity == "tanh" else gate.clamp(min=0)


def _gru_d(p: Any, cell: Any, input: Any, state: Any) -> Any:
    (x, mask, delta), (h, last) = input, state
    gamma_x = (-(delta @ p["weight_decay_x"].diag() + p["bias_decay_x"]).clamp(min=0)).exp()
    gamma_h = (-(delta @ p["weight_decay_h"].T + p["bias_decay_h"]).clamp(min=0)).exp()
    filled = mask * x + (1 - mask) * (gamma_x * last + (1 - gamma_x) * torch.tensor([0.5, -1.0, 2.0]).double())
    h = gamma_h * h
    w, u, v, b = (p[key].split(H) for key in ("weight_ih", "weight_hh", "weight_mask", "bias"))
    r, z = (sigmoid(filled @ w[k].T + h @ u[k].T + mask @ v[k].T + b[k]) for k in range(2))
    candidate = tanh(filled @ w[2].T + (r * h) @ u[2].T + mask @ v[2].T + b[2])
    return (1 - z) * h + z * candidate, mask * x + (1 - mask) * last


def _cfc(p: Any, cell: Any, input: Any, h: Tensor) -> Tensor:
    x, t = input
    s = torch.cat([x, h], -1)
    for k in range(0, len(cell.backbone), 2):
        s = 1.7159 * tanh(0.666 * _linear(p, f"backbone.{k}", s))
    first = _linear(p, "ff1", s)
    if cell.mode == "pure":
        return p["A"] - p["A"] * (-t * (p["w_tau"].abs() + first.abs())).exp() * first
    gate = sigmoid(_linear(p, "time_a", s) * t + _linear(p, "time_b", s))
    share = 1 if cell.mode == "no_gate" else 1 - gate
    return share * tanh(first) + gate * tanh(_linear(p, "ff2", s))


def _peephole_lstm(p: Any, cell: Any, x: Tensor, state: Any) -> Any:
    h, c = state
    i, f, g, o = (x @ p["weight_ih"].T + h @ p["weight_hh"].T + p["bias"]).split(H, -1)
    w_i, w_f, w_o = p["weight_peephole"].split(H)
    c = sigmoid(f + w_f * c) * c + sigmoid(i + w_i * c) * tanh(g)
    return sigmoid(o + w_o * c) * tanh(c), c


EQUATIONS = {
    "LayerNormLSTM": _layer_norm_lstm, "LayerNormGRU": _layer_norm_gru, "DreamerV3GRU": _dreamer_v3, "SLSTM": _slstm,
    "MinGRU": _min_gru, "MinLSTM": _min_lstm, "LiGRU": _li_gru, "MGU": _mgu, "IndRNN": _ind_rnn, "GRUD": _gru_d,
    "CfC": _cfc, "PeepholeLSTM": _peephole_lstm,
}  # fmt: skip


@every_cell
def test_a_step_is_its_equations(name):
    cell = made(name)
    input, state = input_of(name, B), state_of(cell)
    expected = EQUATIONS[name.split(",")[0]](dict(cell.named_parameters()), cell, input, state)
    found = cell(input, state)
    assert type(found) is type(expected)
    for k, (a, b) in enumerate(zip(tensors_in(found), tensors_in(expected), strict=True)):
        assert_equal_f64(a, b, str(k))


@every_cell
def test_gradients(name):
    """Of the input, the state and every parameter, over two steps."""
    cell = made(name)
    inputs, state = [input_of(name, B, seed=s) for s in (1, 11)], state_of(cell)
    leaves = [t for t in [*tensors_in(inputs), *tensors_in(state), *cell.parameters()] if t.requires_grad]

    def run(*_: Tensor) -> Any:
        after = state
        for input in inputs:
            after = cell(input, after)
        return tuple(tensors_in(after))

    assert torch.autograd.gradcheck(run, leaves)


@every_cell
def test_no_state_is_the_zero_state_and_the_cell_tells_it(name):
    cell = made(name)
    input = input_of(name, T, B)
    output, final = tg.dynamic_rnn(cell, input, time_major=True)
    after = None
    for t in range(T):
        after = cell(tuple(part[t] for part in input) if isinstance(input, tuple) else input[t], after)
        assert_equal_f64(output[t], tensors_in(after)[0])
    for a, b in zip(tensors_in(final), tensors_in(after), strict=True):
        assert_equal_f64(a, b)
    layer = tg.Recurrent(copy.deepcopy(cell))
    assert_equal_f64(layer(input)[0], output)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(input)[0], layer(input)[0])
    assert [key.removeprefix("cells.0.") for key in layer.state_dict()] == list(cell.state_dict())


@every_cell
def test_first_weights(name):
    """Finite, the same from one seed, drawn anew by reset_parameters, of the dtype and on the device asked for."""
    torch.manual_seed(3)
    cell = CELLS[name]()
    first = copy.deepcopy(cell.state_dict())
    assert all(value.isfinite().all() for value in first.values())
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(3)
    if name in ("LayerNormLSTM", "SLSTM", "PeepholeLSTM"):  # these draw nothing before reset_parameters
        cell.reset_parameters()
        assert all(torch.equal(value, first[key]) for key, value in cell.state_dict().items())
    cell.reset_parameters()
    assert all(value.isfinite().all() for value in cell.state_dict().values())
    made = type(cell)(I, 8, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in made.parameters())
    assert f"{I}, {H}" in repr(cell)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="hidden_size: expected an integer of at least 1, got 0"):
        cells.MGUCell(3, 0)
    with pytest.raises(ValueError, match="blocks: expected a divisor of hidden_size = 4, got 3"):
        cells.LayerNormGRUCell(3, 4, blocks=3)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size = 4, got 3"):
        cells.SLSTMCell(3, 4, 3)
    with pytest.raises(ValueError, match=r"x_mean: expected \(input_size,\) = \(3,\), got \(2,\)"):
        cells.GRUDCell(3, 4, torch.zeros(2))
    with pytest.raises(ValueError, match="mode: expected one of default, no_gate, pure, got 'x'"):
        cells.CfCCell(3, 4, "x")


def test_peepholes_are_ours():
    cell, ours = made("PeepholeLSTM"), tg.LSTMCell(I, H, peepholes=True, dtype=torch.float64)
    parameters = dict(cell.named_parameters()) | {"bias_ih": cell.bias, "bias_hh": torch.zeros_like(cell.bias)}
    ours.load_state_dict({name: parameters[name] for name in ours.state_dict()})
    x, state = randn(B, I), state_of(cell)
    for a, b in zip(cell(x, state), ours(x, state), strict=True):
        assert_equal_f64(a, b)


def test_missing_values_of_a_gru_d_are_not_looked_at():
    cell, (x, mask, delta) = made("GRUD"), input_of("GRUD", T, B)
    expected, _ = tg.dynamic_rnn(cell, (x, mask, delta), time_major=True)
    holes = x.detach().masked_fill(mask == 0, torch.nan).requires_grad_()
    found, _ = tg.dynamic_rnn(cell, (holes, mask, delta), time_major=True)
    assert_equal_f64(found, expected)
    found.sum().backward()
    assert holes.grad is not None
    assert holes.grad.isfinite().all()


def test_an_slstm_does_not_overflow():
    """Gates of +-2,000 in float32, where exp alone would be infinite."""
    cell = cells.SLSTMCell(1, 4, 2)
    with torch.no_grad():
        cell.weight_ih.fill_(1)
    x = torch.tensor([2e3, -2e3, 2e3, -2e3, 0.0]).view(5, 1, 1).requires_grad_()
    for given in (x, -x):
        output, state = tg.dynamic_rnn(cell, given, time_major=True)
        assert all(part.isfinite().all() for part in (output, *state))
        gradients = torch.autograd.grad(output.sum(), [x, *cell.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)


# What a step may be made of, so that the fused engine can run it: products, elementwise operations, sums over features,
# layer_norm, and what moves or cuts features.
VOCABULARY = {
    "abs", "add", "addmm", "alias", "bmm", "cat", "clamp", "clone", "div", "eq", "exp", "expand", "full", "ge", "gt",
    "log1p", "maximum", "mean", "minimum", "mm", "mul", "native_layer_norm", "neg", "permute", "pow", "relu", "rsqrt",
    "sigmoid", "split_with_sizes", "sub", "sym_size", "tanh", "unsqueeze", "view", "where",
}  # fmt: skip


@every_cell
def test_a_step_is_plain(name):
    """No randomness, no writes in place, no branch on a value: it is traced once, and holds for any batch."""
    cell = made(name)
    parameters = {**dict(cell.named_parameters()), **dict(cell.named_buffers())}
    given = [pytree.tree_map(torch.detach, one) for one in (input_of(name, B), state_of(cell))]
    traced = make_fx(
        lambda p, input, state: functional_call(cell, p, (input, state)),
        tracing_mode="symbolic",
        decomposition_table=core_aten_decompositions(),
    )(parameters, *given)
    targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    found = {str(target).split(".")[1] for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert found <= VOCABULARY


@every_cell
def test_no_steps_no_rows_and_bfloat16(name):
    cell = made(name)
    for steps, rows in ((0, B), (T, 0), (0, 0)):
        input = pytree.tree_map(torch.detach, input_of(name, steps, rows))
        output, final = tg.Recurrent(cell)(input)
        assert output.shape == (steps, rows, H)
        assert all(part.shape[0] == rows and part.eq(0).all() for part in tensors_in(final))
    input = pytree.tree_map(torch.detach, input_of(name, T, B))
    expected, _ = tg.Recurrent(cell)(input)
    low = pytree.tree_map(lambda part: part.to(torch.bfloat16), input)
    output, _ = tg.Recurrent(copy.deepcopy(cell).bfloat16())(low)
    assert output.dtype == torch.bfloat16
    # A unit in the last place at size 1 is 2**-7; steps carry it on, and an sLSTM divides by a sum that may be small.
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.06)


@every_cell
def test_weights_under_vmap(name):
    """An ensemble, each member with weights of its own, and its gradients."""
    cell, other = made(name), made(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    layers = [tg.Recurrent(cell), tg.Recurrent(other)]
    input = pytree.tree_map(torch.detach, input_of(name, T, B))
    parameters, buffers = stack_module_state(layers)  # pyright: ignore[reportArgumentType]

    def run(p: Any, b: Any) -> Tensor:
        return functional_call(layers[0], {**p, **b}, (input,))[0].square().sum()

    found = vmap(grad(run))(parameters, buffers)
    for k, layer in enumerate(layers):
        loss = layer(input)[0].square().sum()
        expected = torch.autograd.grad(loss, list(layer.parameters()))
        for (key, _), gradient in zip(layer.named_parameters(), expected, strict=True):
            assert_equal_f64(found[key][k], gradient, key)
