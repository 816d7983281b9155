# SPDX-License-Identifier: Apache-2.0
"""ns a step of GRU(1, H) or LSTM(1, H) and Dense(1): exported C, RTNeural and onnxruntime, interleaved in one run.

    PYTHONPATH=src python benchmarks/export.py --rtneural PATH [--include DIR] [--rnnoise PATH] [--node DIR]
        [--programs build/export [--build]] [--out build/export.json]

--rtneural is a checkout of RTNeural, of which every backend that compiles runs, by its compile-time API; --include, as
often as needed, has the headers of Eigen and xsimd. --rnnoise is a checkout of rnnoise, whose int8 kernels run a GRU
with as many inputs as units, as do ours and torch's dynamically quantized layer. --node is a folder where `npm install
onnxruntime-web` ran: GRU(1, 64), with a Dense of ours, a step and 100 of them. Each figure is the 10th percentile of
blocks of 512 steps over `--seconds`, the best of `--rounds`. onnxruntime, torch and `stream.steps` run the recurrent
layer alone, without the Dense, from Python on one thread: a block of 512, and a step at a time.

--build builds the programs in the folder --programs and times nothing, so that a second run there compiles nothing.
--out keeps what it has of other sizes: a long run may be taken in parts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import export_peers as peers
import torch
from export_peers import built
from torch import Tensor, nn

from tidegate.cli.machine import describe_machine

SIZES = (8, 16, 32, 64, 128)
KINDS: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM}

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


def ours(folder: Path, kind: str, size: int) -> dict[str, Path]:
    """Programs by the name of their compiler and flags."""
    found: dict[str, Path] = {}
    for weights in ("float32", "int8"):
        place = folder / f"{kind}{size}{weights}"
        peers.exported(place, lambda: Model(kind, size), 1, weights, _TIMING + _OURS)
        for name, program in peers.compiled(place).items():
            found[f"tidegate {weights} {name}"] = program
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
    # Its Eigen backend takes alignments up to 32; large matrices stand in the model, which is no local variable here.
    eigen = ["-DEIGEN_STACK_ALLOCATION_LIMIT=0"]
    variants = [
        ("EIGEN", avx2, "avx2", eigen),
        ("EIGEN", [native[0], avx2[-1]], "native", eigen),
        ("XSIMD", avx2, "avx2", []),
        ("XSIMD", native, "native", []),
        ("STL", avx2, "avx2 fast-math", ["-ffast-math"]),
    ]
    for backend, machine, title, more in variants:
        for compiler in ("g++", "clang++"):
            flags = ["-std=c++17", "-O3", *machine, *more]
            flags += ["-DRTNEURAL_AVX_ENABLED=1", "-DRTNEURAL_NAMESPACE=RTNeural", f"-DRTNEURAL_USE_{backend}=1"]
            flags += [f"-I{path}", f"-I{path / 'modules/json'}", *(f"-I{one}" for one in includes)]
            name = f"RTNeural {backend} {compiler} {title}"
            program = folder / f"{source.stem} {name}"
            if shutil.which(compiler) and built([compiler, *flags, str(source), "-o", str(program)]):
                found[name] = program
    return found


def timed(name: str, program: Path) -> peers.Timing:
    def run(seconds: float) -> dict[str, float]:
        said = subprocess.run([str(program), str(seconds)], capture_output=True, text=True, check=True)
        return {name: float(said.stdout)}

    return run


def prepared(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[peers.Timing]]]:
    """What each row is of, and what is timed for it."""
    for kind in given.kinds:
        for size in given.sizes:
            programs = ours(folder, kind, size)
            if given.rtneural:
                programs |= rtneural(folder, given.rtneural, given.include, kind, size)
            found = [timed(name, program) for name, program in programs.items()]
            yield f"{kind} {size}, ns a step", [*found, *peers.from_python(folder, kind, size)]
    for size in given.int8_sizes if given.rnnoise else ():
        programs = peers.int8_layers(folder, _TIMING, given.rnnoise, size)
        found = [timed(name, program) for name, program in programs.items()]
        yield f"gru with {size} inputs {size}, ns a step", [*found, peers.quantized_by_torch(size)]
    if given.node:
        yield "gru 64 in Node, ns a call", [peers.in_node(folder, Model("gru", 64), given.node, 64)]


def measured(contenders: list[peers.Timing], rounds: int, seconds: float) -> dict[str, float]:
    row: dict[str, float] = {}
    for _ in range(rounds):
        for contender in contenders:
            for name, value in contender(seconds).items():
                row[name] = min(row.get(name, float("inf")), value)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtneural", type=Path)
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("--rnnoise", type=Path)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--int8-sizes", nargs="*", type=int, default=[64, 128, 256])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.programs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {}
    for title, contenders in list(prepared(given, folder)):
        if given.build:
            continue
        row = results[title] = measured(contenders, given.rounds, given.seconds)
        print(title)
        for name, value in sorted(row.items(), key=lambda item: item[1]):
            print(f"  {value:10.1f}  {name}", flush=True)
    if given.out and results:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(given.out.read_text())["results"] if given.out.exists() else {}
        found = {"machine": describe_machine(), "results": before | results}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
