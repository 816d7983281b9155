# SPDX-License-Identifier: Apache-2.0
"""What `export.py` times exported C against, beside RTNeural: rnnoise's int8 kernels, onnxruntime from Python and in
Node, torch's dynamic quantization, and a stream from Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tidegate as tg

BLOCK = 512
_MACHINES = {"native": ["-march=native"], "avx2": ["-mavx2", "-mfma"]}
_CLOCK = "#define _POSIX_C_SOURCE 199309L\n"

# A GRU's step with as many inputs as units, int8, all blocks there, by rnnoise's `compute_generic_gru`.
_RNNOISE = """
#include "nnet.h"
#define SIZE @SIZE@
static opus_int8 weights[2][3 * SIZE * SIZE];
static float scale[3 * SIZE], bias[3 * SIZE], state[SIZE];
static LinearLayer layers[2];
static void block(const float *x, float *y) {
    float in[SIZE];
    for (int t = 0; t < 512; ++t) {
        for (int k = 0; k < SIZE; ++k) in[k] = x[(t + k) % 512];
        compute_generic_gru(&layers[0], &layers[1], state, in, 0);
        y[t] = state[0];
    }
}
int main(int n, char **words) {
    (void)n;
    for (int k = 0; k < 3 * SIZE; ++k) scale[k] = 1.0f / 127 / 127 / SIZE;
    for (int side = 0; side < 2; ++side) {
        for (int k = 0; k < 3 * SIZE * SIZE; ++k) weights[side][k] = (opus_int8)(rand() % 255 - 127);
        layers[side].weights = weights[side];
        layers[side].scale = scale;
        layers[side].bias = layers[side].subias = bias;
        layers[side].nb_inputs = SIZE;
        layers[side].nb_outputs = 3 * SIZE;
    }
    timed(block, atof(words[1]));
    return 0;
}
"""
# The same step by an export: a GRU(SIZE, SIZE) alone.
_ALONE = """
#include "model.h"
static model_state state;
static void block(const float *x, float *y) {
    float in[MODEL_INPUT_SIZE], out[MODEL_OUTPUT_SIZE];
    for (int t = 0; t < 512; ++t) {
        for (int k = 0; k < MODEL_INPUT_SIZE; ++k) in[k] = x[(t + k) % 512];
        model_step(&state, in, out);
        y[t] = out[0];
    }
}
int main(int n, char **words) { (void)n; model_reset(&state); timed(block, atof(words[1])); return 0; }
"""
_NODE = """
import { createRequire } from "node:module";
import { load } from "./model.js";
const require = createRequire(process.argv[2] + "/");
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const size = Number(process.argv[3]), seconds = Number(process.argv[4]);
const session = await ort.InferenceSession.create("layer.onnx", { executionProviders: ["wasm"] });
const [first, ...states] = session.inputNames;
const stream = (await load()).stream();
function tenth(times) { return times.sort((a, b) => a - b)[Math.floor(times.length / 10)]; }
async function timed(run) {
    const times = [];
    for (const start = performance.now(); performance.now() - start < 1000 * seconds;) {
        const before = performance.now();
        await run();
        times.push(1e6 * (performance.now() - before));
    }
    return tenth(times);
}
const found = {};
for (const steps of [1, 100]) {
    const feeds = { [first]: new ort.Tensor("float32", new Float32Array(steps), [steps, 1, 1]) };
    for (const name of states) feeds[name] = new ort.Tensor("float32", new Float32Array(size), [1, 1, size]);
    const x = new Float32Array(steps);
    found[`onnxruntime-web, ${steps} steps`] = await timed(() => session.run(feeds));
    found[`tidegate, ${steps} steps`] =
        await timed(() => { for (let k = 0; k < 100; ++k) stream.process(x); }) / 100;
}
console.log(JSON.stringify(found));
"""


Timing = Callable[[float], dict[str, float]]  # takes about so many seconds; ns of each contender by its name


def built(command: list[str]) -> bool:
    """Run a compiler, whose last word is the program, unless that is there."""
    return Path(command[-1]).exists() or subprocess.run(command, capture_output=True).returncode == 0


def exported(place: Path, model: Callable[[], nn.Module], inputs: int, weights: str, main: str) -> None:
    """An export with a program that times it, unless they are there."""
    if (place / "bench.c").exists():
        return
    torch.manual_seed(0)
    tg.export_c(model(), torch.randn(1, 64, inputs), place, weights=weights)
    (place / "bench.c").write_text(_CLOCK + main)


def compiled(place: Path) -> dict[str, Path]:
    """Its programs, by compiler and processor."""
    found: dict[str, Path] = {}
    for compiler in filter(shutil.which, ("gcc", "clang")):
        for machine, flags in _MACHINES.items():
            program = place / f"{compiler}-{machine}"
            files = [str(place / "model.c"), str(place / "bench.c")]
            if built([compiler, "-std=c99", "-O3", *flags, *files, "-o", str(program)]):
                found[f"{compiler} {machine}"] = program
    return found


def int8_layers(folder: Path, timing: str, rnnoise: Path, size: int) -> dict[str, Path]:
    """GRU(size, size): rnnoise's int8 and an export's int8 and float32, programs by name."""
    found: dict[str, Path] = {}
    source = folder / f"rnnoise{size}.c"
    source.write_text(_CLOCK + timing + _RNNOISE.replace("@SIZE@", str(size)))
    kernels = [str(rnnoise / "src" / name) for name in ("nnet.c", "nnet_default.c")]
    includes = [f"-I{rnnoise / 'src'}", f"-I{rnnoise / 'include'}"]
    for compiler in filter(shutil.which, ("gcc", "clang")):
        for machine, flags in _MACHINES.items():
            program = folder / f"rnnoise{size}-{compiler}-{machine}"
            if built([compiler, "-O3", *flags, *includes, str(source), *kernels, "-lm", "-o", str(program)]):
                found[f"rnnoise int8 {compiler} {machine}"] = program
    for weights in ("float32", "int8"):
        place = folder / f"alone{size}{weights}"
        exported(place, lambda: nn.GRU(size, size, batch_first=True), size, weights, timing + _ALONE)
        found |= {f"tidegate {weights} {name}": program for name, program in compiled(place).items()}
    return found


def from_python(folder: Path, kind: str, size: int) -> list[Timing]:
    """The layer alone: onnxruntime in blocks and a step at a time, and a stream's `steps`."""
    import onnxruntime

    layer = getattr(tg, kind.upper())(1, size)
    file = folder / f"{kind}{size}.onnx"
    tg.to_onnx(layer, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    first, *states = [given.name for given in session.get_inputs()]
    state = {name: torch.zeros(1, 1, size).numpy() for name in states}
    block, step = ({first: torch.randn(steps, 1, 1).numpy(), **state} for steps in (BLOCK, 1))
    stream, x = layer.stream(), torch.randn(BLOCK, 1)
    return [
        lambda seconds: {"onnxruntime block of 512": tenth(lambda: session.run(None, block), seconds) / BLOCK},
        lambda seconds: {"onnxruntime step": tenth(lambda: session.run(None, step), seconds)},
        lambda seconds: {"stream.steps of 512": tenth(lambda: stream.steps(x), seconds) / BLOCK},
    ]


def quantized_by_torch(size: int) -> Timing:
    """torch's own dynamically quantized GRU(size, size), from Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.GRU(size, size)), {nn.GRU})
    layer, x = made[0], torch.randn(BLOCK, 1, size)

    def run(seconds: float) -> dict[str, float]:
        with torch.no_grad():
            return {"torch int8, block of 512": tenth(lambda: layer(x), seconds) / BLOCK}

    return run


def tenth(run: Callable[[], Any], seconds: float) -> float:
    """The 10th percentile of how long it takes, in ns."""
    each: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter_ns()
        run()
        each.append(time.perf_counter_ns() - before)
    return sorted(each)[len(each) // 10]


def in_node(folder: Path, model: nn.Module, modules: Path, size: int) -> Timing:
    """GRU(1, size), an export with its Dense and onnxruntime-web without: ns a call.

    Args:
        modules: a folder with node_modules, onnxruntime-web among them.
    """
    torch.manual_seed(0)
    place = tg.export_c(model, torch.randn(1, 64, 1), folder / f"node{size}", wasm=True)
    tg.to_onnx(tg.GRU(1, size), place / "layer.onnx")
    (place / "package.json").write_text('{"type": "module"}')
    (place / "bench.js").write_text(_NODE)

    def run(seconds: float) -> dict[str, float]:
        command = ["node", "bench.js", str(modules.absolute()), str(size), str(seconds)]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return run
