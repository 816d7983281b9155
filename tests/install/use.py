# SPDX-License-Identifier: Apache-2.0
"""What a user does first, run by the tests in an environment of its own: prints the backend, or why it is another."""

import torch

import tidegate as tg

torch.manual_seed(0)
theirs = torch.nn.GRU(12, 33, num_layers=2, bidirectional=True)
ours = tg.GRU(12, 33, num_layers=2, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(9, 3, 12)
for layer in (theirs, ours):
    layer(x)[0].square().sum().backward()
# float32: seen on every instruction set, 1.8e-7 of outputs up to 1, and 4e-7 of a gradient's largest entry.
torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=5e-7)
for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-6 * float(other.grad.abs().max()))
refused = ""
try:
    ours(torch.randn(9, 3, 13))
except RuntimeError as error:  # the kernels' refusal has come through torch and Python
    refused = str(error)
if "input.size(-1) must be equal to input_size. Expected 12, got 13" not in refused:
    raise SystemExit(f"a wrong input was not refused in torch's words: {refused!r}")
print(tg.explain(ours, x))
