# SPDX-License-Identifier: Apache-2.0
"""from_onnx against onnxruntime's own numbers, float32 to 1e-6; to_onnx against our own, run by onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import vectors
from onnx import helper

import tidegate as tg

CASES = vectors.names("ort")
ORDER = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def model_of(op, tensors, attributes, order=ORDER, opset=14):
    """A model of one node whose W, R, B and P are constants and whose other inputs are the model's."""
    names = [name if name in tensors else "" for name in order]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "Y_h", "Y_c"] if op == "LSTM" else ["Y", "Y_h"]
    node = helper.make_node(op, names, outputs, name="recurrent", **attributes)
    held = [onnx.numpy_helper.from_array(tensors[name], name) for name in ("W", "R", "B", "P") if name in tensors]
    given = [name for name in names if name and name not in ("W", "R", "B", "P")]
    kinds = {name: onnx.TensorProto.INT32 if name == "sequence_lens" else onnx.TensorProto.FLOAT for name in given}
    inputs = [helper.make_tensor_value_info(name, kinds[name], tensors[name].shape) for name in given]
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "graph", inputs, results, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def run(layer, inputs):
    """Y, Y_h and, of an LSTM, Y_c as ONNX lays them out."""
    states = [torch.tensor(inputs[name]) for name in ("initial_h", "initial_c") if name in inputs]
    given = None if not states else states[0] if len(states) == 1 else tuple(states)
    output, final = layer(torch.tensor(inputs["X"]), given, lengths=inputs.get("sequence_lens"))
    directions = 2 if layer.bidirectional else 1
    y = output.unflatten(-1, (directions, -1)).transpose(1, 2)
    return [y, *(final if isinstance(final, tuple) else (final,))]


def close(found, expected, name="", tolerance=1e-6):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_node_gives_onnxruntimes_numbers(name):
    case = vectors.load("ort")[name]
    inputs, outputs = vectors.part(case, "in/"), vectors.part(case, "out/")
    attributes = {key: value for key, value in case["meta"].items() if key != "op"}
    layer = tg.from_onnx(model_of(case["meta"]["op"], inputs, attributes))
    for (key, value), found in zip(outputs.items(), run(layer, inputs), strict=True):
        close(found, value, key)


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


LAYERS = {
    "gru": (tg.GRU, {}),
    "gru-reset-before": (tg.GRU, {"reset_after": False}),
    "gru-clip": (tg.GRU, {"clip": 0.5}),
    "gru-acts": (tg.GRU, {"activations": ("hard_sigmoid(0.3,0.4)", "softsign")}),
    "lstm": (tg.LSTM, {}),
    "lstm-peepholes": (tg.LSTM, {"peepholes": True, "clip": 0.5}),
    "lstm-coupled": (tg.LSTM, {"coupled": True, "peepholes": True}),
    "lstm-acts": (tg.LSTM, {"activations": ("hard_sigmoid(0.3,0.4)", "relu", "elu(0.5)")}),
    "rnn": (tg.RNN, {}),
    "rnn-relu": (tg.RNN, {"nonlinearity": "relu"}),
    "rnn-linear": (tg.RNN, {"activations": "linear"}),
    "rnn-reverse": (tg.RNN, {"reverse": True}),
    "torch-gru": (torch.nn.GRU, {}),
    "torch-lstm": (torch.nn.LSTM, {}),
}


def make(kind, num_layers=1, bidirectional=False, **more):
    layer, options = LAYERS[kind]
    torch.manual_seed(0)
    bidirectional = bidirectional and not options.get("reverse")
    return layer(3, 4, num_layers, bidirectional=bidirectional, **options, **more).eval()


def feed(layer, lengths=None, states=True, steps=5, batch=3):
    """Inputs for onnxruntime, and the same as arguments of the layer."""
    torch.manual_seed(1)
    x = torch.randn((batch, steps, 3) if layer.batch_first else (steps, batch, 3))
    given = {"input": x.numpy()}
    arguments = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    if lengths is not None:
        given["lengths"] = np.array(lengths, np.int32)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    initial = [torch.randn(rows, batch, 4) for _ in range(2 if "LSTM" in type(layer).__name__ else 1)]
    if states:
        given |= {f"{name}_0": state.numpy() for name, state in zip("hc", initial, strict=False)}
    hx = (tuple(initial) if len(initial) > 1 else initial[0]) if states else None
    return given, (x, hx), arguments


