# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench`: this machine, your shapes, against torch.nn and whatever other runtimes are installed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tidegate.cli.bench.agreement import BenchError
from tidegate.cli.bench.measure import Bench, Result
from tidegate.cli.bench.picture import draw_over_torch
from tidegate.cli.bench.report import print_notes, print_report, print_streams, say_wrote, write_json
from tidegate.cli.bench.shapes import Case, Shape, default_shapes, default_streams
from tidegate.cli.bench.stream_picture import draw_latencies
from tidegate.cli.bench.streams import StreamResult
from tidegate.cli.bench.timing import QUICK, THOROUGH, use_threads
from tidegate.cli.bench.worker import PeerProcess, installed_peers
from tidegate.cli.machine import processor_name, running_processes

__all__ = ["BenchError", "Plan", "run_bench"]


STREAM_STEPS = 100_000  # a hundred of them are above p99.9, so that it does not hang on one
_QUICK_STREAM_STEPS = 3_000
_NO_SLOWER = 0.97  # times as fast as torch.nn: what is below is no noise


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shapes: none for the default ones of each mode.
        dtype: a key of shapes.BYTES.
        steps: of a stream that are timed; None for STREAM_STEPS, of a quick run far fewer.
        threads: None for torch's own choice.
        scan_threads: other numbers of threads at which tidegate is timed, too; streams are not.
        peers: other runtimes as well; a quick run leaves them out, for they take long to start.
    """

    kinds: tuple[str, ...]
    modes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    num_layers: int
    bidirectional: bool
    dtype: str
    steps: int | None
    threads: int | None
    scan_threads: tuple[int, ...]
    quick: bool
    peers: bool

    def cases(self) -> list[Case]:
        """Every kind in every mode on every shape."""
        return [case for kind in self.kinds for mode in self.modes for case in self._cases(kind, mode)]

    @property
    def stream_steps(self) -> int:
        return self.steps or (_QUICK_STREAM_STEPS if self.quick else STREAM_STEPS)

    def _cases(self, kind: str, mode: str) -> list[Case]:
        if mode == "stream" and not self.shapes and self.num_layers == 1:
            streams = default_streams(self.quick)
        elif mode == "stream" and not self.shapes:
            shapes = dict.fromkeys(shape for shape, _ in default_streams(self.quick))
            streams = tuple((shape, self.num_layers) for shape in shapes)
        else:
            streams = tuple((shape, self.num_layers) for shape in self.shapes or default_shapes(mode, self.quick))
        cases = [Case(kind, mode, shape, layers, self.bidirectional, self.dtype) for shape, layers in streams]
        if mode == "cell":  # one step of one layer in one direction, whatever was asked of the sequences
            return [replace(_one_step(case), num_layers=1) for case in cases]
        return [_one_step(case) for case in cases] if mode == "stream" else cases


def _one_step(case: Case) -> Case:
    return replace(case, shape=replace(case.shape, steps=1), bidirectional=False)


def run_bench(plan: Plan, out: Path) -> list[Result | StreamResult]:
    """Measure, print the tables, write bench.json, bench.png and, with streams, stream.png into `out`.

    Returns:
        the cases in which tidegate takes more than 3 % longer than torch.nn.

    Raises:
        BenchError: tidegate's results are not torch.nn's.
    """
    console = Console()
    with use_threads(plan.threads) as threads:
        load = running_processes()
        peers = [PeerProcess(peer) for peer in installed_peers()] if plan.peers and not plan.quick else []
        with Bench(
            QUICK if plan.quick else THOROUGH, threads, peers, "train" in plan.modes, plan.scan_threads
        ) as bench:
            results, streams = _measure_all(bench, plan, console)
            limits = bench.limits
        if results:
            print_report(console, results, limits)
        if streams:
            print_streams(console, streams)
        print_notes(console, [note for result in (*results, *streams) for note in result.notes], load)
        say_wrote(console, write_json(out / "bench.json", results, streams, asdict(plan), limits, load))
    machine = f"{processor_name()}, threads: {threads}, {plan.dtype}"
    if results:
        layers = f"{plan.num_layers} layer{'s' * (plan.num_layers > 1)}"
        directions = "both directions" if plan.bidirectional else "one direction"
        say_wrote(console, draw_over_torch(results, f"{machine}, {layers}, {directions}", out / "bench.png"))
    if streams:
        say_wrote(console, draw_latencies(streams, f"{machine}, up to {plan.stream_steps:,} steps", out / "stream.png"))
    return [result for result in (*results, *streams) if result.ratio < _NO_SLOWER]


def _measure_all(bench: Bench, plan: Plan, console: Console) -> tuple[list[Result], list[StreamResult]]:
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    results: list[Result] = []
    streams: list[StreamResult] = []
    cases = plan.cases()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            if case.mode == "stream":
                streams.append(bench.measure_stream(case, plan.stream_steps, partial(progress.advance, task)))
            else:
                results.append(bench.measure(case))
                progress.advance(task)
        progress.update(task, completed=len(cases), description="done")
    return results, streams
