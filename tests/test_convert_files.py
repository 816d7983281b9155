# SPDX-License-Identifier: Apache-2.0
"""Files: .keras, .onnx, .pt, .safetensors; well-formed ones read, others refused by name and run nothing."""

import io
import json
import pickle
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import tidegate as tg
from tidegate.cli import convert_check
from tidegate.cli.convert import run_convert


def keras_weights(groups):
    """model.weights.h5 as Keras writes it: {place: arrays}."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for place, arrays in groups.items():
            group = file.create_group(f"{place}/cell/vars")
            for k, array in enumerate(arrays):
                group.create_dataset(str(k), data=array)
    return buffer.getvalue()


def gru_arrays(seed=0, input_size=3, hidden_size=4):
    rng = np.random.default_rng(seed)
    shapes = [(input_size, 3 * hidden_size), (hidden_size, 3 * hidden_size), (2, 3 * hidden_size)]
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def layer_config(name, class_name="GRU", **config):
    inner = {"name": name, "units": 4, **config}
    return {"module": "keras.layers", "class_name": class_name, "registered_name": None, "config": inner}


def keras_file(path, layers, weights, compression=zipfile.ZIP_STORED):
    config = {"class_name": "Sequential", "config": {"name": "model", "layers": layers}}
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights)
    return path


def test_each_layer_of_a_keras_file_by_its_name(tmp_path):
    nested = {"class_name": "Functional", "config": {"layers": [layer_config("inner")]}}
    arrays = [gru_arrays(k) for k in range(4)]
    path = keras_file(
        tmp_path / "model.keras",
        [
            {"class_name": "InputLayer", "config": {"name": "input"}},
            layer_config("first"),
            layer_config("custom") | {"registered_name": "mine>GRU"},
            layer_config("last", return_sequences=True),
            nested,
        ],
        keras_weights(
            {
                "layers/gru": arrays[0],
                "layers/gru_1": arrays[1],
                "layers/gru_2": arrays[2],
                "layers/functional/layers/gru": arrays[3],
            }
        ),
    )
    for name, expected in (("first", arrays[0]), ("last", arrays[2]), ("inner", arrays[3])):
        layer = tg.from_keras(path, layer=name)
        reference = tg.from_keras("GRU", {"units": 4}, expected)
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), reference.parameters(), strict=True))
    with pytest.raises(tg.ConversionError, match=r"layer=: needed; the recurrent layers are first \(GRU\), last"):
        tg.from_keras(path)


def keras_weights_at(groups):
    """As keras_weights, each place to its last group."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for place, arrays in groups.items():
            group = file.create_group(place)
            for k, array in enumerate(arrays):
                group.create_dataset(str(k), data=array)
    return buffer.getvalue()


def cell_config(class_name="GRUCell", units=4):
    return {"module": "keras.layers", "class_name": class_name, "registered_name": None, "config": {"units": units}}


def stack_config(*cells):
    return {"module": "keras.layers", "class_name": "StackedRNNCells", "config": {"cells": list(cells)}}


