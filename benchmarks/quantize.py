# SPDX-License-Identifier: Apache-2.0
"""Microseconds a step of a layer whose input is as wide as its hidden state: weights of int8 and bfloat16 against
float32 and against torch's own dynamically quantized layer, interleaved, one thread.

    PYTHONPATH=src python benchmarks/quantize.py [--isa avx2] [--kinds gru lstm] [--out build/quantize]

A figure is a sequence of 64 steps over 64: a layer's call, which packs float32 weights each time and stored ones once,
and a stream's `steps`, which packs all once. Medians of processor time. `--isa` holds tidegate to an instruction set,
not torch, whose int8 products ask the processor themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STEPS = 64
ROWS = (1, 16)
SIZES = (64, 128, 256, 384)
_COLOURS = {"float32": "#555555", "bfloat16": "#1b9e77", "int8": "#d95f02", "torch, int8": "#7570b3"}


def slice_of(call: Callable[[], object]) -> Callable[[float], float]:
    """Calls for about so many seconds; the processor time of one call, which a crowded machine changes little."""

    def run(seconds: float) -> float:
        calls, start = 0, time.process_time_ns()
        while (passed := time.process_time_ns() - start) < seconds * 1e9:
            call()
            calls += 1
        return passed / 1e9 / calls

    return run


def measure(kind: str, rows: int, size: int) -> dict[str, float]:
    """Microseconds a step, of each contender."""
    import tidegate as tg
    from tidegate.cli.bench.timing import Effort, interleave

    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind.upper())
    layers: dict[str, Any] = {"float32": getattr(tg, kind.upper())(size, size).eval()}
    for weights in ("bfloat16", "int8"):
        layers[weights] = tg.quantize(layers["float32"], weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(theirs(size, size)), {theirs})
    x = torch.randn(STEPS, rows, size)
    calls: dict[str, Any] = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    calls["torch, int8"] = lambda: quantized[0](x)
    streams = {name: layer.stream(batch_size=rows) for name, layer in layers.items()}
    calls |= {f"{name}, stream": lambda stream=stream: stream.steps(x) for name, stream in streams.items()}
    with torch.no_grad():
        found = interleave(
            {name: slice_of(call) for name, call in calls.items()}, Effort(rounds=7, slice_seconds=0.015)
        )
    return {name: seconds * 1e6 / STEPS for name, seconds in found.items()}


def picture(results: dict[str, dict[str, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted({name.split()[0] for name in results})
    figure, axes = pyplot.subplots(len(kinds), len(ROWS), figsize=(9, 3.4 * len(kinds)), squeeze=False)
    for row, kind in zip(axes, kinds, strict=True):
        for ax, rows in zip(row, ROWS, strict=True):
            for place, (name, colour) in enumerate(_COLOURS.items()):
                times = [results[f"{kind} B{rows} H{size}"][name] for size in SIZES]
                bars = [index + (place - 1.5) * 0.2 for index in range(len(SIZES))]
                ax.bar(bars, times, 0.2, color=colour, label=name)
                for at, value in zip(bars, times, strict=True):
                    ax.text(at, value, f"{value:.3g}", ha="center", va="bottom", fontsize=5.5)
            ax.set(yscale="log", title=f"{kind.upper()}, {rows} row{'s' * (rows > 1)}", ylabel="µs a step")
            ax.set_xticks(range(len(SIZES)), [f"H {size}" for size in SIZES])
            ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(_COLOURS), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="")
    parser.add_argument("--kinds", nargs="+", default=["gru", "lstm"], choices=["gru", "lstm"])
    parser.add_argument("--out", type=Path, help="A folder, for quantize.json and quantize.png.")
    given = parser.parse_args()
    if given.isa:
        os.environ["TIDEGATE_CPU_ISA"] = given.isa
    from tidegate.cli.machine import describe_machine

    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for kind in given.kinds:
        for rows in ROWS:
            for size in SIZES:
                found = results[f"{kind} B{rows} H{size}"] = measure(kind, rows, size)
                gains = [found[name] / found["int8"] for name in ("float32", "torch, int8")]
                stream = found["float32, stream"] / found["int8, stream"]
                said = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
                print(f"{kind} B{rows} H{size}: {said}", flush=True)
                print(
                    f"  int8 is {gains[0]:.2f}x float32, {stream:.2f}x in a stream, {gains[1]:.2f}x torch's", flush=True
                )
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        machine = describe_machine()
        (given.out / "quantize.json").write_text(
            json.dumps({"machine": machine, "us a step": results}, indent=1) + "\n"
        )
        isa = machine["instruction set (tidegate)"]
        picture(
            results, f"A layer's step, input as wide as the hidden state; {isa}, one thread", given.out / "quantize.png"
        )


if __name__ == "__main__":
    main()
