# SPDX-License-Identifier: Apache-2.0
"""tg.quantize: modules with int8 and bfloat16 weights, and what torch's own dynamic quantization gave."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from exported import Recurrent, compiled
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tidegate as tg
from tidegate.cli.demo import training
from tidegate.data import japanese_vowels
from tidegate.kernels import cpu
from tidegate.nn import quantized
from tidegate.storage import STORAGES

KINDS = ("RNN", "LSTM", "GRU")
# What a rounding of h that fell otherwise can make: a 127th of h, times a weight.
TURNED = 0.01


def layer(kind: str, *sizes: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(tg, kind)(*sizes, **options)


def outputs(module: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    found = module(*args, **kwargs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def error(module: Any, stored: Any, *args: Any, **kwargs: Any) -> float:
    with torch.no_grad():
        pairs = zip(outputs(module, *args, **kwargs), outputs(stored, *args, **kwargs), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("weights", STORAGES)
@pytest.mark.parametrize("source", [tg, torch.nn], ids=["tidegate", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_give_what_they_gave(kind: str, source: Any, weights: str) -> None:
    """Error against float32 of two layers: seen up to 0.018 with int8 and 0.01 with bfloat16, of outputs up to 1."""
    torch.manual_seed(0)
    x, lengths = torch.randn(4, 9, 40), torch.tensor([9, 0, 4, 7])
    for bidirectional in (False, True):
        module = getattr(source, kind)(40, 64, num_layers=2, bidirectional=bidirectional, batch_first=True)
        made = tg.quantize(module, weights)
        assert type(made) is getattr(quantized, f"Quantized{kind}")
        assert isinstance(made, getattr(torch.nn, kind))
        assert type(module) is getattr(source, kind)
        assert error(module, made, x) < 0.02
        packed = pack_padded_sequence(x[[0, 2, 3]], lengths[[0, 2, 3]], batch_first=True, enforce_sorted=False)
        whole = pad_packed_sequence(made(packed)[0], batch_first=True)[0]
        assert torch.equal(whole, made(x[[0, 2, 3]], lengths=lengths[[0, 2, 3]])[0])
        states = torch.randn(4 if bidirectional else 2, 4, 64) * 3
        hx = (states, states) if kind == "LSTM" else states
        resets = torch.rand(4, 9) < 0.3
        if source is tg:
            assert error(module, made, x, hx, lengths=lengths, resets=resets) < 0.05
        assert not made(x)[0].requires_grad


@pytest.mark.parametrize("weights", STORAGES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"proj_size": 16}), ("LSTM", {"peepholes": True}), ("LSTM", {"clip": 0.3, "coupled": True}),
        ("GRU", {"reset_after": False}), ("GRU", {"activations": "hard_sigmoid,tanh"}),
        ("RNN", {"nonlinearity": "relu"}),
        ("GRU", {"bias": False}), ("LSTM", {"reverse": True}), ("RNN", {"activations": "softsign"}),
    ],
    ids=str,
)  # fmt: skip
def test_every_option(kind: str, options: dict[str, Any], weights: str) -> None:
    module = layer(kind, 20, 32, **options)
    made = tg.quantize(module, weights)
    assert error(module, made, torch.randn(6, 3, 20)) < 0.03
    with tg.backend("reference"):
        slow = made(torch.ones(2, 1, 20))[0]
    torch.testing.assert_close(made(torch.ones(2, 1, 20))[0], slow, rtol=0, atol=TURNED)


@pytest.mark.parametrize("weights", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_cells_and_what_is_made_of_them(kind: str, weights: str) -> None:
    torch.manual_seed(0)
    cell, x = getattr(tg, f"{kind}Cell")(12, 20), torch.randn(5, 3, 12)
    made = tg.quantize(cell, weights)
    assert isinstance(made, getattr(torch.nn, f"{kind}Cell"))
    assert error(cell, made, x[0]) < 0.01
    assert outputs(made, x[0, 0])[0].shape == (20,)
    state: Any = None
    for step in x:
        state = made(step, state)
    h = state[0] if kind == "LSTM" else state
    recurrent = tg.quantize(tg.Recurrent(cell), weights)
    torch.testing.assert_close(tg.dynamic_rnn(made, x, time_major=True)[0][-1], h, rtol=0, atol=TURNED)
    torch.testing.assert_close(recurrent(x)[0][-1], h, rtol=0, atol=TURNED)
    if not needs.ISAS:
        return
    assert tg.explain(recurrent, x).backend == "cpu"
    torch.testing.assert_close(recurrent(x)[0][-1], h, rtol=0, atol=0)


@pytest.mark.parametrize("weights", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_streams(kind: str, weights: str) -> None:
    made = tg.quantize(layer(kind, 12, 20, num_layers=2), weights)
    x = torch.randn(7, 3, 12)
    stream, blocks = made.stream(batch_size=3), made.stream(batch_size=3)
    steps = torch.stack([stream.step(step) for step in x])
    assert torch.equal(torch.cat([blocks.steps(x[:4]), blocks.steps(x[4:])]), steps)
    assert torch.equal(made(x)[0], steps)
    assert pickle.loads(pickle.dumps(stream)).backend == stream.backend
    with pytest.raises(ValueError, match=r"dtype: expected float32, in which .* weights run"):
        made.stream(dtype=torch.float64)


@pytest.mark.parametrize("weights", STORAGES)
def test_what_is_stored(weights: str, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GRU(5, 7))
    model.register_forward_hook(lambda module, args, output: output[0])
    made, x = tg.quantize(model, weights), torch.randn(4, 2, 6)
    dtype = getattr(torch, weights)
    state = made.state_dict()
    assert state["1.weight_ih_l0"].dtype is state["1.weight_hh_l0"].dtype is dtype
    assert ("1.scale_ih_l0" in state) == (weights == "int8")
    assert state["1.bias_ih_l0"].dtype is torch.float32
    assert [name for name, _ in made.named_parameters()] == ["0.weight", "0.bias"]
    with torch.no_grad():
        right = made(x)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other = tg.quantize(model, weights)
        other[1].weight_ih_l0.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        copies = [other, copy.deepcopy(made)]
        empty = quantized.QuantizedGRU(5, 7, weights=weights)
        empty.load_state_dict(made[1].state_dict())
        assert torch.equal(empty(made[0](x))[0], right)
        torch.save(made[1], tmp_path / "layer.pt")
        assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(made[0](x))[0], right)
        for one in copies:
            assert torch.equal(one(x), right)
    assert f"QuantizedGRU(5, 7, weights={weights})" in repr(made)
    with pytest.raises(RuntimeError, match=rf"1.weight_ih_l0: expected torch.{weights}, got torch.float32"):
        made.load_state_dict(model.state_dict())
    assert torch.equal(made.state_dict()["1.weight_ih_l0"], state["1.weight_ih_l0"])


def test_it_stays_in_its_dtypes() -> None:
    made = tg.quantize(tg.GRU(5, 7), "int8").double()
    assert made.weight_ih_l0.dtype is torch.int8
    assert made.scale_ih_l0.dtype is torch.float32
    with pytest.raises(
        ValueError, match=r"input dtype \(torch.float64\) does not match weight dtype \(torch.float32\)"
    ):
        made(torch.randn(3, 2, 5, dtype=torch.float64))
    with torch.autocast("cpu"):
        assert made(torch.randn(3, 2, 5))[0].dtype is torch.float32
        assert made(torch.randn(3, 2, 5).bfloat16())[0].dtype is torch.float32


def test_no_gradients() -> None:
    made, x = tg.quantize(tg.LSTM(5, 7), "int8"), torch.randn(3, 2, 5)
    with pytest.raises(
        tg.UnsupportedError, match="input: expected tensors that need no gradient, because weights in int8"
    ):
        made(x.clone().requires_grad_())
    with torch.no_grad():
        assert not made(x.clone().requires_grad_())[0].requires_grad
    h = torch.zeros(1, 2, 7, requires_grad=True)
    with pytest.raises(tg.UnsupportedError, match="h_0: expected"):
        made(x, (h, torch.zeros(1, 2, 7)))
    with pytest.raises(RuntimeError, match="QuantizedLSTM: its weights are int8, for inference alone"):
        torch.nn.Sequential(made).train()
    with pytest.raises(tg.UnsupportedError, match="stored for inference"):
        torch.func.jvp(lambda x: made(x)[0], (x,), (x,))
    assert made.eval() is made
    assert list(made.parameters()) == []


def test_what_wants_float32_weights_says_so(tmp_path: Path) -> None:
    made = tg.quantize(tg.GRU(5, 7))
    with pytest.raises(tg.ConversionError, match="its weights are int8"):
        tg.export_c(made, torch.randn(9, 5), tmp_path / "out")
    with pytest.raises(tg.UnsupportedError, match="its weights are int8"):
        tg.inspect(made, torch.randn(9, 5))
    pytest.importorskip("onnx")
    with pytest.raises(tg.ConversionError, match="its weights are int8"):
        tg.to_onnx(made)


def test_compiles_and_exports() -> None:
    made, x = tg.quantize(tg.GRU(5, 7, num_layers=2), "int8"), torch.randn(3, 2, 5)
    with torch.no_grad():
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], made(x)[0], rtol=0, atol=TURNED)
        exported: Any = torch.export.export(made, (x,)).module()
        torch.testing.assert_close(exported(x)[0], made(x)[0], rtol=0, atol=TURNED)


def test_the_report() -> None:
    class Own(torch.nn.GRU):
        pass

    model = torch.nn.ModuleDict({"first": torch.nn.LSTM(5, 7), "own": Own(5, 7), "cell": tg.GRUCell(3, 4)})
    model["again"] = model["first"]
    made = tg.quantize(model)
    assert made["again"] is made["first"]
    report = tg.report(made)
    assert [entry.names for entry in report.quantized] == [("first", "again"), ("cell",)]
    assert report.bytes_before == 4 * (28 * (5 + 7 + 2) + 12 * (3 + 4 + 2))
    assert report.bytes == 28 * (5 + 7) + 12 * (3 + 4) + 4 * 4 * (28 + 12)
    assert report.difference is None
    assert f"stored weights: {report.bytes:,} bytes, {report.bytes_before:,} before" in str(report)
    assert type(made["own"]) is Own
    layer, x = tg.GRU(5, 7, dropout=0.5, num_layers=2), torch.randn(3, 2, 5)
    report = tg.report(tg.quantize(layer, example=x))
    assert report.difference == pytest.approx(error(layer.eval(), tg.quantize(layer), x))
    assert "the model's output on the example: at most 0.00" in str(report)
    assert layer.train().training


def test_in_place_keeps_names_and_hooks() -> None:
    model, seen = torch.nn.Sequential(torch.nn.GRU(5, 7)), list[int]()
    gru = model[0]
    gru.register_forward_hook(lambda *_: seen.append(1))
    assert tg.quantize(model, "bfloat16", inplace=True) is model
    assert model[0] is gru
    model(torch.randn(3, 2, 5))
    assert seen == [1]
    assert type(tg.restore(tg.accelerate(model))[0]) is quantized.QuantizedGRU


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="weights: expected 'int8' or 'bfloat16', got 'int4'"):
        tg.quantize(tg.GRU(5, 7), "int4")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        tg.quantize(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="found none to quantize"):
        tg.quantize(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"got weight_ih_l0 of torch.float64 in GRU; model.float\(\) first"):
        tg.quantize(tg.GRU(5, 7, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:torch.*quantiz.*:DeprecationWarning", "ignore:torch.*quantiz.*:UserWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("by", ["accelerate", "quantize"])
def test_torchs_quantized_modules(kind: str, by: str) -> None:
    """The same integers and scales. torch rounds what they multiply to 7 or 8 bits for a whole call, zero not always
    among them; ours to 8 a row. So both are as near to float32, and to each other."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)
    options = {} if kind.endswith("Cell") else {"num_layers": 2, "bidirectional": kind == "LSTM"}
    model, x = torch.nn.Sequential(theirs(20, 32, **options)), torch.randn(9, 3, 20)
    x = x[0] if kind.endswith("Cell") else x
    made: Any = torch.ao.quantization.quantize_dynamic(model, {theirs})
    weights = made[0].get_weight()
    assert "not swapped: tidegate.accelerate would, the integers as they are" in str(tg.report(made))
    right = outputs(made, x)
    swapped = tg.accelerate(made) if by == "accelerate" else tg.quantize(made)
    name = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    assert torch.equal(getattr(swapped[0], name), weights[name].int_repr())
    scales = getattr(swapped[0], name.replace("weight", "scale"))
    assert torch.equal(scales, torch.full_like(scales, weights[name].q_scale()))
    assert "weights in int8" in str(tg.report(swapped))
    with torch.no_grad():
        pairs = list(zip(right, outputs(swapped, x), outputs(model, x), strict=True))
    assert max(float((a - b).abs().max()) for a, b, _ in pairs) < 0.03  # seen: 0.009
    assert max(float((b - c).abs().max()) for _, b, c in pairs) < 0.02
    if by == "accelerate":
        assert tg.restore(swapped) is swapped


