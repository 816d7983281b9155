# SPDX-License-Identifier: Apache-2.0
"""from_keras against Keras' own numbers, on its reference backend: outputs, states, gradients, float64 to 1e-10."""

import numpy as np
import pytest
import torch
import vectors

import tidegate as tg

CLASSES = {"simple": "SimpleRNN", "gru": "GRU", "lstm": "LSTM"}
ALL = vectors.load("keras3")
ONE = [name for name, case in ALL.items() if case["meta"]["mk"] in ("base", "stateful")]
TWO = [name for name, case in ALL.items() if case["meta"]["mk"] == "bidi" and case["meta"]["mm"] == "concat"]
MERGED = [name for name, case in ALL.items() if case["meta"]["mk"] == "bidi" and case["meta"]["mm"] != "concat"]
MODELS = [name for name, case in ALL.items() if case["meta"]["mk"] == "seqmodel"]


def converted(case, weights=None):
    meta = case["meta"]
    arrays = list(vectors.part(case, "w/").values()) if weights is None else weights
    config = {**meta["kw"]}
    if meta["mk"] == "bidi":
        inner = {"class_name": CLASSES[meta["kind"]], "config": config}
        return tg.from_keras("Bidirectional", {"layer": inner, "merge_mode": meta["mm"]}, arrays)
    return tg.from_keras(CLASSES[meta["kind"]], config, arrays)


def close(found, expected, name):
    if expected.size == 0:
        assert found is None or not found.any(), name
        return
    found = torch.zeros(expected.shape) if found is None else found
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-10, err_msg=name)


def in_keras_order(layer):
    """Gradients of Keras' variables from ours, in Keras' order: the converter's map, transposed."""
    orders = {"rnn": ("h", "h"), "lstm": ("ifgo", "ifco"), "gru": ("rzn", "zrh")}
    ours, theirs = orders[layer.cell.name]
    theirs = theirs.replace("c", "g").replace("h", "n") if layer.cell.name != "rnn" else theirs
    for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
        grads = {}
        for name in ("weight_ih", "weight_hh") + ("bias_ih", "bias_hh") * layer.bias:
            blocks = dict(zip(ours, getattr(layer, f"{name}_l0{suffix}").grad.chunk(len(ours)), strict=True))
            grads[name] = torch.cat([blocks[letter] for letter in theirs])
        yield grads["weight_ih"].T
        yield grads["weight_hh"].T
        if layer.bias:
            both = layer.cell.name == "gru" and layer.reset_after
            yield torch.stack([grads["bias_ih"], grads["bias_hh"]]) if both else grads["bias_ih"]


def call(layer, case, x, init):
    meta = case["meta"]
    keywords = {key: meta["kw"][key] for key in ("return_sequences", "zero_output_for_mask") if key in meta["kw"]}
    mask = torch.tensor(case["mask"]) if "mask" in case else None
    results = tg.convert.keras_call(layer, x, mask, init or None, return_state=True, **keywords)
    if meta["mk"] == "stateful":
        results = tg.convert.keras_call(layer, x, mask, results[1:], return_state=True, **keywords)
    return results


def check(case, results, tag, x, init, weights):
    outputs = vectors.part(case, "out/")
    assert len(results) == len(outputs)
    for k, result in enumerate(results):
        close(result, outputs[str(k)], f"out/{k}")
    counted = results[: case["meta"]["n_out"]] if tag == "g1" else results
    sum((result * torch.tensor(case[f"R/{k}"])).sum() for k, result in enumerate(counted)).backward()
    close(x.grad, case[f"{tag}/x"], "x")
    for k, leaf in enumerate(init):
        close(leaf.grad, case[f"{tag}/init/{k}"], f"init/{k}")
    expected = vectors.part(case, f"{tag}/w/")
    for (name, value), grad in zip(expected.items(), weights(), strict=True):
        close(grad, value, name)


