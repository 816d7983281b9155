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
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from tidegate import dispatch, sequences
from tidegate.checks import check_lengths
from tidegate.nn.cells import GRUCell, LSTMCell, RecurrentCell, RNNCell
from tidegate.nn.options import ACCELERATED

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
        if data.dim() != 3 or data.shape[-1] != whole.input_size:
            expected = f"3 dimensions and input_size = {whole.input_size} features"
            raise ValueError(f"inputs: expected {expected}, got shape {tuple(inputs.shape)}")
        states, structure = pytree.tree_flatten(state)
        if len(states) != len(whole.cell.states):
            expected = f"({', '.join(whole.cell.states)})" if len(whole.cell.states) > 1 else "one tensor"
            raise ValueError(f"initial_state: expected {expected}, got {len(states)} tensors in {structure}")
        if dispatch.is_plain():
            check_lengths(lengths, data.shape[0], "sequence_length")
        output, *finals = whole._sequence(data, tuple(states), lengths)
        state = pytree.tree_unflatten(finals, structure)
    if not time_major:
        output = pytree.tree_map(_batch_first, output)
    return output, state


def _as_sequence(cell: Any) -> RecurrentCell | None:
    """The cell as one of ours that can run whole; None where a hook, a subclass or a user's code must see each step."""
    ours = _OURS.get(type(cell))
    if ours is None or "forward" in vars(cell) or _has_any_global_hook():
        return None
    if cell._forward_hooks or cell._forward_pre_hooks or cell._backward_hooks or cell._backward_pre_hooks:
        return None
    if type(cell) is ours:
        return cell
    twin = ours.__new__(ours)
    twin.__setstate__({**cell.__dict__, ACCELERATED: True})
    return twin


def _zero_state(cell: Any, data: Tensor) -> Any:
    if isinstance(cell, RecurrentCell):
        states = tuple(data.new_zeros((data.shape[1], n)) for n in cell.state_sizes)
        return states[0] if len(states) == 1 else states
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
        live = None if lengths is None else lengths.to(data.device) > t
        # Padding may hold anything, and 0 * NaN is NaN in a weight's gradient.
        output, stepped = _split(cell(_zero_past(live, data[t]), state), state)
        outputs.append(pytree.tree_map(partial(_zero_past, live), output))
        state = stepped if live is None else pytree.tree_map(partial(_hold_past, live), stepped, state)
    return pytree.tree_map(_stacked, *outputs), state


def _zero_past(live: Tensor | None, step: Tensor) -> Tensor:
    return step if live is None else step.masked_fill(~_over_rows(live, step), 0)


def _hold_past(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(_over_rows(live, new), new, old)


def _over_rows(live: Tensor, tensor: Tensor) -> Tensor:
    return live.view(-1, *(1,) * (tensor.dim() - 1))


def _batch_first(steps: Tensor) -> Tensor:
    return steps.transpose(0, 1)


def _stacked(*steps: Tensor) -> Tensor:
    return torch.stack(steps)


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
