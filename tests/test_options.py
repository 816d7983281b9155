# SPDX-License-Identifier: Apache-2.0
"""Options beyond torch.nn's: which backend runs them, their gradients, and how other frameworks initialize."""

import copy
import math
import pickle

import pytest
import torch

import tidegate as tg
from tidegate import backends

EXTENDED = [
    lambda **k: tg.LSTM(3, 4, peepholes=True, **k),
    lambda **k: tg.LSTM(3, 4, cell_clip=0.4, **k),
    lambda **k: tg.LSTM(3, 4, proj_size=2, proj_clip=0.2, **k),
    lambda **k: tg.LSTM(3, 4, coupled=True, **k),
    lambda **k: tg.LSTM(3, 4, clip=0.5, **k),
    lambda **k: tg.LSTM(3, 4, activations="sigmoid,softsign,tanh", **k),
    lambda **k: tg.GRU(3, 4, activations="hard_sigmoid(0.3,0.4),tanh", **k),
    lambda **k: tg.GRU(3, 4, clip=0.5, reset_after=False, **k),
    lambda **k: tg.RNN(3, 4, clip=0.5, **k),
    lambda **k: tg.RNN(3, 4, activations="softplus", **k),
]


@pytest.mark.parametrize("make", EXTENDED)
def test_every_kernel_refuses_what_only_the_cells_step_says(make):
    found = tg.explain(make(), torch.randn(5, 2, 3))
    for backend in backends.BACKENDS:
        beyond = any("beyond torch.nn's equations" in reason for reason in found.calls[0].reasons[backend.name])
        assert beyond == (backend.name not in ("fused", "reference")), backend.name
    assert found.backend == ("reference" if backends.FUSED.availability() else "fused")


@pytest.mark.parametrize("make", EXTENDED)
def test_gradients_copies_and_compilation(make):
    layer = make(dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, lengths=[3, 1])[0], (x, *parameters))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == repr(layer)
        torch.testing.assert_close(again(x)[0], layer(x)[0])
    torch.compiler.reset()  # one recompilation limit serves all layers of a process
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", [tg.RNN, tg.LSTM, tg.GRU])
def test_reverse_is_the_reverse_half_of_a_bidirectional_layer(kind):
    both = kind(3, 4, bidirectional=True)
    one = kind(3, 4, reverse=True)
    one.load_state_dict({name: both.state_dict()[name + "_reverse"] for name in one.state_dict()})
    x = torch.randn(5, 3, 3)
    torch.testing.assert_close(one(x, lengths=[5, 0, 2])[0], both(x, lengths=[5, 0, 2])[0][..., 4:])
    with pytest.raises(ValueError, match="reverse: "):
        kind(3, 4, reverse=True, bidirectional=True)


@pytest.mark.parametrize(("gates", "kind"), [(1, tg.RNN), (4, tg.LSTM), (3, tg.GRU)])
def test_initialization(gates, kind):
    torch.manual_seed(0)
    keras, tf1, flax = (kind(30, 40, init=init) for init in ("keras", "tf1", "flax"))
    bound = math.sqrt(6 / (30 + gates * 40))
    assert 0.9 * bound < keras.weight_ih_l0.abs().max() <= bound
    torch.testing.assert_close(keras.weight_hh_l0.T @ keras.weight_hh_l0, torch.eye(40), rtol=0, atol=1e-5)
    for block in flax.weight_hh_l0.chunk(gates):
        torch.testing.assert_close(block @ block.T, torch.eye(40), rtol=0, atol=1e-5)
    assert abs(flax.weight_ih_l0.std() * math.sqrt(30) - 1) < 0.05
    columns = 80 if kind is tg.GRU else gates * 40
    assert tf1.weight_hh_l0[:columns].abs().max() <= math.sqrt(6 / (70 + columns))
    ones = {tg.RNN: 0, tg.LSTM: 40, tg.GRU: 80}[kind]
    assert tf1.bias_ih_l0.sum() == ones
    assert keras.bias_ih_l0.sum() == (40 if kind is tg.LSTM else 0)
    assert not flax.bias_ih_l0.any()
    with pytest.raises(ValueError, match=r"init: expected one of torch, keras, .*, chrono:784, got 'xavier'"):
        kind(3, 4, init="xavier")


