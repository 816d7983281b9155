# SPDX-License-Identifier: Apache-2.0
"""Models written as C with int8 and bfloat16 weights, compiled and held against PyTorch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import WARNINGS, Drawn, Recurrent, compiled, error, models, needs_clang, run, skip_what_cannot_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tidegate as tg
import tidegate.cells
from tidegate.quantization import product, quantize_rows

TOLERANCE = 1e-5  # of the output's scale


def as_it_says(folder: Path, exported: Any, model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What C makes of x (1, T, I), held to README.md; and how many steps that speaks of."""
    text = (folder / "README.md").read_text()
    found = re.search(r"at most (\S+) from float32 on the example, (\d+) steps .* at most (\S+) more", text)
    assert found is not None
    apart, steps, more = float(found[1]), int(found[2]), float(found[3])
    table = (folder / "model_test.c").read_text().split("expected[")[1].split("{")[1].split("}")[0]
    of_arithmetic = torch.tensor([float(number) for number in re.findall(r"-?\d[-+.e\d]*(?=f)", table)])
    with torch.no_grad():
        theirs = model(x)[0, :steps]
    y = exported.process(x[0])
    assert float((y[:steps] - of_arithmetic.view(steps, -1)).abs().max()) <= more
    assert float((y[:steps] - theirs).abs().max()) <= apart + more
    return y, steps


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.data())
def test_any_model_in_int8(tmp_path_factory: Any, made: Drawn, data: st.DataObject) -> None:
    """As far from the numbers of the arithmetic, and from the model's own, as README.md and the self-test say."""
    model, x = made.model, made.x[0]
    folder = tg.export_c(model, made.x, tmp_path_factory.mktemp("any"), weights="int8")
    flags = data.draw(st.sampled_from([["-O2", "-march=native"], ["-O1"], ["-O2", "-DPLAIN_C"]]))
    exported = compiled(folder, flags)
    y, _ = as_it_says(folder, exported, model, made.x)
    cut = data.draw(st.integers(0, 200))
    exported.reset()
    assert torch.equal(torch.cat([exported.process(x[:cut]), exported.process(x[cut:])]), y)


class Chaotic(nn.Module):
    """Its state grows apart, whatever moved it, by the same factor at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(2, 24, batch_first=True)
        with torch.no_grad():
            self.layer.weight_hh_l0.normal_(0, 1.4 / 24**0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def test_int8_is_held_to_the_steps_that_tell_a_rounding_from_an_error(tmp_path: Path) -> None:
    model, x = Chaotic().eval(), torch.randn(1, 60, 2, generator=torch.Generator().manual_seed(1))
    folder = tg.export_c(model, x, tmp_path / "chaotic", weights="int8")
    for flags in (["-O2", "-march=native"], ["-O1"], ["-O2", "-DPLAIN_C"]):
        _, steps = as_it_says(folder, compiled(folder, flags), model, x)
        assert 1 <= steps < 60


def test_int8_is_what_torch_quantizes() -> None:
    weight, x = torch.randn(7, 20), torch.randn(20)
    weight[3] = 0
    made = quantize_rows(weight)
    rest = [row for row in range(7) if row != 3]
    zeros = torch.zeros(6, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight[rest], made.scales[rest], zeros, 0, -127, 127)
    assert torch.allclose(made.numbers[rest] * made.scales[rest].unsqueeze(-1), theirs, 0, 1e-7)
    assert torch.equal(made.numbers[3], torch.zeros(20, dtype=torch.int8))
    step = float(x.abs().max()) / 127
    whole = torch.round(x / step)
    expected = (made.numbers.double() @ whole.double()) * made.scales.double() * step
    assert error(product(x, made).double(), expected) < 1e-6


def test_int8_of_numbers_near_zero_is_zero(tmp_path: Path) -> None:
    """A state that has died away, as after a second of silence."""
    layer = nn.RNN(1, 20, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.eye(20) / 8)
        layer.bias_hh_l0.zero_()
        layer.bias_ih_l0.zero_()
    x = torch.zeros(1, 200, 1)
    x[0, 0] = 1
    for flags in (["-O2", "-march=native"], ["-O2", "-DPLAIN_C"]):
        exported = compiled(tg.export_c(layer, x, tmp_path, weights="int8"), flags)
        with torch.no_grad():
            assert torch.allclose(exported.process(x[0]), layer(x)[0][0], 0, 1e-2)


@pytest.mark.parametrize(("weights", "apart"), [("bfloat16", 0.01), ("int8", 0.03)])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_shorter_weights(tmp_path: Path, kind: Any, weights: str, apart: float) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(Recurrent(kind(33, 70, 2, batch_first=True)), nn.Linear(70, 18), nn.Linear(18, 2))
    x = torch.randn(1, 200, 33)
    whole = compiled(tg.export_c(layer, x, tmp_path / "whole"))
    short = compiled(tg.export_c(layer, x, tmp_path / "short", weights=weights))
    with torch.no_grad():
        expected = layer(x)[0]
    assert error(whole.process(x[0]), expected) < TOLERANCE
    assert error(short.process(x[0]), expected) < apart
    assert f"; {weights}: at most" in (tmp_path / "short" / "README.md").read_text()


@pytest.mark.parametrize("flags", [["-O3", "-march=native"], ["-O3", "-mavx2", "-mfma"], ["-O2"], ["-Os", "-DPLAIN_C"]])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("compiler", ["gcc", "g++", pytest.param("clang", marks=needs_clang)])
def test_shorter_weights_everywhere(tmp_path: Path, compiler: str, weights: str, flags: list[str]) -> None:
    """The self-test's numbers are what the arithmetic gives in Python."""
    skip_what_cannot_run(flags)
    torch.manual_seed(0)
    blocks = tg.Recurrent(tg.cells.LayerNormGRUCell(19, 35), batch_first=True)
    folder = tg.export_c(
        nn.Sequential(Recurrent(blocks), nn.Linear(35, 17)), torch.randn(1, 60, 19), tmp_path, weights=weights
    )
    language = ["-x", "c++"] if compiler == "g++" else ["-std=c99"]
    program = tmp_path / "test"
    run(compiler, *language, *WARNINGS, *flags, folder / "model.c", folder / "model_test.c", "-o", program)
    run(program)
    if compiler == "gcc":
        sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover")
        run("gcc", "-std=c99", "-O1", *flags[1:], *sanitize, folder / "model.c", folder / "model_test.c", "-o", program)
        run(program)
