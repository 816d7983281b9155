# SPDX-License-Identifier: Apache-2.0
"""The bench's picture of streams: a step's latency, from median to the slowest in a thousand, and the targets."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from tidegate.cli.bench.streams import StreamResult
from tidegate.cli.pictures import INK, PEER_COLOURS, TIDEGATE_COLOUR, TORCH_COLOUR, look, new_figure, save

_COLOURS = {"tidegate": TIDEGATE_COLOUR, "torch.nn": TORCH_COLOUR, **PEER_COLOURS}
_TARGET_SECONDS = 5e-6  # of the smallest stream; of every single session also half of onnxruntime's median


def target(result: StreamResult) -> float | None:
    """Seconds under which a single session's median step should be, or None where none was set."""
    shape = result.case.shape
    if shape.batch != 1:
        return None
    targets = [result.latencies["onnxruntime"].p50 / 2] if "onnxruntime" in result.latencies else []
    if shape.hidden_size <= 64 and result.case.num_layers == 1:
        targets.append(_TARGET_SECONDS)
    return min(targets, default=None)


def draw_latencies(results: list[StreamResult], subtitle: str, path: Path) -> Path:
    kinds = list(dict.fromkeys(result.case.kind for result in results))
    most_rows = max(sum(result.case.kind == kind for result in results) for kind in kinds)
    names = list(dict.fromkeys(name for result in results for name in result.latencies))
    with look(axes_spines_left=False):
        # The streams are the same for every kind, so that one column of names serves all.
        figure, columns = new_figure(max(8.5, 2 + 4.2 * len(kinds)), 2.2 + 0.6 * most_rows, len(kinds), shared=True)
        _scale(columns[0], results)
        for axes, kind in zip(columns, kinds, strict=True):
            _draw_kind(axes, [result for result in results if result.case.kind == kind], names)
            axes.set_title(kind.upper())
        handles = [Line2D([], [], color=_COLOURS[name], marker="o", linewidth=2, label=name) for name in names]
        handles.append(Line2D([], [], color=INK, marker="o", linewidth=2, label="dot p50, bar to p99, tick p99.9"))
        if any(target(result) for result in results):
            label = "target for p50: half of onnxruntime's, 5 µs at H64"
            handles.append(Line2D([], [], color=INK, linestyle=":", label=label))
        columns_of_legend = len(handles) if len(kinds) > 2 else len(kinds) + 1
        figure.legend(handles=handles, loc="outside lower left", ncols=columns_of_legend)
        figure.suptitle(f"Latency of one step of a stream\n{subtitle}", x=0.01, ha="left", fontsize=11)
        return save(figure, path)


def _scale(axes: Axes, results: list[StreamResult]) -> None:
    """A logarithmic scale of seconds, with more marks where a decade or two hold everything."""
    latencies = [latency for result in results for latency in result.latencies.values()]
    decades = max(one.p999 for one in latencies) / min(one.p50 for one in latencies) > 100
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1,) if decades else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(unit="s"))


def _draw_kind(axes: Axes, results: list[StreamResult], names: list[str]) -> None:
    gap = 0.66 / len(names)
    for row, result in enumerate(results):
        for position, name in enumerate(name for name in names if name in result.latencies):
            height = row - 0.33 + gap * (position + 0.5)
            p50, p99, p999 = _percentiles(result, name)
            colour = _COLOURS[name]
            axes.plot([p50, p99], [height, height], color=colour, linewidth=2, marker="o", markevery=[0], markersize=6)
            axes.plot([p99, p999], [height, height], color=colour, linewidth=0.8)
            axes.plot(p999, height, "|", color=colour, markersize=7)
        limit = target(result)
        if limit is not None:
            axes.vlines(limit, row - 0.42, row + 0.42, color=INK, linestyle=":", linewidth=1.6)
    axes.set_yticks(range(len(results)), [result.case.label for result in results], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(len(results) - 0.4, -0.6)


def _percentiles(result: StreamResult, name: str) -> tuple[float, float, float]:
    latency = result.latencies[name]
    return latency.p50, latency.p99, latency.p999
