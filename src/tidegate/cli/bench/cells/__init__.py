# SPDX-License-Identifier: Apache-2.0
"""`tidegate bench --cell NAME`: any cell over a sequence, fused, against how it is run without tidegate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.cli.bench.cells.load import short_name
from tidegate.cli.bench.cells.measure import CellBench
from tidegate.cli.bench.cells.picture import draw_cells
from tidegate.cli.bench.cells.report import print_cells, write_cells_json
from tidegate.cli.bench.model.load import importing_from_here
from tidegate.cli.bench.report import print_notes, say_wrote
from tidegate.cli.bench.shapes import Case, Shape
from tidegate.cli.bench.timing import QUICK, THOROUGH, use_threads
from tidegate.cli.bench.worker import PeerProcess, installed_peers
from tidegate.cli.machine import processor_name, running_processes

__all__ = ["CellPlan", "run_cell_bench"]

_SHAPES = (Shape(1, 100, 64, 64), Shape(8, 100, 64, 64), Shape(32, 50, 256, 256))
_QUICK_SHAPES = (Shape(1, 50, 64, 64), Shape(32, 20, 128, 128))


@dataclass(frozen=True)
class CellPlan:
    """What to measure.

    Attributes:
        cells: names, as `load.short_name` takes them.
        modes: "infer" and "train".
        shapes: none for the default ones.
        threads: None for torch's own choice.
        peers: torch.compile'd cells and jax as well; a quick run leaves them out, for they take long to start.
    """

    cells: tuple[str, ...]
    modes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: str
    threads: int | None
    quick: bool
    peers: bool

    def cases(self) -> list[Case]:
        """Every cell in every mode on every shape.

        Raises:
            ModelError: there is no such cell.
        """
        shapes = self.shapes or (_QUICK_SHAPES if self.quick else _SHAPES)
        names = [short_name(name) for name in self.cells]
        return [
            Case(name, mode, shape, 1, False, self.dtype) for name in names for mode in self.modes for shape in shapes
        ]


def run_cell_bench(plan: CellPlan, out: Path) -> None:
    """Measure, print the tables, write cell.json and cell.png into `out`.

    Raises:
        ModelError: a cell cannot be found or built.
        BenchError: one runs step by step, or its fused results are not the loop's.
    """
    console = Console()
    effort = QUICK if plan.quick else THOROUGH
    with importing_from_here(), use_threads(plan.threads) as threads:
        cases = plan.cases()
        load = running_processes()
        with_peers = plan.peers and not plan.quick
        jax = next((PeerProcess(peer) for peer in installed_peers() if with_peers and peer.name == "jax"), None)
        columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
        with (
            CellBench(effort, threads, with_peers, jax, "train" in plan.modes) as bench,
            Progress(*columns, console=console) as progress,
        ):
            task = progress.add_task("", total=len(cases) * effort.rounds)

            def say(doing: str) -> None:
                progress.update(task, description=doing)

            results = [bench.measure(case, partial(progress.advance, task), say) for case in cases]
            progress.update(task, description="done")
        print_cells(console, results)
        print_notes(console, [note for result in results for note in result.notes], load)
        say_wrote(console, write_cells_json(out / "cell.json", results, asdict(plan), load))
    subtitle = f"{processor_name()}, threads: {threads}, {plan.dtype}"
    say_wrote(console, draw_cells(results, subtitle, out / "cell.png"))
