# SPDX-License-Identifier: Apache-2.0
"""A plan held against the cell's own step, once, on random numbers.

What the operations of a graph do not say: `no_grad`, hooks on tensors, whatever asks whether autograd records, or
whether autocast is on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch
from tidegate.fusion.reading import read, split_result

if TYPE_CHECKING:
    from tidegate.fusion.described import Described
    from tidegate.fusion.plan import Plan


def under(autocast: torch.dtype | None) -> torch.autocast:
    """Autocast to a dtype, or none."""
    return torch.autocast("cpu", autocast, enabled=autocast is not None)


@torch.no_grad()
def differs_for_one_row(
    made: Plan, step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool, autocast: torch.dtype | None
) -> bool:
    """A batch of one row is one of the sizes that a step can tell from others: whether it does something else there."""
    leaves = pytree.tree_leaves(inputs)
    if not dispatch.is_plain() or leaves[0].shape[0] == 0:
        return False

    def stepped(x: Any, state: Any) -> list[Tensor]:
        with dispatch.keeping_generators(), under(autocast):
            y, leaving = split_result(step(*((x[0], state, x[1]) if with_noise else (x, state))), state)
        return [*pytree.tree_leaves(y), *pytree.tree_leaves(leaving)]

    x = pytree.tree_map(_first, inputs)
    expected = stepped(x, state)
    y, final = made.run(read(step).tensors, [leaf[:1] for leaf in leaves], pytree.tree_leaves(state), None, None, False)
    if _are_close([*(leaf[0] for leaf in y), *final], expected, autocast):
        return False
    nudged = stepped(pytree.tree_map(_nudged, x), pytree.tree_map(_nudged, state))
    return _are_close(nudged, expected, autocast)  # else a rounding goes as far


def difference(made: Plan, step: Callable[..., Any], described: Described, autocast: torch.dtype | None) -> str:
    """What is other in a random step's results or gradients than in the cell's own; "" for nothing.

    Args:
        autocast: what the cell's own step is run under.
    """
    from tidegate.fusion.trace import Cell

    cell = Cell(step, described.with_noise)
    own = [_own_twin(tensor) for tensor in cell.tensors]
    structures = pytree.tree_structure(described.input), pytree.tree_structure(described.state)

    def planned(x: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        y, final = made.run(own, [leaf.unsqueeze(0) for leaf in x], state, None, None, False)
        return [*(leaf[0] for leaf in y), *final]

    def stepped(x: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        entering = pytree.tree_unflatten(state, structures[1])
        with under(autocast):
            y, leaving = split_result(cell.call(own, pytree.tree_unflatten(x, structures[0]), entering), entering)
        return [*pytree.tree_leaves(y), *pytree.tree_leaves(leaving)]

    for seed in range(_DRAWS):
        x, state = _drawn(described, seed)
        try:
            expected, found = (_with_gradients(run, x, state, own) for run in (stepped, planned))
            if len(found) == len(expected) and _are_close(found, expected, autocast):
                return ""
            # Where the cell's own results go as far for a few roundings of its numbers, by a divisor near 0 say, a draw
            # tells nothing.
            nudged = _with_gradients(stepped, [_nudged(leaf) for leaf in x], [_nudged(leaf) for leaf in state], own)
        except Exception as error:
            # Of a cell that cannot do a step on random numbers nothing can be said.
            return f"a step on random numbers raised {type(error).__name__}: {error}"
        if _are_close(nudged, expected, autocast):
            break
    return "its results or gradients are not what its operations say"


def _drawn(described: Described, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs and states of three rows."""
    generator = torch.Generator().manual_seed(seed)

    def random(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        value = torch.randn((3, *sizes), generator=generator)
        if dtype.is_floating_point:
            return value.to(dtype).requires_grad_()
        # Of integers zeros, which are indices into whatever they may be.
        return value > 0 if dtype is torch.bool else torch.zeros((3, *sizes), dtype=dtype)

    return [random(*kind) for kind in described.inputs], [random(*kind) for kind in described.states]


def _nudged(leaf: Tensor) -> Tensor:
    """The same numbers but for some roundings."""
    if not leaf.is_floating_point():
        return leaf
    return (leaf.detach() * (1 + 64 * torch.finfo(leaf.dtype).eps)).requires_grad_(leaf.requires_grad)


def _with_gradients(
    run: Callable[..., list[Tensor]], x: list[Tensor], state: list[Tensor], own: list[Tensor]
) -> list[Tensor | None]:
    """A step's results, and the gradients of a sum of them for what it was given and reads."""
    outcome = run(x, state)
    wanted = [tensor for tensor in (*x, *state, *own) if tensor.requires_grad]
    recorded = [leaf for leaf in outcome if leaf.requires_grad]
    loss = sum((leaf.float() * torch.linspace(0.5, 1.5, leaf.numel()).view(leaf.shape)).sum() for leaf in recorded)
    gradients: Any = torch.autograd.grad(loss, wanted, allow_unused=True) if isinstance(loss, Tensor) else ()
    return [*(leaf.detach() for leaf in outcome), *gradients]


def dtypes_of_loop(
    step: Callable[..., Any], inputs: Any, state: Any, with_noise: bool, autocast: torch.dtype, with_lengths: bool
) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """Of y and of the final state, as the cell's own steps give them under autocast.

    Args:
        inputs: (T, B, ...) each.
        with_lengths: some rows keep their state.
    """
    x, entering = pytree.tree_map(_zeros_of_a_step, inputs), pytree.tree_map(_zeros_of_a_row, state)
    outputs: list[list[torch.dtype]] = []
    with torch.no_grad(), dispatch.keeping_generators(), under(autocast):
        for _ in range(min(2, pytree.tree_leaves(inputs)[0].shape[0])):
            given = (x[0], entering, x[1]) if with_noise else (x, entering)
            y, leaving = split_result(step(*given), entering)
            outputs.append([leaf.dtype for leaf in pytree.tree_leaves(y)])
            entering = pytree.tree_map(_promoted, leaving, entering) if with_lengths else leaving
    y_dtypes = [torch.promote_types(*pair) for pair in zip(outputs[0], outputs[-1], strict=True)]
    return y_dtypes, [leaf.dtype for leaf in pytree.tree_leaves(entering)]


def _are_close(
    found: Sequence[Tensor | None], expected: Sequence[Tensor | None], autocast: torch.dtype | None = None
) -> bool:
    """Wide enough for any rounding: what is looked for is another computation. None is zero."""
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            if any(one is not None and bool((one != 0).any()) for one in (a, b)):
                return False
            continue
        if a.shape != b.shape or (a.dtype != b.dtype and autocast is None):
            return False
        is_coarse = autocast is not None and a.dtype is not torch.float64
        tolerance = 0.1 if is_coarse else _TOLERANCES[a.dtype]
        a, b = a.double(), b.double()
        finite = b[b.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        if not torch.allclose(a, b, 0, tolerance * max(scale, 1e-3), equal_nan=True):
            return False
    return True


# Of which the first that tells something decides.
_DRAWS = 4
_TOLERANCES: dict[torch.dtype, float] = defaultdict(lambda: 0.1, {torch.float64: 1e-6, torch.float32: 2e-3})


def _own_twin(tensor: Tensor) -> Tensor:
    """A parameter or buffer with the same values, on the CPU, apart from it."""
    if tensor.device.type == "meta":
        return torch.ones(tensor.shape, dtype=tensor.dtype) * 0.1
    return tensor.detach().cpu().clone().requires_grad_(tensor.requires_grad)


def _first(leaf: Tensor) -> Tensor:
    return leaf[0]


def _zeros_of_a_step(leaf: Tensor) -> Tensor:
    return leaf.new_zeros((1, *leaf.shape[2:]))


def _zeros_of_a_row(leaf: Tensor) -> Tensor:
    return leaf.new_zeros((1, *leaf.shape[1:]))


def _promoted(leaf: Tensor, other: Tensor) -> Tensor:
    return leaf.to(torch.promote_types(leaf.dtype, other.dtype))
