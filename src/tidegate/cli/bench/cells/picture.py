# SPDX-License-Identifier: Apache-2.0
"""The picture of `tidegate bench --cell`: times as fast as the cell in a Python loop, a column for each cell."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tidegate.cli.bench.cells.contenders import YARDSTICK
from tidegate.cli.bench.cells.measure import CellResult
from tidegate.cli.pictures import (
    COMPILED_COLOUR,
    INK,
    PEER_COLOURS,
    TIDEGATE_COLOUR,
    TORCH_COLOUR,
    draw_ratios,
    look,
    new_figure,
    save,
)

_MARKS = {
    "compiled loop": ("s", COMPILED_COLOUR, "torch.compile'd cell in the loop"),
    "jax": ("D", PEER_COLOURS["jax"], "jax.lax.scan"),
    YARDSTICK: ("|", INK, f"{YARDSTICK}, hand-written, same sizes"),
}


def draw_cells(results: list[CellResult], subtitle: str, path: Path) -> Path:
    kinds = list(dict.fromkeys(result.case.kind for result in results))
    most_rows = max(sum(result.case.kind == kind for result in results) for kind in kinds)
    with look(axes_spines_left=False):
        figure, columns = new_figure(max(9.5, 5.8 * len(kinds)), 2.3 + 0.36 * most_rows, len(kinds))
        for axes, kind in zip(columns, kinds, strict=True):
            _draw_kind(axes, [result for result in results if result.case.kind == kind])
            axes.set_title(kind)
        handles = [Line2D([], [], color=TIDEGATE_COLOUR, linewidth=7, label="fused")]
        handles += [
            Line2D([], [], color=colour, marker=marker, markersize=7, markeredgewidth=2, linestyle="", label=label)
            for name, (marker, colour, label) in _MARKS.items()
            if any(name in result.seconds for result in results)
        ]
        handles.append(Line2D([], [], color=TORCH_COLOUR, linewidth=2, label="Python loop = 1"))
        figure.legend(handles=handles, loc="outside lower left", ncols=3 if len(kinds) == 1 else len(handles))
        title = "Times as fast as the cell in a Python loop; in training also the peak memory as a share of the loop's"
        figure.suptitle(f"{title}\n{subtitle}", x=0.01, ha="left", fontsize=11)
        return save(figure, path)


def _draw_kind(axes: Axes, results: list[CellResult]) -> None:
    others: list[float] = []
    for row, result in enumerate(results):
        for name, (marker, colour, _) in _MARKS.items():
            if name in result.seconds:
                others.append(result.seconds["loop"] / result.seconds[name])
                mark = axes.plot(others[-1], row, marker, color=colour, markersize=13 if marker == "|" else 7)[0]
                if marker == "|":
                    mark.set_markeredgewidth(2)
                else:  # dark marks would be lost on the bar
                    mark.set_markeredgecolor("white")
    fused = [result.over("loop") or 1.0 for result in results]
    memory = ["" if result.memory is None else f", {result.memory:.0%} memory" for result in results]
    figures = [f"{ratio:.1f}x{share}" for ratio, share in zip(fused, memory, strict=True)]
    draw_ratios(axes, fused, figures, [f"{result.case.mode}  {result.case.shape}" for result in results], others)
