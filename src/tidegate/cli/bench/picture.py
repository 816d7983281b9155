# SPDX-License-Identifier: Apache-2.0
"""The bench's picture: how many times as fast as torch.nn, shape by shape, a column for each kind."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from tidegate.cli.bench.candidates import CONTENDERS
from tidegate.cli.bench.measure import Result
from tidegate.cli.pictures import PEER_COLOURS, TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save


def draw_ratios(results: list[Result], subtitle: str, path: Path) -> Path:
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
    rows = range(len(results))
    # Bars start at 1: what lies left of the line is slower than torch.nn.
    axes.barh(rows, [result.ratio - 1 for result in results], left=1, color=TIDEGATE_COLOUR, height=0.62)
    for row, result in zip(rows, results, strict=True):
        for name, seconds in result.seconds.items():
            if name in PEER_COLOURS:
                axes.plot(result.seconds["torch.nn"] / seconds, row, "D", color=PEER_COLOURS[name], markersize=5)
        axes.text(
            1.01,
            row,
            f"{result.ratio:.2f}x",
            transform=axes.get_yaxis_transform(),  # x in shares of the axes: a column of figures beside the bars
            va="center",
            fontsize=9,
            weight="bold",
            color=TIDEGATE_COLOUR,
        )
    axes.axvline(1, color=TORCH_COLOUR, linewidth=2)
    axes.set_xscale("log", base=2)
    shares = [result.seconds["torch.nn"] / seconds for result in results for seconds in result.seconds.values()]
    axes.set_xlim(min(0.5, 0.8 * min(shares)), max(2.0, 1.4 * max(shares)))
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(rows, [f"{result.case.mode}  {result.case.shape}" for result in results], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(len(results) - 0.4, -0.6)
