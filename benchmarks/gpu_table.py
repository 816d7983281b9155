# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.py times: every kernel against torch.nn (cuDNN), interleaved, by CUDA events, medians.

Both sides are the modules that a user calls, with all that this costs on the host; both are warm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tidegate as tg
from tidegate.kernels.triton import launch, plan

SEQUENCE = ("held", "resident", "streamed", "persistent")


@dataclass(frozen=True)
class Shape:
    """One line of the table, and what is to be reached over torch.nn: forward, and forward and backward."""

    cell: str
    dtype: str  # "tf32": float32 with products in tf32, on both sides
    batch: int
    hidden_size: int
    targets: tuple[float, float] = (1.0, 1.0)
    steps: int = 256
    layers: int = 1

    @property
    def name(self) -> str:
        name = f"{self.cell} {self.dtype} B{self.batch} H{self.hidden_size}"
        return name + f" T{self.steps}" * (self.steps != 256) + f" L{self.layers}" * (self.layers != 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)


# In order of what is asked first: the budget may end before the last.
SHAPES = [
    *(Shape("GRU", "bfloat16", batch, size, (5, 3)) for batch, size in ((16, 256), (16, 512), (64, 512), (64, 256))),
    *(Shape("GRU", "bfloat16", batch, 1024, (3, 2)) for batch in (16, 64)),
    *(Shape("GRU", "tf32", batch, size, (5, 3)) for batch, size in ((16, 256), (64, 512))),
    *(Shape("LSTM", "bfloat16", batch, size, (2.5, 2)) for batch, size in ((16, 256), (64, 512), (64, 1024))),
    *(Shape("LSTM", "float16", batch, size) for batch, size in ((16, 512), (64, 1024))),
    *(
        Shape("GRU", "bfloat16", batch, size)
        for batch, size in ((1, 256), (16, 64), (16, 128), (256, 512), (256, 1024))
    ),
    *(Shape(cell, "bfloat16", 512, 512) for cell in ("GRU", "LSTM")),
    *(Shape(cell, "bfloat16", 256, 1024) for cell in ("LSTM", "RNN")),
    Shape("GRU", "float16", 256, 1024),
    Shape("GRU", "float32", 16, 128),
    Shape("GRU", "float32", 64, 512),
    Shape("RNN", "bfloat16", 16, 256),
    Shape("RNN", "bfloat16", 64, 512),
    # Where cuDNN keeps weights, too; short sequences; stacks.
    *(Shape(cell, dtype, 16, 128) for cell in ("GRU", "LSTM", "RNN") for dtype in ("tf32", "float16")),
    *(Shape("GRU", "tf32", 16, size) for size in (64, 192)),
    *(Shape("GRU", "bfloat16", 16, 256, steps=steps) for steps in (1, 8, 16, 32, 1024)),
    *(Shape("LSTM", "bfloat16", 16, 256, steps=steps) for steps in (8, 32)),
    *(Shape("GRU", "tf32", 16, 256, steps=steps) for steps in (8, 16, 32)),
    Shape("GRU", "bfloat16", 16, 256, layers=4),
    Shape("LSTM", "bfloat16", 64, 512, layers=2),
    Shape("LSTM", "float16", 16, 512, layers=2),
]
TINY = [Shape("GRU", "float32", 2, 5, (5, 3), 2), Shape("LSTM", "tf32", 2, 5, (1, 1), 2)]
RAGGED = (SHAPES[0], SHAPES[2])


def use_tf32(shape: Shape) -> None:
    precision = "tf32" if shape.dtype == "tf32" else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = precision


def modules(shape: Shape, device: torch.device) -> tuple[Any, Any, torch.Tensor]:
    """torch.nn's layer, ours with its weights, and the input (T, B, H)."""
    torch.manual_seed(0)
    sizes = (shape.hidden_size, shape.hidden_size, shape.layers)
    theirs = getattr(torch.nn, shape.cell)(*sizes).to(device, shape.torch_dtype)
    ours = getattr(tg, shape.cell)(*sizes).to(device, shape.torch_dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape.steps, shape.batch, shape.hidden_size, device=device).to(shape.torch_dtype)
    return theirs, ours, x.requires_grad_()


def runnable(shape: Shape, device: plan.Device) -> list[str]:
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[shape.cell]
    kind = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}[shape.cell]
    precision = "tf32" if shape.dtype == "tf32" else "ieee"
    size = plan.Size(kind, gates, shape.steps, shape.batch, shape.hidden_size, shape.torch_dtype, precision, False)
    kernels = [kernel for kernel in SEQUENCE if not plan.reasons(kernel, size, device)]
    if shape.hidden_size > 256 and "persistent" in kernels:
        kernels.remove("streamed")  # one program for all of the weights: seconds
    return kernels


def inference(module: Any, x: torch.Tensor, **form: Any) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            module(x, **form)

    return run


