# SPDX-License-Identifier: Apache-2.0
"""`tbptt`: chunk by chunk what one call gives, the graph cut between, beside a loop written out with torch.nn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tidegate as tg
from tidegate import cells

T, B, I, H = 23, 3, 5, 4  # noqa: E741


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_trains_as_a_loop_of_torch_nn(kind: str) -> None:
    """Weights after every chunk's step of an optimizer."""
    torch.manual_seed(0)
    layer = getattr(tg, kind)(I, H)
    theirs = getattr(torch.nn, kind)(I, H)
    theirs.load_state_dict(layer.state_dict())
    x, target = torch.randn(T, B, I), torch.randn(T, B, H)

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for (_, wanted), output in tg.tbptt(layer, (x, target), steps=5):
        optimizer.zero_grad()
        (output - wanted).square().mean().backward()
        optimizer.step()

    optimizer, state = torch.optim.SGD(theirs.parameters(), lr=0.1), None
    for start in range(0, T, 5):
        output, state = theirs(x[start : start + 5], state)
        state = tuple(s.detach() for s in state) if kind == "LSTM" else state.detach()
        optimizer.zero_grad()
        (output - target[start : start + 5]).square().mean().backward()
        optimizer.step()
    for ours, expected in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 23, 100])
@pytest.mark.parametrize("batch_first", [False, True])
def test_together_one_call(steps: int, batch_first: bool) -> None:
    layer = tg.LSTM(I, H, 2, batch_first=batch_first)
    shape = (B, T) if batch_first else (T, B)
    x, resets, lengths = torch.randn(*shape, I), torch.rand(shape) < 0.2, torch.tensor([T, 7, 0])
    state = (torch.randn(2, B, H), torch.randn(2, B, H))
    run = tg.tbptt(layer, x, steps, state=state, resets=resets, lengths=lengths)
    pairs = list(run)
    expected, last = layer(x, state, resets=resets, lengths=lengths)
    dim = 1 if batch_first else 0
    torch.testing.assert_close(torch.cat([output for _, output in pairs], dim), expected)
    torch.testing.assert_close(run.state, tuple(s.detach() for s in last))
    assert torch.equal(torch.cat([chunk for chunk, _ in pairs], dim), x)
    assert not any(s.requires_grad for s in run.state)
    assert len(list(run)) == len(pairs), "anew from the first chunk"


def test_gradients_end_where_the_chunk_begins() -> None:
    x = torch.randn(T, B, I, requires_grad=True)
    *_, (_, output) = tg.tbptt(tg.GRU(I, H), x, steps=10)
    output.sum().backward()
    reached = x.grad.abs().sum((1, 2)) > 0
    assert reached.tolist() == [False] * 20 + [True] * 3


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [3, 0, 12, 8], [5, 5, 5, 5, 3]])
def test_pieces_of_any_lengths(sizes: list[int]) -> None:
    """As torch.utils.data.DataLoader or a generator gives them; with resets by a function of the chunk."""
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.2

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(x.split(sizes), resets.split(sizes), strict=True)

    layer = tg.GRU(I, H)
    found = list(tg.tbptt(layer, pieces(), 5, resets=lambda chunk: chunk[1]))
    assert [len(chunk[0]) for chunk, _ in found] == [5, 5, 5, 5, 3]
    torch.testing.assert_close(torch.cat([output for _, output in found]), layer(x, resets=resets)[0])


def test_pieces_are_asked_for_when_they_are_needed() -> None:
    asked = []

    def pieces() -> Iterator[Tensor]:
        for k in range(10):
            asked.append(k)
            yield torch.randn(4, B, I)

    run = iter(tg.tbptt(tg.GRU(I, H), pieces(), 6))
    next(run)
    assert asked == [0, 1]
    next(run)
    assert asked == [0, 1, 2]


def test_any_module() -> None:
    """A stack of cells over a nest of inputs; torch.nn's; a model with an embedding, whose input has no features."""
    stack = tg.Recurrent([tg.GRUCell(I, H), cells.LayerNormLSTMCell(H, H)])
    x = torch.randn(T, B, I)
    run = tg.tbptt(stack, x, 5)
    torch.testing.assert_close(torch.cat([output for _, output in run]), stack(x)[0])

    gru_d = tg.Recurrent(cells.GRUDCell(I, H))
    nest = (torch.randn(T, B, I), torch.rand(T, B, I) < 0.5, torch.rand(T, B, I))
    nest = (nest[0], nest[1].float(), nest[2])
    run = tg.tbptt(gru_d, (nest, torch.randn(T, B)), 5)
    torch.testing.assert_close(torch.cat([output for _, output in run]), gru_d(nest)[0])

    theirs = torch.nn.LSTM(I, H, batch_first=True)
    run = tg.tbptt(theirs, x.transpose(0, 1), 5)
    torch.testing.assert_close(torch.cat([output for _, output in run], 1), theirs(x.transpose(0, 1))[0])
    assert torch.cat([output for _, output in tg.tbptt(theirs, x[:, 0], 5)]).shape == (T, H), "unbatched"

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = torch.nn.Embedding(9, I), tg.GRU(I, H, batch_first=True)

        def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
            return self.layer(self.embedding(tokens), state)

    model, tokens = Model(), torch.randint(9, (B, T))
    run = tg.tbptt(model, (tokens, tokens), 5, dim=1)
    torch.testing.assert_close(torch.cat([output for _, output in run], 1), model(tokens)[0])


