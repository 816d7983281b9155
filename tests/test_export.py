# SPDX-License-Identifier: Apache-2.0
"""Models written as C, compiled with gcc and held against PyTorch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    WARNINGS,
    Drawn,
    Exported,
    Function,
    Recurrent,
    compiled,
    error,
    models,
    needs_clang,
    run,
    skip_what_cannot_run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tidegate as tg

FILES = ["CMakeLists.txt", "README.md", "export.json", "model.c", "model.h", "model_test.c"]
TOLERANCE = 1e-5  # of the output's scale


class Amplifier(nn.Module):
    """The shape of a guitar amplifier's model: one sample in, one out, added to the input."""

    def __init__(self, size: int = 40, kind: Any = nn.GRU, **options: Any) -> None:
        super().__init__()
        self.rec = kind(1, size, batch_first=True, **options)
        self.lin = nn.Linear(size, 1)

    def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Any]:
        y, h = self.rec(x, h)
        return self.lin(y) + x, h


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.data())
def test_any_model(tmp_path_factory: Any, made: Drawn, data: st.DataObject) -> None:
    model, x = made.model, made.x
    folder = tg.export_c(model, x[:, :40], tmp_path_factory.mktemp("any"))
    flags = data.draw(st.sampled_from([["-O2", "-march=native"], ["-O1"], ["-O2", "-DPLAIN_C"]]))
    exported = compiled(folder, flags)
    with torch.no_grad():
        theirs = model(x)[0]
        expected = model.double()(x.double())[0].float()
    # A LayerNorm of nearly equal numbers magnifies roundings: there PyTorch itself is as far off.
    most = max(TOLERANCE, 4 * error(theirs, expected))
    assert error(exported.process(x[0]), expected) < most
    # Blocks of any cut, and single steps.
    exported.reset()
    cuts = sorted(data.draw(st.lists(st.integers(0, 200), max_size=3)))
    blocks = zip([0, *cuts], [*cuts, 200], strict=True)
    assert error(torch.cat([exported.process(x[0, a:b]) for a, b in blocks]), expected) < most
    exported.reset()
    assert error(torch.stack([exported.step(x[0, t]) for t in range(20)]), expected[:20]) < 20 * most


@pytest.mark.parametrize("size", [1, 3, 8, 33, 40, 64, 127])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_sizes(tmp_path: Path, kind: Any, size: int) -> None:
    torch.manual_seed(size)
    model, x = Amplifier(size, kind), torch.randn(1, 200, 1)
    exported = compiled(tg.export_c(model, x, tmp_path))
    with torch.no_grad():
        assert error(exported.process(x[0]), model(x)[0][0]) < TOLERANCE


def test_the_state_is_plain_numbers(tmp_path: Path) -> None:
    x = torch.randn(1, 50, 1)
    exported = compiled(tg.export_c(Amplifier(8), x, tmp_path))
    first = exported.process(x[0, :30])
    saved = exported.state.clone()
    rest = exported.process(x[0, 30:])
    exported.reset()
    assert torch.equal(exported.process(x[0, :30]), first)
    exported.state.copy_(saved)
    assert torch.equal(exported.process(x[0, 30:]), rest)


def test_streams_know_nothing_of_each_other(tmp_path: Path) -> None:
    folder = tg.export_c(Amplifier(8), torch.randn(1, 50, 1), tmp_path)
    first = compiled(folder)
    second = Exported(folder, first.library)
    x, y = torch.randn(50, 1), torch.randn(50, 1)
    alone = first.process(x), second.process(y)
    first.reset()
    second.reset()
    pairs = [(first.step(a), second.step(b)) for a, b in zip(x, y, strict=True)]
    for found, expected in zip(map(torch.stack, zip(*pairs, strict=True)), alone, strict=True):
        assert torch.equal(found, expected)


