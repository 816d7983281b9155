# SPDX-License-Identifier: Apache-2.0
"""from_tf1 against TensorFlow's own numbers: outputs, states, gradients, float64 to 1e-10."""

import numpy as np
import pytest
import torch
import vectors

import tidegate as tg

TOLERANCE = 1e-10
OPTIONS = {
    "gru": ("GRUCell", {}),
    "gru_relu": ("GRUCell", {"activation": "relu"}),
    "rnn": ("BasicRNNCell", {}),
    "rnn_relu": ("BasicRNNCell", {"activation": torch.relu}),
    "blstm_fb1": ("BasicLSTMCell", {}),
    "blstm_fb0": ("BasicLSTMCell", {"forget_bias": 0.0}),
    "blstm_fb0.3_relu": ("BasicLSTMCell", {"forget_bias": 0.3, "activation": "relu"}),
    "lstm": ("LSTMCell", {}),
    "lstm_peep": ("LSTMCell", {"use_peepholes": True}),
    "lstm_proj": ("LSTMCell", {"num_proj": 3}),
    "lstm_peep_proj": ("LSTMCell", {"use_peepholes": True, "num_proj": 3, "forget_bias": 0.5}),
    "lstm_cellclip": ("LSTMCell", {"cell_clip": 0.4}),
    "lstm_all_clip": ("LSTMCell", {"use_peepholes": True, "cell_clip": 0.4, "num_proj": 3, "proj_clip": 0.15}),
}
STACKS = {"multi_gru2": ("gru", "gru"), "multi_lstm_mix": ("lstm_proj", "blstm_fb1")}
STACKED = [case for case in vectors.names("tf_v1") if case.split(".")[0] in STACKS]
TWO_WAY = [case for case in vectors.names("tf_v1") if case.startswith("bidi_")]
# TensorFlow's ResidualWrapper lists no weights, so the file has none: nothing to convert.
SINGLE = [case for case in vectors.names("tf_v1") if case.split(".")[0] in OPTIONS]


def leaves(case, key):
    return {name: torch.tensor(value, requires_grad=True) for name, value in vectors.part(case, key).items()}


def ordered(state):
    """TensorFlow's names of a state in our order: h, or h and c."""
    return [name for name in ("h", "c") if name in state]


def variables_from(cell, kind, weights):
    """The gradients of TensorFlow's variables from those of our parameters: the converter's map, transposed."""
    grads = {name: parameter.grad for name, parameter in cell.named_parameters()}
    kernel = torch.cat([grads["weight_ih"].T, grads["weight_hh"].T])
    hidden_size = cell.hidden_size
    blocks = dict(zip(cell.cell.gates, kernel.split(hidden_size, 1), strict=True))
    biases = dict(zip(cell.cell.gates, grads["bias_ih"].split(hidden_size), strict=True))
    if kind == "GRUCell":
        return {
            "gates/kernel": torch.cat([blocks["r"], blocks["z"]], 1),
            "candidate/kernel": blocks["n"],
            "gates/bias": torch.cat([biases["r"], biases["z"]]),
            "candidate/bias": biases["n"],
        }
    order = "igfo" if "LSTM" in kind else "h"
    found = {"kernel": torch.cat([blocks[g] for g in order], 1), "bias": torch.cat([biases[g] for g in order])}
    if "w_i_diag" in weights:
        found.update(zip(("w_i_diag", "w_f_diag", "w_o_diag"), grads["weight_peephole"].chunk(3), strict=True))
    if "projection/kernel" in weights:
        found["projection/kernel"] = grads["weight_hr"].T
    return found


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        got = found[name]
        if value.size == 0 and np.size(got) != 0:
            got = np.zeros(0) if not torch.as_tensor(got).any() else got
        np.testing.assert_allclose(torch.as_tensor(got).detach().numpy(), value, rtol=0, atol=TOLERANCE, err_msg=name)


def backward(case, tag, outputs, states):
    """Gradients of the golden loss, into `.grad` of every leaf."""
    loss = sum((outputs[name] * torch.tensor(r)).sum() for name, r in vectors.part(case, "R/").items())
    if tag == "g2":
        loss = loss + sum((states[name] * torch.tensor(s)).sum() for name, s in vectors.part(case, "S/").items())
    loss.backward()


def gradient(leaf):
    return np.zeros(0) if leaf.grad is None else leaf.grad


