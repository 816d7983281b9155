# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's "Adding a cell", followed literally: one file, one call, and everything but the kernels knows it.

float64: 1e-14 is the rounding of a few steps."""

from __future__ import annotations

import pytest
import torch
from comparing import randn
from torch import Tensor
from torch.nn.functional import linear

import tidegate as tg
from tidegate import backends, ops
from tidegate.cell import Cell, Options, Parameter, States, Weights
from tidegate.nn import RecurrentCell, RecurrentLayer


def mgu_step(gates_x: Tensor, states: States, weights: Weights, options: Options) -> States:
    """f = sigmoid(..), n = tanh(x_n + W_hn (f h)), h' = (1 - f) h + scale f n. Zhou et al. 2016 (1603.09420)."""
    (h,) = states
    x_f, x_n = gates_x.chunk(2, -1)
    w_f, w_n = weights["weight_hh"].chunk(2)
    f = torch.sigmoid(x_f + linear(h, w_f))
    n = torch.tanh(x_n + linear(f * h, w_n))
    if weights["weight_peep"] is not None:
        n = n + weights["weight_peep"] * h
    return ((1 - f) * h + options["scale"] * f * n,)


MGU = Cell(
    "mgu_of_the_tests",
    ("f", "n"),
    {"h": "H"},
    {
        "weight_ih": Parameter(("2*H", "I")),
        "weight_hh": Parameter(("2*H", "H")),
        "bias_ih": Parameter(("2*H",), "bias"),
        "weight_peep": Parameter(("H",), "peeps"),
    },
    {"scale": (float, 1.0)},
    mgu_step,
)
ops.register(MGU)


class MGULayer(RecurrentLayer):
    cell = MGU
    peeps: bool = False
    scale: float = 1.0


class MGUCell(RecurrentCell):
    cell = MGU
    peeps: bool = False
    scale: float = 1.0


def layer(**options):
    torch.manual_seed(0)
    return MGULayer(3, 5, dtype=torch.float64, **options)


def by_hand(made: MGULayer, x: Tensor) -> Tensor:
    """One layer, forward, with torch's operations."""
    weights = {name: getattr(made, f"{name}_l0", None) for name in MGU.parameters}
    h, outputs = x.new_zeros(x.shape[1], 5), []
    for x_t in x:
        (h,) = mgu_step(linear(x_t, weights["weight_ih"], weights["bias_ih"]), (h,), weights, {"scale": made.scale})
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"peeps": True, "bias": False}, {"scale": 0.5}])
def test_a_layer(options):
    made, x = layer(**options), randn(4, 2, 3)
    output, h_n = made(x)
    torch.testing.assert_close(output, by_hand(made, x), rtol=0, atol=1e-14)
    assert torch.equal(h_n[0], output[-1])
    assert [name.removesuffix("_l0") for name, _ in made.named_parameters()] == [
        name for name, parameter in MGU.parameters.items() if not parameter.when or getattr(made, parameter.when)
    ]
    assert torch.autograd.gradcheck(lambda x: made(x)[0], (x,))


def test_stacks_directions_lengths_and_resets():
    made = layer(num_layers=2, bidirectional=True, batch_first=True, peeps=True)
    x, lengths = randn(3, 6, 3), torch.tensor([6, 2, 0])
    resets = torch.zeros(3, 6, dtype=torch.bool)
    resets[0, 3] = True
    output, _ = made(x, lengths=lengths, resets=resets)
    assert output.shape == (3, 6, 10)
    assert not output[1, 2:].any()
    torch.testing.assert_close(made([x[1, :2]])[0][0], output[1, :2], rtol=0, atol=1e-14)
    torch.testing.assert_close(made(x[0, 3:])[0], output[0, 3:], rtol=0, atol=1e-14)


def test_a_cell_module():
    made, sequence = MGUCell(3, 5, dtype=torch.float64), layer()
    made.load_state_dict({name.removesuffix("_l0"): value for name, value in sequence.state_dict().items()})
    x, h = randn(4, 2, 3), None
    for x_t in x:
        h = made(x_t, h)
    torch.testing.assert_close(h, sequence(x)[1][0], rtol=0, atol=1e-14)
    torch.testing.assert_close(made(x[0, 0]), made(x[0])[0], rtol=0, atol=1e-15)
    _, state = tg.dynamic_rnn(made, x, initial_state=torch.zeros(2, 5, dtype=torch.float64), time_major=True)
    torch.testing.assert_close(state, h, rtol=0, atol=1e-14)


def test_a_stream():
    made, x = layer(num_layers=2), randn(4, 2, 3, grad=False)
    stream = made.stream(2)
    steps = torch.stack([stream.step(x_t) for x_t in x])
    torch.testing.assert_close(steps, made(x)[0].detach(), rtol=0, atol=1e-14)
    assert stream.backend == "reference"


def test_compile_and_explain():
    made, x = layer(), randn(4, 2, 3)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], made(x)[0])
    found = tg.explain(made, x)
    runs = "reference" if backends.FUSED.availability() else "fused"
    assert found.backend == runs
    assert f"mgu_of_the_tests(T=4, B=2, I=3, H=5, float64, cpu): {runs}" in str(found)
    for name, backend in backends.BY_NAME.items():
        if name not in ("fused", "reference"):
            assert any("mgu_of_the_tests is not among the cells" in reason for reason in found.calls[0].reasons[name])
            with tg.backend(backend.name), pytest.raises(tg.UnsupportedError, match="not among the cells"):
                made(x)


def test_what_torch_expects_of_a_module():
    made = layer(num_layers=2, scale=0.25)
    assert repr(made) == "MGULayer(3, 5, num_layers=2, scale=0.25)"
    assert repr(MGUCell(3, 5, peeps=True)) == "MGUCell(3, 5, peeps=True)"
    twin = layer(num_layers=2, scale=0.25)
    twin.load_state_dict(made.state_dict())
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        layer(nonsense=1)
    with pytest.raises(ValueError, match="scale: expected a positive number"):
        layer(scale=-1.0)
    with pytest.raises(ValueError, match="cell: expected a name that is free"):
        ops.register(MGU)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"):
        made(torch.zeros(2, 2, 4, dtype=torch.float64))
