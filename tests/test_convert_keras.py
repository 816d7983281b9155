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


PLAIN = [name for name in ONE if ALL[name]["meta"]["mk"] == "base"]
BACKWARDS = [name for name in PLAIN if ALL[name]["meta"]["kw"].get("go_backwards") and "mask" not in ALL[name]]


def as_cell(kind, kw):
    """The config of the RNN of a cell that is the layer of `kw`."""
    outer = {key: kw[key] for key in kw if key.startswith("return_") or key in ("go_backwards", "zero_output_for_mask")}
    inner = {key: value for key, value in kw.items() if key not in outer}
    return {**outer, "cell": {"module": "keras.layers", "class_name": f"{CLASSES[kind]}Cell", "config": inner}}


@pytest.mark.parametrize("name", PLAIN)
def test_an_rnn_of_a_cell_gives_the_layers_numbers(name):
    case = ALL[name]
    meta = case["meta"]
    layer = tg.from_keras("RNN", as_cell(meta["kind"], meta["kw"]), list(vectors.part(case, "w/").values()))
    x = torch.tensor(case["x"])
    results = call(layer, case, x, [torch.tensor(value) for value in vectors.part(case, "init/").values()])
    for k, result in enumerate(results):
        close(result, case[f"out/{k}"], f"out/{k}")


@pytest.mark.parametrize("name", TWO)
def test_a_bidirectional_of_rnns_of_a_cell_gives_the_layers_numbers(name):
    case = ALL[name]
    meta = case["meta"]
    inner = {"class_name": "RNN", "config": as_cell(meta["kind"], meta["kw"])}
    layer = tg.from_keras("Bidirectional", {"layer": inner}, list(vectors.part(case, "w/").values()))
    reference = converted(case)
    assert repr(layer) == repr(reference)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_layer_that_goes_backwards_says_so_and_keeps_the_inputs_order(name):
    """Keras returns such a layer's steps as it takes them; the plain call returns them where they belong."""
    case = ALL[name]
    layer = converted(case)
    assert layer.reverse
    assert "reverse=True" in repr(layer)
    init = [torch.tensor(value) for value in vectors.part(case, "init/").values()]
    states = tuple(value.unsqueeze(0) for value in init)
    output, final = layer(torch.tensor(case["x"]), (states if len(states) > 1 else states[0]) if states else None)
    in_keras = output.flip(1) if case["meta"]["kw"]["return_sequences"] else output[:, 0]
    close(in_keras, case["out/0"], "out/0")
    for k, state in enumerate(final if isinstance(final, tuple) else (final,), 1):
        close(state[0], case[f"out/{k}"], f"out/{k}")


def test_there_are_layers_that_go_backwards():
    assert len(BACKWARDS) >= 6
    assert {ALL[name]["meta"]["kw"]["return_sequences"] for name in BACKWARDS} == {False, True}


def cell(class_name="GRUCell", **config):
    return {
        "module": "keras.layers",
        "class_name": class_name,
        "registered_name": None,
        "config": {"units": 4, **config},
    }


def stack(*cells, **config):
    return {"cell": {"class_name": "StackedRNNCells", "config": {"cells": list(cells)}}, **config}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_stack_of_like_cells_is_one_layer_after_another(backwards):
    lower, upper = arrays(), arrays(inputs=4)
    layer = tg.from_keras("RNN", stack(cell(), cell(), go_backwards=backwards), [*lower, *upper])
    assert (layer.num_layers, layer.reverse) == (2, backwards)
    apart = [tg.from_keras("GRU", {"units": 4, "go_backwards": backwards}, part) for part in (lower, upper)]
    x, mask = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([[True] * 5, [False, True, True, False, True]])
    init = torch.randn(2, 2, 4, dtype=torch.float64)
    found = tg.convert.keras_call(layer, x, mask, list(init), return_sequences=True, return_state=True)
    middle = tg.convert.keras_call(apart[0], x, mask, [init[0]], return_sequences=True, return_state=True)
    # A layer that goes backwards returns its last step first; the next one of the stack takes the steps in that order.
    between = middle[0].flip(1) if backwards else middle[0]
    final = tg.convert.keras_call(apart[1], between, mask, [init[1]], return_sequences=True, return_state=True)
    for a, b in zip(found, (final[0], middle[1], final[1]), strict=True):
        torch.testing.assert_close(a, b)


