# SPDX-License-Identifier: Apache-2.0
"""What every picture shares: drawn without a display, one look, one colour for each contender."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

TIDEGATE_COLOUR = "#0b7285"
TORCH_COLOUR = "#e8590c"
PEER_COLOURS = {"onnxruntime": "#7048e8", "openvino": "#2b8a3e", "jax": "#495057"}
COMPILED_COLOUR = "#c2255c"
INK = "#212529"

_LOOK: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#868e96",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
}


def look(**changes: Any) -> AbstractContextManager[None]:
    """Draw inside this block. `changes` are matplotlib's names with `_` for `.`, such as `axes_grid=False`."""
    settings: Any = _LOOK | {name.replace("_", "."): value for name, value in changes.items()}
    return matplotlib.rc_context(settings)


def new_figure(width: float, height: float, columns: int = 1, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` axes beside one another, in inches; call inside `look()`.

    `shared`: all have the scales of the first, and only the first names its rows.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, columns, sharex=shared, sharey=shared, squeeze=False)[0])
    return figure, axes


def draw_ratios(
    axes: Axes, ratios: Sequence[float], figures: Sequence[str], names: Sequence[str], others: Iterable[float]
) -> None:
    """Times as fast, a bar in each row from 1 on: what lies left of the line is slower.

    Args:
        figures: beside the bars, a column.
        names: of the rows.
        others: what else the axes must have room for.
    """
    rows = range(len(ratios))
    axes.barh(rows, [ratio - 1 for ratio in ratios], left=1, color=TIDEGATE_COLOUR, height=0.62)
    for row, figure in zip(rows, figures, strict=True):
        # x in shares of the axes.
        place: Any = axes.get_yaxis_transform()
        axes.text(
            1.01, row, figure, transform=place, va="center", fontsize=9, weight="bold", color=TIDEGATE_COLOUR
        )  # fmt: skip
    axes.axvline(1, color=TORCH_COLOUR, linewidth=2)
    axes.set_xscale("log", base=2)
    shown = [*ratios, *others]
    axes.set_xlim(min(0.7, 0.8 * min(shown)), max(2.0, 1.4 * max(shown)))
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(rows, names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(len(ratios) - 0.4, -0.6)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
