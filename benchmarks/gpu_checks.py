# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.py checks before it times anything: numbers against float64, CUDA graphs, torch.compile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kernel_cases import assert_right, computed, grads_for, make_call

import tidegate as tg
from tidegate.backends import TRITON
from tidegate.call import Layer
from tidegate.kernels.triton import plan

KINDS = ("rnn-tanh", "rnn-relu", "lstm", "gru", "gru-reset-before")
# Two batch tiles, several chunks of units and of the inner dimension, every edge inside a block: no power of two.
SHAPES = {"resident": (9, 37, 20, 61), "streamed": (9, 37, 20, 203), "persistent": (9, 37, 20, 301),
          "held": (9, 37, 20, 200), "per_step": (5, 37, 20, 301), "step": (1, 37, 20, 301)}  # fmt: skip
KINDS_OF = {"step": ("gru",), "held": ("gru", "lstm")}  # else the three of most work
TINY = {kernel: (2 if kernel != "step" else 1, 2, 2, 5) for kernel in SHAPES}


@dataclass(frozen=True)
class Task:
    """One kernel on one call, compared with the reference in float64."""

    kernel: str
    variant: str
    dtype: str
    form: str  # "dense", or "lengths, resets, reverse"
    tf32: bool = False
    blocks: tuple[tuple[str, int], ...] = ()  # in place of the planned ones

    @property
    def name(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks)
        return f"{self.kernel} {self.variant} {'tf32' if self.tf32 else self.dtype} {self.form} {blocks}".rstrip()


def tasks(tiny: bool) -> list[Task]:
    """The matrix: every kernel and cell in bfloat16 and float32, every form; float16 and tf32 for two cells."""
    found = [] if tiny else list(held_tasks())  # CUDA C++ does not run under Triton's interpreter
    for kernel in (kernel for kernel in SHAPES if kernel != "held"):
        for variant in KINDS:
            for form in ("dense", "lengths, resets, reverse") if kernel != "step" else ("dense",):
                found += [Task(kernel, variant, name, form) for name in ("float32", "bfloat16")]
        for variant in ("lstm", "gru"):
            found.append(Task(kernel, variant, "float16", "dense"))
            found.append(Task(kernel, variant, "float32", "dense", tf32=True))
    return found