TWICE = [*arrays(), *arrays(inputs=4)]
REFUSED = [
    ("TimeDistributed", {"layer": cell("GRU")}, arrays(), ["from_keras(config['layer']['class_name']", "another axis"]),
    ("ConvLSTM2D", {}, arrays(), ["class_name='ConvLSTM2D'", "its cell convolves"]),
    ("LSTMCell", {"units": 4}, arrays(), ["it is a cell: give the config of the RNN around it"]),
    ("CuDNNGRU", {"units": 4}, arrays(), ["load the model in Keras and save it again"]),
    ("RNN", {}, arrays(), ["cell: expected class_name and config, got None"]),
    ("RNN", {"cell": cell("MyCell")}, arrays(), ["cell='MyCell' is not supported: one of SimpleRNNCell, GRUCell"]),
    (
        "RNN",
        {"cell": {**cell(), "registered_name": "mine>GRUCell"}},
        arrays(),
        ["'mine>GRUCell' is a class of the model"],
    ),
    ("RNN", {"cell": {**cell(), "module": "mine"}}, arrays(), ["cell: 'mine' is a class of the model's own"]),
    ("RNN", {"cell": cell(), "novel": 1}, arrays(), ["novel=1"]),
    ("RNN", {"cell": cell(dropout=0.5)}, arrays(), ["dropout=0.5"]),
    ("RNN", {"cell": cell()}, TWICE, ["weights: expected 3 (kernel, recurrent_kernel, bias), got 6"]),
    (
        "RNN",
        stack(cell(), cell()),
        arrays(),
        ["weights: expected 6 (kernel, recurrent_kernel, bias), of 2 cells, got 3"],
    ),
    ("RNN", stack(), [], ["cells: expected the cells of a StackedRNNCells, got []"]),
    (
        "RNN",
        {"cell": {"class_name": "StackedRNNCells", "config": {}}},
        [],
        ["cells: expected the cells of", "got None"],
    ),
    (
        "RNN",
        stack(cell(), cell("LSTMCell")),
        [*arrays(), *arrays(inputs=4, gates=4, rows=())],
        ["cells that differ, GRU(4), {", "; LSTM(4), {", "one kind, size and options", "run one after another"],
    ),
    ("RNN", stack(cell(), cell(units=2)), [*arrays(), *arrays(2, 4)], ["cells that differ, GRU(4), {", "GRU(2)"]),
    ("RNN", stack(cell(), cell(activation="relu")), TWICE, ["cells that differ"]),
    ("RNN", stack(cell(), cell(use_bias=False)), TWICE[:5], ["cells that differ"]),
    ("RNN", stack(cell(), cell("GRU")), TWICE, ["cell 1='GRU' is not supported"]),
    (
        "Bidirectional",
        {"layer": cell("TimeDistributed")},
        TWICE,
        ["TimeDistributed and TimeDistributed are not supported"],
    ),
    ("Bidirectional", {"layer": cell("GRU"), "novel": 1}, TWICE, ["novel=1"]),
    (
        "Bidirectional",
        {"layer": {"class_name": "RNN", "config": stack(cell(), cell())}},
        TWICE * 2,
        [
            "a stack in each direction",
            "convert layer and backward_layer apart",
        ],
    ),
    (
        "Bidirectional",
        {"layer": cell("GRU"), "backward_layer": cell("GRU")},
        [*arrays(), *arrays()],
        ["go_backwards: "],
    ),
    (
        "Bidirectional",
        {"layer": cell("GRU"), "backward_layer": cell("LSTM", go_backwards=True)},
        [
            *arrays(),
            *arrays(gates=4, rows=()),
        ],
        ["options differ: GRU {", "} forward, LSTM {"],
    ),
    (
        "Bidirectional",
        {"layer": {**cell("GRU"), "registered_name": "mine>GRU"}},
        TWICE,
        ["what its GRU computes is not"],
    ),
    ("Bidirectional", {"layer": [1]}, TWICE, ["layer: expected class_name and config, got [1]"]),
    ("Bidirectional", {}, TWICE, ["layer: expected class_name and config, got None"]),
    ("GRU", [1], arrays(), ["config: expected what layer.get_config() returns, got list [1]"]),
    ("GRU", {1: 2}, arrays(), ["config: expected what layer.get_config() returns, got dict"]),
    ("GRU", {"units": "4"}, arrays(), ["units='4' is not supported: a positive integer"]),
    ("GRU", {"units": -4}, arrays(), ["units=-4"]),
    ("GRU", {"reset_after": "no"}, arrays(), ["reset_after='no' is not supported: True or False"]),
    ("GRU", {"go_backwards": "no"}, arrays(), ["go_backwards='no'"]),
    ("GRU", {"units": 4}, 3, ["weights: expected a list, as layer.get_weights() returns, got int"]),
    ("GRU", {"units": 4}, [], ["a layer has none before it is built"]),
    (
        "GRU",
        {"units": 4},
        [np.zeros((0, 12)), *arrays()[1:]],
        ["kernel: expected (I, 3*H), none of them 0, got (0, 12)"],
    ),
    ("GRU", {}, [arrays()[0], np.zeros((0, 0)), arrays()[2]], ["recurrent_kernel: expected (H, G*H), none of them 0"]),
]


@pytest.mark.parametrize(("name", "config", "weights", "words"), REFUSED)
def test_a_refusal_says_what_it_saw_and_what_to_do(name, config, weights, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.from_keras(name, config, weights)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("source", [42, None, torch.nn.GRU(3, 4), object])
def test_what_is_no_layer_says_so(source):
    with pytest.raises(
        tg.ConversionError, match="expected a layer of Keras' own, the name of its class with its config"
    ):
        tg.from_keras(source)


@pytest.mark.parametrize(
    ("layer", "keywords", "words"),
    [
        (tg.GRU(3, 4), {}, "layer: expected what from_keras returns, got GRU"),
        (torch.nn.GRU(3, 4, batch_first=True), {}, "layer: expected what from_keras returns"),
        (tg.GRU(3, 4, 2, batch_first=True, bidirectional=True), {}, "layer: expected what from_keras returns"),
        (
            tg.GRU(3, 4, batch_first=True),
            {"mask": torch.ones(2, 5)},
            "mask: expected bool (B, T) = (2, 5), got torch.float32",
        ),
        (tg.GRU(3, 4, batch_first=True), {"mask": torch.ones(5, 2, dtype=torch.bool)}, "got torch.bool (5, 2)"),
        (tg.GRU(3, 4, batch_first=True), {"initial_state": []}, "initial_state: expected 1 tensors, got 0"),
    ],
)
def test_a_call_of_another_kind_says_so(layer, keywords, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        tg.convert.keras_call(layer, torch.randn(2, 5, 3), **keywords)
    assert words in str(error.value)
