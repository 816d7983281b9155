# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench --model`: what it finds in a user's model, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import bench, write_module
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import tidegate
from tidegate.cli.bench.agreement import find_difference
from tidegate.cli.bench.model import measure
from tidegate.cli.bench.model.load import Subject
from tidegate.cli.bench.model.measure import Agreement, ModelResult, ModuleResult, measure_model
from tidegate.cli.bench.model.record import describe_call
from tidegate.cli.bench.model.values import floats_in
from tidegate.cli.bench.timing import Effort

PAGE = Path(__file__).parents[1] / "docs" / "faster-models.md"
BRIEF = Effort(rounds=1, slice_seconds=0)


MODELS = """
    import torch
    from torch import nn

    class Mine(nn.GRU):
        def check_input(self, input, batch_sizes):
            pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.GRU(6, 5, batch_first=True)
            self.again = self.first
            self.second = nn.LSTM(5, 4, num_layers=2, bidirectional=True)
            self.cell = nn.LSTMCell(8, 3)
            self.mine = Mine(3, 3)
            self.spare = nn.RNN(2, 2)

        def forward(self, x, scale=1.0):
            y = self.again(self.first(x)[0].repeat(1, 1, 2)[..., :6])[0]
            y = self.second(y.transpose(0, 1))[0]
            state = None
            for step in y:
                state = self.cell(step, state)
            return {"h": state[0] * scale, "mine": self.mine(state[0]), "words": x.long()}

    def build():
        return Model(), torch.randn(2, 7, 6)

    def model_alone():
        return Model()

    def example():
        return {"x": torch.randn(2, 7, 6), "scale": 2.0}

    batch = (torch.randn(3, 9, 6), 0.5)
    instance = nn.Sequential(nn.GRU(6, 5))
"""


