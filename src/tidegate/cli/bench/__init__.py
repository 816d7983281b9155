# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench`: this machine, your shapes, against torch.nn and whatever other runtimes are installed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tidegate.cli.bench.measure import Bench, BenchError, Result
from tidegate.cli.bench.picture import draw_ratios
from tidegate.cli.bench.report import print_report, write_json
from tidegate.cli.bench.shapes import Case, Shape, default_shapes
from tidegate.cli.bench.timing import QUICK, THOROUGH, sgemm_rate
from tidegate.cli.bench.worker import PeerProcess, installed_peers
from tidegate.cli.machine import processor_name, running_processes

__all__ = ["BenchError", "Plan", "run_bench"]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: none for the default ones of each mode.
        threads: None for torch's own choice.
        peers: other runtimes as well; a quick run leaves them out, for they take long to start.
    """

    kinds: tuple[str, ...]
    modes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    num_layers: int
    bidirectional: bool
    threads: int | None
    quick: bool
    peers: bool

    def cases(self) -> list[Case]:
        """Every kind in every mode on every shape."""
        return [
            self._case(kind, mode, shape)
            for kind in self.kinds
            for mode in self.modes
            for shape in self.shapes or default_shapes(mode, self.quick)
        ]

    def _case(self, kind: str, mode: str, shape: Shape) -> Case:
        if mode == "cell":  # one step of one layer in one direction, whatever was asked of the sequences
            return Case(kind, mode, replace(shape, steps=1), 1, False)
        return Case(kind, mode, shape, self.num_layers, self.bidirectional)


def run_bench(plan: Plan, out: Path) -> None:
    """Measure, print the tables, write bench.json and bench.png into `out`.

    Raises:
        BenchError: tidegate's results are not torch.nn's.
    """
    console = Console()
    with _threads(plan.threads) as threads:
        load = running_processes()
        sgemm = sgemm_rate()
        peers = [PeerProcess(peer) for peer in installed_peers()] if plan.peers and not plan.quick else []
        with Bench(QUICK if plan.quick else THOROUGH, threads, peers, "train" in plan.modes) as bench:
            results = _measure_all(bench, plan.cases(), console)
        print_report(console, results, sgemm, load)
        path = write_json(out / "bench.json", results, asdict(plan), sgemm, load)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    layers = f"{plan.num_layers} layer{'s' * (plan.num_layers > 1)}"
    directions = "both directions" if plan.bidirectional else "one direction"
    subtitle = f"{processor_name()}, threads: {threads}, float32, {layers}, {directions}"
    console.print(f"wrote {draw_ratios(results, subtitle, out / 'bench.png')}", highlight=False, soft_wrap=True)


def _measure_all(bench: Bench, cases: list[Case], console: Console) -> list[Result]:
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    results: list[Result] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            results.append(bench.measure(case))
            progress.advance(task)
        progress.update(task, description="done")
    return results


@contextlib.contextmanager
def _threads(wanted: int | None) -> Generator[int]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
