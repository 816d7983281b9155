# SPDX-License-Identifier: Apache-2.0
"""Weights in a file of their own, that a program maps."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import WARNINGS, Exported, Recurrent, error, library, pointer
from torch import Tensor, nn

import tidegate as tg


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Recurrent(nn.GRU(5, 33, num_layers=2, batch_first=True)), nn.LayerNorm(33), nn.Linear(33, 2))


def mapped(path: Path) -> tuple[Tensor, mmap.mmap]:
    """A file where the system maps it, at the start of a page."""
    with path.open("r+b") as file:
        pages = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(pages, dtype=torch.uint8), pages


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("flags", [["-O2", "-march=native"], ["-O2"], ["-Os", "-DPLAIN_C"]])
def test_the_numbers_are_those_of_constants(tmp_path: Path, weights: str, flags: list[str]) -> None:
    model, x = net(), torch.randn(1, 60, 5)
    constant = tg.export_c(model, x, tmp_path / "constant", weights=weights)
    folder = tg.export_c(model, x, tmp_path / "file", weights=weights, blob=True)
    assert sorted(path.name for path in folder.iterdir())[3] == "model.bin"
    file, _pages = mapped(folder / "model.bin")
    made = library(folder, flags)
    assert made.model_check(pointer(file), ctypes.c_size_t(file.numel())) == 0
    from_file = Exported(folder, made, pointer(file))
    assert torch.equal(from_file.process(x[0]), Exported(constant, library(constant, flags)).process(x[0]))
    assert "ALIGNED float" not in (folder / "model.c").read_text()


def test_another_file_is_refused(tmp_path: Path) -> None:
    model, x = net(), torch.randn(1, 60, 5)
    folder = tg.export_c(model, x, tmp_path / "a", blob=True)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    other = tg.export_c(model, x, tmp_path / "b", blob=True)
    check = library(folder).model_check
    content = (folder / "model.bin").read_bytes()
    size = len(content)
    assert f"#define MODEL_FILE_SIZE {size}\n" in (folder / "model.h").read_text()
    room = ctypes.create_string_buffer(size + 128)
    start = -ctypes.addressof(room) % 64

    def checked(content: bytes, size: int, shift: int = 0) -> int:
        address = ctypes.addressof(room) + start + shift
        ctypes.memmove(address, content, len(content))
        return check(ctypes.c_void_p(address), ctypes.c_size_t(size))

    assert checked(content, size) == 0
    assert [checked(content[:-1], size - 1), checked(content + b"\0", size + 1), checked(b"", 0)] == [1, 1, 1]
    assert [checked(content, size, 4), checked(content, size, 32)] == [2, 2]
    assert checked((other / "model.bin").read_bytes(), size) == 3
    assert checked(b"\0" + content[1:], size) == 3


@pytest.mark.parametrize("compiler", [["gcc", "-std=c99"], ["g++", "-x", "c++"]], ids=lambda words: words[0])
def test_its_own_test_in_c(tmp_path: Path, compiler: list[str]) -> None:
    folder, program = tg.export_c(net(), torch.randn(1, 60, 5), tmp_path / "out", blob=True), tmp_path / "test"
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover")
    files = [folder / "model.c", folder / "model_test.c"]
    done = run(*compiler, *WARNINGS, "-O1", "-march=native", *sanitize, *files, "-o", program)
    assert done.returncode == 0, done.stderr
    assert "largest difference" in run(program, folder / "model.bin").stdout
    for content, fault in ((b"", 1), ((folder / "model.bin").read_bytes() + b"\0", 1), (None, 1)):
        path = tmp_path / "other.bin"
        path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        done = run(program, path)
        assert done.returncode == 1
        assert f"model_check gave {fault}" in done.stdout


def test_it_keeps_nothing(tmp_path: Path) -> None:
    folder = tg.export_c(net(), torch.randn(1, 60, 5), tmp_path / "out", blob=True)
    assert run("gcc", "-O2", "-c", folder / "model.c", "-o", tmp_path / "model.o").returncode == 0
    kinds = {line.split()[-1]: line.split()[-2] for line in run("nm", tmp_path / "model.o").stdout.splitlines()}
    assert {name for name, kind in kinds.items() if kind in "BbDdCc"} == set()
    exports = {"model_check", "model_reset", "model_step", "model_process"}
    assert {name for name, kind in kinds.items() if kind == "T"} == exports


def test_a_model_without_weights(tmp_path: Path) -> None:
    x = torch.randn(1, 20, 3)
    folder = tg.export_c(nn.Tanh(), x, tmp_path, blob=True)
    file, _pages = mapped(folder / "model.bin")
    made = library(folder)
    assert made.model_check(pointer(file), ctypes.c_size_t(file.numel())) == 0
    assert error(Exported(folder, made, pointer(file)).process(x[0]), x[0].tanh()) < 1e-6


def test_the_readme_maps_it(tmp_path: Path) -> None:
    """The program that README.md shows, in a main."""
    folder = tg.export_c(net(), torch.randn(1, 60, 5), tmp_path / "out", blob=True)
    text = (folder / "README.md").read_text()
    include, lines = text.split("```c\n")[1].split("```")[0].split("\n\n", 1)
    headers = "".join(f"#include <{name}.h>\n" for name in ("fcntl", "stdlib", "sys/mman", "unistd"))
    numbers = "static float x[4 * MODEL_INPUT_SIZE], y[4 * MODEL_OUTPUT_SIZE]; const int steps = 4;"
    (folder / "main.c").write_text(f"{headers}{include}\nint main(void) {{ {numbers}\n{lines}\nreturn 0; }}\n")
    done = run("gcc", "-Wall", "-Werror", folder / "main.c", folder / "model.c", "-o", tmp_path / "main")
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "main", cwd=folder).returncode == 0
    (folder / "model.bin").write_bytes(b"")
    assert run(tmp_path / "main", cwd=folder).returncode != 0


def test_not_with_wasm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wasm: expected False with blob=True"):
        tg.export_c(net(), torch.randn(1, 60, 5), tmp_path, blob=True, wasm=True)


def run(*command: object, **options: Any) -> Any:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
