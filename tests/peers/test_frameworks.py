# SPDX-License-Identifier: Apache-2.0
"""Live against Keras (torch backend), Flax, onnxruntime and ONNX's own node cases. Run by `make test-peers`."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tidegate as tg
from tidegate.cli.convert import run_convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jax
    import keras
    from flax import linen, nnx
    from onnx.backend.test.case.node import collect_testcases

pytestmark = pytest.mark.filterwarnings("ignore")
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
ACTIVATIONS = ("tanh", "relu", "sigmoid", "linear", "softsign", "softplus", "elu", "selu", "hard_sigmoid", "leaky_relu")
SIZES = st.integers(1, 5)


def close(ours, theirs, tolerance=2e-6):
    ours, theirs = np.asarray(ours.detach()), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@st.composite
def keras_layers(draw):
    kind = draw(st.sampled_from(["SimpleRNN", "GRU", "LSTM"]))
    options = {"return_sequences": draw(st.booleans()), "return_state": True, "use_bias": draw(st.booleans())}
    options |= {"activation": draw(st.sampled_from(ACTIVATIONS)), "bias_initializer": "glorot_normal"}
    if kind != "SimpleRNN":
        options["recurrent_activation"] = draw(st.sampled_from(("sigmoid", "hard_sigmoid")))
    if kind == "GRU":
        options["reset_after"] = draw(st.booleans())
    two_way = draw(st.booleans())
    if not two_way:
        options["go_backwards"] = draw(st.booleans())
    if two_way:
        options["bias_initializer"] = "ones"
    layer = getattr(keras.layers, kind)(draw(SIZES), **{**options, "bias_initializer": "ones"})
    return keras.layers.Bidirectional(layer) if two_way else layer


@quick
@given(keras_layers(), SIZES, SIZES, SIZES)
def test_keras_layers(layer, batch, steps, input_size):
    layer.build((batch, steps, input_size))
    ours = tg.from_keras(layer)
    x = torch.rand(batch, steps, input_size) - 0.5
    theirs = [keras.ops.convert_to_numpy(t) for t in layer(x)]
    found = tg.convert.keras_call(ours, x, return_sequences=layer.return_sequences, return_state=True)
    for a, b in zip(found, theirs, strict=True):
        close(a, b)


KERAS_CELLS = ["SimpleRNNCell", "GRUCell", "LSTMCell"]


@quick
@given(st.sampled_from(KERAS_CELLS), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), SIZES, SIZES)
def test_keras_rnns_of_cells(tmp_path_factory, kind, depth, backwards, sequences, two_way, units, input_size):
    cells = [getattr(keras.layers, kind)(units, bias_initializer="ones") for _ in range(depth)]
    layer = keras.layers.RNN(
        cells if depth > 1 else cells[0], return_sequences=sequences, go_backwards=backwards and not two_way, name="own"
    )
    if two_way:
        layer = keras.layers.Bidirectional(layer, name="own")
    model = keras.Sequential([keras.Input((None, input_size)), layer])
    path = tmp_path_factory.getbasetemp() / "model.keras"
    model.save(path)
    if two_way and depth > 1:
        with pytest.raises(tg.ConversionError, match="a stack in each direction"):
            tg.from_keras(path)
        return
    x = torch.rand(2, 4, input_size) - 0.5
    expected = keras.ops.convert_to_numpy(model(x))
    for ours in (tg.from_keras(layer), tg.from_keras(path)):
        close(tg.convert.keras_call(ours, x, return_sequences=sequences), expected)


@pytest.mark.parametrize("name", ["gru", "backwards", "both", "stack"])
def test_the_command_checks_against_keras(tmp_path, name):
    """return_state, go_backwards, directions, cells."""
    layer = {
        "gru": lambda: keras.layers.GRU(4, return_sequences=True, return_state=True),
        "backwards": lambda: keras.layers.LSTM(4, return_sequences=True, go_backwards=True),
        "both": lambda: keras.layers.Bidirectional(keras.layers.RNN(keras.layers.LSTMCell(4)), name="own"),
        "stack": lambda: keras.layers.RNN([keras.layers.GRUCell(4), keras.layers.GRUCell(4)], return_sequences=True),
    }[name]()
    inputs = keras.Input((None, 3))
    keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")
    lines = []
    run_convert(tmp_path / "model.keras", tmp_path / "model.onnx", say=lines.append)
    checks = [line for line in lines if "run on random input, the largest difference is" in line]
    assert [line.split(":")[0].split()[1] for line in checks] == ["Keras", "onnxruntime"]


@keras.saving.register_keras_serializable("mine")
class Own(keras.layers.GRU):
    pass


def test_keras_layers_that_are_none_of_ours(tmp_path):
    """A file that holds them beside one that is; each asked for by name."""
    outer = keras.Input((4, 5, 3))
    y = keras.layers.TimeDistributed(keras.layers.Bidirectional(keras.layers.LSTM(2), name="inner"), name="spread")(
        outer
    )
    y = keras.layers.GRU(4, return_sequences=True, name="plain")(y)
    y = Own(2, return_sequences=True, name="own")(y)
    model = keras.Model(outer, keras.layers.RNN([keras.layers.LSTMCell(3), keras.layers.GRUCell(2)], name="mixed")(y))
    model.save(tmp_path / "model.keras")
    cases = {
        "inner": r"inner \(Bidirectional\): inside spread \(TimeDistributed\), along another axis",
        "own": r"own \(Own\): |not found",
        "mixed": "cells that differ, LSTM",
        None: r"the recurrent layers are plain \(GRU\), mixed \(RNN\)",
    }
    for name, words in cases.items():
        with pytest.raises(tg.ConversionError, match=words):
            tg.from_keras(tmp_path / "model.keras", layer=name)
    assert tg.from_keras(tmp_path / "model.keras", layer="plain").hidden_size == 4
    for layer, words in ((model.get_layer("spread"), "another axis"), (model.get_layer("own"), "of Keras' own")):
        with pytest.raises(tg.ConversionError, match=words):
            tg.from_keras(layer)


def test_keras_file_then_onnx_then_onnxruntime(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3)),
            keras.layers.LSTM(4, return_sequences=True, name="a"),
            keras.layers.GRU(5, return_sequences=True, reset_after=False, name="b"),
            keras.layers.Bidirectional(keras.layers.GRU(2, return_sequences=True), name="c"),
        ]
    )
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32")
    y = x
    for name in "abc":
        layer = tg.from_keras(tmp_path / "model.keras", layer=name)
        session = onnxruntime.InferenceSession(tg.to_onnx(layer, states=False).SerializeToString())
        y = session.run(None, {"input": y})[0]
    np.testing.assert_allclose(y, keras.ops.convert_to_numpy(model(x)), atol=2e-6)


@quick
@given(st.sampled_from(["GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"]), SIZES, SIZES, st.booleans())
def test_linen_cells(name, input_size, hidden_size, residual):
    options = {"residual": residual} if name == "SimpleCell" else {}
    cell = getattr(linen, name)(hidden_size, **options)
    x = np.random.default_rng(0).normal(size=(2, input_size)).astype("float32")
    carry = cell.initialize_carry(jax.random.PRNGKey(1), x.shape)
    params = cell.init(jax.random.PRNGKey(2), carry, x)
    ours = tg.from_flax(type(cell), params, **options)
    state = ours(torch.tensor(x))
    close(state[0] if isinstance(state, tuple) else state, cell.apply(params, carry, x)[1])


@quick
@given(st.sampled_from(["GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"]), SIZES, SIZES)
def test_nnx_cells(name, input_size, hidden_size):
    cell = getattr(nnx, name)(input_size, hidden_size, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, input_size)).astype("float32")
    ours = tg.from_flax(name, nnx.state(cell, nnx.Param))
    zeros = np.zeros((2, hidden_size), "float32")
    carry = (zeros, zeros) if "LSTM" in name else zeros
    state = ours(torch.tensor(x))
    close(state[0] if isinstance(state, tuple) else state, cell(carry, x)[1])


def recurrent_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    names = ("GRU", "LSTM", "RNN")
    return [case for case in cases if case.model is not None and case.model.graph.node[0].op_type in names]


@pytest.mark.parametrize("case", recurrent_cases(), ids=lambda case: case.name)
def test_onnxs_own_node_cases(case):
    model, (inputs, outputs) = case.model, case.data_sets[0]
    node = model.graph.node[0]
    values = dict(zip((i.name for i in model.graph.input), inputs, strict=True))
    for name in node.input[1:4]:
        if name:
            model.graph.initializer.append(onnx.numpy_helper.from_array(values[name], name))
    if len(node.input) > 7 and node.input[7]:
        model.graph.initializer.append(onnx.numpy_helper.from_array(values[node.input[7]], node.input[7]))
    layer = tg.from_onnx(model)
    places = dict(zip(("X", "W", "R", "B", "lens", "h", "c", "P"), node.input, strict=False))
    states = [torch.tensor(values[places[key]]) for key in ("h", "c") if places.get(key)]
    if layer.batch_first:
        states = [state.transpose(0, 1) for state in states]
    lengths = torch.tensor(values[places["lens"]]) if places.get("lens") else None
    given_states = None if not states else states[0] if len(states) == 1 else tuple(states)
    output, final = layer(torch.tensor(values[places["X"]]), given_states, lengths=lengths)
    output = output.unflatten(-1, (2 if layer.bidirectional else 1, -1))
    found = {"Y": output if layer.batch_first else output.transpose(1, 2)}
    for place, state in zip(("Y_h", "Y_c"), final if isinstance(final, tuple) else (final,), strict=False):
        found[place] = state.transpose(0, 1) if layer.batch_first else state
    wanted = [place for place, name in zip(("Y", "Y_h", "Y_c"), node.output, strict=False) if name]
    for place, value in zip(wanted, outputs, strict=True):
        close(found[place], value, 1e-5)