def test_resets_in_blocks(tmp_path: Path) -> None:
    layer = tg.GRU(3, 5, batch_first=True)
    x, resets = torch.randn(1, 50, 3), torch.rand(50) < 0.2
    exported = compiled(tg.export_c(layer, x, tmp_path, resets=True))
    with torch.no_grad():
        expected = layer(x, resets=resets.unsqueeze(0))[0][0]
    assert error(exported.process(x[0], resets), expected) < TOLERANCE


def test_an_initial_state_of_the_models_own(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(2, 6, batch_first=True)
            self.first = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x, self.first.expand(1, x.shape[0], 6).contiguous())[0]

    model, x = Model(), torch.randn(1, 20, 2)
    exported = compiled(tg.export_c(model, x, tmp_path))
    with torch.no_grad():
        assert error(exported.process(x[0]), model(x)[0]) < TOLERANCE


def test_what_a_model_gives_for_a_whole_sequence(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 4)
            self.lstm = nn.LSTM(4, 5, proj_size=3, num_layers=2, batch_first=True)
            self.last = nn.Linear(3, 2)

        def forward(self, index: Tensor) -> Tensor:
            return self.last(self.lstm(self.embedding(index))[1][0][-1])

    model, index = Words(), torch.randint(0, 11, (1, 30))
    exported = compiled(tg.export_c(model, index, tmp_path))
    with torch.no_grad():
        assert error(exported.process(index[0])[-1], model(index)[0]) < TOLERANCE


def test_an_index_that_the_embedding_does_not_have_is_a_row_of_zeros(tmp_path: Path) -> None:
    exported = compiled(tg.export_c(nn.Embedding(5, 3), torch.arange(5), tmp_path))
    assert torch.equal(exported.process(torch.tensor([5.0, -1.0, 0.5])), torch.zeros(3, 3))


def test_cells_in_the_models_own_loop(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRUCell(3, 5), nn.LSTMCell(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 5)
            state, outputs = None, []
            for t in range(x.shape[1]):
                h = self.first(x[:, t], h)
                state = self.second(h, state)
                outputs.append(state[0])
            return torch.stack(outputs, 1)

    model, x = Loop(), torch.randn(1, 40, 3)
    exported = compiled(tg.export_c(model, x, tmp_path))
    with torch.no_grad():
        assert error(exported.process(x[0]), model(x)[0]) < TOLERANCE


@pytest.mark.parametrize("time_major", [False, True])
def test_forms_of_the_example(tmp_path: Path, time_major: bool) -> None:
    layer, x = nn.GRU(3, 4, batch_first=not time_major), torch.randn(20, 3)
    one = tg.export_c(layer, x, tmp_path / "a")
    two = tg.export_c(layer, x.unsqueeze(1 if time_major else 0), tmp_path / "b")
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in FILES)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Recurrent(nn.GRU(4, 4, batch_first=True)), nn.Dropout(0.5)).double()
    tg.export_c(model, torch.randn(1, 20, 3), tmp_path)
    assert model.training
    assert type(model[1].layer) is nn.GRU
    assert model[0].weight.dtype is torch.float64
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("flags", [["-O2", "-march=native"], ["-O1"], ["-O2", "-DPLAIN_C"]])
@pytest.mark.parametrize("power", [-3, -2, 4, 5, 2.5, [2.0, -3.0, 0.0, 5.0, 1.0]])
def test_powers_of_negative_numbers(tmp_path: Path, power: Any, flags: list[str]) -> None:
    exponent = torch.tensor(power) if isinstance(power, list) else power
    x = torch.randn(1, 50, 5).abs() if power == 2.5 else torch.randn(1, 50, 5)
    exported = compiled(tg.export_c(Function(lambda x: x**exponent), x, tmp_path), flags)
    expected = x[0] ** exponent
    assert torch.allclose(exported.process(x[0]), expected, 1e-5, 0)


