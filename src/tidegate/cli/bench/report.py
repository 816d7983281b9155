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

from tidegate.cli.bench.limits import Limits
from tidegate.cli.bench.measure import Result
from tidegate.cli.bench.streams import StreamResult
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


def print_report(console: Console, results: list[Result], limits: Limits) -> None:
    """A table for each kind and mode, the geometric means, then how to read them."""
    for kind, mode in dict.fromkeys((result.case.kind, result.case.mode) for result in results):
        members = [result for result in results if (result.case.kind, result.case.mode) == (kind, mode)]
        print_table(console, _case_table(f"{kind.upper()}, {MODE_NAMES[mode]}", members))
    if any(result.seconds_by_threads for result in results):
        print_table(console, _thread_table(results))
    print_table(console, _mean_table(group_means(results)))
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in limits.gemm_flops.items())
    known = {dtype: rate for dtype, rate in limits.fma_flops.items() if rate is not None}
    fmas = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in known.items()) or "not known here"
    reads = [rate / 1e9 for rate in limits.read_bytes.values()]
    console.print(
        "Times: medians in microseconds per step. Ratios: times as fast as the other, above 1 is faster. Of bound: the "
        "share of tidegate's time that the machine needs at least: for the products at torch.mm's rate (gemm, "
        f"{rates}) or for reading the weights step after step at torch.sum's rate over as many bytes (read, "
        f"{min(reads):.0f} to {max(reads):.0f} GB/s), whichever is longer; a better kernel may exceed it. Of FMA: the "
        f"products' share of the multiply-adds that the processor can do ({fmas}). Peak: rise "
        "of the resident set in a training step, torch.nn then tidegate.",
        style="dim",
        highlight=False,
    )


def print_notes(console: Console, notes: list[str], load: float | None) -> None:
    """What makes the figures doubtful, or incomplete."""
    if load is not None and load > 0.5:
        console.print(
            f"warning: {load:.1f} other processes were running on {usable_cores()} cores when the bench began: "
            "times are too long, ratios unsteady",
            style="yellow",
            highlight=False,
        )
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def new_table(title: str) -> Table:
    """As every table of the bench looks: narrow, for the widest has to fit in 80 columns."""
    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )


