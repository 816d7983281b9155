# SPDX-License-Identifier: Apache-2.0
"""ns a step of GRU(1, H) or LSTM(1, H) and Dense(1): exported C, RTNeural and onnxruntime, interleaved in one run.

    PYTHONPATH=src python benchmarks/export.py --rtneural PATH [--include DIR] [--out build/export.json]

PATH is a checkout of RTNeural, of which every backend that compiles runs, by its compile-time API; DIR, as often as
needed, has the headers of Eigen and xsimd. Each figure is the 10th percentile of blocks of 512 steps over `--seconds`,
the best of `--rounds`. onnxruntime runs the recurrent layer alone, without the Dense, by its Python API on one thread:
a block of 512, and a step at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tidegate as tg
from tidegate.cli.machine import describe_machine

SIZES = (8, 16, 32, 64, 128)
KINDS: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM}
BLOCK = 512

_TIMING = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}
/* The 10th percentile of blocks' times, a step. */
static void timed(void (*block)(const float *, float *), double seconds) {
    static float x[512], y[512];
    static double each[1000000];
    int count = 0;
    for (int t = 0; t < 512; ++t) x[t] = (float)(t % 17) / 17.0f - 0.5f;
    for (const double start = now(); now() - start < seconds * 1e9 && count < 1000000; ++count) {
        const double before = now();
        block(x, y);
        each[count] = (now() - before) / 512;
    }
    qsort(each, (size_t)count, sizeof *each, by_size);
    printf("%.2f\\n", each[count / 10]);
}
"""
_OURS = """
#include "model.h"
static model_state state;
static void block(const float *x, float *y) {
    for (int t = 0; t < 512; ++t) model_step(&state, x + t, y + t);
}
int main(int n, char **words) { (void)n; model_reset(&state); timed(block, atof(words[1])); return 0; }
"""
_RTNEURAL = """
#include <RTNeural/RTNeural.h>
static RTNeural::ModelT<float, 1, 1, RTNeural::@LAYER@T<float, 1, @SIZE@>, RTNeural::DenseT<float, @SIZE@, 1>> model;
static std::vector<std::vector<float>> drawn(int rows, int columns) {
    std::vector<std::vector<float>> found((size_t)rows, std::vector<float>((size_t)columns));
    for (auto& row : found) for (auto& value : row) value = ((float)rand() / (float)RAND_MAX - 0.5f) / 4;
    return found;
}
static void block(const float *x, float *y) {
    for (int t = 0; t < 512; ++t) { alignas(64) float in[1] = {x[t]}; y[t] = model.forward(in); }
}
int main(int, char **words) {
    auto& layer = model.template get<0>();
    auto& dense = model.template get<1>();
    layer.setWVals(drawn(1, @GATES@ * @SIZE@));
    layer.setUVals(drawn(@SIZE@, @GATES@ * @SIZE@));
    layer.setBVals(@BIAS@);
    dense.setWeights(drawn(1, @SIZE@));
    model.reset();
    timed(block, atof(words[1]));
}
"""


class Model(nn.Module):
    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.rec, self.lin = KINDS[kind](1, size, batch_first=True), nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.rec(x)[0])


def built(command: list[str]) -> bool:
    """Run a compiler, whose last word is the program, unless that is there."""
    return Path(command[-1]).exists() or subprocess.run(command, capture_output=True).returncode == 0


def ours(folder: Path, kind: str, size: int) -> dict[str, Path]:
    """Programs by the name of their compiler and flags."""
    found: dict[str, Path] = {}
    torch.manual_seed(0)
    for weights in ("float32", "int8"):
        place = tg.export_c(
            Model(kind, size), torch.randn(1, 64, 1), folder / f"{kind}{size}{weights}", weights=weights
        )
        (place / "bench.c").write_text("#define _POSIX_C_SOURCE 199309L\n" + _TIMING + _OURS)
        for compiler in ("gcc", "clang"):
            for name, flags in (("native", ["-march=native"]), ("avx2", ["-mavx2", "-mfma"])):
                program = place / f"{compiler}-{name}"
                files = [str(place / "model.c"), str(place / "bench.c")]
                if shutil.which(compiler) and built([compiler, "-std=c99", "-O3", *flags, *files, "-o", str(program)]):
                    found[f"tidegate {weights} {compiler} {name}"] = program
    return found


