# SPDX-License-Identifier: Apache-2.0
"""The tests run in one process per core, so each keeps to one thread unless it is about threads. What is drawn is the
same each time."""

import os

# Triton reads this when it is first imported, by whatever test comes first: its interpreter runs the GPU kernels here.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run; `make test-fuzz` draws others (--hypothesis-profile fuzz).
settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", derandomize=False, deadline=None, database=None, print_blob=True)
settings.load_profile("steady")

torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def poisoned_buffers() -> Generator[None]:
    """The kernels' buffers hold NaN until they are written; whatever instruction set a test chose is undone."""
    from tidegate.kernels import cpu

    cpu.operators().poison_buffers(True)
    yield
    cpu.operators().poison_buffers(False)
    cpu.operators().use_isa("")