def print_table(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _case_table(title: str, results: list[Result]) -> Table:
    backends = list(dict.fromkeys(result.backend for result in results))
    if len(backends) == 1:
        title += f" (backend: {backends[0]})"
    table = new_table(title)
    with_peers = any(result.best_peer for result in results)
    with_memory = any(result.peak_bytes for result in results)
    table.add_column("shape", no_wrap=True)
    for name in (
        "torch.nn",
        "tidegate",
        "ratio",
        *(["best peer"] * with_peers),
        "of bound",
        "of FMA",
        *(["peak MB"] * with_memory),
    ):
        table.add_column(name, justify="right", no_wrap=name not in ("best peer", "peak MB"))
    if len(backends) > 1:
        table.add_column("backend", no_wrap=True)
    for result in results:
        microseconds = {name: seconds / result.case.shape.steps * 1e6 for name, seconds in result.seconds.items()}
        row = [str(result.case.shape), _short(microseconds["torch.nn"]), _short(microseconds["tidegate"])]
        row.append(format_ratio(result.ratio))
        if with_peers:
            against = over_best_peer(result)
            row.append("-" if against is None else f"{result.best_peer} {format_ratio(against)}")
        row.append(f"{result.bound.name} {result.bound.share:.0%}")
        row.append("-" if result.fma_share is None else f"{result.fma_share:.0%}")
        if with_memory:
            row.append(", ".join(_short(peak / 1e6) for peak in result.peak_bytes.values()))
        table.add_row(*row, *([result.backend] if len(backends) > 1 else []))
    return table


def _thread_table(results: list[Result]) -> Table:
    table = new_table("tidegate at other numbers of threads, microseconds per step")
    for name in ("kind", "mode", "shape"):
        table.add_column(name, no_wrap=True)
    for threads in results[0].seconds_by_threads:
        table.add_column(str(threads), justify="right", no_wrap=True)
    for result in results:
        case = result.case
        times = [_short(seconds / case.shape.steps * 1e6) for seconds in result.seconds_by_threads.values()]
        table.add_row(case.kind, case.mode, str(case.shape), *times)
    return table


def _mean_table(means: list[Mean]) -> Table:
    table = new_table("Geometric means (small: B <= 16 and H <= 256)")
    for name in ("kind", "mode", "regime"):
        table.add_column(name)
    for name in ("shapes", "over torch.nn", "lowest", "over best peer"):
        table.add_column(name, justify="right")
    for mean in means:
        against = "-" if mean.over_best_peer is None else format_ratio(mean.over_best_peer)
        ratios = (format_ratio(mean.over_torch), format_ratio(mean.lowest_over_torch), against)
        table.add_row(mean.kind, mean.mode, mean.regime, str(mean.shapes), *ratios)
    return table


def format_ratio(value: float) -> str:
    # Two runs of the same code differ by some per cent: nothing is coloured inside that.
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.{1 if value >= 9.995 else 2}f}x[/]"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def print_streams(console: Console, results: list[StreamResult]) -> None:
    """A table for each kind, then how to read them."""
    for kind in dict.fromkeys(result.case.kind for result in results):
        members = [result for result in results if result.case.kind == kind]
        backends = ", ".join(dict.fromkeys(result.backend for result in members))
        table = new_table(f"{kind.upper()}, one step of a stream (backend: {backends})")
        table.add_column("shape", no_wrap=True)
        table.add_column("", no_wrap=True)
        for name in ("p50", "p99", "p99.9", "ratio", "sessions/core"):
            table.add_column(name, justify="right", no_wrap=True)
        for result in members:
            table.add_section()
            for position, (name, latency) in enumerate(result.latencies.items()):
                figures = [_short(seconds * 1e6) for seconds in (latency.p50, latency.p99, latency.p999)]
                ratio = "1" if name == "torch.nn" else format_ratio(result.times_as_fast(name))
                sessions = f"{result.sessions_per_core(name):.0f}"
                table.add_row("" if position else result.case.label, name, *figures, ratio, sessions)
        print_table(console, table)
    steps = sorted({latency.steps for result in results for latency in result.latencies.values()})
    fewer = f" ({steps[0]:,} at least of a contender whose steps are long)" if len(steps) > 1 else ""
    console.print(
        f"Latencies: microseconds of one step with its Python call, percentiles over {steps[-1]:,} steps{fewer}, the "
        f"clock's own {max(result.clock_seconds for result in results) * 1e9:.0f} ns subtracted. Ratio: median "
        "against torch.nn's. Sessions/core: B * 10 ms / p50 / threads: rows that a core can advance by a step in each "
        "10 ms frame if it does nothing else.",
        style="dim",
        highlight=False,
    )


def write_json(
    path: Path,
    results: list[Result],
    streams: list[StreamResult],
    plan: dict[str, Any],
    limits: Limits,
    load: float | None,
) -> Path:
    """Everything that a figure has to be read with, then every figure. Seconds are of one call, or one step."""
    document: dict[str, Any] = {
        **describe_run(load),
        "plan": plan,
        "gemm_gflops": {dtype: rate / 1e9 for dtype, rate in limits.gemm_flops.items()},
        "fma_gflops": {dtype: rate / 1e9 for dtype, rate in limits.fma_flops.items() if rate is not None},
        "read_gigabytes_per_second": {str(size): rate / 1e9 for size, rate in sorted(limits.read_bytes.items())},
        "geometric_means": [asdict(mean) for mean in group_means(results)],
        "results": [
            {
                **asdict(result),
                "regime": result.case.shape.regime,
                "over_torch": result.ratio,
                "best_peer": result.best_peer,
                "over_best_peer": over_best_peer(result),
            }
            for result in results
        ],
        "streams": [
            {
                **asdict(result),
                "over": {name: result.times_as_fast("tidegate", name) for name in result.latencies},
                "sessions_per_core": {name: result.sessions_per_core(name) for name in result.latencies},
            }
            for result in streams
        ],
    }
    return save_json(path, document)


def recorded_command(arguments: list[str]) -> str:
    """The command for someone else to repeat: without --out, a path of this machine that no figure depends on."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return shlex.join(["tidegate", *kept])


def describe_run(load: float | None) -> dict[str, Any]:
    """When, how and where; `load` is how many other processes ran before."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": recorded_command(sys.argv[1:]),
        "machine": describe_machine(),
        "packages": {package: package_version(package) for package in OPTIONAL_PACKAGES},
        "load_before": load,
    }


def say_wrote(console: Console, path: Path) -> None:
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def save_json(path: Path, document: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path
