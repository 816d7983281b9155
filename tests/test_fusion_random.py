# SPDX-License-Identifier: Apache-2.0
"""Random cells, fused, against the eager loop over the same cells in float64."""

from __future__ import annotations

from typing import Any

import needs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_cells import RandomCell, cells

from tidegate.nn import over_time

pytestmark = needs.compiled_operators


def results(
    cell: RandomCell, fuse: bool, seed: int, steps: int, batch: int, options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Outputs and final states, and the gradients of everything."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    xs, states = [random(steps, batch, n) for n in cell.inputs], [random(batch, n) for n in cell.sizes]
    x = xs[0] if len(xs) == 1 else tuple(xs)
    state = states[0] if len(states) == 1 else tuple(states)
    y, final = over_time.run(cell, x, state, fuse=fuse, **options)
    found = [y, *(final if isinstance(final, tuple) else [final])]
    loss = sum((torch.sin(value) * torch.linspace(0.5, 1.5, value.shape[-1])).sum() for value in found)
    wanted = [*xs, *states, *cell.parameters()]
    return [value.detach() for value in found], list(torch.autograd.grad(loss, wanted, allow_unused=True))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cells(),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
    st.integers(1, 4),
    st.sampled_from(needs.ISAS or ("",)),
)
def test_a_fused_cell_is_the_eager_loop(
    cell: RandomCell,
    steps: int,
    batch: int,
    with_lengths: bool,
    with_resets: bool,
    reverse: bool,
    seed: int,
    threads: int,
    isa: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"reverse": reverse}
    if with_lengths:
        options["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
    if with_resets:
        options["resets"] = torch.rand(steps, batch, generator=generator) < 0.3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    operators: Any = torch.ops.tidegate_cpu
    operators.use_isa(isa)
    try:
        fused = results(cell, True, seed, steps, batch, options)
    finally:
        torch.set_num_threads(before)
        operators.use_isa("")
    eager = results(cell, False, seed, steps, batch, options)
    for a, b in zip([*fused[0], *fused[1]], [*eager[0], *eager[1]], strict=True):
        if a is None or b is None:
            # What nothing reaches: a loop says None, a fused one may say zeros.
            assert not any(c is not None and c.any() for c in (a, b))
            continue
        scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * scale, equal_nan=True)