@pytest.mark.parametrize("tag", ["g1", "g2"])
@pytest.mark.parametrize("name", SINGLE)
def test_a_cell_gives_tensorflows_numbers(name, tag):
    case = vectors.load("tf_v1")[name]
    kind, options = OPTIONS[case["meta"]["cell"]]
    weights = vectors.part(case, "w/")
    cell = tg.from_tf1(kind, {f"rnn/{kind}/{key}:0": value for key, value in weights.items()}, **options)
    x, init = torch.tensor(case["x"], requires_grad=True), leaves(case, "init/")
    initial = tuple(init[key] for key in ordered(init))
    state = None if not init else initial[0] if len(initial) == 1 else initial
    outputs, final = tg.dynamic_rnn(cell, x, case.get("lens"), state, case["meta"]["time_major"])
    finals = dict(zip("hc", final if isinstance(final, tuple) else (final,), strict=False))
    same({"outputs": outputs, **finals}, {"outputs": case["outputs"], **vectors.part(case, "state/")})
    backward(case, tag, {"outputs": outputs}, finals)
    found = {"x": gradient(x)} | {f"init/{key}": gradient(leaf) for key, leaf in init.items()}
    found |= {f"w/{key}": value for key, value in variables_from(cell, kind, weights).items()}
    same(found, vectors.part(case, f"{tag}/"))


@pytest.mark.parametrize("tag", ["g1", "g2"])
@pytest.mark.parametrize("name", TWO_WAY)
def test_two_cells_make_a_bidirectional_layer(name, tag):
    case = vectors.load("tf_v1")[name]
    kind, options = OPTIONS[case["meta"]["cell"]]
    weights = vectors.part(case, "w/")
    cells = [tg.from_tf1(kind, weights, scope=scope, **options) for scope in ("fw/", "bw/")]
    time_major = case["meta"]["time_major"]
    layer = tg.convert.as_layer(*cells, batch_first=not time_major)
    x, init = torch.tensor(case["x"], requires_grad=True), leaves(case, "init/")
    states = [torch.stack([init[f"fw.{s}"], init[f"bw.{s}"]]) for s in ("h", "c") if f"fw.{s}" in init]
    outputs, final = layer(x, states[0] if len(states) == 1 else tuple(states), lengths=case.get("lens"))
    forward, back = outputs.chunk(2, -1)
    outs = {"outputs_fw": forward, "outputs_bw": back}
    pairs = zip("hc", final if isinstance(final, tuple) else (final,), strict=False)
    finals = {f"{way}.{s}": value[k] for s, value in pairs for k, way in enumerate(("fw", "bw"))}
    same(outs | finals, {k: case[k] for k in outs} | vectors.part(case, "state/"))
    backward(case, tag, outs, finals)
    found = {"x": gradient(x)} | {f"init/{key}": gradient(leaf) for key, leaf in init.items()}
    for k, way in enumerate(("fw", "bw")):
        for key, parameter in cells[k].named_parameters():
            parameter.grad = getattr(layer, f"{key}_l0" + "_reverse" * k).grad
        found |= {f"w/{way}/{key}": value for key, value in variables_from(cells[k], kind, weights).items()}
    same(found, vectors.part(case, f"{tag}/"))


@pytest.mark.parametrize("name", STACKED)
def test_stacked_cells_run_one_after_another(name):
    case = vectors.load("tf_v1")[name]
    weights, init, states = (vectors.part(case, key) for key in ("w/", "init/", "state/"))
    outputs, finals = torch.tensor(case["x"]), {}
    for k, inner in enumerate(STACKS[case["meta"]["cell"]]):
        kind, options = OPTIONS[inner]
        cell = tg.from_tf1(kind, weights, scope=f"cell_{k}/", **options)
        given = [torch.tensor(init[f"{k}.{s}"]) for s in ("h", "c") if f"{k}.{s}" in init]
        state = None if not given else given[0] if len(given) == 1 else tuple(given)
        outputs, final = tg.dynamic_rnn(cell, outputs, case.get("lens"), state, case["meta"]["time_major"])
        finals |= {f"{k}.{s}": v for s, v in zip("hc", final if isinstance(final, tuple) else (final,), strict=False)}
    same({"outputs": outputs, **finals}, {"outputs": case["outputs"], **states})


def gru_variables(input_size=3, hidden_size=4):
    rng = np.random.default_rng(0)
    rows = input_size + hidden_size
    return {
        "gates/kernel": rng.normal(size=(rows, 2 * hidden_size)).astype("float32"),
        "gates/bias": rng.normal(size=2 * hidden_size).astype("float32"),
        "candidate/kernel": rng.normal(size=(rows, hidden_size)).astype("float32"),
        "candidate/bias": rng.normal(size=hidden_size).astype("float32"),
    }


