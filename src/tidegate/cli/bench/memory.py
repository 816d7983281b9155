# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step: how far the resident set rises above where it stood before the step.

The resident set sees whatever a step touches, through torch's allocator or not: scratch of oneDNN and MKL, the autograd
graph's own nodes. It is read in a process of its own for each contender, on steps after the first: code that is
compiled once and buffers that stay are not counted. One reading is off by up to a third, for the heap's free pages lie
elsewhere each time, so the median of several is taken. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path
from statistics import median_low

import torch

from tidegate.cli.bench.candidates import Call, build_call, build_module
from tidegate.cli.bench.shapes import Case

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"
_READINGS = 5


def can_measure() -> bool:
    return sys.platform == "linux" and _CLEAR_REFS.exists()


def peak_of_training_step(contender: str, case: Case, threads: int) -> int:
    """Bytes. Meant for a process that does nothing else."""
    torch.set_num_threads(threads)
    return peak_of(build_call(build_module(contender, case), case))


def peak_of(call: Call) -> int:
    """Bytes of one of its calls after the first."""
    call()
    return median_low(_rise(call) for _ in range(_READINGS))


def _rise(call: Call) -> int:
    gc.collect()
    _give_freed_memory_back()
    _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK, encoding="ascii")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def _give_freed_memory_back() -> None:
    """Without it, the step would reuse what the step before left behind, and seem to need nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl gives freed memory back by itself
    if trim is not None:
        trim(0)