X = torch.zeros(T, B, I)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "steps": ({"steps": 0}, ValueError, "steps: expected a number of steps, 1 or more, got 0"),
    "data": ({"data": 3}, TypeError, "data: expected a tensor, a tuple of them, or an iterable of such pieces, got i"),
    "lengths of time": (
        {"data": (X, X[1:])}, ValueError, r"data: expected 23 steps in dimension 0 of all, got \(22, 3, 5\)",
    ),
    "resets": ({"resets": torch.zeros(4, B, dtype=torch.bool)}, ValueError, r"data: expected 23 steps"),
    "resets of pieces": (
        {"data": [X], "resets": X}, TypeError, "resets: expected a function of a chunk with data that comes in pieces",
    ),
    "a piece": ({"data": ["x"]}, TypeError, "data: expected tensors, or nests of them, in every piece, got str"),
    "module": ({"module": lambda x, state: x}, ValueError, r"module: expected it to return \(output, state\), got Ten"),
    "lengths": ({"lengths": [24, 2, 3]}, ValueError, r"lengths: expected 0..T = 0..23, got 24"),
    "negative lengths": ({"lengths": [3, -1, 3]}, ValueError, r"lengths: expected 0..T = 0..23, got -1"),
    "negative lengths of pieces": (
        {"data": [X], "lengths": [3, -1, 3]}, ValueError, "lengths: expected 0 or more, got -1",
    ),
    "lengths of pieces": ({"data": [X], "lengths": [24, 2, 3]}, ValueError, r"lengths: expected 0..T = 0..23, got 24"),
    "a list of resets": (
        {"resets": [True] * T}, TypeError, "resets: expected a tensor, or a function of a chunk, got list",
    ),
    "dim": ({"dim": -3}, ValueError, "dim: expected a dimension, 0 or more, or None, got -3"),
    "both ways": ({"module": tg.GRU(I, H, bidirectional=True)}, ValueError, "forward alone.*, got bidirectional=True"),
    "torch.nn's both ways": ({"module": torch.nn.GRU(I, H, bidirectional=True)}, ValueError, "got bidirectional=True"),
    "reverse": ({"module": tg.LSTM(I, H, reverse=True)}, ValueError, "forward alone.*, got reverse=True"),
    "a reverse Recurrent": (
        {"module": tg.Recurrent(tg.GRUCell(I, H), reverse=True)}, ValueError, "forward alone.*, got reverse=True",
    ),
    "pairs": (
        {"module": tg.Recurrent([(tg.GRUCell(I, H), tg.GRUCell(I, H))])}, ValueError, "forward alone.*, got a pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    given, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        list(tg.tbptt(**{"module": tg.GRU(I, H), "data": X, "steps": 5, **given}))


def test_wrong_lengths_are_told_before_the_first_chunk() -> None:
    with pytest.raises(ValueError, match=r"lengths: expected 0..T = 0..23, got 99"):
        tg.tbptt(tg.GRU(I, H), X, 5, lengths=[99, 2, 3])


def test_a_dataloaders_lists() -> None:
    """Its pieces (input, target) come as lists; a layer would take a list for rows of a batch."""
    x, target = torch.randn(T, I), torch.randn(T, I)
    layer = tg.GRU(I, H)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), batch_size=6)
    found = list(tg.tbptt(layer, loader, 5))
    torch.testing.assert_close(torch.cat([output for _, output in found]), layer(x)[0])
    torch.testing.assert_close(torch.cat([wanted for (_, wanted), _ in found]), target)


def test_a_module_without_a_state() -> None:
    run = tg.tbptt(lambda x, state: (2 * x, None), X, 5)
    assert [len(output) for _, output in run] == [5, 5, 5, 5, 3]
    assert run.state is None


def test_an_error_of_the_datas_own() -> None:
    def pieces() -> Iterator[Tensor]:
        yield X
        raise OSError("the disk is gone")

    run = iter(tg.tbptt(tg.GRU(I, H), pieces(), 5))
    assert [len(next(run)[1]) for _ in range(4)] == [5, 5, 5, 5], "the whole chunks before it"
    with pytest.raises(OSError, match="the disk is gone"):
        next(run)