@pytest.mark.parametrize("tag", ["g1", "g2"])
@pytest.mark.parametrize("name", ONE + TWO)
def test_a_layer_gives_keras_numbers(name, tag):
    case = ALL[name]
    layer = converted(case)
    x = torch.tensor(case["x"], requires_grad=True)
    init = [torch.tensor(value, requires_grad=True) for value in vectors.part(case, "init/").values()]
    results = call(layer, case, x, init)
    check(case, results, tag, x, init, lambda: in_keras_order(layer))


@pytest.mark.parametrize("tag", ["g1", "g2"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_in_a_row(name, tag):
    case = ALL[name]
    arrays = list(vectors.part(case, "w/").values())
    first = tg.from_keras("LSTM", {"units": 4}, arrays[:3])
    inner = {"class_name": "GRU", "config": {"units": 3, "reset_after": False}}
    second = tg.from_keras("Bidirectional", {"layer": inner}, arrays[3:])
    x = torch.tensor(case["x"], requires_grad=True)
    mask = torch.tensor(case["mask"]) if "mask" in case else None
    middle = tg.convert.keras_call(first, x, mask, return_sequences=True)
    result = tg.convert.keras_call(second, middle, mask, return_sequences=True)
    check(case, (result,), tag, x, [], lambda: [*in_keras_order(first), *in_keras_order(second)])


@pytest.mark.parametrize("name", MERGED)
def test_other_merge_modes_are_refused(name):
    with pytest.raises(tg.ConversionError, match="merge_mode="):
        converted(ALL[name])


def test_every_recurrent_case_of_the_file_is_used():
    assert len(ONE) + len(TWO) + len(MERGED) + len(MODELS) == len(ALL) == 105


def arrays(units=4, inputs=3, gates=3, rows=(2,)):
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=shape) for shape in ((inputs, gates * units), (units, gates * units), (*rows, gates * units))
    ]


def test_what_acts_in_training_is_refused_or_left_out():
    config = {"units": 4, "dropout": 0.2, "recurrent_dropout": 0.1, "kernel_regularizer": {"class_name": "L2"}}
    with pytest.raises(tg.ConversionError) as error:
        tg.from_keras("GRU", config, arrays())
    for word in ("dropout=0.2", "recurrent_dropout=0.1", "kernel_regularizer="):
        assert word in str(error.value)
    assert tg.from_keras("GRU", config, arrays(), inference_only=True).hidden_size == 4


def test_the_flat_bias_of_cudnngru_is_the_same():
    kernel, recurrent, bias = arrays()
    layers = [tg.from_keras("GRU", {"units": 4}, [kernel, recurrent, b]) for b in (bias, bias.ravel())]
    assert all(torch.equal(a, b) for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "config", "weights", "words"),
    [
        ("ConvLSTM2D", {}, arrays(), ["class_name='ConvLSTM2D'"]),
        (
            "GRU",
            {"units": 5, "activation": "cube", "novel": 1},
            arrays(),
            ["(5, any), got (4, 12)", "'cube'", "novel=1"],
        ),
        ("GRU", {"units": 4, "reset_after": False}, arrays(), ["bias: expected (3*H,) = (12), got (2, 12)"]),
        ("GRU", {"units": 4, "use_bias": False}, arrays(), ["expected 2 (kernel, recurrent_kernel), got 3"]),
        ("LSTM", {"units": 4}, arrays(), ["recurrent_kernel: expected (H, 4*H), got (4, 12)"]),
        ("GRU", {"recurrent_activation": "hard_sigmoid", "implementation": 2}, arrays(), ["Keras 2"]),
        ("Bidirectional", {"layer": {"class_name": "Dense"}}, arrays(), ["Dense and Dense", "got 3"]),
    ],
)
def test_what_cannot_be_represented(name, config, weights, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.from_keras(name, config, weights)
    for word in words:
        assert word in str(error.value)
