# SPDX-License-Identifier: Apache-2.0
"""`tidegate demo`: the same classifier with torch.nn and with tidegate, on real sequences of different lengths."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import tidegate
from tidegate.cli.demo.pictures import draw_confusion, draw_curves
from tidegate.cli.demo.report import write_report
from tidegate.cli.demo.training import Run, new_runs, standardised, train_side_by_side
from tidegate.data import Dataset

HEADS = ("", "torch.nn\nPackedSequence", "tidegate\nlengths=", "")


def run_demo(
    dataset: Dataset, *, kind: str, hidden_size: int, epochs: int, seed: int, out: Path, report: Path | None = None
) -> None:
    """Train both, print the table, write curves.png and confusion.png into `out`, and all of it as a page, `report`."""
    console = Console()
    lengths = torch.cat([dataset.train.lengths, dataset.test.lengths])
    console.print(
        f"[bold]{dataset.name}[/]: {len(dataset.train)} training and {len(dataset.test)} test sequences, "
        f"{dataset.num_channels} channels, {int(lengths.min())} to {int(lengths.max())} steps, "
        f"{len(dataset.classes)} classes",
        highlight=False,
    )
    dataset = standardised(dataset)
    runs = new_runs(dataset, kind, hidden_size, seed)
    _train(runs, dataset, epochs, console)

    rows = _results(runs, dataset)
    console.print(_table(rows))
    title = f"{dataset.name}: bidirectional {kind.upper()}, hidden size {hidden_size}, {epochs} epochs, seed {seed}"
    predictions = runs[1].predict(dataset.test)
    accuracy = f"tidegate, test set: {runs[1].accuracies[-1]:.1%} right"
    pictures = (
        draw_curves(runs, title, out / "curves.png"),
        draw_confusion(dataset.test.labels, predictions, dataset.classes, accuracy, out / "confusion.png"),
    )
    for picture in pictures:
        console.print(f"wrote {picture}", highlight=False, soft_wrap=True)
    if report is not None:
        write_report(report, title, (HEADS, *rows), pictures, runs[1], dataset)
        console.print(f"wrote {report}", highlight=False, soft_wrap=True)


def _train(runs: tuple[Run, Run], dataset: Dataset, epochs: int, console: Console) -> None:
    columns = (
        TextColumn("training both, epoch by epoch in turn"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs, loss=float("nan"))
        train_side_by_side(runs, dataset, epochs, lambda: progress.update(task, advance=1, loss=runs[1].losses[-1]))


def _table(rows: list[tuple[str, ...]]) -> Table:
    table = Table(*HEADS, title="Side by side", title_justify="left")
    for column in table.columns[1:3]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _results(runs: tuple[Run, Run], dataset: Dataset) -> list[tuple[str, ...]]:
    """What both reached, a row a figure: its name, torch.nn's, tidegate's, and what to say of it."""
    right = [round(run.accuracies[-1] * len(dataset.test)) for run in runs]
    apart = max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    times = [median(run.seconds) for run in runs]
    layer = runs[1].model.layer
    explanation = tidegate.explain(layer, dataset.train.padded, lengths=dataset.train.lengths)
    return [
        ("test accuracy", *(f"{run.accuracies[-1]:.1%}" for run in runs),
         f"{right[0]} and {right[1]} of {len(dataset.test)}"),
        ("training loss", *(f"{run.losses[-1]:.2e}" for run in runs), f"curves {apart:.0e} apart"),
        ("time per epoch", *(f"{seconds * 1e3:.1f} ms" for seconds in times), f"{times[0] / times[1]:.2f}x (medians)"),
        ("backend", "torch", explanation.backend, ""),
    ]  # fmt: skip
