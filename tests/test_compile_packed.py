# SPDX-License-Identifier: Apache-2.0
"""A PackedSequence under torch.compile and torch.export: without a break where the number of rows stands in a shape."""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tidegate as tg

# torch's compiler looks at .grad of whatever a graph is given, and warns of it itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LAYERS = {"rnn": tg.RNN, "lstm": tg.LSTM, "gru": tg.GRU}
BATCHES = ([2, 6, 4, 1, 1], [1, 7, 7, 3, 4, 7], [6])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def make_layer(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind](3, 4, num_layers=2, bidirectional=True, dtype=torch.float64, **options)


def padded(lengths: list[int]) -> Tensor:
    return torch.rand(max(lengths), len(lengths), 3, dtype=torch.float64)


def training_step(module: Any, layer: Any, data: Tensor, lengths: list[int], hx: Any = None) -> list[Tensor]:
    layer.zero_grad()
    data = data.clone().requires_grad_()
    packed = pack_padded_sequence(data, torch.tensor(lengths), enforce_sorted=False)
    output, states = module(packed, hx)
    assert isinstance(output, PackedSequence)
    (output.data.square().sum() + sum(state.square().sum() for state in states)).backward()
    return [output.data, *states, data.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_for_every_packed_batch(kind: str, has_state: bool) -> None:
    layer = make_layer(kind)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in BATCHES:
        data, hx = padded(lengths), None
        if has_state:
            state = torch.rand(4, len(lengths), 4, dtype=torch.float64)
            hx = (state, state * 2) if kind == "lstm" else state
        results = [training_step(module, layer, data, lengths, hx) for module in (compiled, layer)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "one row may be a graph of its own"


class Tacotron(torch.nn.Module):
    """Tacotron2's encoder, kokoro's: linear, pack, an LSTM, unpack."""

    def __init__(self, is_sorted: bool) -> None:
        super().__init__()
        self.front = torch.nn.Linear(3, 3)
        self.rnn = tg.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.is_sorted = is_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.front(x), lengths, batch_first=True, enforce_sorted=self.is_sorted)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0] * 2


@needs.compiled_unpacking
@pytest.mark.parametrize("is_sorted", [False, True])
def test_only_torchs_own_functions_break_a_graph(is_sorted: bool) -> None:
    torch.manual_seed(0)
    model, x = Tacotron(is_sorted), torch.randn(3, 5, 3)
    lengths = torch.tensor([5, 4, 2] if is_sorted else [2, 5, 4])
    found = torch._dynamo.explain(model)(x, lengths)
    assert found.graph_break_count <= 2  # of packing and of unpacking, which torch's compiler does not follow
    assert all("pack" in str(reason.reason) for reason in found.break_reasons)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, lengths), model(x, lengths))


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_counted_by_a_value_run_as_with_torch_outside_of_the_graph(kind: str) -> None:
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = make_layer(kind)

        def forward(self, packed: PackedSequence) -> Tensor:
            return self.rnn(packed)[0].data.sin() * 2

    model, lengths = Doubled(), [5, 4, 2]
    packed = pack_padded_sequence(padded(lengths), torch.tensor(lengths))
    assert torch._dynamo.explain(model)(packed).graph_count == 1
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(packed), model(packed))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=needs.strict_export_of_packed)])
@pytest.mark.parametrize("kind", LAYERS)
def test_export_takes_the_number_of_rows_from_the_values(kind: str, strict: bool) -> None:
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = make_layer(kind)

        def forward(self, data: Tensor, sizes: Tensor) -> Any:
            output, states = self.rnn(PackedSequence(data, sizes))
            return output.data, states

    model = Packed()
    packed = pack_padded_sequence(padded([5, 4, 2]), torch.tensor([5, 4, 2]))
    program = torch.export.export(model, (packed.data, packed.batch_sizes), strict=strict)
    other = pack_padded_sequence(padded([5, 3, 3]), torch.tensor([5, 3, 3]))
    for one in (packed, other):
        expected = model(one.data, one.batch_sizes)
        torch.testing.assert_close(program.module()(one.data, one.batch_sizes), expected, rtol=0, atol=1e-14)
