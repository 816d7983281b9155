# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench --model module:attribute`: where the time of a user's own model goes, before and after a swap."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.cli.bench.agreement import BenchError
from tidegate.cli.bench.model.load import ModelError, importing_from_here, load_subject
from tidegate.cli.bench.model.measure import ModelResult, measure_model
from tidegate.cli.bench.model.picture import draw_model
from tidegate.cli.bench.model.report import print_model, write_model_json
from tidegate.cli.bench.report import print_notes, say_wrote
from tidegate.cli.bench.timing import Effort, use_threads
from tidegate.cli.machine import processor_name, running_processes

__all__ = ["ModelError", "ModelPlan", "run_model_bench"]

_THOROUGH = Effort(rounds=9, slice_seconds=0.1)
_QUICK = Effort(rounds=5, slice_seconds=0.02)


@dataclass(frozen=True)
class ModelPlan:
    """What to measure: names as `load.load_subject` takes them; modes "infer" and "train"; None for torch's threads."""

    model: str
    input: str | None
    modes: tuple[str, ...]
    threads: int | None
    quick: bool


def run_model_bench(plan: ModelPlan, out: Path) -> None:
    """Measure, print, write model.json and model.png into `out`.

    Raises:
        ModelError: what the user named cannot be timed.
        BenchError: the accelerated model's results are not the model's; said after everything is written.
    """
    console = Console()
    effort = _QUICK if plan.quick else _THOROUGH
    results: list[ModelResult] = []
    with importing_from_here(), use_threads(plan.threads) as threads:
        load = running_processes()
        subject = load_subject(plan.model, plan.input)
        columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(plan.modes) * effort.rounds)
            for mode in plan.modes:
                progress.update(task, description=f"{plan.model} {mode}")
                results.append(measure_model(subject, mode, effort, lambda: progress.advance(task)))
            progress.update(task, description="done")
        for result in results:
            print_model(console, result)
        print_notes(console, [], load)
        say_wrote(console, write_model_json(out / "model.json", results, asdict(plan), load))
    subtitle = f"{processor_name()}, threads: {threads}"
    say_wrote(console, draw_model(results, subtitle, out / "model.png"))
    if not all(result.agreement.holds for result in results):
        raise BenchError(f"{plan.model}: the accelerated model's results are not the model's")