def test_a_tanh_gru_loads_into_a_layer_and_runs_on_a_fast_kernel_if_there_is_one():
    cell = tg.from_tf1("GRUCell", gru_variables())
    layer = tg.GRU(3, 4, reset_after=False, batch_first=True)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in cell.state_dict().items()})
    x = torch.randn(2, 5, 3)
    expected = tg.dynamic_rnn(cell, x)[0]
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tg.convert.as_layer(cell, batch_first=True)(x)[0], expected, rtol=0, atol=1e-6)
    assert not any(
        "beyond torch.nn" in reason for call in tg.explain(layer, x).calls for reason in call.reasons["aten"]
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_arrays_dtype_is_the_cells(dtype):
    cell = tg.from_tf1("GRUCell", {name: value.astype(dtype) for name, value in gru_variables().items()})
    assert cell.weight_ih.dtype == getattr(torch, dtype)


def test_conversion_draws_no_random_numbers_and_shares_no_memory():
    variables = gru_variables()
    before = torch.get_rng_state()
    cell = tg.from_tf1("GRUCell", variables)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        cell.weight_ih.zero_()
    assert variables["gates/kernel"].any()


def test_every_fault_is_listed_at_once():
    variables = gru_variables() | {"optimizer/gates/kernel/Adam": np.zeros(3)}
    del variables["candidate/bias"]
    with pytest.raises(tg.ConversionError) as error:
        tg.from_tf1("GRUCell", variables, cell_clip=1.0, use_peepholes=True)
    for word in ("cell_clip=1.0", "use_peepholes=True", "optimizer/gates/kernel/Adam", "candidate/bias: missing"):
        assert word in str(error.value)


def test_a_wrong_shape_names_the_variable_expected_and_found():
    variables = gru_variables()
    variables["candidate/kernel"] = variables["candidate/kernel"][:-1]
    variables["gates/bias"] = variables["gates/bias"][:-1]
    with pytest.raises(tg.ConversionError, match=r"candidate/kernel: expected .* = \(7, 4\), got \(6, 4\)") as error:
        tg.from_tf1("GRUCell", variables)
    assert "gates/bias: expected [2*hidden_size] = (8), got (7,)" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "variables", "options", "words"),
    [
        ("NASCell", {}, {}, "one of GRUCell"),
        ("GRUCell", gru_variables(), {"activation": "gelu"}, "activation='gelu'"),
        ("GRUCell", {**gru_variables(), "b/gates/bias": np.zeros(8)}, {}, "choose one cell by scope="),
        ("BasicRNNCell", {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}, {}, "kernel: expected"),
        ("BasicRNNCell", {"kernel": np.zeros((7, 4), int), "bias": np.zeros(4)}, {}, "floating-point"),
        ("BasicRNNCell", {"kernel": "no", "bias": np.zeros(4)}, {}, "floating-point"),
        (
            "LSTMCell",
            {"kernel": np.zeros((7, 16)), "bias": np.zeros(16)},
            {"num_proj": 3},
            "projection/kernel: missing",
        ),
        ("LSTMCell", {"kernel": np.zeros((7, 16)), "bias": np.zeros(16)}, {"cell_clip": -1}, "cell_clip=-1"),
        ("LSTMCell", {"kernel": np.zeros((7, 16)), "bias": np.zeros(16, "f")}, {}, "different dtypes"),
        (
            "LSTMCell",
            {"kernel": np.zeros((7, 16)), "bias": np.zeros(16), **dict.fromkeys(("w_i_diag", "w_f_diag"), np.zeros(4))},
            {"use_peepholes": False},
            "use_peepholes=False, but there are variables",
        ),
    ],
)
def test_what_cannot_be_represented(kind, variables, options, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.from_tf1(kind, variables, **options)
    assert words in str(error.value)


LSTM = {"kernel": np.zeros((7, 16)), "bias": np.zeros(16)}


@pytest.mark.parametrize(
    ("kind", "variables", "options", "words"),
    [
        ("GRUCell", [1], {}, "variables: expected arrays by name, got list"),
        ("GRUCell", None, {}, "variables: expected arrays by name, got NoneType"),
        ("GRUCell", {1: 2}, {}, "variables: expected names, got the key 1"),
        ("GRUCell", gru_variables(), {"scope": 1}, "scope=1 is not supported: a text"),
        ("GRUCell", {**gru_variables(), "gates/kernel": np.zeros((7, 0))}, {}, "none of them 0, got (7, 0)"),
        ("LSTMCell", LSTM, {"num_proj": "3"}, "num_proj='3' is not supported: a positive integer"),
        ("LSTMCell", LSTM, {"cell_clip": float("nan")}, "cell_clip=nan is not supported"),
        ("LSTMCell", LSTM, {"cell_clip": float("inf")}, "cell_clip=inf is not supported"),
        ("LSTMCell", LSTM, {"forget_bias": float("nan")}, "forget_bias=nan is not supported"),
        ("LSTMCell", LSTM, {"use_peepholes": "no"}, "use_peepholes='no' is not supported"),
    ],
)
def test_arguments_of_another_kind_say_so(kind, variables, options, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.from_tf1(kind, variables, **options)
    assert words in str(error.value)
    assert "got (1, 1)" not in str(error.value)
