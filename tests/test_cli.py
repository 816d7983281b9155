# SPDX-License-Identifier: Apache-2.0
"""The command line, run as a user runs it: what it prints, writes and refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from tidegate import backends, cli
from tidegate.cli.bench import measure
from tidegate.cli.bench.onnx_models import onnx_model
from tidegate.cli.bench.report import geometric_mean
from tidegate.cli.bench.shapes import Case, Shape, default_shapes, parse_shape
from tidegate.cli.bench.timing import Effort, interleave
from tidegate.data.csv_file import DataFileError, read_csv

HEADER = "sequence,step,label,left,right"
GOOD = "\n".join(
    [HEADER]
    + [
        f"{label}{index},{step},{label},{step + index},{-step if label == 'a' else step}"
        for label in "ab"
        for index in range(5)
        for step in range(2 + index)
    ]
)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_demo_trains_both_and_draws_pictures(tmp_path: Path, kind: str) -> None:
    page = tmp_path / "new" / "page.html"
    result = run("demo", "--model", kind, "--hidden", 8, "--epochs", 3, "--out", tmp_path, "--report", page)
    assert result.exit_code == 0, result.output
    assert "270 training and 370 test sequences, 12 channels, 7 to 29 steps, 9 classes" in result.output
    for row in ("test accuracy", "training loss", "time per epoch", "backend"):
        assert row in result.output
    assert is_picture(tmp_path / "curves.png")
    assert is_picture(tmp_path / "confusion.png")
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == text.count("<img") == 3
    assert "http" not in text, "nothing is fetched"
    assert f"{kind}, layer 0, reverse" in text or f"{kind}, reverse" in text


def test_demo_learns_the_users_own_sequences(tmp_path: Path) -> None:
    data = tmp_path / "gestures.csv"
    data.write_text(GOOD)
    result = run("demo", "--data", data, "--hidden", 4, "--epochs", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "gestures: 6 training and 4 test sequences, 2 channels, 2 to 6 steps, 2 classes" in result.output


def edited(line: int, text: str) -> str:
    """GOOD with one line replaced; the header is line 1."""
    lines = GOOD.split("\n")
    lines[line - 1] = text
    return "\n".join(lines)


BAD_FILES = {
    "empty": ("", "line 1: expected a header, got an empty line or file"),
    "no header": (GOOD.partition("\n")[2], "line 1, column 1: expected the header 'sequence', got 'a0'"),
    "short header": ("sequence,step", "line 1, column 3: expected the header 'label', got 'nothing'"),
    "no channels": ("sequence,step,label\na,0,x", "line 1: expected at least one channel"),
    "same channel twice": (edited(1, "sequence,step,label,left,left"), "line 1: column 'left' appears more than once"),
    "columns missing": (edited(3, "a0,1,a,2"), "line 3: expected 5 columns as in the header, got 4"),
    "no sequence": (edited(3, ",1,a,1,1"), "line 3, column 'sequence': empty"),
    "no label": (edited(3, "a0,1,,1,1"), "line 3, column 'label': empty"),
    "step not whole": (edited(3, "a0,1.5,a,1,1"), "line 3, column 'step': expected a whole number, got '1.5'"),
    "not a number": (edited(3, "a0,1,a,1,loud"), "line 3, column 'right': expected a number, got 'loud'"),
    "nothing": (edited(3, "a0,1,a,,1"), "line 3, column 'left': expected a number, got ''"),
    "nan": (edited(3, "a0,1,a,nan,1"), "line 3, column 'left': expected a finite number within float32, got 'nan'"),
    "infinite": (
        edited(3, "a0,1,a,1,-inf"),
        "line 3, column 'right': expected a finite number within float32, got '-inf'",
    ),
    "beyond float32": (
        edited(3, "a0,1,a,1,1e39"),
        "line 3, column 'right': expected a finite number within float32, got '1e39'",
    ),
    "step twice": (edited(3, "a0,0,a,1,1"), "line 3, column 'step': sequence 'a0' has step 0 already, on line 2"),
    "step missing": (edited(6, "a1,4,a,1,1"), "line 6, column 'step': sequence 'a1' has step 4 but not step 3"),
    "starts late": (f"{HEADER}\na,2,x,1,1", "line 2, column 'step': sequence 'a' starts at step 2, expected 0 or 1"),
    "label changes": (
        edited(3, "a0,1,b,1,1"),
        "line 3, column 'label': sequence 'a0' has label 'a' on line 2, got 'b'",
    ),
    "one label": (f"{HEADER}\na,0,x,1,1\nb,0,x,1,1", "column 'label': expected at least two labels, got 'x'"),
    "header alone": (HEADER, "column 'label': expected at least two labels, got no rows"),
    "one sequence of a label": (f"{GOOD}\nc,0,c,1,1", "line 42, column 'label': label 'c' has 1 sequence"),
    "open quote": (f'{GOOD}\n"c,0,c,1,1', "not a CSV file"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_demo_refuses_a_bad_file_naming_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    data = tmp_path / "bad.csv"
    data.write_text(text)
    result = run("demo", "--data", data, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"error: --data: {data}" in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    data = tmp_path / "bad.csv"
    data.write_text(f"{HEADER}\na,0,x,one,two\na,x,x,1,nan")
    with pytest.raises(DataFileError) as error:
        read_csv(data)
    assert str(error.value).count("\n  line") == 4


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "bad.csv"
    data.write_bytes(GOOD.encode() + b"\xff")
    result = run("demo", "--data", data)
    assert result.exit_code == 2
    assert "expected text in UTF-8" in result.stderr
    assert run("demo", "--data", tmp_path / "none.csv").exit_code == 2


def test_the_split_is_stratified_seeded_and_loses_nothing(tmp_path: Path) -> None:
    data = tmp_path / "good.csv"
    data.write_text("\ufeff" + GOOD)  # as spreadsheet programs write it
    first, again, other = read_csv(data, seed=0), read_csv(data, seed=0), read_csv(data, seed=1)
    assert first.classes == ("a", "b")
    assert torch.bincount(first.train.labels).tolist() == [3, 3]
    assert torch.bincount(first.test.labels).tolist() == [2, 2]
    assert sorted([*first.train.lengths.tolist(), *first.test.lengths.tolist()]) == sorted([2, 3, 4, 5, 6] * 2)
    assert torch.equal(first.test.padded, again.test.padded)
    assert not torch.equal(first.test.lengths, other.test.lengths)


def test_rows_of_a_csv_file_may_come_in_any_order(tmp_path: Path) -> None:
    data = tmp_path / "good.csv"
    data.write_text(GOOD)
    expected = read_csv(data)
    header, *rows = GOOD.split("\n")
    by_sequence = sorted(rows, key=lambda row: (row.split(",")[0], -int(row.split(",")[1])))
    data.write_text("\n".join([header, *by_sequence]))
    found = read_csv(data)
    assert torch.equal(found.train.padded, expected.train.padded)
    assert torch.equal(found.test.padded, expected.test.padded)


def test_bench_writes_table_json_and_picture(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    scan = ("--scan-threads", 1, "--scan-threads", 3)
    result = run("bench", "--quick", "--kind", "gru", "--shape", "2,3,4,5", "--threads", 1, *scan, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for title in ("GRU, inference", "GRU, training", "GRU, one step of the cell", "other numbers", "Geometric means"):
        assert title in result.output
    assert is_picture(tmp_path / "bench.png")
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["threads"] == 1
    assert found["machine"]["torch"] == torch.__version__
    assert [entry["case"]["mode"] for entry in found["results"]] == ["infer", "train", "cell"]
    for entry in found["results"]:
        assert set(entry["seconds"]) == {"torch.nn", "tidegate"}
        assert min(entry["seconds"].values()) > 0
        assert list(entry["seconds_by_threads"]) == ["1", "3"]
        assert min(entry["seconds_by_threads"].values()) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("by_sign", [False, True], ids=["--out FOLDER", "--out=FOLDER"])
def test_bench_keeps_the_output_folder_out_of_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_sign: bool
) -> None:
    options = ["--mode", "infer", "--kind", "rnn", "--shape", "2,3,4,5"]
    out = [f"--out={tmp_path}"] if by_sign else ["--out", str(tmp_path)]
    arguments = ["bench", *options, *out, "--quick"]
    monkeypatch.setattr(sys, "argv", ["anywhere/tidegate", *arguments])
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "bench.json").read_text()
    assert json.loads(text)["command"] == "tidegate bench --mode infer --kind rnn --shape 2,3,4,5 --quick"
    assert str(tmp_path) not in text


def test_bench_runs_layers_in_both_directions(tmp_path: Path) -> None:
    options = ("--kind", "lstm", "--mode", "infer", "--layers", 2, "--bidirectional", "--no-peers")
    result = run("bench", "--quick", *options, "--shape", "2,3,4,5", "--out", tmp_path)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,0", "1,2,3,-4", "1,2,3,x", "1.5,2,3,4"])
def test_bench_refuses_a_shape_that_is_none(text: str) -> None:
    result = run("bench", "--shape", text)
    assert result.exit_code == 2
    assert "--shape: expected B,T,I,H" in result.stderr


@pytest.mark.parametrize(("slower", "code"), [(1.0, 0), (1.02, 0), (1.5, 1)])
def test_bench_check_fails_where_torch_nn_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, code: int
) -> None:
    monkeypatch.setattr(measure, "interleave", lambda runs, *_: dict.fromkeys(runs, 1.0) | {"tidegate": slower})
    options = ["--kind", "rnn", "--mode", "infer", "--shape", "2,3,4,5", "--out", tmp_path]
    result = run("bench", "--quick", "--check", *options)
    assert result.exit_code == code
    told = "slower than torch.nn by more than 3 %:\n  rnn infer B2 T3 I4 H5: 0.67x of torch.nn"
    assert (told in result.output) == bool(code)


def test_bench_refuses_to_time_wrong_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = measure.build_call

    def build_call(module: torch.nn.Module, case: Case) -> Any:
        call = honest(module, case)
        return call if type(module) is torch.nn.GRU else lambda: [result + 0.01 for result in call()]

    monkeypatch.setattr(measure, "build_call", build_call)
    result = run("bench", "--quick", "--kind", "gru", "--mode", "infer", "--shape", "2,3,4,5", "--out", tmp_path)
    assert result.exit_code == 1
    assert "gru infer B2 T3 I4 H5: tidegate: result 0 is 1.0e-02 away from torch.nn's" in result.stderr


def test_shapes_know_their_regime_and_cost() -> None:
    assert parse_shape("16, 100, 64, 256") == Shape(16, 100, 64, 256)
    assert [Shape(*sizes).regime for sizes in ((16, 1, 1, 256), (17, 1, 1, 256), (16, 1, 1, 257))] == [
        "small",
        "large",
        "large",
    ]
    shape = Shape(2, 3, 4, 5)
    assert Case("gru", "infer", shape, 1, False).flops == 2 * (2 * 3) * 15 * (4 + 5)
    assert Case("rnn", "infer", shape, 2, True).flops == 2 * (2 * 3) * (2 * 5) * ((4 + 5) + (10 + 5))
    assert Case("lstm", "train", shape, 1, False).flops == 3 * 2 * (2 * 3) * 20 * (4 + 5)
    assert all(shape.steps == 1 for shape in default_shapes("cell", quick=False))


def test_timing_takes_turns_and_reports_the_median() -> None:
    asked: list[str] = []

    def time_slice(name: str, seconds: list[float]) -> Any:
        samples = iter(seconds)
        return lambda _: (asked.append(name), next(samples))[1]

    slices = {"a": time_slice("a", [9, 1, 2, 30]), "b": time_slice("b", [9, 4, 5, 6])}
    assert interleave(slices, Effort(rounds=3, slice_seconds=0)) == {"a": 2, "b": 5}
    assert "".join(asked) == "ab" + "ab" + "ba" + "ab"
    assert geometric_mean([1, 4]) == pytest.approx(2)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_the_onnx_model_given_to_peers_is_torchs(kind: str, bidirectional: bool) -> None:
    pytest.importorskip("onnx")
    onnx_reference = pytest.importorskip("onnx.reference")
    case = Case(kind, "infer", Shape(2, 3, 4, 5), 2, bidirectional)
    module = measure.build_module("torch.nn", case)
    weights = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    x = measure.build_input(case)
    model = onnx_reference.ReferenceEvaluator(
        importlib.import_module("onnx").load_from_string(onnx_model(case, weights))
    )
    (output,) = model.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), module(x)[0].detach())


def test_doctor_lists_versions_and_every_backend() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    for backend in backends.BACKENDS:
        assert backend.name in result.output
        for reason in backend.availability():
            assert reason in result.output


def test_doctor_answers_where_no_package_of_the_command_line_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda package: None)
    monkeypatch.setattr(sys, "argv", ["tidegate", "doctor"])
    cli.main()
    said = capsys.readouterr().out
    assert "\n  instruction set (tidegate)  " in said
    assert "\n  reference  yes\n" in said


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cli, "find_spec", lambda package: None if package == "typer" else importlib.util.find_spec(package)
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == "tidegate's command line needs typer: pip install 'tidegate[cli]'"


def test_without_a_command_the_help_is_shown() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "bench", "doctor"):
        assert command in result.output
