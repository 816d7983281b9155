# SPDX-License-Identifier: Apache-2.0
"""What `tidegate bench --cell` found: a table for each cell and mode, and JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tidegate.cli.bench.cells.contenders import YARDSTICK
from tidegate.cli.bench.cells.measure import CellResult
from tidegate.cli.bench.report import MODE_NAMES, describe_run, format_ratio, new_table, print_table, save_json

OTHERS = ("loop", "compiled loop", "jax", YARDSTICK)


def print_cells(console: Console, results: list[CellResult]) -> None:
    """A table for each cell and mode, then how to read them."""
    for kind, mode in dict.fromkeys((result.case.kind, result.case.mode) for result in results):
        members = [result for result in results if (result.case.kind, result.case.mode) == (kind, mode)]
        table = new_table(f"{kind}, {MODE_NAMES[mode]}")
        others = [name for name in OTHERS if any(name in result.seconds for result in members)]
        with_memory = any(result.peak_bytes for result in members)
        table.add_column("shape", no_wrap=True)
        for name in ("fused", *(f"over {name.removesuffix(' loop')}" for name in others), *(["peak MB"] * with_memory)):
            table.add_column(name, justify="right")
        for result in members:
            ratios = [result.over(name) for name in others]
            row = [f"{result.seconds['fused'] / result.case.shape.steps * 1e6:.1f}"]
            row += ["-" if ratio is None else format_ratio(ratio) for ratio in ratios]
            if with_memory:
                row.append(", ".join(f"{peak / 1e6:.1f}" for peak in result.peak_bytes.values()))
            table.add_row(str(result.case.shape), *row)
        print_table(console, table)
    slowest = max(result.first_seconds for result in results)
    console.print(
        "fused: the median in microseconds per step. Over: times as fast as the cell in a Python loop, as that loop "
        f"over the torch.compile'd cell, as a jax scan of it, and as {YARDSTICK} of the same sizes, hand-written, "
        "another computation unless the cell is an LSTM. Peak: rise of the resident set in a training step, the loop's "
        f"then fused. A first call, which traces the cell, took at most {slowest:.2f} s.",
        style="dim",
        highlight=False,
    )


def write_cells_json(path: Path, results: list[CellResult], plan: dict[str, Any], load: float | None) -> Path:
    """Seconds are of one call over all steps."""
    document: dict[str, Any] = {
        **describe_run(load),
        "plan": plan,
        "results": [
            {
                **asdict(result),
                "over": {name: result.over(name) for name in OTHERS if name in result.seconds},
                "memory": result.memory,
            }
            for result in results
        ],
    }
    return save_json(path, document)