def training(module: Any, x: torch.Tensor, **form: Any) -> Callable[[], None]:
    """Forward and backward. The gradient that arrives is ready: making it is no part of the time."""
    upstream = torch.randn_like(x)
    wanted = [x, *module.parameters()]

    def run() -> None:
        output = module(x, **form)[0]
        torch.autograd.grad(output, wanted, upstream)

    return run


def by(run: Callable[[], None], kernel: str, recompute: bool = False, **config: int) -> Callable[[], None]:
    def chosen() -> None:
        with tg.backend("triton"), plan.using(kernel, recompute, **config):
            run()

    return chosen


def candidates(shape: Shape, device: torch.device) -> dict[str, Callable[[], None]]:
    """Everything to time on one shape, by name."""
    theirs, ours, x = modules(shape, device)
    found = {"torch.nn forward": inference(theirs, x), "torch.nn training": training(theirs, x)}
    found |= {"default forward": inference(ours, x), "default training": training(ours, x)}
    for kernel in runnable(shape, launch.device_on(device)):
        found[f"{kernel} forward"] = by(inference(ours, x), kernel)
        found[f"{kernel} training"] = by(training(ours, x), kernel)
        found[f"{kernel} training, recomputed"] = by(training(ours, x), kernel, recompute=True)
    return found


def ragged(shape: Shape, device: torch.device) -> dict[str, Callable[[], None]]:
    """Ours by the planned kernel: dense, with lengths from T/2 to T, with resets in one step of fifty."""
    _, ours, x = modules(shape, device)
    lengths = torch.linspace(max(1, shape.steps // 2), shape.steps, shape.batch, device=device).long()
    resets = torch.rand(shape.steps, shape.batch, device=device) < 0.02
    forms: dict[str, dict[str, Any]] = {"dense": {}, "lengths": {"lengths": lengths}, "resets": {"resets": resets}}
    return {
        f"{name} {how}": by(make(ours, x, **form), "")
        for name, form in forms.items()
        for how, make in (("forward", inference), ("training", training))
    }


def medians(runs: dict[str, Callable[[], None]], device: torch.device, rounds: int, until: float) -> dict[str, float]:
    """Milliseconds of each, interleaved; fewer rounds where time runs out, three at least."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > until:
            break
        for name, run in runs.items():
            times[name].append(_milliseconds(run, device))
    return {name: statistics.median(found) for name, found in times.items()}


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def warm(tiny: bool, device: torch.device) -> Callable[[int, int], None]:
    """Runs a worker's share of the table once, so that its kernels are in Triton's cache on disk."""

    def run(part: int, parts: int) -> None:
        for shape in (TINY if tiny else SHAPES)[part::parts]:
            use_tf32(shape)
            for name, once in candidates(shape, device).items():
                if name.split()[0] in SEQUENCE:
                    once()

    return run


def line(shape: Shape, times: dict[str, float]) -> dict[str, Any]:
    """One shape's figures: how many times as fast as torch.nn the default is, and the fastest kernel."""
    found: dict[str, Any] = {**asdict(shape), "name": shape.name, "milliseconds": times}
    for how, target in zip(("forward", "training"), shape.targets, strict=True):
        kernels = {name: took for name, took in times.items() if f" {how}" in name and name.split()[0] in SEQUENCE}
        best, default = min(kernels, key=lambda name: kernels[name]), times[f"default {how}"]
        ratio = times[f"torch.nn {how}"] / default
        found[how] = {
            "ratio": round(ratio, 2), "target": target, "met": ratio >= target,
            "us_per_step": round(1e3 * default / shape.steps, 2),
            "best": best.replace(f" {how}", ""), "best_ratio": round(times[f"torch.nn {how}"] / kernels[best], 2),
        }  # fmt: skip
    return found


def slower(lines: list[dict[str, Any]]) -> list[str]:
    """The shapes whose default is more than 3 % slower than torch.nn, or than the best kernel by a tenth."""
    said: list[str] = []
    for found in lines:
        for how in ("forward", "training"):
            side = found[how]
            if side["ratio"] < 0.97:
                said.append(f"{found['name']}, {how}: {side['ratio']}x of torch.nn")
            if side["best_ratio"] > 1.1 * max(side["ratio"], 1):
                said.append(f"{found['name']}, {how}: {side['best']} would reach {side['best_ratio']}x")
    return said


def picture(lines: list[dict[str, Any]], path: Path) -> bool:
    """A bar a shape; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(lines)), layout="constrained")
    for shift, how in ((0.2, "forward"), (-0.2, "training")):
        axes.barh([-k + shift for k in range(len(lines))], [x[how]["ratio"] for x in lines], 0.4, label=how)
    axes.set_yticks([-k for k in range(len(lines))], [x["name"] for x in lines])
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as torch.nn")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
