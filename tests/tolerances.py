# SPDX-License-Identifier: Apache-2.0
"""How close is close: the one rule, and the floor of each dtype with its reason.

The oracle is float64. An error is the largest absolute difference from it, in units of the oracle's largest entry
where that is above 1, so that a gradient summed over many steps is judged as a sum is. A result passes if its error is
at most twice that of torch.nn in the same dtype, plus the floor.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOORS = {
    # The two sum the same products in another order; what is left is many times smaller than this.
    torch.float64: 1e-10,
    # Half a unit in the last place (2**-24) of a pre-activation of 16 to 32, which torch's own samples (inputs up to 9)
    # reach: where torch's rounding falls luckier than ours, its error does not pay for that. Worst of 1,500 draws: 24.
    torch.float32: 32 * 2**-24,
    # One unit in the last place (2**-8, 2**-11) of a number of size 1: results are rounded once a layer, and a
    # rounding that falls the other way from torch's is a whole unit.
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}


def error(result: Tensor, oracle: Tensor) -> float:
    """The largest difference, in units of the oracle's largest entry where that is above 1. NaN counts as infinite."""
    assert result.shape == oracle.shape, f"shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return 0.0
    difference = (result.detach().double() - oracle.detach().double()).abs().max()
    return (difference / oracle.detach().abs().max().clamp(min=1)).nan_to_num(nan=torch.inf).item()


def assert_close(ours: Tensor, theirs: Tensor, oracle: Tensor, what: str) -> None:
    """`ours` and torch.nn's `theirs`, in one dtype, against the float64 `oracle`: the rule above."""
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, torch.nn gives {theirs.dtype}"
    allowed = 2 * error(theirs, oracle) + FLOORS[ours.dtype]
    found = error(ours, oracle)
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"


def assert_equal_f64(ours: Tensor, expected: Tensor, what: str = "") -> None:
    """Both float64, equal to the floor of that dtype."""
    assert ours.dtype == expected.dtype == torch.float64, f"{what}: {ours.dtype}, {expected.dtype}"
    found = error(ours, expected)
    assert found <= FLOORS[torch.float64], f"{what}: error {found:.3g}"