def equal(ours, theirs):
    output, final = ours
    found = [output, *(final if isinstance(final, tuple) else (final,))]
    assert len(found) == len(theirs)
    for a, b in zip(found, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_onnxruntime_gives_our_numbers_and_the_model_reads_back(kind, bidirectional, num_layers, batch_first, states):
    layer = make(kind, num_layers, bidirectional, batch_first=batch_first, bias=states)
    ours = type(layer).__module__.startswith("tidegate")
    model = tg.to_onnx(layer, lengths=ours, states=states)
    run_model = session(model)
    back = tg.from_onnx(model)
    # One session, other sizes: batch and time are dynamic. A row of length 0 keeps its state.
    for steps, lengths in ((5, [5, 0, 2]), (2, [1, 2, 2])):
        given, arguments, keywords = feed(layer, lengths if ours else None, states, steps)
        with torch.no_grad():
            expected = layer(*arguments, **keywords)
        equal(expected, run_model.run(None, given))
        equal(back(*arguments, **keywords), [t.numpy() for t in flat(expected)])
    assert not [node for node in model.graph.node if node.op_type in ("Loop", "Scan")]


def flat(results):
    output, final = results
    return [output, *(final if isinstance(final, tuple) else (final,))]


def test_a_stream_runs_in_onnxruntime():
    layer = make("gru", 2)
    step = session(tg.to_onnx(layer, steps=1))
    x, state = torch.randn(6, 2, 3), np.zeros((2, 2, 4), np.float32)
    outputs = []
    for t in range(6):
        output, state = step.run(None, {"input": x[t : t + 1].numpy(), "h_0": state})
        outputs.append(output)
    expected, last = layer(x)
    close(expected, np.concatenate(outputs))
    close(last, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_reads_back_bit_for_bit(dtype, tmp_path):
    layer = make("gru", 2, True).to(dtype)
    tg.to_onnx(layer, tmp_path / "model.onnx")
    back = tg.from_onnx(tmp_path / "model.onnx")
    for name, weight in layer.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: torch.nn.Linear(3, 4), ["expected a GRU, LSTM or RNN layer"]),
        (
            lambda: tg.LSTM(3, 4, proj_size=2, cell_clip=1, proj_clip=2),
            ["proj_size=2", "cell_clip=1.0", "proj_clip=2.0"],
        ),
        (lambda: tg.GRU(3, 4, activations="gelu,mish"), ["activations='gelu'", "activations='mish'"]),
    ],
)
def test_what_onnx_cannot_represent(layer, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.to_onnx(layer())
    for word in words:
        assert word in str(error.value)


def mixed():
    layer = tg.GRU(3, 4)
    layer.weight_ih_l0 = torch.nn.Parameter(layer.weight_ih_l0.double())
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "words"),
    [
        (lambda: tg.GRU(3, 4), {"batch_size": 0}, "batch_size=0 is not supported: a positive integer, or None"),
        (lambda: tg.GRU(3, 4), {"steps": 2.5}, "steps=2.5 is not supported"),
        (lambda: tg.GRU(3, 4), {"steps": True}, "steps=True is not supported"),
        (lambda: tg.GRU(3, 4, device="meta"), {}, "on the meta device"),
        (mixed, {}, "arrays of different dtypes: weight_ih_l0 torch.float64, weight_hh_l0 torch.float32"),
    ],
)
def test_what_cannot_be_written_says_so(layer, options, words):
    with pytest.raises(tg.ConversionError) as error:
        tg.to_onnx(layer(), **options)
    assert words in str(error.value)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = tg.GRU(3, 4, 2, bidirectional=True, batch_first=True)
        self.second = tg.LSTM(8, 4, batch_first=True, peepholes=True)
        self.third = tg.RNN(4, 4, bias=False, batch_first=True, reverse=True)
        self.linear = torch.nn.Linear(4, 2)
        self.cell = tg.GRUCell(2, 2, reset_after=False)

    def forward(self, x, lengths):
        y, _ = self.first(x, lengths=lengths)
        y, state = self.second(y, lengths=lengths)
        y = self.linear(self.third(y)[0])
        return y, *state, self.cell(y[:, 0])


# The exporter's own warnings are not ours to judge.
@pytest.mark.filterwarnings("ignore")
def test_torchs_exporter_writes_a_model_that_contains_our_layers(tmp_path):
    torch.manual_seed(0)
    model, x, lengths = Model().eval(), torch.randn(3, 5, 3), torch.tensor([5, 0, 2])
    program = torch.onnx.export(
        model,
        (x, lengths),
        dynamo=True,
        verbose=False,
        custom_translation_table=tg.convert.onnx_translations(),
        dynamic_shapes=({0: "batch", 1: "steps"}, {0: "batch"}),
    )
    program.save(tmp_path / "model.onnx")
    kinds = [node.op_type for node in program.model.graph]
    assert [kinds.count(kind) for kind in ("GRU", "LSTM", "RNN")] == [5, 1, 1]
    run_model = session(program.model_proto)
    for inputs in ((x, lengths), (torch.randn(2, 7, 3), torch.tensor([7, 3]))):
        found = run_model.run(None, {"x": inputs[0].numpy(), "lengths": inputs[1].numpy()})
        for ours, theirs in zip(model(*inputs), found, strict=True):
            close(ours, theirs)
    node = next(node for node in program.model.graph if node.op_type == "LSTM")
    second = tg.from_onnx(tmp_path / "model.onnx", node.outputs[0].name)
    for name, weight in model.second.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


@pytest.mark.filterwarnings("ignore")
def test_torchs_exporter_refuses_resets():
    class Resets(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = tg.GRU(3, 4)

        def forward(self, x, resets):
            return self.layer(x, resets=resets)[0]

    table = tg.convert.onnx_translations()
    arguments = (torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
        torch.onnx.export(Resets(), arguments, dynamo=True, verbose=False, custom_translation_table=table)
    causes, cause = [], error.value
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__
    assert any("cannot reset a state in mid-sequence" in text for text in causes)
