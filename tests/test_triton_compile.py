# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels compile for sm_90, with room on a multiprocessor: no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import needs

SHARED = 227 * 1024  # bytes that a block may have on sm_90
STACK = 64  # bytes a thread: a few registers spilled


@needs.interpreted_triton
def test_every_kernel_compiles_and_fits(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_compile.py")],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {usage["kernel"] for usage in found} == {"step", "resident", "streamed", "persistent", "per_step"}
    assert {usage["kind"] for usage in found} >= {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"}
    for usage in found:
        assert usage["shared"] <= SHARED, usage
        assert usage["stack"] <= STACK, usage
        synchronised = usage["kernel"] == "persistent"
        assert (usage["acquires"] > 0, usage["releases"] > 0) == (synchronised, synchronised), usage
        exact = usage["precision"] == "ieee" and usage["dtype"] == "float32"
        if usage["kernel"] != "step" and not exact:
            assert usage["matrix"] != "none", usage
