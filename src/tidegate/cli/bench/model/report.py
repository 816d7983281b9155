# SPDX-License-Identifier: Apache-2.0
"""What was found in a user's model: a table and sentences for the terminal, JSON for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tidegate.cli.bench.model.measure import ModelResult, ModuleResult, describe_shapes
from tidegate.cli.bench.report import describe_run, format_ratio, new_table, print_table, save_json

_MODE_NAMES = {"infer": "inference", "train": "training step: forward and backward, no optimizer"}


def print_model(console: Console, result: ModelResult) -> None:
    """Each recurrent module's share and speed-up, the model's, what is left to gain, and whether results agree."""
    print_table(console, _table(result))
    for line in sentences(result):
        console.print(line, highlight=False, markup=False)
    if not result.agreement.holds:
        console.print("The results do not agree.", style="red")


def _table(result: ModelResult) -> Table:
    table = new_table(f"{result.name}, {_MODE_NAMES[result.mode]}")
    table.add_column("module", overflow="fold")
    table.add_column("runs", overflow="fold")
    for name in ("torch.nn", "share", "tidegate", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for module in result.modules:
        table.add_row(module.name, "\n".join([module.module, *describe_shapes(module)]), *_figures(module, result))
    table.add_section()
    before, after = result.seconds["torch.nn"], result.seconds["tidegate"]
    table.add_row("the whole model", "", format_time(before), "100%", format_time(after), format_ratio(result.ratio))
    return table


def _figures(module: ModuleResult, result: ModelResult) -> list[str]:
    if not module.calls:
        return ["-"] * 4
    before, after = module.seconds["torch.nn"], module.seconds["tidegate"]
    share = f"{before / result.seconds['torch.nn']:.0%}"
    ratio = format_ratio(module.ratio) if module.swapped else "-"
    return [format_time(before), share, format_time(after), ratio]


def sentences(result: ModelResult) -> list[str]:
    """What the table means."""
    lines = [
        f"With tidegate.accelerate the model is {result.ratio:.2f} times as fast. What it swaps took "
        f"{result.share('torch.nn'):.0%} of the model's time and takes {result.share('tidegate'):.0%} of the new one. "
        + (
            f"If it took none at all, the model would be {result.limit:.1f} times as fast: no more can be gained there."
            if result.limit is not None
            else "The rest is too short to measure."
        )
    ]
    agreement = result.agreement
    what = f"tensor{'s' * (agreement.results != 1)} of outputs{' and gradients' * (result.mode == 'train')}"
    lines.append(
        f"Results: {agreement.results} {what}, at most {agreement.difference:.1e} apart "
        f"({agreement.allowed:.0e} allowed), in units of a tensor's largest value where that is above 1."
    )
    if agreement.own > 0:
        lines.append(f"The model itself differs by {agreement.own:.1e} from one call to the next under one seed.")
    for module in result.modules:
        if not module.calls:
            lines.append(f"{module.name}: the example input does not reach it ({module.why})")
        elif not module.swapped:
            lines.append(f"{module.name}: {module.why}")
    return lines


def format_time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def write_model_json(path: Path, results: list[ModelResult], plan: dict[str, Any], load: float | None) -> Path:
    """Seconds are of one call of the model, and of one module's calls in it."""
    document: dict[str, Any] = {
        **describe_run(load),
        "plan": plan,
        "results": [
            {
                **asdict(result),
                "over_torch": result.ratio,
                "swapped_share": {side: result.share(side) for side in result.seconds},
                "amdahl_limit": result.limit,
                "agrees": result.agreement.holds,
            }
            for result in results
        ],
    }
    return save_json(path, document)
