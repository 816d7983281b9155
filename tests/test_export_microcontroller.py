# SPDX-License-Identifier: Apache-2.0
"""Exported C on microcontrollers: how large it is, what it calls, and under qemu PyTorch's numbers.

A Cortex-M0+ runs ARMv6-M, of which a Cortex-M3 knows every instruction: qemu has a board of that with memory enough.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import WARNINGS, run
from torch import Tensor, nn

import tidegate as tg

GCC, QEMU = "arm-none-eabi-gcc", "qemu-system-arm"
pytestmark = pytest.mark.skipif(shutil.which(GCC) is None, reason=f"{GCC} is not installed")
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")

HERE = Path(__file__).parent / "microcontroller"
M4F = ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")
M0 = ("-mcpu=cortex-m0plus", "-mthumb")
BOARDS = {M4F: "mps2-an386", M0: "mps2-an385"}


class Audio(nn.Module):
    def __init__(self, kind: Any, size: int) -> None:
        super().__init__()
        self.rec = kind(1, size, batch_first=True)
        self.lin = nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.rec(x)[0])


def exported(folder: Path, kind: Any, size: int = 64, weights: str = "float32") -> Path:
    torch.manual_seed(0)
    return tg.export_c(Audio(kind, size), torch.randn(1, 40, 1), folder, weights=weights)


def sizes(folder: Path, processor: tuple[str, ...]) -> dict[str, int]:
    """Bytes of code, constants and variables."""
    made = folder / "model.o"
    run(GCC, "-std=c99", "-Os", *WARNINGS, *processor, "-c", folder / "model.c", "-o", made)
    found = {"text": 0, "rodata": 0, "data": 0, "bss": 0}
    for line in run("arm-none-eabi-size", "-A", made).splitlines():
        words = line.split()
        kind = words[0].split(".")[1] if words and words[0].startswith(".") else ""
        if kind in found:
            found[kind] += int(words[1])
    return found


@pytest.mark.parametrize(("kind", "most"), [(nn.GRU, 1024), (nn.LSTM, 1536)])
def test_code_is_small(tmp_path: Path, kind: Any, most: int) -> None:
    found = sizes(exported(tmp_path, kind), M4F)
    assert found["text"] <= most
    assert found["data"] == found["bss"] == 0


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("processor", [M4F, M0], ids=["M4F", "M0+"])
def test_it_calls_no_library_but_the_compilers(tmp_path: Path, processor: tuple[str, ...], weights: str) -> None:
    folder = exported(tmp_path, nn.GRU, weights=weights)
    sizes(folder, processor)
    undefined = {line.split()[-1] for line in run("arm-none-eabi-nm", "-u", folder / "model.o").splitlines()}
    # __aeabi_fadd and its like are arithmetic where there is no floating-point unit.
    assert all(name.startswith("__aeabi_") for name in undefined - {"memset", "memcpy", "memmove"})


def test_constants_take_what_the_header_says(tmp_path: Path) -> None:
    whole = sizes(exported(tmp_path / "a", nn.GRU), M4F)["rodata"]
    short = sizes(exported(tmp_path / "b", nn.GRU, weights="int8"), M4F)["rodata"]
    parameters = sum(parameter.numel() for parameter in Audio(nn.GRU, 64).parameters())
    assert 4 * (parameters - 128) <= whole <= 4 * parameters + 256  # two biases are one
    assert short < whole / 3


@needs_qemu
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("processor", [M4F, M0], ids=["M4F", "M0+"])
def test_under_qemu(tmp_path: Path, processor: tuple[str, ...], weights: str) -> None:
    folder = exported(tmp_path, nn.LSTM, 20, weights)
    program = tmp_path / "test.elf"
    sources = (folder / "model.c", folder / "model_test.c", HERE / "startup.c")
    options = ("--specs=rdimon.specs", "-T", HERE / "link.ld", "-DSTACK_TOP=0x200000", "-Wl,--no-warn-rwx-segments")
    run(GCC, "-std=c99", "-Os", *processor, *sources, *options, "-o", program)
    said = run(QEMU, "-M", BOARDS[processor], "-nographic", "-semihosting", "-kernel", program)
    assert "largest difference" in said
