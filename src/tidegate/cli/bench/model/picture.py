# SPDX-License-Identifier: Apache-2.0
"""A picture of where a model's time goes, before and after: a bar each, cut into recurrent modules and the rest."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from tidegate.cli.bench.model.measure import ModelResult
from tidegate.cli.bench.model.report import format_time
from tidegate.cli.pictures import look, new_figure, save

_REST_COLOUR = "#ced4da"
_MOST_MODULES = 8  # more than this are one colour, "others"


def draw_model(results: list[ModelResult], subtitle: str, path: Path) -> Path:
    with look(axes_spines_left=False, axes_grid=False):
        figure, columns = new_figure(max(7.5, 6.5 * len(results)), 3.6, columns=len(results))
        for axes, result in zip(columns, results, strict=True):
            _draw_mode(axes, result)
            axes.set_title(f"{result.mode}: {result.ratio:.2f}x")
        handles, labels = columns[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=min(5, len(labels)), fontsize=9)
        figure.suptitle(f"{results[0].name}\n{subtitle}", x=0.01, ha="left", fontsize=11)
        return save(figure, path)


def _parts(result: ModelResult) -> list[tuple[str, dict[str, float]]]:
    """Name and seconds on each side, of the longest modules, of the other ones and of the rest of the model."""
    called = sorted((module for module in result.modules if module.calls), key=lambda m: -m.seconds["torch.nn"])
    parts = [(module.name, module.seconds) for module in called[:_MOST_MODULES]]
    if len(called) > _MOST_MODULES:
        others = called[_MOST_MODULES:]
        parts.append(("others", {side: sum(module.seconds[side] for module in others) for side in result.seconds}))
    spent = {side: sum(module.seconds[side] for module in called) for side in result.seconds}
    parts.append(("not recurrent", {side: max(0.0, total - spent[side]) for side, total in result.seconds.items()}))
    return parts


def _draw_mode(axes: Axes, result: ModelResult) -> None:
    sides = list(result.seconds)
    scale = 1e3
    left = dict.fromkeys(sides, 0.0)
    parts = _parts(result)
    colours = [matplotlib.colormaps["viridis"](0.1 + 0.75 * k / max(1, len(parts) - 1)) for k in range(len(parts) - 1)]
    for (name, seconds), colour in zip(parts, [*colours, _REST_COLOUR], strict=True):
        widths = [seconds[side] * scale for side in sides]
        axes.barh(range(len(sides)), widths, left=[left[side] * scale for side in sides], color=colour, label=name)
        for side in sides:
            left[side] += seconds[side]
    longest = max(*left.values(), *result.seconds.values()) * scale
    for row, side in enumerate(sides):
        end = max(left[side], result.seconds[side]) * scale
        axes.text(end + 0.01 * longest, row, format_time(result.seconds[side]), va="center", fontsize=9, weight="bold")
    axes.set_xlim(0, 1.18 * longest)
    axes.set_yticks(range(len(sides)), sides)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(sides) - 0.4, -0.6)
    axes.set_xlabel("milliseconds of one call")