@pytest.mark.parametrize("pad", [lambda x: nn.functional.pad(x, (0, 0)), nn.ConstantPad1d((0, 0), 0.0)])
def test_padding_by_nothing(tmp_path: Path, pad: Any) -> None:
    """As a causal convolution has it whose kernel is one step."""
    conv, x = nn.Conv1d(3, 4, 1), torch.randn(1, 50, 3)
    model = Function(lambda x: conv(pad(x.transpose(1, 2))).transpose(1, 2))
    exported = compiled(tg.export_c(model, x, tmp_path))
    with torch.no_grad():
        assert error(exported.process(x[0]), model(x)[0]) < TOLERANCE


@pytest.mark.parametrize("function", [lambda x: x, lambda x: x + 1e-50, lambda x: x * 3.4028234e38, lambda x: 0.0 * x])
def test_small_models_and_constants_at_the_limits_of_float32(tmp_path: Path, function: Any) -> None:
    x = torch.rand(1, 50, 4)
    exported = compiled(tg.export_c(Function(function), x, tmp_path))
    assert torch.equal(exported.process(x[0]), function(x)[0])


# What is written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    x = torch.randn(1, 100, 3)
    stack = nn.Sequential(Recurrent(nn.LSTM(3, 21, 2, batch_first=True)), nn.LayerNorm(21), nn.Linear(21, 3), nn.GELU())
    return tg.export_c(stack, x, tmp_path_factory.mktemp("written"))


def test_the_files(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_the_same_bytes_every_time(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 100, 3)
    stack = nn.Sequential(Recurrent(nn.LSTM(3, 21, 2, batch_first=True)), nn.LayerNorm(21), nn.Linear(21, 3), nn.GELU())
    again = tg.export_c(stack, x, tmp_path)
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in FILES)


@pytest.mark.parametrize("flags", [["-O3", "-march=native"], ["-O3", "-mavx2", "-mfma"], ["-O3"], ["-Os", "-DPLAIN_C"]])
@pytest.mark.parametrize(
    "compiler",
    [["gcc", "-std=c99"], ["g++", "-x", "c++"], pytest.param(["clang", "-std=c99"], marks=needs_clang)],
    ids=lambda words: words[0],
)
def test_it_compiles_without_a_warning_and_its_test_passes(
    folder: Path, tmp_path: Path, compiler: list[str], flags: list[str]
) -> None:
    skip_what_cannot_run(flags)
    program = tmp_path / "test"
    run(*compiler, *WARNINGS, *flags, folder / "model.c", folder / "model_test.c", "-o", program)
    assert "largest difference" in run(program)


def _numbers_of(text: str) -> list[re.Match[str]]:
    """The constants of a model's arrays."""
    start = text.index("ALIGNED float weights[")
    return list(re.finditer(r"-?\d[-+.e\d]*f(?=[,\n])", text[start:]))


@pytest.mark.parametrize("fault", ["a weight", "NaN first", "NaN last"])
def test_its_test_finds_a_broken_model(folder: Path, tmp_path: Path, fault: str) -> None:
    text = (folder / "model.c").read_text()
    if fault == "a weight":
        start = text.index("ALIGNED float weights[")
        first = _numbers_of(text)[100]
        broken = text[: start + first.start()] + f"({first[0]} + 0.01f)" + text[start + first.end() :]
    else:
        at = 0 if fault == "NaN first" else 99
        call = "model_step(state, x, y);"
        assert call in text
        broken = text.replace(call, f"{call} if (t == {at}) y[1] = 0.0f / (float)(t - {at});")
    (tmp_path / "broken.c").write_text(broken)
    program = tmp_path / "test"
    run("gcc", "-std=c99", "-O1", f"-I{folder}", tmp_path / "broken.c", folder / "model_test.c", "-o", program)
    assert subprocess.run([str(program)], capture_output=True).returncode == 1