def rtneural(folder: Path, path: Path, includes: list[str], kind: str, size: int) -> dict[str, Path]:
    gates, layer = (3, "GRULayer") if kind == "gru" else (4, "LSTMLayer")
    text = _TIMING + _RTNEURAL.replace("@LAYER@", layer).replace("@SIZE@", str(size)).replace("@GATES@", str(gates))
    bias = f"drawn(2, 3 * {size})" if kind == "gru" else f"drawn(1, 4 * {size})[0]"
    source = folder / f"rtneural-{kind}{size}.cpp"
    source.write_text(text.replace("@BIAS@", bias))
    found: dict[str, Path] = {}
    avx2 = ["-mavx2", "-mfma", "-DRTNEURAL_DEFAULT_ALIGNMENT=32"]
    native = ["-march=native", "-DRTNEURAL_DEFAULT_ALIGNMENT=64"]
    variants = [(backend, kind, []) for backend in ("EIGEN", "XSIMD") for kind in ("avx2", "native")]
    for backend, machine, more in (*variants, ("STL", "avx2", ["-ffast-math"])):
        for compiler in ("g++", "clang++"):
            flags = ["-std=c++17", "-O3", *(avx2 if machine == "avx2" else native), *more]
            flags += ["-DRTNEURAL_AVX_ENABLED=1", "-DRTNEURAL_NAMESPACE=RTNeural", f"-DRTNEURAL_USE_{backend}=1"]
            flags += [f"-I{path}", f"-I{path / 'modules/json'}", *(f"-I{one}" for one in includes)]
            name = f"RTNeural {backend} {compiler} {machine}{' fast-math' if more else ''}"
            program = folder / f"{source.stem} {name}"
            if shutil.which(compiler) and built([compiler, *flags, str(source), "-o", str(program)]):
                found[name] = program
    return found


def onnx_sessions(folder: Path, kind: str, size: int) -> Any:
    """What times onnxruntime, for so many seconds: a step in a block of 512, and a step alone."""
    import onnxruntime

    layer = getattr(tg, kind.upper())(1, size)
    file = folder / f"{kind}{size}.onnx"
    tg.to_onnx(layer, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    first, *states = [given.name for given in session.get_inputs()]
    state = {name: torch.zeros(1, 1, size).numpy() for name in states}
    blocks = {steps: {first: torch.randn(steps, 1, 1).numpy(), **state} for steps in (BLOCK, 1)}

    def timed(steps: int, seconds: float) -> float:
        each: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            before = time.perf_counter_ns()
            session.run(None, blocks[steps])
            each.append((time.perf_counter_ns() - before) / steps)
        return sorted(each)[len(each) // 10]

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtneural", type=Path)
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", type=Path, help="Where they are built; a second run with it builds nothing.")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.programs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {}
    for kind in given.kinds:
        for size in given.sizes:
            programs = ours(folder, kind, size)
            if given.rtneural:
                programs |= rtneural(folder, given.rtneural, given.include, kind, size)
            sessions = onnx_sessions(folder, kind, size)
            row = results[f"{kind} {size}"] = {}
            for _ in range(given.rounds):
                for name, program in programs.items():
                    said = subprocess.run(
                        [str(program), str(given.seconds)], capture_output=True, text=True, check=True
                    )
                    row[name] = min(row.get(name, float("inf")), float(said.stdout))
                for name, steps in (("onnxruntime block of 512", BLOCK), ("onnxruntime step", 1)):
                    row[name] = min(row.get(name, float("inf")), sessions(steps, given.seconds))
            print(f"{kind} {size}")
            for name, value in sorted(row.items(), key=lambda item: item[1]):
                print(f"  {value:10.1f}  {name}", flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"machine": describe_machine(), "ns a step": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
