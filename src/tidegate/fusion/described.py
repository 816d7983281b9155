# SPDX-License-Identifier: Apache-2.0
"""What a cell is given and gives: nests of tensors, and what a plan is made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate.fusion.reading import computed

Kind = tuple[tuple[int, ...], torch.dtype]  # sizes of features, and dtype


class Described(NamedTuple):
    """What a plan is made for: the nests that a cell is given, a 0 for each tensor, with each tensor's features.

    Attributes:
        with_noise: the input is a pair of the input and the noise.
    """

    input: Any
    inputs: tuple[Kind, ...]
    state: Any
    states: tuple[Kind, ...]
    with_noise: bool

    def example(self) -> tuple[Any, Any]:
        """Some x_t and a state of this kind."""
        inputs, states = (
            [torch.empty((2, *sizes), dtype=dtype, device="meta") for sizes, dtype in kinds]
            for kinds in (self.inputs, self.states)
        )
        structures = pytree.tree_structure(self.input), pytree.tree_structure(self.state)
        return pytree.tree_unflatten(inputs, structures[0]), pytree.tree_unflatten(states, structures[1])

    def key(self) -> tuple[Any, ...]:
        if all(place == 0 or (type(place) is tuple and not any(place)) for place in (self.input, self.state)):
            return self  # a tensor or a plain tuple of them
        structures = pytree.tree_structure(self.input), pytree.tree_structure(self.state)
        return (*structures, self.inputs, self.states, self.with_noise)


def kinds_of(leaves: Sequence[Tensor], skipped: int, autocast: torch.dtype | None) -> tuple[Kind, ...]:
    # The length of a range is a number to a compiler, too, even where a size may change.
    sizes = [tuple([len(range(size)) for size in leaf.shape[skipped:]]) for leaf in leaves]
    # Under autocast, halves and float32 may meet.
    dtypes = [leaf.dtype if autocast is None else computed(leaf.dtype) for leaf in leaves]
    return tuple(zip(sizes, dtypes, strict=True))


def leaves_of(nest: Any) -> list[Any]:
    """The leaves of a nest: of the usual ones without a walk."""
    if type(nest) is Tensor:
        return [nest]
    if type(nest) is tuple and all(type(leaf) is Tensor for leaf in nest):  # pyright: ignore[reportUnknownVariableType]
        return [*nest]  # pyright: ignore[reportUnknownArgumentType]
    return pytree.tree_leaves(nest)


def places_of(nest: Any) -> Any:
    """The nest with a 0 for each leaf."""
    if type(nest) is Tensor:
        return 0
    if type(nest) is tuple and all(type(leaf) is Tensor for leaf in nest):  # pyright: ignore[reportUnknownVariableType]
        return (0,) * len(nest)  # pyright: ignore[reportUnknownArgumentType]
    return pytree.tree_map(_zero, nest)


def like(nest: Any, leaves: Sequence[Tensor]) -> Any:
    """The leaves in the nest's structure."""
    if type(nest) is Tensor:
        return leaves[0]
    if type(nest) is tuple and all(type(leaf) is Tensor for leaf in nest):  # pyright: ignore[reportUnknownVariableType]
        return tuple(leaves)
    return pytree.tree_unflatten(list(leaves), pytree.tree_structure(nest))


def _zero(leaf: Any) -> int:
    return 0
