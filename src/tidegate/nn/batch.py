# SPDX-License-Identifier: Apache-2.0
"""What `Recurrent` is given, in any form and as one tensor or a nest of them, read into a batch (T, B, ...).

Letters: T steps, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from tidegate import sequences
from tidegate.nn.over_time import Nest, check_tensors, mapped
from tidegate.sequences import Sequences


class Batch(NamedTuple):
    """A batch of sequences, time first, and the way back into the form in which it came.

    Attributes:
        data: (T, B, ...) each.
        lengths: (B,) int64, or None.
        resets: (T, B) bool, or None.
        restore: an output (T, B, ...) -> the input's form.
        dropout: between layers, (output, p) -> output.
        unbatched: it is one sequence, and the user's states have no B.
        order: where each row of data stands in the user's batch, and of each of the user's rows its place in data;
            None where they are the same.
    """

    data: Nest
    lengths: Tensor | None
    resets: Tensor | None
    restore: Callable[[Tensor], Any]
    dropout: Callable[..., Tensor] = F.dropout
    unbatched: bool = False
    order: tuple[Tensor | None, Tensor | None] = (None, None)

    def steps(self) -> int:
        return pytree.tree_leaves(self.data)[0].shape[0]

    def rows(self) -> int:
        return pytree.tree_leaves(self.data)[0].shape[1]

    def read_state(self, state: Nest, name: str) -> Nest:
        """The user's state, (B, ...) each in the rows' order."""
        check_tensors(state, name)
        return mapped(lambda leaf: leaf.unsqueeze(0), state) if self.unbatched else _selected(state, self.order[0])

    def restore_state(self, state: Nest) -> Nest:
        """A state as the user is given it."""
        return mapped(lambda leaf: leaf.squeeze(0), state) if self.unbatched else _selected(state, self.order[1])


def read_batch(input: object, lengths: object, resets: object, batch_first: bool) -> Batch:
    """Read an input as `Recurrent.forward` documents it.

    Raises:
        ValueError, TypeError: names the argument.
    """
    if isinstance(input, list):
        return _from_rows(input, lengths, resets)
    leaves, structure = pytree.tree_flatten(input, is_leaf=_is_packed)
    if not leaves or not all(isinstance(leaf, (Tensor, PackedSequence)) for leaf in leaves):
        came = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, PackedSequence))), "none")
        raise TypeError(f"input: expected Tensors, PackedSequences or a list of Tensors, got {came}")
    if any(_has_lengths(leaf) for leaf in leaves):
        parts = [sequences.from_form(leaf, lengths, resets, any_features=True) for leaf in leaves]
        return _from_parts(parts, structure, leaves[0])
    return _from_padded(leaves, structure, lengths, resets, batch_first)


def _from_padded(leaves: list[Tensor], structure: Any, lengths: object, resets: object, batch_first: bool) -> Batch:
    first = leaves[0]
    if first.dim() < 2:
        raise ValueError(f"input: expected a batch of at least 3 dimensions, or (T, I), got {first.dim()} dimensions")
    unbatched = first.dim() == 2
    shared = 1 if unbatched else 2
    layout = "(T, ...)" if unbatched else "(B, T, ...)" if batch_first else "(T, B, ...)"
    for leaf in leaves:
        if leaf.shape[:shared] != first.shape[:shared]:
            expected = f"{layout} like the first tensor, {tuple(first.shape[:shared])}"
            raise ValueError(f"input: expected {expected}, got {tuple(leaf.shape)}")
    if unbatched:
        marks = sequences.read_unbatched_marks(lengths, resets, first.shape[0], first.device)
        data = structure.unflatten([leaf.unsqueeze(1) for leaf in leaves])
        return Batch(data, None, marks, _lone, unbatched=True)
    time, batch = (1, 0) if batch_first else (0, 1)
    steps, rows = first.shape[time], first.shape[batch]
    read, marks = sequences.read_marks(lengths, resets, steps, rows, batch_first, first.device)
    if batch_first:
        return Batch(structure.unflatten([_swapped(leaf) for leaf in leaves]), read, marks, _swapped)
    return Batch(structure.unflatten(leaves), read, marks, _same)


def _from_rows(rows: list[Any], lengths: object, resets: object) -> Batch:
    """A list of sequences, each a tensor or a nest of them."""
    if not rows or all(isinstance(row, Tensor) for row in rows):
        return _from_parts([sequences.from_form(rows, lengths, resets, any_features=True)], None, None)
    flat = [pytree.tree_flatten(row) for row in rows]
    structure = flat[0][1]
    for k, (_, other) in enumerate(flat):
        if other != structure:
            raise ValueError(f"input[{k}]: expected the structure of the rows before it, {structure}, got {other}")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    parts = [sequences.from_form(list(column), lengths, resets, any_features=True) for column in columns]
    return _from_parts(parts, structure, None)


def _from_parts(parts: list[Sequences], structure: Any, first: object) -> Batch:
    """Of each tensor of a nest its sequences: all must have the same lengths, and a packed one's the same order."""
    one = parts[0]
    for part in parts[1:]:
        same = part.data.shape[:2] == one.data.shape[:2] and torch.equal(_known(part.lengths), _known(one.lengths))
        if not same or (part.packed_rows is None) is not (one.packed_rows is None):
            raise ValueError("input: expected tensors of one form and with the same lengths")
    data = one.data if structure is None else structure.unflatten([part.data for part in parts])
    order = (first.sorted_indices, first.unsorted_indices) if isinstance(first, PackedSequence) else (None, None)
    return Batch(data, one.lengths, one.resets, one.restore, one.dropout, order=order)


def _known(lengths: Tensor | None) -> Tensor:
    assert lengths is not None  # of every form that has lengths of its own
    return lengths


def _is_packed(part: object) -> bool:
    return isinstance(part, PackedSequence)


def _has_lengths(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence) or leaf.is_nested


def _selected(state: Nest, order: Tensor | None) -> Nest:
    return state if order is None else mapped(lambda leaf: leaf.index_select(0, order), state)


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def _lone(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1)


def _same(tensor: Tensor) -> Tensor:
    return tensor
