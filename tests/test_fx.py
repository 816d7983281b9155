# SPDX-License-Identifier: Apache-2.0
"""torch.fx and what is built on it: layers and cells are leaves of a traced graph, as torch.nn's are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import tidegate as tg

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max to specify the range for observers:UserWarning",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning",
    "ignore:must run observer before calling calculate_qparams:UserWarning",
)
KINDS = ("RNN", "LSTM", "GRU")


class Tagger(torch.nn.Module):
    def __init__(self, library: Any, kind: str) -> None:
        super().__init__()
        self.front = torch.nn.Linear(3, 5)
        self.inner = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(5, 3))
        self.rnn = getattr(library, kind)(3, 4, 2, batch_first=True)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.inner(self.front(x)))[0])


class Decoder(torch.nn.Module):
    """Two steps of a cell, from a state that is given."""

    def __init__(self, library: Any, kind: str) -> None:
        super().__init__()
        self.cell = getattr(library, kind + "Cell")(3, 3)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        state: Any = (h, h) if type(self.cell).__name__ == "LSTMCell" else h
        for _ in range(2):
            state = self.cell(x, state)
        return state[0]


def models(model: type[torch.nn.Module], kind: str) -> list[Any]:
    """torch.nn's, the same accelerated, and one that was built of tidegate's."""
    torch.manual_seed(0)
    theirs = model(torch.nn, kind).eval()
    accelerated = tg.accelerate(copy.deepcopy(theirs))
    built = model(tg, kind).eval()
    built.load_state_dict(theirs.state_dict())
    return [theirs, accelerated, built]


def nodes(graph: Any) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_one_node(kind: str) -> None:
    x = torch.randn(2, 6, 3)
    theirs, *ours = models(Tagger, kind)
    expected = torch.fx.symbolic_trace(theirs)
    for model in ours:
        traced = torch.fx.symbolic_trace(model)
        assert nodes(traced.graph) == nodes(expected.graph)
        assert traced.code == expected.code
        traced.graph.lint()
        assert torch.equal(traced(x), model(x))
        torch.testing.assert_close(traced(x), theirs(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_is_a_node_each_step(kind: str) -> None:
    x, h = torch.randn(2, 3), torch.randn(2, 3)
    theirs, *ours = models(Decoder, kind)
    expected = torch.fx.symbolic_trace(theirs)
    for model in ours:
        traced = torch.fx.symbolic_trace(model)
        assert traced.code == expected.code
        torch.testing.assert_close(traced(x, h), theirs(x, h), rtol=0, atol=1e-6)


def test_lengths_and_resets_are_inputs_of_the_node() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = tg.GRU(3, 4)

        def forward(self, x: Tensor, h: Tensor, lengths: Tensor, resets: Tensor) -> Tensor:
            return self.rnn(x, h, lengths=lengths, resets=resets)[0]

    model = Model()
    given = (torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.tensor([5, 2]), torch.rand(5, 2) < 0.5)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(*given), model(*given))


def test_a_norm_of_a_leaf_runs_when_the_graph_runs() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(tg.GRU(3, 4), "weight_hh_l0")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), normed)
    x = torch.randn(5, 2, 3)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x)[0], model(x)[0])
    with torch.no_grad():
        model[1].parametrizations.weight_hh_l0.original0.mul_(2)
    assert torch.equal(traced(x)[0], model(x)[0])


def test_forward_hooks_are_refused_instead_of_run_twice() -> None:
    model = torch.nn.Sequential(tg.GRU(3, 4))
    model[0].register_forward_hook(lambda module, args, output: (output[0] * 2, output[1]))
    with pytest.raises(TypeError, match=r"torch.fx: expected no forward hooks on a GRU, got 1"):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_for_inference(kind: str) -> None:
    """Observers go around the linear layers; a recurrent one stays in float, as torch.nn's RNN does."""
    torch.manual_seed(1)
    x = torch.randn(2, 6, 3)
    for model in models(Tagger, kind)[1:]:
        prepared = prepare_fx(model, QConfigMapping().set_object_type(torch.nn.Linear, default_dynamic_qconfig), (x,))
        assert type(prepared.rnn) is getattr(tg, kind)
        prepared(x)
        quantized: Any = convert_fx(prepared)
        assert type(quantized.front) is torch.ao.nn.quantized.dynamic.Linear
        assert type(quantized.rnn) is getattr(tg, kind)
        torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_static_quantization(kind: str) -> None:
    x = torch.randn(2, 6, 3)
    theirs, *ours = models(Tagger, kind)
    for model in ours:
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        torch.testing.assert_close(prepared(x), theirs(x), rtol=0, atol=1e-5)
        quantized: Any = convert_fx(prepared)
        assert type(quantized.front) is torch.ao.nn.quantized.Linear
        assert type(quantized.rnn) is getattr(tg, kind)
        torch.testing.assert_close(quantized(x), theirs(x), rtol=0, atol=0.2)


def test_an_lstm_with_equations_of_its_own_is_not_quantized_as_torchs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), tg.LSTM(3, 4, peepholes=True))
    x = torch.randn(5, 2, 3)
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    assert torch.equal(prepared(x)[0], model(x)[0])
