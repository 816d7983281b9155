# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench --cell`: what it times, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import torch
from command_line import bench, write_module

from tidegate.cli.bench.agreement import BenchError
from tidegate.cli.bench.cells import CellPlan, contenders, measure
from tidegate.cli.bench.cells.contenders import build_contenders, build_yardstick, loop
from tidegate.cli.bench.cells.load import READY, PlainLSTMCell, load_cell, short_name
from tidegate.cli.bench.cells.measure import CellBench, CellResult
from tidegate.cli.bench.cells.picture import draw_cells
from tidegate.cli.bench.jax_cells import STEPS
from tidegate.cli.bench.model.load import ModelError
from tidegate.cli.bench.shapes import Case, Shape
from tidegate.cli.bench.timing import Effort
from tidegate.nn import known_cells, over_time

pytestmark = needs.compiled_operators

BRIEF = Effort(rounds=1, slice_seconds=0)
SMALL = ("--shape", "2,7,4,6", "--threads", 1)


CELLS = """
    import torch

    class Leaky(torch.nn.Module):
        def __init__(self, input_size, hidden_size):
            super().__init__()
            self.state_size = hidden_size
            self.linear = torch.nn.Linear(input_size + hidden_size, hidden_size)

        def forward(self, x, h):
            return 0.9 * h + 0.1 * torch.tanh(self.linear(torch.cat((x, h), -1)))

    class Branching(Leaky):
        def forward(self, x, h):
            return super().forward(x, h) if h.sum() < 100 else h

    def pair(input_size, hidden_size):
        cell = Leaky(input_size, hidden_size)
        return (lambda x, state: (state[0], (cell(x, state[0]), state[1] + 1))), (hidden_size, 2)

    def stateless(input_size, hidden_size):
        return lambda x, h: torch.tanh(h)

    def breaks(input_size, hidden_size):
        raise RuntimeError("no such size")

    class Failing(Leaky):
        def forward(self, x, h):
            raise RuntimeError("broken step")

    number = lambda input_size, hidden_size: 3
"""


def test_it_times_cells_of_ours_and_of_users(here: Path) -> None:
    name = write_module(here, CELLS)
    options = ("--cell", f"{name}:Leaky", "--cell", "lstm", "--quick", *SMALL, "--out", here / "out")
    result = bench(*options)
    assert result.exit_code == 0, result.output
    for text in (f"{name}:Leaky, inference", "LSTM, training", "B2 T7 I4 H6", "over loop", "over tg.LSTM", "peak MB"):
        assert text in result.output
    assert (here / "out/cell.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((here / "out/cell.json").read_text())
    assert [entry["case"]["mode"] for entry in found["results"]] == ["infer", "train"] * 2
    assert found["machine"]["processor"]
    for entry in found["results"]:
        assert set(entry["seconds"]) == {"loop", "fused", "tg.LSTM"}
        assert entry["over"]["loop"] == pytest.approx(entry["seconds"]["loop"] / entry["seconds"]["fused"])
        assert entry["first_seconds"] > 0
        if entry["peak_bytes"]:
            assert entry["case"]["mode"] == "train"
            assert set(entry["peak_bytes"]) == {"loop", "fused"}
            assert entry["memory"] == pytest.approx(entry["peak_bytes"]["fused"] / max(1, entry["peak_bytes"]["loop"]))


def test_a_function_with_state_sizes_of_its_own(here: Path) -> None:
    name = write_module(here, CELLS)
    result = bench("--cell", f"{name}:pair", "--quick", *SMALL, "--mode", "infer", "--dtype", "float64", "--out", here)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("cell", "code", "text"),
    [
        ("LayerNrmLSTM", 2, "did you mean LayerNormLSTM?"),
        ("Zoneout", 2, "expected module:factory"),
        ("{}:nothing", 2, "has no 'nothing'"),
        ("{}:breaks", 2, "{}:breaks(4, 6) raised RuntimeError: no such size"),
        ("{}:Failing", 2, "a step of {}:Failing raised RuntimeError: broken step"),
        ("{}:number", 2, "returned int: expected a cell"),
        ("{}:stateless", 2, "return (cell, state sizes)"),
        ("{}:Branching", 1, "if h.sum() < 100"),
    ],
)
def test_what_cannot_be_timed_is_refused_with_its_reason(here: Path, cell: str, code: int, text: str) -> None:
    name = write_module(here, CELLS)
    result = bench("--cell", cell.format(name), "--quick", *SMALL, "--out", here)
    assert result.exit_code == code, result.output
    assert text.format(name) in result.output
    assert not (here / "cell.json").exists()


def test_options_that_do_not_go_with_it() -> None:
    result = bench("--cell", "MGU", "--kind", "gru", "--layers", 2, "--mode", "stream")
    assert result.exit_code == 2
    for option in ("--kind", "--layers", "--mode stream"):
        assert option in result.output


