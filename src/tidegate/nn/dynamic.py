# SPDX-License-Identifier: Apache-2.0
"""Any cell over time, with TensorFlow's `dynamic_rnn` for a model: state handled implicitly.

Letters: T steps, B rows, F output features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch, sequences
from tidegate.checks import check_lengths
from tidegate.nn import over_time
from tidegate.nn.named import check as check_names
from tidegate.nn.named import give, outside_of_graph
from tidegate.nn.over_time import AnyCell, Nest
from tidegate.sequences import Lengths


def dynamic_rnn(
    cell: AnyCell,
    inputs: Nest,
    sequence_length: Lengths = None,
    initial_state: Nest = None,
    time_major: bool = False,
    *,
    fuse: bool | None = None,
    **named: Nest,
) -> tuple[Any, Any]:
    """Run a cell over every step of `inputs`.

    Args:
        cell: one of tidegate's or torch.nn's cells, which run whole on the fast kernels; or any module or function
            `(x_t, state) -> (y_t, state)` or `-> state`, whose output is then the state's first tensor. A pair whose
            first part alone has the state's structure is taken as (state, y_t).
        inputs: (B, T, ...), or with time_major (T, B, ...); or a nest of such tensors, of which the cell is given
            one of (B, ...) at each step, as GRU-D's (x, mask, delta). T and B may be 0.
        sequence_length: (B,) integers in 0..T, any dtype and device, or None for T everywhere. Past it a row's outputs
            are 0 and its state stays.
        initial_state: the cell's state, a tensor or any nest of tuples, lists and dicts, rows (B, ...) in each. None
            for zeros, where the cell tells its sizes: a torch.nn.RNNCellBase; a `state_size` attribute, an int or a
            nest of ints as in TensorFlow; or `hidden_size`, of a cell with one state.
        fuse: None to run the sequence fused if it can be, True to raise an error with every reason if it can't, False
            to call the cell at every step.
        named: further inputs, (B, T, ...) or (T, B, ...) likewise, by the names of the arguments that the cell takes
            beside x_t and the state, as ncps' cells take the time since the step before.

    Returns:
        outputs: (B, T, F), or with time_major (T, B, F); a nest if y_t is one.
        state: like initial_state.

    Raises:
        ValueError: names the argument: inputs that disagree in B or T, no initial state and no known size, a
            sequence_length of the wrong count, dtype or value, a cell whose result is neither (y_t, state) nor state.
        UnsupportedError: `fuse` is True, and the cell can't run fused.
    """
    uncompiled = outside_of_graph(dynamic_rnn, named)
    if uncompiled is not None:
        return uncompiled(cell, inputs, sequence_length, initial_state, time_major, fuse=fuse, **named)
    check_names([cell], named)
    joined = (inputs, named) if named else inputs
    steps, batch = _sizes(joined, time_major)
    data = joined if time_major else pytree.tree_map(_swapped, joined)
    lengths = sequences.read_lengths(sequence_length, batch, "sequence_length")
    over_time.check_features(cell, inputs, "inputs")
    if dispatch.is_plain():
        check_lengths(lengths, steps, "sequence_length")
    if named:
        cell, data = give(cell, *data)
    state = over_time.zero_state(cell, data) if initial_state is None else initial_state
    over_time.check_state(cell, state, batch, "initial_state")
    output, state = over_time.run(cell, data, state, lengths, fuse=fuse)
    return (output if time_major else pytree.tree_map(_swapped, output)), state


def _sizes(inputs: Nest, time_major: bool) -> tuple[int, int]:
    """T and B, of every tensor of `inputs`."""
    layout = "time_major (T, B, ...)" if time_major else "(B, T, ...)"
    leaves = pytree.tree_leaves(inputs)
    if not leaves:
        raise ValueError(f"inputs: expected a tensor {layout} or a nest of them, got an empty {type(inputs).__name__}")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"inputs: expected a tensor {layout} or a nest of them, got {type(leaf).__name__}")
        if leaf.dim() < 2:
            raise ValueError(f"inputs: expected (B, T, ...) or time_major (T, B, ...), got {leaf.dim()} dimensions")
        if leaf.shape[:2] != leaves[0].shape[:2]:
            raise ValueError(
                f"inputs: expected {layout} like the first, {tuple(leaves[0].shape[:2])}, got {tuple(leaf.shape)}"
            )
    first, second = leaves[0].shape[:2]
    return (first, second) if time_major else (second, first)


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)
