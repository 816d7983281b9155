# SPDX-License-Identifier: Apache-2.0
"""The bench's picture: how many times as fast as torch.nn, shape by shape, a column for each kind."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tidegate.cli.bench.candidates import CONTENDERS
from tidegate.cli.bench.measure import Result
from tidegate.cli.pictures import PEER_COLOURS, TIDEGATE_COLOUR, TORCH_COLOUR, draw_ratios, look, new_figure, save


def draw_over_torch(results: list[Result], subtitle: str, path: Path) -> Path:
    kinds = list(dict.fromkeys(result.case.kind for result in results))
    most_rows = max(sum(result.case.kind == kind for result in results) for kind in kinds)
    with look(axes_spines_left=False):
        figure, columns = new_figure(max(7.5, 5.4 * len(kinds)), 2.2 + 0.3 * most_rows, columns=len(kinds))
        for axes, kind in zip(columns, kinds, strict=True):
            _draw_kind(axes, [result for result in results if result.case.kind == kind])
            axes.set_title(kind.upper())
        peers = sorted({name for result in results for name in result.seconds if name not in CONTENDERS})
        handles = [Line2D([], [], color=TIDEGATE_COLOUR, linewidth=7, label="tidegate")]
        handles += [
            Line2D([], [], color=PEER_COLOURS[name], marker="D", markersize=5, linestyle="", label=name)
            for name in peers
        ]
        handles.append(Line2D([], [], color=TORCH_COLOUR, linewidth=2, label="torch.nn = 1"))
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
        figure.suptitle(f"Times as fast as torch.nn\n{subtitle}", x=0.01, ha="left", fontsize=11)
        return save(figure, path)


def _draw_kind(axes: Axes, results: list[Result]) -> None:
    peers = [
        (row, name, result.seconds["torch.nn"] / seconds)
        for row, result in enumerate(results)
        for name, seconds in result.seconds.items()
        if name in PEER_COLOURS
    ]
    for row, name, ratio in peers:
        axes.plot(ratio, row, "D", color=PEER_COLOURS[name], markersize=5)
    ratios = [result.ratio for result in results]
    names = [f"{result.case.mode}  {result.case.shape}" for result in results]
    draw_ratios(axes, ratios, [f"{ratio:.2f}x" for ratio in ratios], names, [ratio for *_, ratio in peers])
