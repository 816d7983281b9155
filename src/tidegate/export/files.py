# SPDX-License-Identifier: Apache-2.0
"""`export_c`: its arguments, and what is written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tidegate.export import wasm as wasm_files
from tidegate.export.compile import Compiled, compile_step
from tidegate.export.folder import write
from tidegate.export.readme import readme
from tidegate.export.self_test import self_test
from tidegate.export.source import Source, source
from tidegate.export.stored import KINDS
from tidegate.export.templates import Choices, cmake, header, implementation


def export_c(
    model: Any,
    example: Any,
    out: str | os.PathLike[str],
    *,
    name: str = "model",
    weights: str = "float32",
    resets: bool = False,
    block: bool = False,
    blob: bool = False,
    wasm: bool = False,
) -> Path:
    """Write one step of a model as self-contained C99: no allocation, no libm, its state explicit.

    The model becomes `y_t, state' = f(x_t, state)`. Its recurrent layers (tidegate's or torch.nn's RNN, LSTM and GRU
    with all their options, in reverse with `block`; their cells; any cell in `tidegate.Recurrent` or `dynamic_rnn`)
    give the state, and so does the past of causal convolutions: steps of a constant that are put before a sequence.
    Around them may stand what the tracer of cells takes: Linear, LayerNorm, activations, sums, slices, and BatchNorm;
    Embedding, whose index is then a number of x. A copy of the model is exported, in eval and in float32.

    Args:
        model: a torch.nn.Module that is called as model(example) and returns y, or a tuple that begins with it.
        example: (1, T, I) or (T, 1, I), as the model takes it; (T, I) for one sequence of the layers' `batch_first`.
            Of a model of indices the same without I. The first 256 steps become the self-test.
        out: a folder, made if need be, for one export: what an earlier one wrote there goes, by its list, export.json.
            Other files stay; one of a name that is to be written is an error. All is replaced, or nothing.
        name: of the files and, in capitals, of the macros: letters, digits and _.
        weights: "float32"; "bfloat16" or "int8" for matrices of at least 16 rows and columns, the others stay float32.
            int8 by the arithmetic of `tidegate.quantization`: rows by a scale each, what they multiply as it comes. The
            self-test's numbers are those of these weights; README.md says how far they are from the model's own, and
            C's from them.
        resets: `NAME_process` also takes a mark for each step that begins a new sequence.
        block: over whole sequences instead of step by step, for models with layers that run in reverse or both ways:
            `NAME_process` alone, which takes x and y of a sequence and `NAME_ROOM_SIZE(steps)` floats to work in. An
            output of every step is then needed. Of rows of several lengths each is a call.
        blob: the weights in a file, NAME.bin, that a program maps or reads and hands to each call; `NAME_check` says
            whether it is the one. Else they are constants in NAME.c.
        wasm: also NAME.wasm, NAME.js, a module for browsers and Node, and index.html, a page that runs the self-test.

    Returns:
        the folder.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        ConversionError: the model is no such step; names the module and says why. Nothing is written.
        FileNotFoundError: `wasm`, and there is no clang or no wasm-ld.
    """
    _check_name(name)
    if weights not in KINDS:
        raise ValueError(f"weights: expected one of {', '.join(KINDS)}, got {weights!r}")
    if wasm and (block or blob):
        other = "block" if block else "blob"
        raise ValueError(
            f"wasm: expected False with {other}=True: the module for browsers is of steps and their weights"
        )
    folder = _folder(out)
    if wasm:
        wasm_files.check_tools()
    chosen = Choices(name, weights, resets, block, blob)
    compiled = compile_step(model, example, weights, block)
    made = source(compiled)
    texts = files(compiled, made, chosen)
    more = wasm_files.files(compiled, made, chosen, texts) if wasm else {}
    if blob:
        more[f"{name}.bin"] = made.constants.file()
    return write(folder, {**texts, **more})


def files(compiled: Compiled, made: Source, chosen: Choices) -> dict[str, str]:
    """The text of every file."""
    return {
        f"{chosen.name}.h": header(compiled, made, chosen),
        f"{chosen.name}.c": implementation(compiled, made, chosen),
        f"{chosen.name}_test.c": self_test(compiled, chosen),
        "CMakeLists.txt": cmake(chosen),
        "README.md": readme(compiled, made, chosen),
    }


# CMake's own targets.
_TARGETS = ("all", "clean", "help", "install", "package", "test")
# Headers that the files include: NAME.h would stand before them.
_HEADERS = ("arm_neon", "immintrin", "stddef", "stdint", "stdio", "time", "wasm_simd128")


def _folder(out: Any) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out: expected a path, got {type(out).__name__}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    return folder


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ValueError(f"name: expected letters, digits and _, beginning with a letter, got {name!r}")
    if name in _TARGETS:
        raise ValueError(f"name: expected none of {', '.join(_TARGETS)}, CMake's own targets, got {name!r}")
    if name in _HEADERS:
        raise ValueError(f"name: expected none of {', '.join(_HEADERS)}, the compiler's own headers, got {name!r}")
