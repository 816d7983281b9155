# SPDX-License-Identifier: Apache-2.0
"""Streams share the weights of their module and never a state: pickles, copies, a thousand of them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import tidegate as tg

MAKERS = {
    "layer": lambda: tg.LSTM(5, 7, 2),
    "projection": lambda: tg.LSTM(5, 7, proj_size=3),
    "cell": lambda: tg.GRUCell(5, 7),
    "on the reference": lambda: tg.GRU(5, 7, clip=0.5),
}


def advanced(stream: Any) -> Any:
    torch.manual_seed(0)
    for _ in range(3):
        stream.step(torch.randn(2, 5))
    return stream


def saved_and_loaded(stream: Any) -> Any:
    file = io.BytesIO()
    torch.save(stream, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda stream: pickle.loads(pickle.dumps(stream)),
    "torch.save": saved_and_loaded,
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "clone": lambda stream: stream.clone(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_goes_its_own_way(kind: str, how: str) -> None:
    stream = advanced(MAKERS[kind]().stream(2))
    twin = COPIES[how](stream)
    before = stream.state
    x = torch.randn(2, 5)
    y = twin.step(x)
    for ours, then in zip(*(s if isinstance(s, tuple) else (s,) for s in (stream.state, before)), strict=True):
        assert torch.equal(ours, then)
    torch.testing.assert_close(stream.step(x), y)
    assert twin.backend == stream.backend
    assert twin.rows == 2


def test_streams_of_one_module_share_its_weights() -> None:
    layer = tg.GRU(64, 64)
    streams = [layer.stream(1) for _ in range(1000)]
    assert len({id(stream._laid) for stream in streams}) == 1
    layer.weight_hh_l0.data.mul_(2)  # no version says so
    changed, x = layer.stream(1), torch.randn(1, 64)
    assert changed._laid is not streams[0]._laid
    torch.testing.assert_close(changed.step(x), layer(x[None])[0][0].detach())
    assert not torch.allclose(streams[0].step(x), streams[0].clone().step(x) * 0)
    other = tg.GRU(64, 64)
    assert other.stream(1)._laid is not changed._laid
    assert layer.stream(1, dtype=torch.float64)._laid is not changed._laid


def test_what_runs_in_reverse_has_no_stream() -> None:
    with pytest.raises(ValueError, match="stream: expected reverse=False"):
        tg.GRU(5, 7, reverse=True).stream()
    with pytest.raises(ValueError, match="stream: expected bidirectional=False"):
        tg.GRU(5, 7, bidirectional=True).stream()


def test_a_file_without_states_is_refused() -> None:
    stream = tg.GRU(5, 7).stream(2)
    saved = stream.save()
    for wrong in ({**saved, "states": None}, {k: v for k, v in saved.items() if k != "states"}):
        with pytest.raises(ValueError, match="source: expected states by name"):
            stream.load(wrong)