@pytest.mark.filterwarnings("ignore:torch.*quantiz.*:DeprecationWarning", "ignore:torch.*quantiz.*:UserWarning")
def test_torchs_modules_that_are_left_alone() -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(5, 7))
    made: Any = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}, dtype=torch.float16)
    tg.accelerate(made)
    assert type(made[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert "torch keeps its weights as float32, not as int8" in str(tg.report(made))


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_a_trained_model_keeps_its_accuracy(kind: str) -> None:
    """The demo's, on the embedded data: at most 0.5 points lost, which is one sequence of 370."""
    dataset = training.standardised(japanese_vowels())
    _, run = training.new_runs(dataset, kind, 32, seed=0)
    for _ in range(40):
        run.train_epoch(dataset.train)
    run.evaluate(dataset.test)
    model = run.model.eval()
    for weights in STORAGES:
        run.model = tg.quantize(model, weights)
        run.evaluate(dataset.test)
    before, *after = run.accuracies
    assert before > 0.9
    assert min(after) >= before - 0.005


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", needs.ISAS)
def test_the_numbers_of_exported_c(kind: str, isa: str, tmp_path: Path) -> None:
    """Step by step from the same state: then all integers are the same."""
    module, x = layer(kind, 20, 32), torch.randn(60, 20)
    exported = compiled(tg.export_c(Recurrent(module), x, tmp_path, weights="int8"))
    made = tg.quantize(module)
    cpu.operators().use_isa(isa)
    try:
        for step in x:
            parts = exported.state[: exported.state_size].clone().view(-1, 1, 32)
            hx = tuple(parts) if kind == "LSTM" else parts[0]
            right = made(step.unsqueeze(0), hx)[0]
            torch.testing.assert_close(exported.step(step), right[0], rtol=0, atol=3e-6)
    finally:
        cpu.operators().use_isa("")