def held_tasks() -> Iterator[Task]:
    """Of the kernel in CUDA C++: every cell, dtype and form that it has, with several block sizes."""
    for variant in KINDS[:-1]:
        for form in ("dense", "lengths, resets, reverse"):
            for dtype in ("bfloat16", "float16", "float32"):
                yield Task("held", variant, dtype, form, tf32=dtype == "float32")
    for tiles, units, warps in ((1, 8, 2), (2, 16, 8), (4, 8, 4), (8, 16, 4)):
        blocks = (("block_b", 16 * tiles), ("block_n", units), ("num_warps", warps), ("programs", -(-200 // units)))
        for variant in ("lstm", "gru"):
            yield Task("held", variant, "bfloat16", "lengths, resets, reverse", blocks=blocks)


def on(call: Layer, device: torch.device) -> Layer:
    """The same call on another device."""
    call = call.with_tensors([None if tensor is None else tensor.to(device) for tensor in call.tensors])
    lengths, resets = (None if t is None else t.to(device) for t in (call.lengths, call.resets))
    return call._replace(lengths=lengths, resets=resets)


def away_from_kink(call: Layer) -> Layer:
    """Half of the units far above relu's kink and half far below: no rounding falls on its other side."""
    weights = {name: None if weight is None else weight / 32 for name, weight in call.weights.items()}
    side = torch.ones(call.hidden_size, dtype=call.input.dtype)
    side[::2] = -1
    return call._replace(weights=weights | {"bias_ih": side})


def run_task(task: Task, device: torch.device, tiny: bool) -> str:
    """Runs one task, gates kept and computed again; says what is wrong, or nothing."""
    shape = (TINY if tiny else SHAPES)[task.kernel]
    varied = task.form != "dense"
    call = make_call(
        task.variant, shape, dtype=getattr(torch, task.dtype), lengths=varied, resets=varied, reverse=varied,
        batch_first=varied,
    )  # fmt: skip
    if task.variant == "rnn-relu":
        call = away_from_kink(call)
    call = on(call, device)
    precision = "tf32" if task.tf32 else "ieee"
    try:
        for recompute in (False, True):
            with plan.using(task.kernel, recompute, precision, **dict(task.blocks)):
                values = computed(call, grads_for(call), TRITON)
                again = computed(call, grads_for(call), TRITON)
            same = all(a is None or b is None or torch.equal(a, b) for a, b in zip(values, again, strict=True))
            if not same:
                return "two runs differ"
            if task.tf32:
                exactly = "persistent" if task.kernel == "held" else task.kernel
                with plan.using(exactly, recompute, "ieee"):
                    exact = computed(call, grads_for(call), TRITON)
                worst = max(
                    float((a - b).abs().max() / b.abs().max().clamp(min=1))
                    for a, b in zip(values, exact, strict=True)
                    if a is not None and b is not None and b.numel()
                )
                if not worst < 2e-2:  # ten bits of mantissa, over a few steps
                    return f"tf32 differs from float32 by {worst:.1e}"
            else:
                assert_right(call, values)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def work(part: int, parts: int, tiny: bool, warm: Callable[[int, int], None]) -> None:
    """A worker process: its share of the tasks, then of the table's kernels, so that they are compiled when timed."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new buffers with NaN
    device = torch.device("cpu" if tiny else "cuda")
    for task in tasks(tiny)[part::parts]:
        started = time.perf_counter()
        fault = run_task(task, device, tiny)
        print(json.dumps({"task": task.name, "fault": fault, "seconds": time.perf_counter() - started}), flush=True)
    torch.use_deterministic_algorithms(False)
    warm(part, parts)
    print(json.dumps({"warm": part}), flush=True)


def run_workers(script: str, parts: int, limit: float, flags: list[str]) -> dict[str, Any]:
    """All tasks in `parts` processes, since what takes time is compiling; stopped after `limit` seconds."""
    started = time.perf_counter()
    folder = Path(".") / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"worker-{part}.jsonl" for part in range(parts)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, "--worker", f"{part}/{parts}", *flags],
            stdout=output.open("w"), stderr=output.with_suffix(".err").open("w"),
        )
        for part, output in enumerate(outputs)
    ]  # fmt: skip
    shown = -1
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        done = sum(len(output.read_text().splitlines()) for output in outputs)
        if done // 10 != shown // 10:
            shown = done
            print(f"  {done} done, {time.perf_counter() - started:.0f} s", flush=True)
        if time.perf_counter() - started > limit:
            break
    stopped = [process for process in processes if process.poll() is None]
    for process in stopped:
        process.kill()
        process.wait()
    lines = [json.loads(line) for output in outputs for line in output.read_text().splitlines() if line.endswith("}")]
    found = [line for line in lines if "task" in line]
    missing = sorted({task.name for task in tasks("--dry-run" in flags)} - {line["task"] for line in found})
    crashed = [
        output.with_suffix(".err").read_text()[-2000:]
        for process, output in zip(processes, outputs, strict=True)
        if process not in stopped and process.returncode != 0
    ]
    return {
        "passed": sum(not line["fault"] for line in found),
        "faults": {x["task"]: x["fault"] for x in found if x["fault"]},
        "not run": missing, "crashed": crashed, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def captures(device: torch.device) -> dict[str, str]:
    """CUDA graphs and torch.compile around the kernels; "" where the results are those of a plain call."""
    found: dict[str, str] = {}
    graphs = device.type == "cuda"
    for kernel in ("step", *(("held",) if graphs else ()), "resident", "streamed", "persistent"):
        hidden_size = 24 if kernel == "resident" else 64
        layer = tg.GRU(16, hidden_size, device=device)
        x = torch.randn(1 if kernel == "step" else 4, 3, 16, device=device)
        found[f"CUDA graph, {kernel}"] = _captured(layer, x, kernel) if graphs else "no CUDA device"
    cell = tg.GRUCell(16, 64, device=device)
    head = torch.nn.Linear(64, 5).to(device)
    x, h = torch.randn(3, 16, device=device), torch.randn(3, 64, device=device)
    mode: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {"backend": "aot_eager"}
    found["torch.compile, a cell"] = _compiled(lambda x, h: head(cell(x, h)), (x, h), mode)
    layer = tg.LSTM(16, 64, device=device)
    found["torch.compile, a layer"] = _compiled(lambda x: layer(x)[0], (torch.randn(4, 3, 16, device=device),), mode)
    return found


def _captured(layer: Any, x: torch.Tensor, kernel: str) -> str:
    try:
        with torch.no_grad(), tg.backend("triton"), plan.using(kernel):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                expected = layer(x)[0]
            torch.cuda.current_stream().wait_stream(stream)
            graph, still = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):
                output = layer(still)[0]
            for _ in range(2):
                output.zero_()
                graph.replay()
                torch.cuda.synchronize()
                if not torch.equal(output, expected):
                    return "a replay differs"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def _compiled(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], mode: dict[str, Any]) -> str:
    try:
        with torch.no_grad(), tg.backend("triton"):
            expected = function(*inputs).clone()
            run = torch.compile(function, fullgraph=True, **mode)
            for _ in range(3):
                found = run(*inputs).clone()
        # The same kernel, captured: only the products around it may be summed in another order.
        if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return "the results differ"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def sanitized(device: torch.device, tiny: bool) -> None:
    """One call of every kernel, forward and backward, for compute-sanitizer to look at."""
    for kernel in (kernel for kernel in SHAPES if not (tiny and kernel == "held")):
        for variant in KINDS_OF.get(kernel, ("gru", "gru-reset-before", "lstm")):
            steps, batch, _, hidden_size = (TINY if tiny else SHAPES)[kernel]
            call = on(make_call(variant, (min(steps, 3), batch, 8, hidden_size), dtype=torch.float32), device)
            with plan.using(kernel, precision="tf32"):
                computed(call, grads_for(call), TRITON)
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"  {kernel} {variant}", flush=True)
