# SPDX-License-Identifier: Apache-2.0
"""The picture of an inspection: heat maps of units over time, and the gradient's reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tidegate.inspection.result import LayerInspection

_COLUMNS = 5
_WIDTH, _HEIGHT = 3.1, 2.4  # of one picture, in inches
_LEAST = 1e-20  # what is less, 0 too, is not drawn


def draw(layers: Sequence[LayerInspection], row: int) -> Figure:
    """Of each layer its values and, last, the reach, in lines of a few pictures."""
    counts = [len(layer.values) + bool(layer.reach) for layer in layers]
    most = max(counts)
    columns = -(-most // -(-most // _COLUMNS))  # as few lines as there can be, of like lengths
    lines = [-(-count // columns) for count in counts]
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * sum(lines) + 0.3), layout="constrained")
    grid: Any = figure.subplots(sum(lines), columns, squeeze=False)
    for k, layer in enumerate(layers):
        places = list(grid[sum(lines[:k]) : sum(lines[: k + 1])].flat)
        places[0].set_ylabel(f"{layer.name}\nunit")
        for axes, (name, value) in zip(places, layer.values.items(), strict=False):
            _draw_value(figure, axes, name, value[:, row].flatten(1))
        if layer.reach:
            _draw_reach(places[len(layer.values)], layer, row)
        for axes in places[counts[k] :]:
            axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


def _draw_value(figure: Figure, axes: Axes, name: str, value: Tensor) -> None:
    """Units over time, (T, S): a gate from 0, dark, to 1, bright; what has a sign blue to red around 0."""
    known = value[~value.isnan()]
    limit = float(known.abs().max()) if known.numel() else 1.0
    signed = bool((known < 0).any())
    limit = limit if signed else max(limit, 1.0)
    shades: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "viridis", "vmin": 0}
    shades |= {"aspect": "auto", "interpolation": "nearest", "origin": "lower", "vmax": limit}
    image = axes.imshow(value.T.float().cpu().numpy(), **shades)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(name, fontsize=11, fontweight="bold", loc="left")
    figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)


def _draw_reach(axes: Axes, layer: LayerInspection, row: int) -> None:
    for name, norms in layer.reach.items():
        steps = torch.arange(len(norms))
        drawn = norms[:, row].masked_fill(norms[:, row] < _LEAST, torch.nan).float()
        axes.plot(steps.numpy(), drawn.cpu().numpy(), label=f"dh_T/d{name}_t")
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(layer.valid) - 0.5)
    axes.set_title("reach", fontsize=11, fontweight="bold", loc="left")
    axes.grid(True, color="#e9ecef")
    axes.legend(frameon=False, fontsize=8)