def test_it_finds_times_and_compares_every_recurrent_module(here: Path) -> None:
    name = write_module(here, MODELS)
    threads = torch.get_num_threads()
    options = ("--mode", "infer", "--mode", "train", "--quick", "--threads", 1, "--out", here / "out")
    result = bench("--model", f"{name}:build", *options)
    assert result.exit_code == 0, result.output
    for text in ("first, again", "2 x B2 T7 I6 H5", "B2 T7 I5 H4, 2 layers, both directions", "7 x B2 T1 I8 H3"):
        assert text in result.output
    assert "mine: left alone: a subclass of torch.nn.GRU" in result.output
    assert "spare: the example input does not reach it" in result.output
    assert (here / "out/model.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads((here / "out/model.json").read_text())
    assert [entry["mode"] for entry in found["results"]] == ["infer", "train"]
    for entry in found["results"]:
        modules = {module["name"]: module for module in entry["modules"]}
        assert list(modules) == ["first, again", "second", "cell", "mine", "spare"]
        assert [module["calls"] for module in modules.values()] == [2, 1, 7, 1, 0]
        assert [module["swapped"] for module in modules.values()] == [True, True, True, False, True]
        swapped = sum(modules[name]["seconds"]["torch.nn"] for name in ("first, again", "second", "cell"))
        assert entry["swapped_share"]["torch.nn"] == pytest.approx(swapped / entry["seconds"]["torch.nn"])
        assert entry["agrees"]
    compared = [entry["agreement"]["results"] for entry in found["results"]]
    assert compared == [3, 3 + 4 + 16 + 4 + 4]  # h, mine's output and state; then the gradients but the spare's
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("options", [("model_alone", "example"), ("model_alone", "batch"), ("Model", "batch")])
def test_the_example_may_come_from_elsewhere(here: Path, options: tuple[str, str]) -> None:
    name = write_module(here, MODELS)
    result = bench("--model", f"{name}:{options[0]}", "--input", f"{name}:{options[1]}", "--quick", "--out", here)
    assert result.exit_code == 0, result.output
    steps = 7 if options[1] == "example" else 9
    assert f"T{steps} I6 H5" in result.output


WRONG = {
    "no colon": ("--model NAME", "--model: expected module:attribute, such as my_model:build, got 'NAME'"),
    "a file": ("--model NAME.py:build", "--model: expected the name of a module, not of a file: NAME:build"),
    "no module": ("--model no_such_module:build", "--model: there is no module 'no_such_module'"),
    "no submodule": ("--model torch.no_such:build", "--model: there is no module 'torch.no_such'"),
    "no attribute": ("--model NAME:biuld", "--model: NAME has no 'biuld'; it has 'build'"),
    "a number": ("--model NAME:number", "--model: NAME:number is of type int: expected a function without arguments"),
    "arguments": ("--model NAME:needs", "--model: NAME:needs must be callable without arguments: missing a required"),
    "returns": ("--model NAME:number_of", "--model: NAME:number_of returned int: expected a torch.nn.Module"),
    "raises": ("--model NAME:fails", "--model: NAME:fails() raised ZeroDivisionError"),
    "no example": ("--model NAME:alone", "--model: no example input: NAME:alone returned a model alone"),
    "bad example": ("--model NAME:alone --input NAME:words", "--model: NAME:alone raised"),
    "example fails": ("--model NAME:alone --input NAME:fails", "--input: NAME:fails() raised ZeroDivisionError"),
    "no such input": ("--model NAME:alone --input NAME:none", "--input: NAME has no 'none'"),
    "not recurrent": ("--model NAME:linear", "--model: NAME:linear holds no recurrent module"),
    "no tensor": ("--model NAME:silent", "--model: NAME:silent returned no floating-point tensor"),
    "frozen": ("--model NAME:frozen --mode train", "--mode train: no output of NAME:frozen asks for a gradient"),
    "input alone": ("--input NAME:words", "--input: belongs to --model, which is not given"),
    "shape": (
        "--model NAME:build --shape 1,2,3,4 --dtype float64",
        "--model: the model says what runs; leave out",
    ),
    "mode": ("--model NAME:build --mode cell", "--model: the model says what runs; leave out --mode cell"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(here: Path, options: str, message: str) -> None:
    text = """
        import torch
        from torch import nn

        number = 3
        words = ["no", "tensors"]
        def needs(size): return nn.GRU(size, 2)
        def number_of(): return 3
        def fails(): return 1 / 0
        def alone(): return nn.GRU(3, 2)
        def build(): return nn.GRU(3, 2), torch.randn(4, 2, 3)
        def linear(): return nn.Linear(3, 2), torch.randn(2, 3)
        def frozen(): return nn.GRU(3, 2).requires_grad_(False), torch.randn(4, 2, 3)
        class Silent(nn.GRU):
            def forward(self, x): return "nothing"
        def silent(): return Silent(3, 2), torch.randn(4, 2, 3)
    """
    name = write_module(here, text)
    result = bench(*options.replace("NAME", name).split(), "--out", here)
    assert result.exit_code == 2, result.output
    assert f"error: {message.replace('NAME', name)}" in result.stderr
    if "raised" in message:
        assert "Traceback" in result.stderr
    else:
        assert "Traceback" not in result.stderr


def test_an_error_while_importing_shows_the_users_line(here: Path) -> None:
    name = write_module(here, "import no_such_package_of_mine")
    result = bench("--model", f"{name}:build")
    assert result.exit_code == 2
    assert f"error: --model: importing {name} raised ModuleNotFoundError" in result.stderr
    assert f'{name}.py", line 1' in result.stderr


def test_results_that_differ_are_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).add_(0.5)
        return tidegate.accelerate(model)

    monkeypatch.setitem(measure.SIDES, "tidegate", spoil)
    name = write_module(here, MODELS)
    result = bench("--model", f"{name}:build", "--quick", "--out", here)
    assert result.exit_code == 1
    assert "The results do not agree." in result.output
    assert "the accelerated model's results are not the model's" in result.stderr


def test_a_model_that_differs_from_itself_is_judged_by_that() -> None:
    class Counting(nn.GRU):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # beyond any seed
            self.calls += 1
            return x + (self.calls % 2)

    model = nn.Sequential(Counting(3, 3))
    result = measure_model(Subject("counting", model, (torch.zeros(2, 3),), {}), "infer", BRIEF, lambda: None)
    assert result.agreement.own == 1
    assert result.agreement.holds
    assert not Agreement(1, 3.0, own=1.0, allowed=1e-3).holds
    assert not Agreement(1, float("nan"), own=0.0, allowed=1e-3).holds


def test_a_model_that_came_accelerated_is_timed_against_torch_nn() -> None:
    model = tidegate.accelerate(nn.Sequential(nn.GRU(3, 4)))
    own = tidegate.GRU(3, 4)
    result = measure_model(Subject("both", model, (torch.randn(5, 2, 3),), {}), "infer", BRIEF, lambda: None)
    assert (result.modules[0].module, result.modules[0].swapped) == ("torch.nn.GRU", True)
    assert type(model[0]) is tidegate.GRU
    result = measure_model(Subject("own", own, (torch.randn(5, 2, 3),), {}), "infer", BRIEF, lambda: None)
    assert (result.modules[0].swapped, result.modules[0].why, result.share("torch.nn")) == (False, "tidegate's own", 0)


def test_amdahl() -> None:
    def module(swapped: bool, before: float, after: float) -> ModuleResult:
        return ModuleResult("m", "torch.nn.GRU", swapped, "", 1, {}, {"torch.nn": before, "tidegate": after})

    agreement = Agreement(1, 0.0, 0.0, 1e-3)
    modules = [module(True, 6.0, 2.0), module(False, 1.0, 1.0)]
    result = ModelResult("model", "infer", {"torch.nn": 8.0, "tidegate": 4.0}, modules, agreement)
    assert (result.ratio, result.share("torch.nn"), result.share("tidegate"), result.limit) == (2.0, 0.75, 0.5, 4.0)
    too_long = ModelResult("model", "infer", {"torch.nn": 6.0, "tidegate": 2.0}, modules, agreement)
    assert too_long.limit is None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ((nn.GRU(3, 4), torch.randn(5, 2, 3)), "B2 T5 I3 H4"),
        ((nn.GRU(3, 4, batch_first=True), torch.randn(5, 2, 3)), "B5 T2 I3 H4"),
        ((nn.RNN(3, 4), torch.randn(5, 3)), "B1 T5 I3 H4"),
        ((nn.LSTM(3, 4, 2, proj_size=2), torch.randn(5, 2, 3)), "B2 T5 I3 H4, 2 layers, projected to 2"),
        ((nn.GRU(3, 4), pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))), "B2 T5 I3 H4, packed"),
        ((nn.GRUCell(3, 4), torch.randn(3)), "B1 T1 I3 H4"),
        ((nn.GRU(3, 4).double(), torch.randn(5, 2, 3).double()), "B2 T5 I3 H4, float64"),
        ((tidegate.GRU(3, 4), [torch.randn(5, 3), torch.randn(2, 3)]), "B2 in a list I3 H4"),
    ],
)
def test_a_call_is_described_in_the_benchs_letters(call: tuple[nn.Module, Any], text: str) -> None:
    assert describe_call(call[0], (call[1],), {}) == text
    words = {"input": call[1], "lengths": torch.tensor([1]), "resets": None}
    described = describe_call(call[0], (), words)
    assert described == (text.replace(", float64", "") + ", lengths" + ", float64" * ("float64" in text))


