# SPDX-License-Identifier: Apache-2.0
"""What every picture shares: drawn without a display, one look, one colour for each contender."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
