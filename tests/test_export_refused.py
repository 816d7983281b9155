# SPDX-License-Identifier: Apache-2.0
"""Models and arguments that the export refuses, by the module or the argument, with nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported import Recurrent
from torch import Tensor, nn

import tidegate as tg


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.look = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gru(x)[0]
        return self.look(y, y, y)[0]


class Mean(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0].mean(1, keepdim=True) + self.gru(x)[0]


class OwnGRU(nn.GRU):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """One of torch.nn's methods, which a swapped layer would use in another way."""


class Branch(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if float(input.detach().sum()) > -1e9 else input


def _conv(**options: Any) -> nn.Module:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)

    return Conv()


class Applied(nn.Module):
    """A GRU that is used as a function says."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.gru, self.first = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class KeepsItself(nn.Module):
    """A state that stays with the module from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.h = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.h = self.gru(x, self.h)
        return y


def _late(model: Any, x: Tensor) -> Tensor:
    return x + (torch.arange(x.shape[1]) >= 100).float().reshape(1, -1, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Attention(), r"look \(MultiheadAttention\): attention looks at all steps"),
        (Mean(), r"model \(Mean\): a step of it is not what it gives over a whole sequence"),
        (nn.GRU(4, 4, bidirectional=True), r"model \(GRU\): it runs both ways"),
        (tg.GRU(4, 4, reverse=True), r"model \(GRU\): it runs from the end"),
        (_conv(padding=1), r"conv \(Conv1d\): it looks ahead"),
        (_conv(), r"conv \(Conv1d\): .*shorter than its input: put 2 steps of zeros before it"),
        (_conv(stride=2, padding=2), r"conv \(Conv1d\): its stride over time is 2"),
        (nn.GRU(4, 4), "it is given several steps for one step of the input: does the example have its time first"),
        (nn.Sequential(Recurrent(OwnGRU(4, 4, batch_first=True))), r"0.layer \(OwnGRU\): a subclass of torch.nn.GRU"),
        (Branch(4, 4), "it cannot be traced: it looks at values"),
        (nn.Sequential(nn.Linear(5, 4)), r"0 \(Linear\): it raised RuntimeError"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), r"1 \(Softmax\): a step of it is not what it gives"),
        (
            Applied(lambda m, x: m.gru(x, m.first(x[:, 0]).unsqueeze(0))[0]),
            r"gru \(GRU\): its initial state depends on the input",
        ),
        (Applied(lambda m, x: m.gru(x, m.gru(x)[1])[0]), r"gru \(GRU\): its initial state depends on the input"),
        (Applied(_late), "model: its steps are not its output over a sequence"),
        (Applied(lambda m, x: m.gru(x)[0] > 0), "expected an output of floating-point numbers, got torch.bool"),
        (Applied(lambda m, x: F.dropout(m.gru(x)[0], 0.5)), r"model \(Applied\): a step of it is not what it gives"),
        (KeepsItself(), r"gru \(GRU\): it raised RuntimeError"),
        (Applied(lambda m, x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2)), "it raised ValueError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals_name_the_module_and_leave_nothing(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(tg.ConversionError, match=message):
        tg.export_c(model, torch.randn(1, 150, 4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"example": [1.0]}, TypeError, "example: expected a tensor"),
        ({"example": torch.zeros(3)}, ValueError, r"example: expected \(T, I\), .* got \(3,\)"),
        ({"example": torch.zeros(2, 5, 3)}, ValueError, "example: expected one sequence"),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module, got builtin_function"),
        ({"name": "a-b"}, ValueError, "name: expected letters"),
        ({"name": "time"}, ValueError, "name: expected none of .* headers"),
        ({"name": "test"}, ValueError, "name: expected none of"),
        ({"weights": "int4"}, ValueError, "weights: expected one of"),
        ({"out": None}, TypeError, "out: expected a path, got NoneType"),
        ({"out": __file__}, ValueError, "out: expected a folder"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], error: Any, message: str) -> None:
    given = {"model": nn.GRU(3, 4), "example": torch.zeros(5, 3), "out": tmp_path / "out", **arguments}
    with pytest.raises(error, match=message):
        tg.export_c(**given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", [torch.zeros(1, 20, 4), torch.randn(1, 1, 4)], ids=["zeros", "one step"])
@pytest.mark.parametrize(
    "looks", [lambda m, x: m.gru(x.flip(1))[0], lambda m, x: m.gru(x + x.mean(1, keepdim=True))[0]]
)
def test_an_example_whose_steps_are_equal_hides_nothing(tmp_path: Path, looks: Any, example: Tensor) -> None:
    with pytest.raises(tg.ConversionError, match="a step of it is not what it gives"):
        tg.export_c(Applied(looks), example, tmp_path / "out")


def test_indices(tmp_path: Path) -> None:
    def words(**options: Any) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 4, **options), Recurrent(nn.GRU(4, 4, batch_first=True)))

    with pytest.raises(ValueError, match="example: expected indices that differ, got 20 equal to 3"):
        tg.export_c(words(), torch.full((1, 20), 3), tmp_path / "out")
    with pytest.raises(tg.ConversionError, match=r"0 \(Embedding\): its max_norm changes the weights"):
        tg.export_c(words(max_norm=0.5), torch.arange(9).unsqueeze(0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