def test_floats_are_found_wherever_a_model_puts_them() -> None:
    packed = pack_padded_sequence(torch.ones(5, 2, 3), torch.tensor([5, 2]))
    value = {"a": [torch.ones(1), (torch.ones(2), None)], "b": packed, "c": torch.ones(3).long(), "d": "text"}
    assert [tuple(tensor.shape) for tensor in floats_in(value)] == [(1,), (2,), (7, 3)]


def test_a_difference_is_judged_by_its_dtype() -> None:
    one = [torch.ones(3)]
    assert find_difference(one, [torch.ones(3) + 1e-4], torch.float32) is None
    assert find_difference(one, [torch.ones(3) + 1e-4], torch.float64) is not None
    assert find_difference(one, [torch.ones(3) + 2e-2], torch.bfloat16) is None
    assert find_difference(one, [torch.full((3,), torch.nan)], torch.bfloat16) is not None
    assert find_difference(one, [torch.ones(4)], torch.float32) == "result 0: expected (3,), got (4,)"


def test_the_page_can_be_followed(here: Path) -> None:
    """docs/faster-models.md: its my_model.py, its command, and every line of the table that it shows."""
    page = PAGE.read_text(encoding="utf-8")
    (module,) = re.findall(r"```python\n# my_model.py\n(.*?)```", page, re.DOTALL)
    name = write_module(here, module)
    (command,) = re.findall(r"```\ntidegate bench (--model my_model:.*?)\n```", page)
    result = bench(*command.replace("my_model", name).split(), "--quick")
    assert result.exit_code == 0, result.output
    assert (here / "out/bench/model.png").exists()
    for text in ("B8 T40 I64 H96, 2 layers, both directions", "the whole model", "torch.nn.GRU"):
        assert text in page
        assert text in result.output
