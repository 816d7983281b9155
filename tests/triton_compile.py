# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for sm_90 without a GPU, down to machine code, and says what each takes of a multiprocessor.

    python tests/triton_compile.py [--all]

One JSON object a line: kernel, kind, dtype, direction, block sizes, shared memory in bytes, registers a thread, bytes
of stack a thread (what did not fit into registers).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tidegate.kernels.triton import launch, plan, pointwise, reset_before, resident, streamed

H200 = plan.Device(False, False, 132, (9, 0))
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CARRIED = ("carry_h", "carry_c", "gate_z")  # float32 in memory, whatever the dtype
SYNC = {"streamed": "block", "persistent": "flags", "per_step": "launch"}

Case = tuple[str, str, torch.dtype, str, int, int]  # kernel, kind, dtype, precision, H, B

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
FEW: list[Case] = [
    ("resident", "rnn_tanh", bf16, "ieee", 128, 16),
    ("resident", "lstm", bf16, "ieee", 128, 16),
    ("resident", "gru", fp32, "ieee", 64, 16),
    ("resident", "gru_reset_before", fp16, "ieee", 100, 16),
    ("streamed", "rnn_relu", bf16, "ieee", 256, 16),
    ("streamed", "lstm", bf16, "ieee", 200, 16),
    ("streamed", "lstm", fp32, "tf32", 256, 16),
    ("streamed", "gru", bf16, "ieee", 256, 16),
    ("streamed", "gru_reset_before", bf16, "ieee", 256, 16),
    ("persistent", "lstm", bf16, "ieee", 1024, 64),
    ("persistent", "gru", fp32, "ieee", 512, 16),
    ("per_step", "gru", bf16, "ieee", 512, 16),
    ("step", "lstm", bf16, "ieee", 512, 16),
    ("step", "gru_reset_before", bf16, "ieee", 512, 16),
]
ALL: list[Case] = [
    (kernel, kind, dtype, precision, hidden_size, batch)
    for kernel, hidden_sizes in {
        "resident": (64, 100, 128), "streamed": (200, 256), "persistent": (512, 1024), "step": (256,),
    }.items()
    for kind in launch.KINDS
    for dtype, precision in ((bf16, "ieee"), (fp16, "ieee"), (fp32, "ieee"), (fp32, "tf32"))
    for hidden_size in hidden_sizes
    for batch in ((16, 256) if kernel == "persistent" else (16,))
]  # fmt: skip


def kernels(kernel: str, kind: str) -> Iterator[tuple[str, Any]]:
    """The compiled functions of one kernel, by direction."""
    before = kind == "gru_reset_before"
    if kernel == "step":
        yield "forward", pointwise.reset_before if before else pointwise.forward
        return
    name = "resident" if kernel == "resident" else "streamed"
    module = reset_before if before else {"resident": resident, "streamed": streamed}[name]
    for direction in ("forward", "backward"):
        yield direction, getattr(module, f"{name}_{direction}" if before else direction)


def compiled(case: Case) -> Iterator[dict[str, Any]]:
    """What each direction takes; nothing where the plan refuses the case."""
    kernel, name, dtype, precision, hidden_size, batch = case
    kind = launch.KINDS[name]
    size = plan.Size(name, kind.gates, 100, batch, hidden_size, dtype, precision, False)
    if kernel != "step" and plan.reasons(kernel, size, H200):
        return
    with plan.using(precision=precision):
        config = plan.config(kernel, size, H200)
    for direction, function in kernels(kernel, name):
        constants = {
            "CELL": getattr(kind, direction), "GATES": kind.gates, "KEPT": kind.kept, "COLUMNS": kind.columns,
            "SKIP": 0, "HAS_C": name == "lstm", "HAS_BIAS": True, "HAS_LENGTHS": True, "HAS_RESETS": True,
            "REVERSE": True, "ACC": tl.float32, "PRECISION": precision, "WIDEN": False, "SECOND": True,
            "BLOCK_B": config.block_b, "BLOCK_N": config.block_n, "BLOCK_H": config.block_n,
            "BLOCK_K": config.block_k, "PROGRAMS": config.programs, "SYNC": SYNC.get(kernel), "SPINS": plan.SPINS,
            "FLAGS": 1 << (config.programs - 1).bit_length(),
        }  # fmt: skip
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        options["launch_cooperative_grid"] = kernel == "persistent"
        binary = triton.compile(source(function, dtype, hidden_size, constants), GPUTarget("cuda", 90, 32), options)
        yield {
            "kernel": kernel, "kind": name, "dtype": str(dtype).removeprefix("torch."), "precision": precision,
            "hidden_size": hidden_size, "batch": batch, "direction": direction, **config._asdict(), **usage(binary),
        }  # fmt: skip


def source(function: Any, dtype: torch.dtype, hidden_size: int, constants: dict[str, Any]) -> ASTSource:
    """The kernel with the types and alignments that a launch would find."""
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    special = {"lengths": "*i64", "resets": "*u8", "flags": "*i32", **dict.fromkeys(CARRIED, "*fp32")}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[place,] = "constexpr", constants[name]
        elif name in ("T", "B", "N", "H", "first", "count"):
            signature[name] = "i32"
        else:
            signature[name] = special.get(name, POINTERS[dtype])
        if signature[name].startswith("*") or (name == "H" and hidden_size % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, values, attributes)


def usage(binary: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    ptx = binary.asm["ptx"]
    return {
        "shared": binary.metadata.shared, "registers": int(registers), "stack": int(stack),
        "matrix": "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "none",
        "acquires": ptx.count("ld.acquire.gpu"), "releases": len(re.findall(r"atom\S*\.release\.", ptx)),
    }  # fmt: skip


if __name__ == "__main__":
    for wanted in ALL if "--all" in sys.argv else FEW:
        for found in compiled(wanted):
            print(json.dumps(found), flush=True)
