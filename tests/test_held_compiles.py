# SPDX-License-Identifier: Apache-2.0
"""held.cu, compiled without a GPU: every cell, dtype and form, at the sizes that are planned for it."""

import pytest
import torch

from tidegate.kernels.triton import held, plan

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
try:
    nvrtc.nvrtcVersion()
except RuntimeError:
    pytest.skip("NVIDIA's run-time compiler is not installed", allow_module_level=True)

H200 = plan.Device(False, False, 132, (9, 0))
DTYPES = {torch.bfloat16: "ieee", torch.float16: "ieee", torch.float32: "tf32"}


@pytest.mark.parametrize(("batch", "hidden_size"), [(1, 8), (16, 200), (64, 512), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_it_compiles_at_the_sizes_that_are_planned(kind, dtype, batch, hidden_size):
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    size = plan.Size(kind, gates, 100, batch, hidden_size, dtype, DTYPES[dtype], False)
    chosen = plan.choose(size, H200)
    assert chosen.kernel == "held"
    for form in (False, True):
        flags = held.Flags(0, 0, has_bias=True, has_lengths=form, has_resets=form, reverse=form)
        assert held.compiled(held.definitions(size, chosen.config, flags), (9, 0))
