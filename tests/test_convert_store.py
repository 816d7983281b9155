# SPDX-License-Identifier: Apache-2.0
"""convert.save and load: every option of every class comes back; a header of another kind says which part is wrong."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tidegate as tg
from tidegate.convert import store

quick = settings(max_examples=200, deadline=None)
CLASSES = [tg.RNN, tg.LSTM, tg.GRU, tg.RNNCell, tg.LSTMCell, tg.GRUCell]
ACTIVATIONS = st.sampled_from(["tanh", "relu", "sigmoid", "elu(0.3)", "hard_sigmoid(0.3,0.4)", "softsign"])
CLIPS = st.sampled_from([None, 0, 1, 0.3])


def constructor(kind: type) -> set[str]:
    """The names of its arguments; `_proj_size` is torch.nn's place for what only an LSTM takes."""
    refused = {"_proj_size", *(["proj_size"] if kind in (tg.RNN, tg.GRU) else [])}
    return set(inspect.signature(kind).parameters) - refused


@pytest.mark.parametrize("kind", CLASSES)
def test_every_argument_is_stored(kind):
    # The first two are the weights'; nonlinearity is stored as activations.
    assert constructor(kind) - {"device", "dtype", "nonlinearity"} == set(store.ARGUMENTS[kind.__name__])


@st.composite
def modules(draw: st.DrawFn) -> torch.nn.Module:
    kind = draw(st.sampled_from(CLASSES))
    hidden_size = draw(st.integers(2, 4))
    options: dict[str, Any] = {"bias": draw(st.booleans()), "clip": draw(CLIPS)}
    options["init"] = draw(st.sampled_from(["torch", "keras", "tf1", "flax", "orthogonal", "kaiming"]))
    if not kind.__name__.endswith("Cell"):
        options |= {name: draw(st.booleans()) for name in ("batch_first", "bidirectional")}
        options["num_layers"] = draw(st.integers(1, 3))
        options["checkpoint_every"] = draw(st.sampled_from([0, 1, 100]))
        options["dropout"] = draw(st.sampled_from([0, 0.25, 1])) if options["num_layers"] > 1 else 0.0
        options["reverse"] = not options["bidirectional"] and draw(st.booleans())
    roles = {"R": 1, "G": 2, "L": 3}[kind.__name__[0]]
    if draw(st.booleans()):
        options["activations"] = draw(st.lists(ACTIVATIONS, min_size=roles, max_size=roles))
    elif roles == 1:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if roles > 1 and options["bias"]:
        options["forget_bias" if roles == 3 else "update_bias"] = draw(st.sampled_from([None, 1.0, -2]))
    if roles == 2:
        options["reset_after"] = draw(st.booleans())
    if roles == 3:
        options |= {name: draw(st.booleans()) for name in ("peepholes", "coupled")}
        options |= {name: draw(CLIPS) for name in ("cell_clip", "proj_clip")}
        options["proj_size"] = draw(st.integers(0, 1))
    if roles == 1 and "activations" in options:
        options["activations"] = options["activations"][0]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 3)))
    return kind(draw(st.integers(1, 4)), hidden_size, **options).to(dtype)


