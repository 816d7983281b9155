# SPDX-License-Identifier: Apache-2.0
"""A stream's state, and its rows: sessions come and go, start anew, are saved, loaded and cloned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stream_layers import LAYERS, as_tuple, close, every_layer, unchanged

import tidegate as tg


def test_the_state_is_a_copy_both_ways() -> None:
    layer = tg.LSTM(5, 7)
    stream = layer.stream(2)
    stream.step(torch.randn(2, 5))
    h, c = stream.state
    before = stream.state
    h.zero_()
    c.zero_()
    unchanged(stream, before, 2)
    mine = (torch.randn(1, 2, 7), torch.randn(1, 2, 7))
    stream.state = mine
    kept = stream.state
    mine[0].zero_()
    output = stream.step(torch.randn(2, 5))
    assert not torch.equal(as_tuple(stream.state)[0], kept[0])
    output.zero_()
    assert as_tuple(stream.state)[0].abs().sum() > 0


def test_rows_come_and_go() -> None:
    layer = tg.GRU(5, 7, 2)
    x = torch.randn(4, 5)
    stream = layer.stream(0)
    assert stream.step(torch.empty(0, 5)).shape == (0, 7)
    assert stream.steps(torch.empty(3, 0, 5)).shape == (3, 0, 7)
    assert stream.add_rows(2) == range(2)
    stream.step(x[:2])
    assert stream.add_rows(torch.ones(2, 1, 7)) == range(2, 3)
    before = stream.state
    stream.remove_rows(1)
    assert torch.equal(stream.state, before[:, [0, 2]])
    stream.remove_rows(torch.tensor([True, False]))
    assert torch.equal(stream.state, torch.ones(2, 1, 7))
    assert stream.add_rows(0) == range(1, 1)
    stream.add_rows()
    stream.reset(torch.tensor([0]))
    assert torch.equal(stream.state, torch.zeros(2, 2, 7))
    stream.remove_rows([1, 0, 1])
    assert stream.rows == 0


def test_reset_forgets_even_nan() -> None:
    stream = tg.LSTM(5, 7).stream(2)
    stream.step(torch.full((2, 5), torch.nan))
    stream.reset(1)
    h, c = stream.state
    assert h[:, 0].isnan().all()
    assert torch.equal(h[:, 1], torch.zeros(1, 7))
    assert torch.equal(c[:, 1], torch.zeros(1, 7))


@every_layer
@pytest.mark.parametrize("by_file", [True, False], ids=["file", "dictionary"])
def test_save_and_load(name: str, by_file: bool, tmp_path: Path) -> None:
    layer = LAYERS[name](5, 7, 2)
    x = torch.randn(5, 3, 5)
    stream = layer.stream(3)
    stream.steps(x[:2])
    saved: Any = stream.save(tmp_path / "state.pt") if by_file else stream.save()
    expected = [stream.step(x_t) for x_t in x[2:]]
    other = layer.stream(1)
    other.load(tmp_path / "state.pt" if by_file else saved)
    assert other.rows == 3
    assert all(torch.equal(other.step(x_t), y) for x_t, y in zip(x[2:], expected, strict=True))


def test_clones_go_their_own_ways() -> None:
    stream = tg.LSTM(5, 7).stream(2)
    x = torch.randn(3, 2, 5)
    stream.step(x[0])
    clone = stream.clone()
    expected = stream.step(x[1])
    clone.add_rows()
    clone.remove_rows(2)
    assert torch.equal(clone.step(x[1]), expected)
    clone.reset()
    assert stream.rows == 2
    assert as_tuple(stream.state)[0].abs().sum() > 0


@pytest.mark.slow
def test_a_million_steps_with_sessions_coming_and_going() -> None:
    """The first row stays all the time: no drift against its sequence run whole, and no memory is kept."""
    torch.manual_seed(0)
    layer = tg.GRU(4, 8)
    x = torch.randn(1_000_000, 4)
    stream = layer.stream(1)
    guests = torch.randn(7, 4)
    sizes: list[int] = []
    with torch.inference_mode():
        for t, x_t in enumerate(x.unbind()):
            if t % 1000 == 0:
                stream.remove_rows(range(1, stream.rows))
                stream.add_rows(t // 1000 % 7)
                sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
            output = stream.step(torch.cat((x_t.unsqueeze(0), guests[: stream.rows - 1])))
        close(output[0], layer(x)[0][-1])
    assert max(sizes[100:]) - sizes[100] < 1000, "pages of 4 KiB"
