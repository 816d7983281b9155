# SPDX-License-Identifier: Apache-2.0
"""An export for browsers and Node: the same C compiled to WebAssembly, a module around it, a page that tests it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from tidegate.export.compile import Compiled
from tidegate.export.source import Source
from tidegate.export.templates import Choices, state_size

_TOOLS = {"clang": "clang", "wasm-ld": "lld"}  # and Debian's and Ubuntu's packages of them
_STACK = 4096  # bytes beside a step's own numbers
_PIECES = Path(__file__).parent / "runtime"


def check_tools() -> None:
    """Raises:
    FileNotFoundError: names what is missing, and the packages that have it.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(_TOOLS[tool] for tool in missing)
        raise FileNotFoundError(f"wasm: {' and '.join(missing)} not found: on Debian and Ubuntu apt install {packages}")


def files(compiled: Compiled, made: Source, chosen: Choices, texts: dict[str, str]) -> dict[str, str | bytes]:
    """`NAME.wasm`, `NAME.js` and `index.html`.

    Args:
        texts: the C files.
    """
    name = chosen.name
    sizes = {
        "@NAME@": name,
        "@INPUT@": str(compiled.inputs),
        "@OUTPUT@": str(compiled.outputs),
        "@STATE@": str(max(state_size(compiled), 1)),
        "@MARKS@": "0, " if chosen.resets else "",
        "@TOLERANCE@": f"{compiled.tolerance:.1e}",
        "@EXAMPLE@": _array(compiled.example.flatten().tolist()),
        "@EXPECTED@": _array(compiled.expected.flatten().tolist()),
    }
    found: dict[str, str | bytes] = {f"{name}.wasm": _compiled(name, texts, made.stack)}
    for file, piece in ((f"{name}.js", "model.js"), ("index.html", "index.html")):
        text = (_PIECES / piece).read_text(encoding="utf-8")
        for word, value in sizes.items():
            text = text.replace(word, value)
        found[file] = text
    return found


def _array(values: list[float]) -> str:
    return json.dumps([float(f"{value:.9g}") for value in values])


def _compiled(name: str, texts: dict[str, str], stack: int) -> bytes:
    exports = [f"{name}_{function}" for function in ("reset", "step", "process")]
    with tempfile.TemporaryDirectory() as folder:
        for file in (f"{name}.h", f"{name}.c"):
            (Path(folder) / file).write_text(texts[file], encoding="utf-8")
        command = [
            *("clang", "--target=wasm32", "-std=c99", "-O3", "-msimd128", "-mbulk-memory", "-ffreestanding"),
            *("-nostdlib", f"{name}.c", "-o", f"{name}.wasm", "-Wl,--no-entry", "-Wl,--strip-all"),
            *(f"-Wl,--export={function}" for function in (*exports, "__heap_base")),
            f"-Wl,-z,stack-size={(stack + _STACK + 15) // 16 * 16}",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"wasm: clang failed: {done.stderr.strip()}")
        return (Path(folder) / f"{name}.wasm").read_bytes()
