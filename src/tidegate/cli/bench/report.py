# SPDX-License-Identifier: Apache-2.0
"""What the bench found: tables for the terminal, JSON for other programs."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tidegate.cli.bench.measure import Result
from tidegate.cli.machine import OPTIONAL_PACKAGES, describe_machine, package_version, usable_cores

MODE_NAMES = {"infer": "inference", "train": "training", "cell": "one step of the cell"}


@dataclass(frozen=True)
class Mean:
    """Geometric means over the shapes of one kind, mode and regime; `over_best_peer` is None where no peer ran."""

    kind: str
    mode: str
    regime: str
    shapes: int
    over_torch: float
    lowest_over_torch: float
    over_best_peer: float | None


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def group_means(results: list[Result]) -> list[Mean]:
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        case = result.case
        groups.setdefault((case.kind, case.mode, case.shape.regime), []).append(result)
    means: list[Mean] = []
    for (kind, mode, regime), members in groups.items():
        ratios = [result.ratio for result in members]
        peers = [over_best_peer(result) for result in members]
        known = [ratio for ratio in peers if ratio is not None]
        means.append(
            Mean(
                kind,
                mode,
                regime,
                len(members),
                geometric_mean(ratios),
                min(ratios),
                geometric_mean(known) if known else None,
            )
        )
    return means


def over_best_peer(result: Result) -> float | None:
    best = result.best_peer
    return result.seconds[best] / result.seconds["tidegate"] if best is not None else None


def print_report(console: Console, results: list[Result], sgemm: float, load: float | None) -> None:
    """A table for each kind and mode, the geometric means, then how to read them."""
    for kind, mode in dict.fromkeys((result.case.kind, result.case.mode) for result in results):
        members = [result for result in results if (result.case.kind, result.case.mode) == (kind, mode)]
        console.print(_case_table(f"{kind.upper()}, {MODE_NAMES[mode]}", members, sgemm))
    console.print(_mean_table(group_means(results)))
    console.print(
        "Times: medians in microseconds per step. Ratios: times as fast as the other, above 1 is faster. sgemm: share "
        f"of torch.mm's rate here, {sgemm / 1e9:.0f} GFLOP/s; a better kernel exceeds it. Peak: rise of "
        "the resident set in a training step, torch.nn then tidegate.",
        style="dim",
        highlight=False,
    )
    if load is not None and load > 0.5:
        console.print(
            f"warning: {load:.1f} other processes were running on {usable_cores()} cores when the bench began: "
            "times are too long, ratios unsteady",
            style="yellow",
            highlight=False,
        )
    for note in (note for result in results for note in result.notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _case_table(title: str, results: list[Result], sgemm: float) -> Table:
    backends = list(dict.fromkeys(result.backend for result in results))
    if len(backends) == 1:
        title += f" (backend: {backends[0]})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    with_peers = any(result.best_peer for result in results)
    with_memory = any(result.peak_bytes for result in results)
    table.add_column("shape", no_wrap=True)
    for name in ("torch.nn", "tidegate", "ratio", *(["best peer"] * with_peers), "sgemm", *(["peak MB"] * with_memory)):
        table.add_column(name, justify="right", no_wrap=name not in ("best peer", "peak MB"))
    if len(backends) > 1:
        table.add_column("backend", no_wrap=True)
    for result in results:
        microseconds = {name: seconds / result.case.shape.steps * 1e6 for name, seconds in result.seconds.items()}
        row = [str(result.case.shape), _short(microseconds["torch.nn"]), _short(microseconds["tidegate"])]
        row.append(_ratio(result.ratio))
        if with_peers:
            against = over_best_peer(result)
            row.append("-" if against is None else f"{result.best_peer} {_ratio(against)}")
        row.append(f"{result.case.flops / result.seconds['tidegate'] / sgemm:.0%}")
        if with_memory:
            row.append(", ".join(f"{peak / 1e6:.1f}" for peak in result.peak_bytes.values()))
        table.add_row(*row, *([result.backend] if len(backends) > 1 else []))
    return table


def _mean_table(means: list[Mean]) -> Table:
    table = Table(
        title="Geometric means (small: B <= 16 and H <= 256)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("kind", "mode", "regime"):
        table.add_column(name)
    for name in ("shapes", "over torch.nn", "lowest", "over best peer"):
        table.add_column(name, justify="right")
    for mean in means:
        against = "-" if mean.over_best_peer is None else _ratio(mean.over_best_peer)
        ratios = (_ratio(mean.over_torch), _ratio(mean.lowest_over_torch), against)
        table.add_row(mean.kind, mean.mode, mean.regime, str(mean.shapes), *ratios)
    return table


def _ratio(value: float) -> str:
    # Two runs of the same code differ by some per cent: nothing is coloured inside that.
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.2f}x[/]"


def _short(microseconds: float) -> str:
    return f"{microseconds:.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def write_json(path: Path, results: list[Result], plan: dict[str, Any], sgemm: float, load: float | None) -> Path:
    """Everything that a figure has to be read with, then every figure. Seconds are of one call."""
    document: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["tidegate", *sys.argv[1:]]),
        "machine": describe_machine(),
        "packages": {package: package_version(package) for package in OPTIONAL_PACKAGES},
        "plan": plan,
        "load_before": load,
        "sgemm_gflops": sgemm / 1e9,
        "geometric_means": [asdict(mean) for mean in group_means(results)],
        "results": [
            {
                **asdict(result),
                "regime": result.case.shape.regime,
                "over_torch": result.ratio,
                "best_peer": result.best_peer,
                "over_best_peer": over_best_peer(result),
                "share_of_sgemm": result.case.flops / result.seconds["tidegate"] / sgemm,
            }
            for result in results
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path
