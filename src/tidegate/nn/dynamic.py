# SPDX-License-Identifier: Apache-2.0
"""Any cell over time, with TensorFlow's `dynamic_rnn` for a model: state handled implicitly.

Letters: T steps, B rows, F output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import sequences
from tidegate.checks import check_lengths
from tidegate.nn.cells import GRUCell, LSTMCell, RecurrentCell, RNNCell

_OURS: dict[type, type[RecurrentCell]] = {
    RNNCell: RNNCell,
    LSTMCell: LSTMCell,
    GRUCell: GRUCell,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}


def dynamic_rnn(
    cell: Callable[..., Any],
    inputs: Tensor,
    sequence_length: Any = None,
    initial_state: Any = None,
    time_major: bool = False,
) -> tuple[Any, Any]:
    """Run a cell over every step of `inputs`.

    Args:
        cell: one of tidegate's or torch.nn's cells, which run whole on the fast kernels; or any module or function
            `(x_t, state) -> (y_t, state)` or `-> state`, whose output is then the state's first tensor.
        inputs: (B, T, ...), or with time_major (T, B, ...).
        sequence_length: (B,) integers in 0..T, any dtype and device, or None for T everywhere. Past it a row's outputs
            are 0 and its state stays.
        initial_state: the cell's state, a tensor or any nest of tuples, lists and dicts, rows (B, ...) in each. None
            for zeros, where the cell tells its sizes: a torch.nn.RNNCellBase, or a `state_size` attribute, an int or a
            nest of ints as in TensorFlow.

    Returns:
        outputs: (B, T, F), or with time_major (T, B, F); a nest if y_t is one.
        state: like initial_state.

    Raises:
        ValueError: names the argument: no initial state and no known size, a sequence_length of the wrong count, dtype
            or value, a cell whose result is neither (y_t, state) nor state.
    """
    if inputs.dim() < 2:
        raise ValueError(f"inputs: expected (B, T, ...) or time_major (T, B, ...), got {inputs.dim()} dimensions")
    data = inputs if time_major else inputs.transpose(0, 1)
    batch = data.shape[1]
    lengths = sequences.read_lengths(sequence_length, batch, "sequence_length")
    state = _zero_state(cell, data) if initial_state is None else initial_state
    whole = _as_sequence(cell)
    if whole is None:
        output, state = _loop(cell, data, lengths, state)
    else:
        states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
        output, *finals = whole.sequence(data, states, lengths)
        state = finals[0] if len(finals) == 1 else tuple(finals)
    if not time_major:
        output = pytree.tree_map(_batch_first, output)
    return output, state


def _as_sequence(cell: Any) -> RecurrentCell | None:
    """The cell as one of ours that can run whole; None where a hook, a subclass or a user's code must see each step."""
    ours = _OURS.get(type(cell))
    if ours is None or cell._forward_hooks or cell._forward_pre_hooks or cell._backward_hooks:
        return None
    if type(cell) is ours:
        return cell
    twin = ours.__new__(ours)
    twin.__setstate__(cell.__dict__)
    return twin


def _zero_state(cell: Any, data: Tensor) -> Any:
    size = getattr(cell, "state_size", None)
    if size is None and isinstance(cell, torch.nn.RNNCellBase):
        size = (cell.hidden_size,) * 2 if isinstance(cell, torch.nn.LSTMCell) else cell.hidden_size
    if size is None:
        raise ValueError(
            f"initial_state: needed, because a {type(cell).__name__} does not tell its state's size; "
            "pass initial_state, or give the cell a state_size"
        )

    def zeros(n: int) -> Tensor:
        return data.new_zeros((data.shape[1], n))

    return pytree.tree_map(zeros, size)


def _loop(cell: Callable[..., Any], data: Tensor, lengths: Tensor | None, state: Any) -> tuple[Any, Any]:
    steps = data.shape[0]
    if steps == 0:
        raise ValueError("inputs: expected at least one step for a cell of the user's own, got T = 0")
    check_lengths(lengths, steps, "sequence_length")
    outputs: list[Any] = []
    for t in range(steps):
        output, stepped = _split(cell(data[t], state), state)
        if lengths is not None:
            select = partial(_where_live, lengths.to(data.device) > t)
            output = pytree.tree_map(select, output)
            stepped = pytree.tree_map(select, stepped, state)
        outputs.append(output)
        state = stepped
    return pytree.tree_map(_stacked, *outputs), state


def _batch_first(steps: Tensor) -> Tensor:
    return steps.transpose(0, 1)


def _stacked(*steps: Tensor) -> Tensor:
    return torch.stack(steps)


def _where_live(live: Tensor, new: Tensor, old: Tensor | None = None) -> Tensor:
    rows = live.view(-1, *(1,) * (new.dim() - 1))
    return torch.where(rows, new, torch.zeros_like(new) if old is None else old)


def _split(result: Any, state: Any) -> tuple[Any, Any]:
    """A cell's result as (y_t, state): it is a state if it has the state's structure, else a pair that ends in one."""
    structure = pytree.tree_structure(state)
    if pytree.tree_structure(result) == structure:
        return pytree.tree_leaves(result)[0], result
    if isinstance(result, tuple) and len(result) == 2 and pytree.tree_structure(result[1]) == structure:
        return result
    raise ValueError(
        f"cell: expected (y_t, state) or state with the structure {structure}, got {type(result).__name__}"
    )
