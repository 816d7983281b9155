# SPDX-License-Identifier: Apache-2.0
"""Models over whole sequences: layers that run in reverse or both ways, lengths and resets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import WARNINGS, Beside, CausalConv, ExportedBlocks, Function, Recurrent, Residual, error, library, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tidegate as tg
import tidegate.cells

TOLERANCE = 1e-5  # of the output's scale
FLAGS = [["-O2", "-march=native"], ["-O1"], ["-O2", "-DPLAIN_C"]]


def blocks(model: nn.Module, x: Tensor, folder: Path, flags: list[str] = FLAGS[0], **options: Any) -> ExportedBlocks:
    made = tg.export_c(model, x, folder, block=True, **options)
    return ExportedBlocks(made, library(made, flags))


@st.composite
def models(draw: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    sizes = st.integers(1, 40)
    inputs = size = draw(sizes)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["both", "both", "reverse", "forward", "cells", "linear", "norm", "conv"]))
        width = draw(sizes)
        outputs = width
        if kind == "both":
            of, count = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU])), draw(st.integers(1, 3))
            layer: nn.Module = Recurrent(of(size, width, count, bidirectional=True, batch_first=True))
            outputs = 2 * width
        elif kind == "reverse":
            layer = Recurrent(
                draw(st.sampled_from([tg.RNN, tg.LSTM, tg.GRU]))(size, width, reverse=True, batch_first=True)
            )
        elif kind == "forward":
            layer = Recurrent(nn.GRU(size, width, batch_first=True))
        elif kind == "cells":
            pair = (tg.GRUCell(size, width), tidegate.cells.LayerNormLSTMCell(size, width))
            layer, outputs = Recurrent(tg.Recurrent(pair, batch_first=True)), 2 * width
        elif kind == "conv":
            layer = CausalConv(size, width, 3, 1, 1, "own")
        else:
            layer = nn.Linear(size, width) if kind == "linear" else nn.LayerNorm(size)
            outputs = width if kind == "linear" else size
        wrap = draw(st.sampled_from(["", "", "residual", "beside", "slice"]))
        if wrap == "residual" and outputs == size:
            layer = Residual(layer)
        elif wrap == "beside":
            layer, outputs = Beside(layer), outputs + size
        elif wrap == "slice" and outputs > 2:
            layer, outputs = nn.Sequential(layer, Function(lambda x: x[..., 1:-1])), outputs - 2
        layers.append(layer)
        size = outputs
    return nn.Sequential(*layers).eval(), torch.randn(1, 120, inputs)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.sampled_from(FLAGS), st.integers(1, 120))
def test_any_model(tmp_path_factory: Any, made: tuple[nn.Module, Tensor], flags: list[str], steps: int) -> None:
    model, x = made
    exported = blocks(model, x[:, :40], tmp_path_factory.mktemp("any"), flags)
    for sequence in (x, x[:, :steps]):
        with torch.no_grad():
            theirs, expected = model.float()(sequence), model.double()(sequence.double()).float()
        # A LayerNorm of nearly equal numbers magnifies roundings: there PyTorch itself is as far off.
        assert error(exported.process(sequence[0]), expected[0]) < max(TOLERANCE, 4 * error(theirs, expected))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("compiler", ["gcc", "g++"])
def test_its_own_test_in_c(tmp_path: Path, weights: str, compiler: str) -> None:
    torch.manual_seed(0)
    layers = nn.LSTM(20, 24, 2, bidirectional=True, batch_first=True)
    model = nn.Sequential(Recurrent(layers), nn.Linear(48, 3))
    folder = tg.export_c(model, torch.randn(1, 60, 20), tmp_path / "out", block=True, weights=weights, resets=True)
    language = ["-x", "c++"] if compiler == "g++" else ["-std=c99"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    for flags in (["-O3", "-march=native"], ["-O1", *sanitize]):
        run(
            compiler, *language, *WARNINGS, *flags, folder / "model.c", folder / "model_test.c", "-o", tmp_path / "test"
        )
        assert "largest difference" in run(tmp_path / "test")


def test_lengths_are_the_steps_of_a_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 7, 2, bidirectional=True, batch_first=True), torch.randn(4, 30, 3)
    lengths = torch.tensor([30, 1, 17, 8])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    with torch.no_grad():
        expected, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0], batch_first=True)
    exported = blocks(layer, x[:1], tmp_path)
    for row, length in enumerate(lengths):
        assert error(exported.process(x[row, :length]), expected[row, :length]) < TOLERANCE
    assert exported.process(x[0, :0]).shape == (0, 14)


@pytest.mark.parametrize("flags", FLAGS)
def test_resets_cut_a_block_into_sequences(tmp_path: Path, flags: list[str]) -> None:
    torch.manual_seed(0)
    layer, x, cuts = nn.LSTM(3, 7, 2, bidirectional=True, batch_first=True), torch.randn(1, 50, 3), [0, 1, 20, 35, 50]
    resets = torch.zeros(50, dtype=torch.bool)
    resets[cuts[1:-1]] = True
    exported = blocks(layer, x, tmp_path, flags, resets=True)
    with torch.no_grad():
        parts = [layer(x[:, a:b])[0] for a, b in pairwise(cuts)]
    assert error(exported.process(x[0], resets), torch.cat(parts, 1)[0]) < TOLERANCE


def test_an_initial_state_of_the_models_own(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(2, 6, batch_first=True, bidirectional=True)
            self.first = nn.Parameter(torch.randn(2, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x, self.first.expand(2, x.shape[0], 6).contiguous())[0]

    model, x = Model(), torch.randn(1, 20, 2)
    with torch.no_grad():
        assert error(blocks(model, x, tmp_path).process(x[0]), model(x)[0]) < TOLERANCE


def test_a_layer_that_runs_forward_needs_no_room(tmp_path: Path) -> None:
    x = torch.randn(1, 20, 2)
    exported = blocks(nn.GRU(2, 6, batch_first=True), x, tmp_path)
    assert exported.row == 1
    assert "goes over the steps from the first to the last. */" in (tmp_path / "model.h").read_text()


def test_what_a_header_says(tmp_path: Path) -> None:
    tg.export_c(nn.GRU(2, 6, 2, bidirectional=True), torch.randn(20, 1, 2), tmp_path, block=True)
    header = (tmp_path / "model.h").read_text()
    assert "over whole sequences" in header
    assert "model_step" not in header
    assert "model_state" not in header


class Sum(nn.Module):
    def __init__(self, layer: nn.Module, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, bidirectional=True, batch_first=True)
        self.look = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gru(x)[0]
        return self.look(y, y, y)[0]


BOTH = nn.GRU(4, 4, bidirectional=True, batch_first=True)


def _with_mean(found: Any) -> Tensor:
    return found[0].mean(1, keepdim=True) + found[0]


def _last_states(found: Any) -> Tensor:
    return found[1].transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Looks(), r"look \(MultiheadAttention\): attention looks at all steps"),
        (Sum(BOTH, _with_mean), "model: beside the layers that run from the end something in it looks"),
        (Sum(BOTH, _last_states), r"model: expected an output of every step, .*got \(1, 8\)"),
    ],
    ids=["attention", "mean", "last"],
)
def test_refusals(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(tg.ConversionError, match=message):
        tg.export_c(model, torch.randn(1, 50, 4), tmp_path / "out", block=True)
    assert list(tmp_path.iterdir()) == []
