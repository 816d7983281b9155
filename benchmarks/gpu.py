# SPDX-License-Identifier: Apache-2.0
"""Check and time the GPU kernels on this machine, in one command and under eight minutes.

    PYTHONPATH=src python benchmarks/gpu.py            # numbers, captures, the table; JSON and a picture in --out
    PYTHONPATH=src compute-sanitizer --tool memcheck --report-api-errors no python benchmarks/gpu.py --sanitize
    PYTHONPATH=src compute-sanitizer --tool racecheck python benchmarks/gpu.py --sanitize
    PYTHONPATH=src python benchmarks/gpu.py --compile  # registers and shared memory for sm_90; needs no GPU
    PYTHONPATH=src python benchmarks/gpu.py --sweep    # after the table, other block sizes on a few shapes
    PYTHONPATH=src python benchmarks/gpu.py --dry-run  # tiny, under Triton's interpreter: does this script work?

Needs torch, triton and a CUDA device; matplotlib for the picture; no network, no compiled CPU operators.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import gpu_checks
import gpu_table
import gpu_uses
import torch
import triton

from tidegate.kernels import triton as kernels


class Budget:
    """Seconds that are left; what does not fit is dropped, and said to be."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.dropped: list[str] = []

    def left(self) -> float:
        return self.end - time.perf_counter()

    def allows(self, what: str, seconds: float) -> bool:
        if self.left() < seconds:
            self.dropped.append(what)
        return self.left() >= seconds


def facts() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "python": sys.version.split()[0], "device": "interpreter",
    }  # fmt: skip
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, check=False)
        found |= {
            "device": properties.name, "processors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(), "driver, clocks": smi.stdout.strip(),
        }  # fmt: skip
    return found


def table(budget: Budget, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    shapes = gpu_table.TINY if tiny else gpu_table.SHAPES
    print(f"{'shape':30s} {'forward':>28s} {'training':>36s}")
    for shape in shapes:
        if not budget.allows(shape.name, 8):
            continue
        gpu_table.use_tf32(shape)
        until = time.perf_counter() + min(12, budget.left() / 3)
        times = gpu_table.medians(gpu_table.candidates(shape, device), device, 3 if tiny else 15, until)
        found = gpu_table.line(shape, times)
        lines.append(found)
        sides = [found[how] for how in ("forward", "training")]
        told = [f"{x['ratio']:.2f}x of {x['target']:g} ({x['us_per_step']} us; {x['best']})" for x in sides]
        print(f"{shape.name:30s} {told[0]:>28s} {told[1]:>36s}", flush=True)
    return lines


def ragged(budget: Budget, device: torch.device, tiny: bool) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for shape in gpu_table.TINY[:1] if tiny else gpu_table.RAGGED:
        if budget.allows(f"lengths and resets, {shape.name}", 8):
            gpu_table.use_tf32(shape)
            times = gpu_table.medians(gpu_table.ragged(shape, device), device, 3 if tiny else 15, budget.end - 3)
            how = ("forward", "training")
            found[shape.name] = {
                f"{form} {x}": round(times[f"{form} {x}"] / times[f"dense {x}"], 2)
                for form in ("lengths", "resets") for x in how
            }  # fmt: skip
            print(f"  {shape.name}, times the dense time (to reach: 1.1): {found[shape.name]}", flush=True)
    return found


def sweep(budget: Budget, device: torch.device, tiny: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of other block sizes, the planned ones first."""
    found: dict[str, dict[str, float]] = {}
    for shape in gpu_table.TINY[:1] if tiny else gpu_table.SHAPES[:6]:
        _, ours, x = gpu_table.modules(shape, device)
        for kernel in gpu_table.runnable(shape, gpu_table.launch.device_on(device)):
            tried: dict[str, dict[str, int]] = {"planned": {}}
            for warps in (2, 4, 8):
                tried[f"{warps} warps"] = {"num_warps": warps}
            if kernel != "resident" and not tiny:
                tried |= {f"block_k {k}": {"block_k": k} for k in (32, 64, 128)}
                tried |= {f"{stages} stages": {"num_stages": stages} for stages in (2, 3, 4)}
            if not budget.allows(f"sweep, {shape.name} {kernel}", 15):
                continue
            runs = {name: gpu_table.by(gpu_table.training(ours, x), kernel, **config) for name, config in tried.items()}
            found[f"{shape.name} {kernel}"] = gpu_table.medians(runs, device, 7, budget.end - 3)
            print(f"  {shape.name} {kernel}: {found[f'{shape.name} {kernel}']}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the GPU kernels.")
    parser.add_argument("--out", type=Path, default=Path("build") / "gpu")
    parser.add_argument("--budget", type=float, default=460, help="seconds for everything")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    for flag in ("--dry-run", "--sanitize", "--compile", "--sweep"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tiny = options.dry_run
    if options.compile:
        sys.argv = ["triton_compile.py", "--all"]
        runpy.run_path(str(Path(__file__).parents[1] / "tests" / "triton_compile.py"), run_name="__main__")
        return 0
    missing = kernels.availability()
    if missing:
        print(f"The GPU kernels cannot run here: {'; '.join(missing)}")
        return 2
    device = torch.device("cpu" if tiny else "cuda")
    if options.worker:
        part, parts = map(int, options.worker.split("/"))
        gpu_checks.work(part, parts, tiny, gpu_table.warm(tiny, device))
        return 0
    if options.sanitize:
        gpu_checks.sanitized(device, tiny)
        return 0

    budget = Budget(options.budget)
    result: dict[str, Any] = {"facts": facts()}
    print(json.dumps(result["facts"], indent=1))
    print("Numbers against float64, every kernel and cell:")
    flags = ["--dry-run"] if tiny else []
    checks = gpu_checks.run_workers(__file__, options.workers, 0.5 * budget.left(), flags)
    result["checks"] = checks
    print(f"  {checks['passed']} passed, {len(checks['faults'])} failed, {len(checks['not run'])} not run")
    for name, fault in checks["faults"].items():
        print(f"  FAILED {name}: {fault}")
    for text in checks["crashed"]:
        print(f"  A WORKER CRASHED: {text}")
    print("Captures:")
    result["captures"] = gpu_checks.captures(device) if budget.allows("captures", 60) else {}
    result["uses"] = gpu_uses.run(device) if not tiny and budget.allows("uses", 60) else {}
    for name, fault in (result["captures"] | result["uses"]).items():
        print(f"  {name}: {fault or 'the same results'}", flush=True)
    result["lines"] = table(budget, device, tiny)
    result["ragged"] = ragged(budget, device, tiny)
    result["sweep"] = sweep(budget, device, tiny) if options.sweep else {}
    result["slower"] = gpu_table.slower(result["lines"])
    result["dropped"] = budget.dropped
    if result["slower"]:
        print("Where another choice would be faster:", *result["slower"], sep="\n  ")
    if budget.dropped or checks["not run"]:
        print("Dropped for want of time:", *budget.dropped, *checks["not run"], sep="\n  ")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    drawn = bool(result["lines"]) and gpu_table.picture(result["lines"], options.out / "gpu.png")
    print(f"Written: {options.out / 'gpu.json'}{' and gpu.png' if drawn else ''}")
    wrong = any(checks[what] for what in ("faults", "crashed", "not run")) or any(
        fault for fault in (result["captures"] | result["uses"]).values() if fault != "no CUDA device"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