def values(module: Any) -> dict[str, Any]:
    """Every public attribute that is a number, a text or a mark."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, bool))}
    return {name: value for name, value in plain.items() if name != "training" and name[0] != "_"}


@quick
@given(modules())
def test_a_module_comes_back_as_it_was(tmp_path_factory, module):
    path = tmp_path_factory.getbasetemp() / "module.safetensors"
    tg.convert.save(module, path)
    before = torch.get_rng_state()
    back = tg.convert.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(back) is type(module)
    assert repr(back) == repr(module)
    assert values(back) == values(module)
    names = [name for name, _ in module.named_parameters()]
    assert [name for name, _ in back.named_parameters()] == names
    for name in names:
        assert torch.equal(getattr(back, name), getattr(module, name))
    x = torch.randn(3, 3, module.input_size, dtype=module.state_dict()[names[0]].dtype)
    x = x[0] if "Cell" in type(module).__name__ else x
    for a, b in zip(flat(back.eval()(x)), flat(module.eval()(x)), strict=True):
        # The same numbers in other memory: a product's last bit may differ.
        torch.testing.assert_close(a, b)


def flat(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [t for result in results for t in flat(result)]


class Own(tg.GRU):
    pass


def test_what_cannot_be_stored_says_so(tmp_path):
    pruned = tg.GRU(3, 4)
    torch.nn.utils.prune.random_unstructured(pruned, "weight_hh_l0", 0.5)
    parametrized = torch.nn.utils.parametrizations.weight_norm(tg.GRU(3, 4), "weight_hh_l0")
    cases = [
        (torch.nn.GRU(3, 4), "got GRU"),
        (Own(3, 4), "expected one of tidegate's RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, got Own"),
        (parametrized, "got ParametrizedGRU; make a parametrization permanent first"),
        (
            pruned,
            "weight_hh_l0, weight_hh_l0_mask, weight_hh_l0_orig: make a parametrization or pruning permanent first",
        ),
        ({}, "got dict"),
    ]
    for module, words in cases:
        with pytest.raises(tg.ConversionError) as error:
            tg.convert.save(module, tmp_path / "module.safetensors")
        assert words in str(error.value)
    assert not list(tmp_path.iterdir())


GOOD = store.describe(tg.GRU(3, 4))
HEADERS = [
    (None, "header: expected a description"),
    ([], "header: expected a description"),
    ({}, "header, class: expected one of RNN, LSTM"),
    ({"class": []}, "header, class: expected one of RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, got []"),
    ({"class": {}}, "header, class: "),
    ({"class": "os.system"}, "got 'os.system'"),
    ({"class": "GRU"}, "header, arguments: expected those of GRU by name, got None"),
    ({"class": "GRU", "arguments": []}, "header, arguments: expected those of GRU"),
    ({"class": "GRU", "arguments": {}}, "header, arguments: no input_size"),
    ({"num_layers": True}, "num_layers: expected an integer, got True"),
    ({"num_layers": 10**9}, "num_layers=1000000000, with 4 weights"),
    ({"input_size": [3]}, "input_size: expected an integer, got [3]"),
    ({"input_size": 10**30}, "load("),
    ({"hidden_size": None}, "hidden_size: expected an integer, got None"),
    ({"hidden_size": 0}, "hidden_size must be greater than zero"),
    ({"bias": "yes"}, "bias: expected true or false, got 'yes'"),
    ({"clip": {}}, "clip: expected a number, got {}"),
    ({"clip": float("nan")}, "clip: expected a positive number"),
    ({"activations": ["tanh"]}, "activations: expected a text, got ['tanh']"),
    ({"activations": "cube,tanh"}, "got 'cube'"),
    ({"dropout": "0"}, "dropout: expected a number, got '0'"),
    ({"dropout": 2.0}, "dropout should be a number in range [0, 1]"),
    ({"init": "xavier"}, "init: expected one of"),
    ({"peepholes": True}, "'peepholes' is none of GRU's"),
]


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_a_header_of_another_kind_names_the_part(tmp_path, header, words):
    if isinstance(header, dict) and header and "class" not in header:
        header = {**GOOD, "arguments": {**GOOD["arguments"], **header}}
    path = tmp_path / "module.safetensors"
    save_file(tg.GRU(3, 4).state_dict(), path, {"tidegate": json.dumps(header)})
    with pytest.raises(tg.ConversionError) as error:
        tg.convert.load(path)
    assert words in str(error.value)
    assert str(error.value).startswith("load(")


def test_weights_of_another_kind_say_so(tmp_path):
    path = tmp_path / "module.safetensors"
    weights = tg.GRU(3, 4).state_dict()
    header = {"tidegate": json.dumps(GOOD)}
    save_file({name: weight.long() for name, weight in weights.items()}, path, header)
    with pytest.raises(tg.ConversionError, match=r"weight_hh_l0: expected floating-point numbers, got torch\.int64"):
        tg.convert.load(path)
    for changed in ({}, {**weights, "more": torch.zeros(1)}, {**weights, "weight_hh_l0": torch.zeros(0)}):
        save_file(changed, path, header)
        with pytest.raises(tg.ConversionError, match=r"load\("):
            tg.convert.load(path)


@settings(quick, max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4), st.floats(0, 1))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, changes, share):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    torch.manual_seed(0)
    tg.convert.save(tg.GRU(1, 1), path)
    content = bytearray(path.read_bytes())
    content = content if changes else content[: int(share * len(content))]
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(bytes(content))
    try:
        tg.convert.load(path)
    except tg.ConversionError as error:
        assert str(error).startswith("load(")  # noqa: PT017 - either outcome is right, no other error is


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def test_checkpoint_every_set_to_none(tmp_path):
    layer = tg.GRU(3, 4, checkpoint_every=8)
    layer.checkpoint_every = None
    tg.convert.save(layer, tmp_path / "layer.safetensors")
    assert tg.convert.load(tmp_path / "layer.safetensors").checkpoint_every == 0


# A single layer with dropout is one that torch's constructor makes, with a warning.
@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
@quick
@given(st.sampled_from(sorted(GOOD["arguments"])), JSON)
@example("dropout", 1)
@example("dropout", 0.5)
def test_any_json_in_an_arguments_place_is_read_or_refused(tmp_path_factory, name, value):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    header = {**GOOD, "arguments": {**GOOD["arguments"], name: value}}
    save_file(tg.GRU(3, 4).state_dict(), path, {"tidegate": json.dumps(header)})
    try:
        tg.convert.load(path)
    except tg.ConversionError as error:
        assert str(error).startswith("load(")  # noqa: PT017 - either outcome is right, no other error is


@quick
@given(modules())
def test_a_cell_becomes_a_layer_with_every_option(module):
    if "Cell" not in type(module).__name__:
        return
    layer = tg.convert.as_layer(module)
    stored, kept = store.describe(module)["arguments"], store.describe(layer)["arguments"]
    assert {name: kept[name] for name in stored} == stored
    x = torch.randn(1, 3, module.input_size, dtype=module.weight_ih.dtype)
    torch.testing.assert_close(layer(x)[0][0], flat(module(x[0]))[0])


def test_two_cells_that_differ_are_no_layer():
    for other, words in (
        (tg.GRUCell(3, 4).double(), "cell 1, weight_ih torch.float64"),
        (tg.GRUCell(3, 4, init="tf1"), "init: "),
    ):
        with pytest.raises(tg.ConversionError) as error:
            tg.convert.as_layer(tg.GRUCell(3, 4), other)
        assert words in str(error.value)


PACKAGES = {
    "onnx": ("tg.from_onnx('x')", "tg.to_onnx(tg.GRU(3, 4))"),
    "google.protobuf": ("tg.from_onnx('x')",),
    "onnxscript": ("tg.convert.onnx_translations()",),
    "safetensors": ("tg.convert.save(tg.GRU(3, 4), 'x')", "tg.convert.load('x')"),
    "h5py": ("tg.from_keras(file)",),
    "numpy": (
        "tg.from_onnx('x')",
        "tg.from_keras('GRU', {}, [[1.0]] * 3)",
        "tg.from_tf1('BasicRNNCell', {'kernel': [[1.0]] * 2, 'bias': [1.0]})",
        "tg.from_flax('SimpleCell', {'i': {'kernel': [[1.0]]}, 'h': {'kernel': [[1.0]]}})",
        "tg.from_keras(file)",
    ),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(package, tmp_path):
    """The one that is missing, not the one that asked for it; and without it `tidegate.convert` is imported."""
    code = f"""
import io, json, sys, zipfile
sys.modules[{package!r}] = None
import tidegate as tg
tg.convert
file = {str(tmp_path / "model.keras")!r}
with zipfile.ZipFile(file, "w") as archive:
    layers = [{{"class_name": "GRU", "config": {{"name": "gru"}}}}]
    archive.writestr("config.json", json.dumps({{"config": {{"layers": layers}}}}))
    archive.writestr("model.weights.h5", "")
for call in {PACKAGES[package]!r}:
    try:
        eval(call)
    except ImportError as error:
        print(str(error).split(" (")[0].split(" needs ")[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    name = "protobuf" if package.startswith("google") else package
    expected = f"the package {name}: pip install tidegate[convert]"
    assert done.stdout.splitlines() == [expected] * len(PACKAGES[package])