def test_rnns_of_cells_in_a_keras_file_stand_where_keras_puts_them(tmp_path):
    """The places are those that Keras 3.15 wrote."""
    lower, upper = gru_arrays(0), gru_arrays(1, input_size=4)
    inner = {"module": "keras.layers", "class_name": "RNN", "config": {"cell": cell_config()}}
    layers = [
        layer_config("one", "RNN", cell=cell_config()),
        layer_config("two", "RNN", cell=stack_config(cell_config(), cell_config())),
        layer_config("ways", "Bidirectional", layer=inner),
        layer_config("spread", "TimeDistributed", layer=layer_config("hidden", "GRU")),
        layer_config("frames", "ConvLSTM2D"),
        layer_config("other", "GRU") | {"registered_name": "mine>GRU"},
    ]
    for layer in layers[:5]:
        layer["config"].pop("units")
    weights = keras_weights_at(
        {
            "layers/rnn/cell/vars": lower,
            "layers/rnn_1/cell/cells/gru_cell/vars": lower,
            "layers/rnn_1/cell/cells/gru_cell_1/vars": upper,
            "layers/bidirectional/forward_layer/cell/vars": lower,
            "layers/bidirectional/backward_layer/cell/vars": gru_arrays(2),
        }
    )
    path = keras_file(tmp_path / "model.keras", layers, weights)
    expected = {
        "one": ("GRU", {"units": 4}, lower),
        "two": ("RNN", {"cell": stack_config(cell_config(), cell_config())}, [*lower, *upper]),
        "ways": ("Bidirectional", {"layer": inner}, [*lower, *gru_arrays(2)]),
    }
    for name, (kind, config, arrays) in expected.items():
        layer, reference = tg.from_keras(path, layer=name), tg.from_keras(kind, config, arrays)
        assert repr(layer) == repr(reference)
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), reference.parameters(), strict=True))
    for name, words in (
        ("hidden", r"hidden \(GRU\): inside spread \(TimeDistributed\), along another axis"),
        ("frames", r"frames \(ConvLSTM2D\): no layer here is like it"),
        ("other", r"other \(GRU\): a class of the model's own"),
        (None, r"are one \(RNN\), two \(RNN\), ways \(Bidirectional\)\n  not read: hidden \(GRU\): inside"),
    ):
        with pytest.raises(tg.ConversionError, match=words):
            tg.from_keras(path, layer=name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.sampled_from(["", "GRU", "RNN", "relu"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["config", "class_name", "layer", "layers", "cell", "cells"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def places(node, path=()):
    """Every place in a configuration."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_configuration_of_any_form_is_read_or_refused(tmp_path_factory, data):
    inner = {"module": "keras.layers", "class_name": "RNN", "config": {"cell": cell_config()}}
    layers = [
        layer_config("gru", activation="tanh", use_bias=True, go_backwards=False),
        layer_config("two", "RNN", cell=stack_config(cell_config(), cell_config())),
        layer_config("ways", "Bidirectional", layer=inner, backward_layer=inner, merge_mode="concat"),
        layer_config("spread", "TimeDistributed", layer=layer_config("hidden", "GRU")),
    ]
    arrays, upper = gru_arrays(), gru_arrays(input_size=4)
    weights = {
        "layers/gru/cell/vars": arrays,
        "layers/rnn/cell/cells/gru_cell/vars": arrays,
        "layers/rnn/cell/cells/gru_cell_1/vars": upper,
        "layers/bidirectional/forward_layer/cell/vars": arrays,
        "layers/bidirectional/backward_layer/cell/vars": arrays,
    }
    *way, last = data.draw(st.sampled_from([place for place in places(layers) if place]))
    target = layers
    for key in way:
        target = target[key]
    if data.draw(st.booleans()):
        target[last] = data.draw(JSON)
    else:
        del target[last]
    path = keras_file(tmp_path_factory.getbasetemp() / "any.keras", layers, keras_weights_at(weights))
    try:
        tg.from_keras(path, layer=data.draw(st.sampled_from(["gru", "two", "ways", "hidden", None])))
    except tg.ConversionError as error:
        assert "from_keras(" in str(error)  # noqa: PT017 - either outcome is right, no other error is


def soft_link(file, place):
    del file[place]
    file[place] = h5py.SoftLink("/elsewhere")


def outer_link(file, place):
    del file[place]
    file[place] = h5py.ExternalLink("/etc/hostname", "/")


def compressed(file, place):
    del file[place]
    file.create_dataset(place, shape=(1 << 20, 1 << 10), dtype="f4", compression="gzip", fillvalue=1.0)


def unwritten(file, place):
    del file[place]
    file.create_dataset(place, shape=(1 << 20, 1 << 10), dtype="f4")


def outside(file, place):
    del file[place]
    file.create_dataset(place, shape=(3, 12), dtype="f4", external=[("/etc/hostname", 0, 144)])


def objects(file, place):
    del file[place]
    file.create_dataset(place, data=["text"] * 3)


@pytest.mark.parametrize("harm", [soft_link, outer_link, compressed, unwritten, outside, objects])
def test_a_weights_file_that_points_elsewhere_or_claims_what_it_has_not_is_refused(tmp_path, harm):
    buffer = io.BytesIO(keras_weights({"layers/gru": gru_arrays()}))
    with h5py.File(buffer, "r+") as file:
        harm(file, "layers/gru/cell/vars/0")
    path = keras_file(tmp_path / "model.keras", [layer_config("gru")], buffer.getvalue())
    with pytest.raises(tg.ConversionError, match=r"model.weights.h5, layer gru: "):
        tg.from_keras(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    weights = bytes(200 << 20)
    path = keras_file(tmp_path / "model.keras", [layer_config("gru")], weights, zipfile.ZIP_DEFLATED)
    with pytest.raises(tg.ConversionError, match="and 209715200 for model"):
        tg.from_keras(path)


def test_paths_inside_a_zip_are_never_written(tmp_path):
    path = keras_file(tmp_path / "model.keras", [layer_config("gru")], keras_weights({"layers/gru": gru_arrays()}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped.txt", "no")
    before = sorted(tmp_path.parent.iterdir())
    tg.from_keras(path)
    assert sorted(tmp_path.parent.iterdir()) == before


def written(path, content):
    path.write_bytes(content)
    return path


def test_files_of_another_kind_say_so(tmp_path):
    whole = keras_file(tmp_path / "a.keras", [layer_config("gru")], keras_weights({"layers/gru": gru_arrays()}))
    content = whole.read_bytes()
    weights = keras_weights({"layers/gru": gru_arrays()})
    cases = {
        "no zip, or cut short": content[: len(content) // 2],
        "an HDF5 file; save the model as .keras": weights,
        "0 entries config.json": zipped({"other": "x"}),
        "no JSON": zipped({"config.json": "{", "model.weights.h5": "x"}),
        "expected the configuration of a Keras model": zipped({"config.json": "[1]", "model.weights.h5": "x"}),
        "damaged": content.replace(b"config.json", b"donfig.json", 1),
    }
    for words, bad in cases.items():
        with pytest.raises(tg.ConversionError) as error:
            tg.from_keras(written(tmp_path / "b.keras", bad))
        assert words in str(error.value), words


def zipped(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_onnx_files_of_another_kind_say_so(tmp_path):
    content = tg.to_onnx(tg.GRU(3, 4)).SerializeToString()
    for bad, words in ((content[:-20], "damaged"), (b"PK\x03\x04 no", "no ONNX model"), (b"", "it has no nodes")):
        with pytest.raises(tg.ConversionError) as error:
            tg.from_onnx(written(tmp_path / "model.onnx", bad))
        assert words in str(error.value)
    with pytest.raises(tg.ConversionError, match=r"expected a path or an onnx.ModelProto, got dict"):
        tg.from_onnx({})


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link", "folder", "", "data"])
def test_onnx_data_outside_the_folder_or_the_file_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "folder").mkdir()
    (tmp_path / "secret").write_bytes(bytes(1000))
    (folder / "data").write_bytes(bytes(10))
    (folder / "link").symlink_to(tmp_path / "secret")
    model = tg.to_onnx(tg.GRU(3, 4))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "W_0")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    with pytest.raises(tg.ConversionError, match="W_0: "):
        tg.from_onnx(written(folder / "model.onnx", model.SerializeToString()))


def test_onnx_tensors_that_claim_what_they_have_not_are_refused():
    model = tg.to_onnx(tg.GRU(3, 4))
    next(tensor for tensor in model.graph.initializer if tensor.name == "R_0").dims[0] = 1 << 40
    with pytest.raises(tg.ConversionError, match=r"R_0: dimensions .* need \d+ bytes, there are 192"):
        tg.from_onnx(model)


def test_onnx_constants_that_multiply_are_refused():
    model = tg.to_onnx(tg.GRU(3, 4))
    name = "W_0"
    for k in range(40):
        model.graph.node.insert(k, helper.make_node("Concat", [name] * 2, [f"twice_{k}"], axis=0))
        name = f"twice_{k}"
    next(node for node in model.graph.node if node.op_type == "GRU").input[1] = name
    with pytest.raises(tg.ConversionError, match="bytes out of constants of"):
        tg.from_onnx(model)


def test_every_fault_of_a_node_is_listed():
    model = tg.to_onnx(tg.LSTM(3, 4))
    node = next(node for node in model.graph.node if node.op_type == "LSTM")
    node.attribute.extend([helper.make_attribute("clip", -1.0), helper.make_attribute("novel", 3)])
    node.attribute.extend([helper.make_attribute("activations", ["Sigmoid", "Cube", "Tanh"])])
    node.input[3] = "computed"
    with pytest.raises(tg.ConversionError) as error:
        tg.from_onnx(model)
    for word in ("clip=-1.0", "novel=3", "activations='Cube'", "B = 'computed' is no constant"):
        assert word in str(error.value)


class Harm:
    def __reduce__(self):
        return print, ("run!",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    torch.save({"weight_ih_l0": Harm()}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harm(), protocol=2))
    for name in ("model.pt", "plain.pt"):
        with pytest.raises(tg.ConversionError, match="no state_dict"):
            tg.convert.from_torch_file(tmp_path / name)
    assert "run!" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "layer",
    [
        tg.GRU(3, 4, 2, bidirectional=True, reset_after=False, clip=0.5, dtype=torch.float64),
        tg.LSTM(3, 4, proj_size=2, peepholes=True, cell_clip=1.0, activations="hard_sigmoid,relu,tanh", reverse=True),
        tg.RNN(3, 4, batch_first=True, activations="softsign", bias=False),
    ],
)
def test_a_safetensors_file_holds_the_layer(layer, tmp_path):
    tg.convert.save(layer, tmp_path / "layer.safetensors")
    back = tg.convert.load(tmp_path / "layer.safetensors")
    assert repr(back) == repr(layer)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), layer.parameters(), strict=True))
    x = torch.randn(5, 5, 3, dtype=layer.weight_ih_l0.dtype)
    torch.testing.assert_close(back(x)[0], layer(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "description",
    [None, "[]", "{", '{"class": "os.system"}', '{"class": "GRU", "arguments": {"device": "cuda"}}',
     '{"class": "GRU", "arguments": {"input_size": 3, "hidden_size": 4, "num_layers": 1000000000}}',
     '{"class": "GRU", "arguments": {"input_size": 3, "hidden_size": 5}}'],
)  # fmt: skip
def test_another_safetensors_file_is_refused(tmp_path, description):
    from safetensors.torch import save_file

    metadata = None if description is None else {"tidegate": description}
    save_file(tg.GRU(3, 4).state_dict(), tmp_path / "layer.safetensors", metadata)
    with pytest.raises(tg.ConversionError, match=r"load\("):
        tg.convert.load(tmp_path / "layer.safetensors")
    with pytest.raises(tg.ConversionError, match=r"load\("):
        tg.convert.load(written(tmp_path / "cut.safetensors", b"\xff" * 40))


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (torch.nn.GRU(3, 4, 2, bidirectional=True), {}),
        (torch.nn.LSTM(3, 4, proj_size=2, batch_first=True), {"batch_first": True}),
        (torch.nn.RNN(3, 4, nonlinearity="relu", bias=False), {"activations": "relu"}),
    ],
)
def test_a_state_dict_says_which_layer_it_is(tmp_path, layer, options):
    torch.save({f"encoder.{name}": weight for name, weight in layer.state_dict().items()}, tmp_path / "model.pt")
    found = tg.convert.from_torch_file(tmp_path / "model.pt", "encoder", **options)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(found(x)[0], layer(x)[0], rtol=0, atol=1e-6)


def test_an_rnns_state_dict_needs_its_activation(tmp_path):
    torch.save(torch.nn.RNN(3, 4).state_dict(), tmp_path / "model.pt")
    with pytest.raises(tg.ConversionError, match="give tanh or relu"):
        tg.convert.from_torch_file(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (
            {"weight_hh_l0": torch.zeros(0, 0)},
            {},
            "weight_hh_l0: expected 2 dimensions of floating-point numbers, none",
        ),
        ({"weight_hh_l0": torch.zeros(12, 0)}, {}, "none of them 0, got torch.float32 (12, 0)"),
        ({"weight_ih_l0": torch.zeros(12, 3, dtype=torch.int64)}, {}, "weight_ih_l0: expected 2 dimensions"),
        ({"bias_ih_l0": torch.zeros(12, dtype=torch.float64)}, {}, "arrays of different dtypes: "),
        ({"weight_hh_l0": torch.zeros(12, 5)}, {}, "(12, 5) is no RNN's, GRU's or LSTM's"),
        ({"weight_ih_l0": torch.zeros(9, 3)}, {}, "weight_ih_l0"),
        ({"weight_ih_l2": torch.zeros(12, 4)}, {}, "expected 3 layers of 1 directions, got [(0, ''), (2, '')]"),
        ({}, {"num_layers": 2}, "num_layers=2 is not supported: a state_dict says it itself"),
        ({}, {"forget": 2}, "forget"),
        ({}, {"layer": "decoder"}, "layer='decoder': 0 fit; the recurrent layers are ['']"),
    ],
)
def test_a_state_dict_of_another_kind_says_so(tmp_path, change, options, words):
    torch.save({**torch.nn.GRU(3, 4).state_dict(), **change}, tmp_path / "model.pt")
    with pytest.raises(tg.ConversionError) as error:
        tg.convert.from_torch_file(tmp_path / "model.pt", **options)
    assert words in str(error.value)


LISTED = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


# torch's own word on a pickle that another protocol wrote.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=300, deadline=None)
@given(LISTED, st.floats(0, 1), st.booleans())
def test_a_damaged_torch_file_is_read_or_refused(tmp_path_factory, changes, share, zipped):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.manual_seed(0)
    torch.save(torch.nn.GRU(1, 1).state_dict(), path, _use_new_zipfile_serialization=zipped)
    read_or_refused(tg.convert.from_torch_file, path, changes, share)


@settings(max_examples=300, deadline=None)
@given(LISTED, st.floats(0, 1))
def test_a_damaged_keras_file_is_read_or_refused(tmp_path_factory, changes, share):
    arrays = gru_arrays(input_size=1, hidden_size=1)
    path = tmp_path_factory.getbasetemp() / "damaged.keras"
    keras_file(path, [layer_config("gru", units=1)], keras_weights({"layers/gru": arrays}))
    read_or_refused(tg.from_keras, path, changes, share)


def read_or_refused(read, path, changes, share):
    content = bytearray(path.read_bytes())
    content = content if changes else content[: int(share * len(content))]
    for place, value in changes:
        # Most of what can be damaged stands at the end of a zip, and at the beginning of what it holds.
        place = 1 - place**3 if value % 2 else place**3
        content[min(int(place * len(content)), len(content) - 1)] = value
    path.write_bytes(bytes(content))
    try:
        read(path)
    except tg.ConversionError as error:
        assert "from_" in str(error)  # noqa: PT017 - either outcome is right, no other error is


def test_a_path_that_cannot_be_read_is_no_damaged_file(tmp_path):
    for read in (tg.from_keras, tg.from_onnx, tg.convert.load, tg.convert.from_torch_file):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
        with pytest.raises(OSError, match=r"irectory|device"):
            read(tmp_path)


def test_the_command_converts_checks_and_says_so(tmp_path):
    lines = []
    torch.save(torch.nn.LSTM(3, 4, 2).state_dict(), tmp_path / "model.pt")
    run_convert(tmp_path / "model.pt", tmp_path / "model.onnx", say=lines.append)
    run_convert(tmp_path / "model.onnx", tmp_path / "model.safetensors", say=lines.append)
    run_convert(tmp_path / "model.safetensors", tmp_path / "again.onnx", say=lines.append)
    text = "\n".join(lines)
    assert "found    torch: LSTM(3, 4, num_layers=2), 304 weights" in text
    assert "torch.nn.LSTM: run on random input, the largest difference is" in text
    assert text.count("onnxruntime: run on random input, the largest difference is") == 3
    assert "read back, bit for bit the same" in text
    with pytest.raises(tg.ConversionError, match=r"reads .keras, .onnx"):
        run_convert(tmp_path / "model.txt", tmp_path / "model.onnx")


def test_importing_tidegate_imports_no_framework():
    code = "import sys, tidegate; print(*{'onnx', 'h5py', 'safetensors', 'keras', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def test_the_command_keeps_the_layout_of_an_onnx_file(tmp_path):
    """Read, checked against onnxruntime and written again: rows first throughout."""
    layer = tg.GRU(3, 4, 2, batch_first=True, bidirectional=True)
    tg.to_onnx(layer, tmp_path / "model.onnx")
    lines = []
    run_convert(tmp_path / "model.onnx", tmp_path / "model.safetensors", say=lines.append)
    assert any("GRU(3, 4, num_layers=2, batch_first=True, bidirectional=True)" in line for line in lines)
    assert any("onnxruntime: run on random input, the largest difference is" in line for line in lines)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(tg.convert.load(tmp_path / "model.safetensors")(x)[0], layer(x)[0])


def test_the_command_settles_what_an_onnx_file_leaves_open(tmp_path):
    model = tg.to_onnx(tg.GRU(3, 4))
    for node in model.graph.node:
        if node.op_type == "GRU":
            node.input[0] = "turned"
    model.graph.node.insert(0, helper.make_node("Transpose", ["input"], ["turned"], perm=[1, 0, 2]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(tg.ConversionError, match="say by batch_first="):
        run_convert(tmp_path / "model.onnx", tmp_path / "model.safetensors", say=print)
    run_convert(tmp_path / "model.onnx", tmp_path / "model.safetensors", batch_first=True, say=print)
    assert tg.convert.load(tmp_path / "model.safetensors").batch_first


def test_the_command_says_that_a_layer_goes_backwards(tmp_path, monkeypatch):
    # The file holds no more than is read, so Keras itself would not run it.
    monkeypatch.setattr(convert_check, "against_source", lambda *_: "not run")
    arrays = keras_weights({"layers/gru": gru_arrays()})
    path = keras_file(tmp_path / "model.keras", [layer_config("gru", go_backwards=True)], arrays)
    lines = []
    run_convert(path, tmp_path / "model.safetensors", say=lines.append)
    assert "reverse=True" in lines[0]
    assert lines[1].startswith("note     go_backwards: its output is in the input's order of time")