def test_names() -> None:
    assert short_name("layernormlstmcell") == short_name("LayerNormLSTM") == "LayerNormLSTM"
    assert short_name("sLSTM") == "SLSTM"
    assert short_name("my.cells:Mine") == "my.cells:Mine"
    with pytest.raises(ModelError, match="one of LSTM, CfC"):
        short_name("")
    plan = CellPlan(("MGU", "lstm"), ("infer", "train"), (), "float32", None, False, True)
    assert [str(case) for case in plan.cases()][:3] == [
        f"MGU infer {shape}" for shape in ("B1 T100 I64 H64", "B8 T100 I64 H64", "B32 T50 I256 H256")
    ]
    assert len(plan.cases()) == 12


@pytest.mark.parametrize("name", [*READY, "LSTM"])
def test_every_ready_cell_can_be_timed(name: str) -> None:
    """And the loop is over_time's."""
    subject = load_cell(name, 2, 3, 8, 8, torch.float64)
    with torch.no_grad():
        found = loop(subject.cell, subject.inputs, subject.state)
        expected, _ = over_time.run(subject.cell, subject.inputs, subject.state, fuse=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    calls = build_contenders(subject, "train", compiled=False)
    for a, b in zip(calls["loop"](), calls["fused"](), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_plain_lstm_is_torchs() -> None:
    plain, theirs = PlainLSTMCell(4, 6), torch.nn.LSTMCell(4, 6)
    theirs.load_state_dict(plain.state_dict())
    x, state = torch.randn(2, 4), (torch.randn(2, 6), torch.randn(2, 6))
    for a, b in zip(plain(x, state), theirs(x, state), strict=True):
        torch.testing.assert_close(a, b)
    subject = load_cell("LSTM", 2, 3, 4, 6, torch.float32)
    assert known_cells.as_sequence(subject.cell) is None
    assert build_yardstick(subject, 6, "infer")()[0].shape == (3, 2, 6)


def test_a_fused_cell_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "fused", lambda *given: loop(*given) + 0.1)
    with CellBench(BRIEF, 1, False, None, False) as bench, pytest.raises(BenchError, match="away from the loop's"):
        bench.measure(Case("MGU", "infer", Shape(2, 3, 4, 4), 1, False), lambda: None, print)


def test_a_compiler_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(cell: Any) -> Any:
        def step(*given: Any) -> Any:
            raise RuntimeError("no compiler\nand more")

        return step

    monkeypatch.setattr(torch, "compile", refuses)
    with CellBench(BRIEF, 1, True, None, False) as bench:
        result = bench.measure(Case("MGU", "infer", Shape(2, 3, 4, 4), 1, False), lambda: None, print)
    assert result.notes == ["MGU infer B2 T3 I4 H4: compiled loop: not timed: RuntimeError: no compiler"]
    assert "compiled loop" not in result.seconds


def test_the_compiled_loop_has_one_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bool] = []

    def compiled(cell: Any) -> Any:
        def step(x: torch.Tensor, state: tuple[torch.Tensor, ...]) -> Any:
            recorded.append(all(leaf.requires_grad for leaf in state))
            return cell(x, state)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    for mode in ("infer", "train"):
        build_contenders(load_cell("LSTM", 2, 5, 4, 6, torch.float32), mode, compiled=True)["compiled loop"]()
    assert recorded == [False] * 5 + [True] * 5


class FakeJax:
    """A peer whose arrays are what the loop gives, or not."""

    def __init__(self, off: float) -> None:
        self.off = off

    def build(self, case: Case, weights: dict[str, Any], input: Any, threads: int) -> list[Any]:
        with_gradients = build_contenders(measure.build_subject(case), case.mode, compiled=False)["loop"]()
        assert list(weights) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        return [np.asarray(array) + self.off for array in (with_gradients[0], *with_gradients[2:])]

    def time_slice(self, seconds: float) -> float:
        return 1.0

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("off", "takes_part"), [(0.0, True), (0.5, False)])
def test_jax_takes_part_if_it_agrees(off: float, takes_part: bool) -> None:
    peer: Any = FakeJax(off)
    with CellBench(BRIEF, 1, False, peer, False) as bench:
        result = bench.measure(Case("LSTM", "train", Shape(2, 3, 4, 5), 1, False), lambda: None, print)
    assert ("jax" in result.seconds) == takes_part
    assert bool(result.notes) != takes_part
    assert set(STEPS) <= {*READY, "LSTM"}


def test_the_picture_has_a_column_for_each_cell(tmp_path: Path) -> None:
    seconds = {"loop": 8e-3, "fused": 1e-3, "compiled loop": 3e-3, "jax": 2e-3, "tg.LSTM": 8e-4}
    results = [
        CellResult(
            Case(kind, mode, Shape(2, 3, 4, 5), 1, False),
            seconds,
            0.2,
            {"loop": 100, "fused": 20} if mode == "train" else {},
        )
        for kind in ("MGU", "LSTM")
        for mode in ("infer", "train")
    ]
    assert draw_cells(results, "here", tmp_path / "cell.png").read_bytes().startswith(b"\x89PNG")
    assert results[0].over("jax") == pytest.approx(2)
    assert results[0].memory is None
    assert results[1].memory == pytest.approx(0.2)