class Unstable(nn.Module):
    """Roundings grow step by step."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first
        self.rec = nn.RNN(1, 4, nonlinearity="relu", bias=False, batch_first=True)
        with torch.no_grad():
            self.rec.weight_hh_l0.copy_(0.2 * torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.rec(x)[0]
        small = torch.where(h.abs() < 1e9, h - h.roll(1, -1), h)
        return (1 + self.first * small) - 1


def test_what_magnifies_roundings_is_no_test(tmp_path: Path) -> None:
    """The self-test's tolerance does not grow with them without an end."""
    torch.manual_seed(0)
    with pytest.raises(tg.ConversionError, match=r"model: its first output in float32 is .* it magnifies roundings"):
        tg.export_c(Unstable(1e-5), torch.randn(1, 50, 1), tmp_path / "out")
    folder = tg.export_c(Unstable(1e-1), torch.randn(1, 50, 1), tmp_path / "out")
    (tolerance,) = re.findall(r"#define TOLERANCE (\S+)f ", (folder / "model_test.c").read_text())
    assert 1e-5 <= float(tolerance) <= 1e-4


def test_chaos_is_compared_as_far_as_pytorch_tells(tmp_path: Path) -> None:
    """Random weights this large forget nothing: after some steps float32 is another sequence than float64."""
    torch.manual_seed(0)
    layer = nn.RNN(8, 32, batch_first=True)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.randn(32, 32) / 2)
    model = nn.Sequential(nn.Linear(3, 8), Recurrent(layer))
    folder = tg.export_c(model, torch.randn(1, 200, 3), tmp_path / "out")
    (steps,) = re.findall(r"#define STEPS (\d+)", (folder / "model_test.c").read_text())
    assert 10 < int(steps) < 200
    program = tmp_path / "test"
    run("gcc", "-std=c99", "-O1", folder / "model.c", folder / "model_test.c", "-o", program)
    run(program)


def test_cmake_builds_it(folder: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    run("cmake", "-S", folder, "-B", tmp_path)
    run("cmake", "--build", tmp_path)
    run("ctest", "--test-dir", tmp_path)


@pytest.mark.parametrize("flags", [["-march=native"], [], ["-DPLAIN_C"]])
def test_under_sanitizers(folder: Path, tmp_path: Path, flags: list[str]) -> None:
    program = tmp_path / "test"
    sanitize = "-fsanitize=address,undefined"
    files = (folder / "model.c", folder / "model_test.c")
    run("gcc", "-std=c99", "-O1", *flags, sanitize, "-fno-sanitize-recover", *files, "-o", program)
    run(program)


@pytest.mark.parametrize("flags", [["-O3", "-march=native"], ["-Os", "-DPLAIN_C"]])
@pytest.mark.parametrize("compiler", ["gcc", pytest.param("clang", marks=needs_clang)])
def test_it_calls_nothing_and_keeps_nothing(folder: Path, tmp_path: Path, compiler: str, flags: list[str]) -> None:
    file = tmp_path / "model.o"
    run(compiler, "-std=c99", *flags, "-c", folder / "model.c", "-o", file)
    kinds = {line.split()[-1]: line.split()[-2] for line in run("nm", file).splitlines()}
    assert {name for name, kind in kinds.items() if kind == "U"} <= {"memcpy", "memset", "memmove"}
    assert {name for name, kind in kinds.items() if kind in "BbDdCc"} == set()
    assert {name for name, kind in kinds.items() if kind == "T"} == {"model_reset", "model_step", "model_process"}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tidegate.cli.app import app

    text = "import torch\ndef build():\n    return torch.nn.GRU(3, 4), torch.zeros(5, 1, 3)\n"
    (tmp_path / "my_export_model.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", "my_export_model:build", "--out", "c", "--name", "amp"])
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in (tmp_path / "c").iterdir())[2:5] == ["amp.c", "amp.h", "amp_test.c"]
    assert "c/amp_test.c" in done.output
    failed = CliRunner().invoke(app, ["export", "my_export_model:nothing", "--out", "d"])
    assert failed.exit_code == 1
    assert "my_export_model has no 'nothing'" in failed.output
