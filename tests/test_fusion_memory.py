# SPDX-License-Identifier: Apache-2.0
"""What a fused cell's backward writes over: never what somebody may read again."""

from __future__ import annotations

from typing import Any

import needs
import pytest
import torch
from fusing import B, D, H, T
from torch import Tensor, nn

import tidegate as tg
from tidegate.cells import LayerNormLSTMCell, SLSTMCell
from tidegate.fusion import kept
from tidegate.nn import over_time

pytestmark = needs.compiled_operators


class Plain(nn.Module):
    """Its gates are kept in the memory of what the input gives."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(H, 2 * H, dtype=D), nn.Linear(H, 2 * H, dtype=D)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z, n = (self.from_x(x) + self.from_h(h)).chunk(2, -1)
        return torch.sigmoid(z) * h + torch.tanh(n)


class Reads(Plain):
    """What the input gives is read again, inside the loop and after it."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.from_x(x)
        z, n = (gates * torch.tanh(self.from_h(h))).chunk(2, -1)
        h = torch.sigmoid(z) * h + torch.tanh(n)
        return self.from_h(h) * gates, h


class Bare(nn.Module):
    """The input itself is what the loop reads, and as large as what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.from_h = nn.Linear(H, H, dtype=D)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x + self.from_h(h))
        return torch.sigmoid(x) * h, h


CELLS: dict[str, Any] = {
    "plain": Plain,
    "reads": Reads,
    "bare": Bare,
    "layer norm": lambda: LayerNormLSTMCell(H, H).double(),
    "sLSTM": lambda: SLSTMCell(H, H, 2).double(),
}


class Run:
    """A run of a cell, with all that its gradients are asked of."""

    def __init__(self, cell: nn.Module, fuse: bool, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=D)

        self.x = random(T, B, H).requires_grad_()
        sizes = getattr(cell, "state_size", H)
        states = [random(B, n).abs().requires_grad_() for n in (sizes if isinstance(sizes, tuple) else (sizes,))]
        state = tuple(states) if isinstance(sizes, tuple) else states[0]
        self.wanted = [self.x, *states, *cell.parameters()]
        y, final = over_time.run(cell, self.x, state, fuse=fuse, **options)
        self.y, self.results = y, [y, *(final if isinstance(final, tuple) else (final,))]

    def loss(self) -> Tensor:
        return sum((torch.sin(result) * (k + 1)).sum() for k, result in enumerate(self.results))  # pyright: ignore

    def gradients(self, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(), self.wanted, **options))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))  # values up to some hundreds
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"lengths": [T, 0, 2]}, {"resets": True}], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_gradients_and_results_are_the_loops(name, threads, options):
    cell = CELLS[name]()
    if "lengths" in options:
        options = {"lengths": torch.tensor(options["lengths"])}
    if "resets" in options:
        options = {"resets": torch.rand(T, B) < 0.3}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = Run(cell, True, **options)
        results = [result.detach().clone() for result in run.results]
        x, found = run.x.detach().clone(), run.gradients()
    finally:
        torch.set_num_threads(before)
    expected = Run(cell, False, **options)
    assert_same(found, expected.gradients())
    assert_same(results, expected.results)
    # None of what the caller holds was written over.
    assert torch.equal(x, run.x)
    assert all(map(torch.equal, results, run.results))


@pytest.mark.parametrize("name", CELLS)
def test_a_graph_that_is_kept_gives_the_same_again(name):
    run = Run(CELLS[name](), True)
    first = run.gradients(retain_graph=True)
    again = run.gradients(create_graph=True)
    assert_same(again, first)
    sum(gradient.square().sum() for gradient in again).backward(retain_graph=True)
    last = run.gradients()
    assert_same(last, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        run.gradients()


def test_what_hooks_are_handed_stays_as_it_is():
    handed: list[tuple[Tensor, Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        handed.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run = Run(LayerNormLSTMCell(H, H).double(), True)
    run.gradients()
    assert handed
    assert all(torch.equal(now, then) for now, then in handed)


def kept_per_step_and_row(cell: nn.Module, n: int) -> float:
    """Of a training step over an input and a state of n features, how many times n numbers are kept."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() >= 2 and tensor.numel() >= 40 * 5 * n:  # no parameters
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(40, 5, n)
    states = tuple([torch.rand(5, n) for _ in cell.state_size])  # pyright: ignore
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y, _ = over_time.run(cell, x, states, fuse=True)
        assert y.requires_grad
    return sum(saved.values()) / (4 * 40 * 5 * n)


@pytest.mark.parametrize(
    ("cell", "most"),
    [
        # The input, both products of four gates, h and c.
        (LayerNormLSTMCell(16, 16), 1 + 4 + 4 + 2),
        # The input, the sum of both products, h, c, n and m.
        (SLSTMCell(16, 16, 2), 1 + 4 + 4),
    ],
    ids=["layer norm", "sLSTM"],
)
def test_what_can_be_computed_again_is_not_kept(cell, most):
    assert kept_per_step_and_row(cell, 16) <= most


class NormedForTwo(nn.Module):
    """A norm of the input's product, which the output reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(H, H, dtype=D), nn.Linear(H, H, dtype=D)
        self.norm = nn.LayerNorm(H, dtype=D)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(self.from_x(x))
        return normed, torch.tanh(normed + self.from_h(h))


def test_a_norm_that_others_read_too_stays_before_the_loop():
    cell = NormedForTwo()
    run, expected = Run(cell, True), Run(cell, False)
    assert (
        "mean i0"
        not in tg.explain(tg.dynamic_rnn, cell, run.x.detach(), initial_state=torch.zeros(T, H, dtype=D))
        .calls[0]
        .program
    )
    assert_same(run.gradients(), expected.gradients())


def test_a_backward_that_failed_in_the_middle_cannot_be_tried_again(monkeypatch):
    from tidegate.fusion import loop

    run = Run(Plain(), True)

    def out_of_memory(*given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(loop, "_matrix_gradient", out_of_memory)
    with pytest.raises(MemoryError):
        run.gradients()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        run.gradients()


def test_it_does_write_over_what_was_kept(monkeypatch):
    seen: list[tuple[int, ...]] = []
    known = kept.places_over

    def watched(*given: Any) -> tuple[int, ...]:
        seen.append(known(*given))
        return seen[-1]

    monkeypatch.setattr(kept, "places_over", watched)
    run = Run(Plain(), True)
    assert max(seen[-1]) >= 0  # the gates, over what the input gives
    run.gradients()
    assert max(seen[-1]) >= 0  # their gradient, over them
