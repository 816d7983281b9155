# SPDX-License-Identifier: Apache-2.0
"""Exported C on aarch64: NEON by GCC's vectors, run by qemu-user. Debian: gcc-aarch64-linux-gnu, qemu-user."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import WARNINGS, Recurrent, run
from torch import nn

import tidegate as tg

GCC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
missing = [tool for tool in (GCC, QEMU) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def net(kind: Any, size: int) -> nn.Module:
    torch.manual_seed(size)
    return nn.Sequential(
        Recurrent(kind(19, size, 2, batch_first=True)), nn.LayerNorm(size), nn.Linear(size, 3), nn.GELU()
    )


@pytest.mark.parametrize("flags", [["-O3"], ["-O2", "-DPLAIN_C"]], ids=["NEON", "plain"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("kind", "size"), [(nn.GRU, 35), (nn.LSTM, 64), (nn.RNN, 7)])
def test_its_own_test_passes(tmp_path: Path, kind: Any, size: int, weights: str, flags: list[str]) -> None:
    folder = tg.export_c(net(kind, size), torch.randn(1, 60, 19), tmp_path / "out", weights=weights)
    program = tmp_path / "test"
    files = (folder / "model.c", folder / "model_test.c")
    run(GCC, "-std=c99", *WARNINGS, *flags, "-static", *files, "-o", program)
    assert "largest difference" in run(QEMU, program)


def test_over_whole_sequences_from_a_file(tmp_path: Path) -> None:
    layers = nn.GRU(5, 20, 2, bidirectional=True, batch_first=True)
    folder = tg.export_c(Recurrent(layers), torch.randn(1, 60, 5), tmp_path / "out", block=True, blob=True)
    program = tmp_path / "test"
    files = (folder / "model.c", folder / "model_test.c")
    run(GCC, "-std=c99", *WARNINGS, "-O3", "-static", *files, "-o", program)
    assert "largest difference" in run(QEMU, program, folder / "model.bin")


def test_the_vectors_are_the_machines(tmp_path: Path) -> None:
    """Of float32 products `fmla` on four lanes, and no call."""
    folder = tg.export_c(net(nn.GRU, 64), torch.randn(1, 60, 19), tmp_path / "out")
    made = tmp_path / "model.o"
    run(GCC, "-std=c99", "-O3", "-c", folder / "model.c", "-o", made)
    assert "fmla\tv" in run("aarch64-linux-gnu-objdump", "-d", made)
    undefined = {line.split()[-1] for line in run("aarch64-linux-gnu-nm", "-u", made).splitlines()}
    assert undefined <= {"memcpy", "memset", "memmove"}