@pytest.mark.parametrize("kind", [tg.LSTM, tg.GRU])
def test_initialization_by_the_literature(kind):
    """Saxe et al. 2014, He et al. 2015, Tallec and Ollivier 2018: there -1/log(sigmoid(bias)) is about u + 1/2."""
    torch.manual_seed(0)
    gates = 4 if kind is tg.LSTM else 3
    orthogonal, kaiming = kind(30, 40, init="orthogonal"), kind(30, 400, init="kaiming")
    for block in orthogonal.weight_hh_l0.chunk(gates):
        torch.testing.assert_close(block @ block.T, torch.eye(40), rtol=0, atol=1e-5)
    assert not orthogonal.bias_ih_l0.any()
    assert abs(kaiming.weight_hh_l0.std() * math.sqrt(400 / 2) - 1) < 0.02
    assert not kaiming.bias_hh_l0.any()

    chrono = kind(3, 4000, init="chrono:784")
    bias = (chrono.bias_ih_l0 + chrono.bias_hh_l0).detach().chunk(gates)
    scales = -1 / torch.sigmoid(bias[1]).log()
    assert scales.min() > 0.5
    assert scales.max() < 784
    assert abs(scales.median() / 392 - 1) < 0.1
    if kind is tg.LSTM:
        assert torch.equal(bias[0], -bias[1])
    assert not any(b.any() for b in bias[2:])
    torch.manual_seed(0)
    plain = kind(3, 4000)
    torch.manual_seed(0)
    assert torch.equal(kind(3, 4000, init="chrono:784").weight_hh_l0, plain.weight_hh_l0)


@pytest.mark.parametrize("init", ["torch", "keras", "chrono:20"])
@pytest.mark.parametrize(("kind", "name"), [
    (tg.LSTM, "forget_bias"), (tg.GRU, "update_bias"), (tg.LSTMCell, "forget_bias"), (tg.GRUCell, "update_bias"),
])  # fmt: skip
def test_a_gate_that_keeps(kind, name, init):
    module = kind(3, 5, init=init, **{name: 1.5})
    biases = [value.detach() for key, value in module.named_parameters() if key.startswith("bias")]
    assert torch.equal((biases[0] + biases[1])[5:10], torch.full((5,), 1.5))
    assert getattr(module, name) == 1.5
    module.reset_parameters()
    assert torch.equal(biases[0][5:10], torch.full((5,), 1.5))
    with pytest.raises(ValueError, match=f"{name}: expected None with bias=False, got 1.0"):
        kind(3, 5, bias=False, **{name: 1})
    with pytest.raises(ValueError, match=f"{name}: expected a number, or None, got 'one'"):
        kind(3, 5, **{name: "one"})


def test_what_is_no_scheme_of_a_cell():
    with pytest.raises(ValueError, match="init: expected chrono: and the longest dependency in steps, 3 or more"):
        tg.GRU(3, 4, init="chrono")
    with pytest.raises(ValueError, match=r"init: expected one of torch, .*, got \['keras'\]"):
        tg.GRU(3, 4, init=["keras"])
    with pytest.raises(ValueError, match="init: chrono is for the gates of an LSTM or a GRU, got it for rnn"):
        tg.RNN(3, 4, init="chrono:20")
    with pytest.raises(ValueError, match="init: expected bias=True with chrono"):
        tg.GRU(3, 4, bias=False, init="chrono:20")
    with pytest.raises(TypeError, match="forget_bias"):
        tg.GRU(3, 4, forget_bias=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init", ["keras", "tf1", "flax", "orthogonal", "kaiming"])
@pytest.mark.parametrize("kind", [tg.RNN, tg.LSTM, tg.GRU, tg.RNNCell, tg.LSTMCell, tg.GRUCell])
def test_initialization_in_any_dtype(kind, init, dtype):
    options = {"proj_size": 4} if kind is tg.LSTM else {}
    module = kind(3, 8, init=init, dtype=dtype, **options)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    if init == "keras" and not options:
        weight = next(value for name, value in module.named_parameters() if name.startswith("weight_hh")).double()
        torch.testing.assert_close(weight.T @ weight, torch.eye(8).double(), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": "tanh"}, "expected 3 activations"),
        ({"activations": "sigmoid,cube,tanh"}, "got 'cube'"),
        ({"activations": "elu(1,2),tanh,tanh"}, "expected 1 finite parameters for elu"),
        ({"clip": -1}, "clip: expected a positive number"),
        ({"cell_clip": math.inf}, "cell_clip: expected a positive number"),
    ],
)
def test_wrong_options_say_so(options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        tg.LSTM(3, 4, **options)
    assert words in str(error.value)
