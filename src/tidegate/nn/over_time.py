# SPDX-License-Identifier: Apache-2.0
"""A cell over time: the one way in which `dynamic_rnn` and `Recurrent` run any cell, whoever wrote it.

Letters: T steps, B rows. A nest is a tensor, or any nest of tuples, lists and dicts of tensors.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch, fusion
from tidegate.errors import UnsupportedError
from tidegate.fusion.reading import split_result
from tidegate.nn import segments
from tidegate.nn.cells import RecurrentCell
from tidegate.nn.known_cells import TorchCell, as_sequence, states_of_kind
from tidegate.scope import Ran, scope

Nest: TypeAlias = Any  # what a nest is cannot be said in types
AnyCell: TypeAlias = Callable[..., Any]

# Cells that `check_hidden_size` has let pass.
_TRIED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


@runtime_checkable
class DrawsNoise(Protocol):
    """A cell with random numbers in it. They are drawn before the loop, for all steps at once, so that its step stays a
    function of what it is given: the step is then called as `cell(x_t, state, noise_t)`."""

    def draw_noise(self, inputs: Nest, state: Nest) -> Nest | None:
        """Draw for a whole sequence, from torch's default generator.

        Args:
            inputs: (T, B, ...) each.
            state: (B, ...) each.

        Returns:
            a nest of (T, B, ...), of which step t is given [t]; what is one mask for all steps is expanded over T,
            which costs no memory. None if there is nothing to draw, as in eval: the step is then given no noise.
        """
        ...


def run(
    cell: AnyCell,
    inputs: Nest,
    state: Nest,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    *,
    fuse: bool | None = None,
    every: int = 0,
) -> tuple[Nest, Nest]:
    """Run a cell over all steps. Shapes and the values of `lengths` are the caller's to check.

    Args:
        cell: `(x_t, state) -> (y_t, state)` or `-> state`, whose y_t is then the state's first tensor. If it
            `DrawsNoise`, also `(x_t, state, noise_t)`.
        inputs: (T, B, ...) each; T and B may be 0.
        state: the state that enters the first step, (B, ...) each.
        lengths: (B,) int64 in 0..T, or None for T everywhere. Past it a row's outputs are 0 and its state stays; in
            reverse a row begins at its last valid step.
        resets: (T, B) bool, or None. A mark at t makes t the first step of a new sequence: forward, the state entering
            t is zero; in reverse, the state entering t-1 is zero. A mark past a row's length means nothing.
        reverse: from the last step to the first; outputs[t] still belongs to inputs[t].
        fuse: None to run the whole sequence at once where that can be done, True to raise where it can't, False to call
            the cell at every step.
        every: recorded, the steps of a segment, between which states are kept and inside which nothing is; 0 to keep
            everything.

    Returns:
        outputs, (T, B, ...) each, and the state after the last step, like `state`. Of T = 0 the outputs have the shape
        that a step on zeros gives, which is then run once without gradient.

    Raises:
        ValueError: the cell's result is neither (y_t, state) nor state.
        UnsupportedError: `fuse` is True, and the cell has to be called at every step.
    """
    whole = None if fuse is False else as_sequence(cell)
    if whole is None and scope.observer is not None:
        return scope.observer(CellRun(cell, inputs, state, fuse, lengths, resets, reverse))
    noise = draw_noise(cell, inputs, state) if whole is None else None
    given = (inputs,) if noise is None else (inputs, noise)
    run_part = partial(_run_part, cell, whole, reverse, fuse)
    if segments.applies(pytree.tree_leaves(inputs)[0].shape[0], every):
        return segments.run_cell(run_part, given, state, segments.Marks(lengths, resets), reverse, every, cell)
    return run_part(given, state, segments.Marks(lengths, resets))


def _run_part(
    cell: AnyCell,
    whole: RecurrentCell | TorchCell | None,
    reverse: bool,
    fuse: bool | None,
    given: tuple[Nest, ...],
    state: Nest,
    marks: segments.Marks,
) -> tuple[Nest, Nest]:
    """A sequence, or a segment of one. `given` are the inputs and, if there is any, the noise."""
    inputs, noise = given if len(given) == 2 else (*given, None)
    lengths, resets = marks
    if whole is not None:
        states, structure = pytree.tree_flatten(state)
        output, *finals = whole._sequence(inputs, tuple(states), lengths, resets, reverse)
        return output, pytree.tree_unflatten(finals, structure)
    if fuse is not False:
        reasons, result = fusion.run(cell, inputs, state, noise, lengths, resets, reverse, fuse is True)
        if result is not None:
            if scope.trace is not None:
                scope.trace.append(Ran("fused", "forward", describe(cell, inputs, state), 1))
            return result
        if fuse:
            raise UnsupportedError(f"cell: a {name_of(cell)} runs step by step: {'; '.join(reasons)}")
    return _loop(cell, inputs, state, noise, lengths, resets, reverse)


class CellRun(NamedTuple):
    """A cell over a sequence, as `run` was given it: what `scope.observer` is handed in place of a call."""

    cell: AnyCell
    inputs: Nest
    state: Nest
    fuse: bool | None
    lengths: Tensor | None
    resets: Tensor | None
    reverse: bool


def state_size(cell: object) -> Nest | None:
    """Features of the cell's state, an int or a nest of ints; None if the cell does not tell.

    It tells by being one of ours or of torch.nn's, by `state_size` (TensorFlow's and ncps' name), or, having one
    state, by `hidden_size`.
    """
    if isinstance(cell, RecurrentCell):
        return cell.state_sizes[0] if len(cell.state_sizes) == 1 else cell.state_sizes
    size = getattr(cell, "state_size", None)
    if size is not None:
        return size
    hidden_size = getattr(cell, "hidden_size", None)
    if isinstance(cell, torch.nn.LSTMCell):
        return (hidden_size, hidden_size)
    return hidden_size if isinstance(hidden_size, int) else None


def zero_state(cell: object, inputs: Nest, name: str = "initial_state") -> Nest:
    """The zero state of a cell for `inputs`, (T, B, ...) each: of their first floating dtype, else the parameters'.

    Raises:
        ValueError: the cell does not tell its state's size; `name` is the argument that would give it.
    """
    leaves: list[Tensor] = pytree.tree_leaves(inputs)
    parameters = list(cell.parameters()) if isinstance(cell, torch.nn.Module) else []
    like = next((tensor for tensor in (*leaves, *parameters) if tensor.is_floating_point()), None)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    state = zero_state_of(cell, leaves[0].new_empty(0, dtype=dtype), leaves[0].shape[1], name)
    check_hidden_size(cell, mapped(lambda leaf: leaf.new_zeros((1, *leaf.shape[2:])), inputs), dtype)
    return state


def zero_state_of(cell: Any, like: Tensor, batch: int | None, name: str) -> Nest:
    """The zero state that a cell tells the sizes of, (B, size) each, or (size,) if `batch` is None.

    Raises:
        ValueError: it tells none.
    """
    size = state_size(cell)
    if size is None:
        raise ValueError(
            f"{name}: needed, because a {name_of(cell)} does not tell its state's size; "
            f"pass {name}, or give the cell a state_size"
        )

    def zeros(n: int) -> Tensor:
        return like.new_zeros((n,) if batch is None else (batch, n))

    return pytree.tree_map(zeros, size)


def check_hidden_size(cell: Any, input: Nest, dtype: torch.dtype) -> None:
    """Let a cell that tells its size by `hidden_size` alone do a step on one row, (1, ...).

    A cell of two states may have one, too. Given one tensor, it would take two rows of a larger batch for its states;
    of one row it can't.
    """
    size = getattr(cell, "hidden_size", None)
    if size is None or getattr(cell, "state_size", None) is not None or isinstance(cell, torch.nn.RNNCellBase):
        return
    is_kept = isinstance(cell, torch.nn.Module) and not torch.compiler.is_compiling()
    if is_kept and cell in _TRIED:
        return
    first: Tensor = pytree.tree_leaves(input)[0]
    with dispatch.keeping_generators() if is_kept else contextlib.nullcontext():
        _step_without_gradient(cell, input, first.new_zeros((1, size), dtype=dtype))
    if is_kept:
        _TRIED.add(cell)


def check_state(cell: object, state: Nest, batch: int, name: str) -> None:
    """Every tensor of a state has B rows, and one of our own cells has as many tensors as it has states.

    Raises:
        ValueError: names the argument, `name`.
    """
    states, structure = pytree.tree_flatten(state)
    names = states_of_kind(cell)
    if names and len(states) != len(names):
        expected = f"({', '.join(names)})" if len(names) > 1 else "one tensor"
        raise ValueError(f"{name}: expected {expected}, got {len(states)} tensors in {structure}")
    if names:
        return  # sizes are checked where they are used
    check_tensors(state, name)
    for one in states:
        if one.dim() == 0 or one.shape[0] != batch:
            raise ValueError(f"{name}: expected (B, ...) = ({batch}, ...), got {tuple(one.shape)}")


def check_tensors(state: Nest, name: str) -> None:
    """It is a nest of tensors and of nothing else.

    Raises:
        ValueError: names the argument, `name`.
    """
    for one in pytree.tree_leaves(state):
        if not isinstance(one, Tensor):
            raise ValueError(f"{name}: expected a tensor (B, ...) or a nest of them, got {type(one).__name__}")


def check_features(cell: object, inputs: Nest, name: str) -> None:
    """One of our own cells, where it runs whole, takes one tensor (T, B, I) or (B, T, I) of its input_size.

    Raises:
        ValueError: names the argument, `name`.
    """
    whole = as_sequence(cell)
    if whole is None or (isinstance(inputs, Tensor) and inputs.dim() == 3 and inputs.shape[-1] == whole.input_size):
        return
    came = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__}"
    raise ValueError(f"{name}: expected 3 dimensions and input_size = {whole.input_size} features, got {came}")


def draw_noise(cell: AnyCell, inputs: Nest, state: Nest) -> Nest | None:
    """What the cell draws for a whole sequence; None if it draws nothing."""
    draw: Any = getattr(cell, "draw_noise", None)
    return None if draw is None else draw(inputs, state)


def mapped(function: Callable[[Tensor], Tensor], nest: Nest) -> Nest:
    """A nest of what the function makes of each tensor."""
    return pytree.tree_map(function, nest)


def at(t: int, nest: Nest) -> Nest:
    """Step t of a nest of (T, ...)."""
    return mapped(lambda leaf: leaf[t], nest)


def valid_steps(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    """(T, B) bool, False past each row's length."""
    return torch.arange(steps, device=device).unsqueeze(-1) < lengths.to(device)


def zero_past(lengths: Tensor, tensor: Tensor) -> Tensor:
    """(T, B, ...), 0 past each row's length."""
    return _zero_where(~valid_steps(lengths, tensor.shape[0], tensor.device), tensor)


def fresh_steps(resets: Tensor | None, valid: Tensor | None, reverse: bool) -> Tensor | None:
    """(T, B) bool: the state that enters step t is zero."""
    if resets is None or not reverse:
        return resets
    # In reverse, the state that leaves t + 1 enters t; a mark on padding separates nothing.
    resets = resets if valid is None else resets & valid
    return torch.cat((resets[1:], torch.zeros_like(resets[:1])))


def name_of(cell: AnyCell) -> str:
    """A cell in an error's words."""
    return type(getattr(cell, "around", cell)).__name__


def describe(cell: AnyCell, inputs: Nest, state: Nest) -> str:
    """A cell over a sequence in one line: LayerNormLSTMCell(T=50, B=8, float32, cpu)."""
    cell = getattr(cell, "around", cell)
    function = getattr(cell, "function", cell)
    name = getattr(function, "__qualname__", type(cell).__name__)
    first: Tensor = pytree.tree_leaves(inputs)[0]
    like: Tensor = pytree.tree_leaves(state)[0] if pytree.tree_leaves(state) else first
    steps, batch = first.shape[:2]
    return f"{name}(T={steps}, B={batch}, {str(like.dtype).removeprefix('torch.')}, {first.device})"


def _loop(
    cell: AnyCell,
    inputs: Nest,
    state: Nest,
    noise: Nest | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Nest, Nest]:
    first: Tensor = pytree.tree_leaves(inputs)[0]
    steps, device = first.shape[0], first.device
    valid = None if lengths is None else valid_steps(lengths, steps, device)
    if valid is not None:
        # Padding may hold anything, and 0 * NaN is NaN in a weight's gradient.
        inputs = mapped(partial(_zero_where, ~valid), inputs)
    if steps == 0:
        return outputs_without_steps(cell, inputs, state, noise), state
    fresh = fresh_steps(resets, valid, reverse)
    outputs: list[Nest] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        entering = state if fresh is None else mapped(partial(_zero_where, fresh[t]), state)
        given = (at(t, inputs), entering) if noise is None else (at(t, inputs), entering, at(t, noise))
        output, stepped = split_result(cell(*given), state)
        outputs.append(output)
        state = stepped if valid is None else pytree.tree_map(partial(_choose, valid[t]), stepped, state)
    stacked = pytree.tree_map(_stacked, *(outputs[::-1] if reverse else outputs))
    return stacked if valid is None else mapped(partial(_zero_where, ~valid), stacked), state


def outputs_without_steps(cell: AnyCell, inputs: Nest, state: Nest, noise: Nest | None) -> Nest:
    """Outputs of T = 0."""
    given = (inputs,) if noise is None else (inputs, noise)
    zeros = mapped(lambda leaf: leaf.new_zeros(leaf.shape[1:]), given)
    output = _step_without_gradient(cell, zeros[0], state, *zeros[1:])
    return mapped(lambda y: y.new_zeros((0, *y.shape)), output)


@torch.no_grad()
def _step_without_gradient(cell: AnyCell, input: Nest, state: Nest, *noise: Nest) -> Nest:
    """y_t of one step."""
    return split_result(cell(input, state, *noise), state)[0]


def _zero_where(mask: Tensor, tensor: Tensor) -> Tensor:
    return tensor.masked_fill(_over_features(mask, tensor), 0)


def _choose(keep: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(_over_features(keep, new), new, old)


def _over_features(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.view(*mask.shape, *(1,) * (tensor.dim() - mask.dim()))


def _stacked(*steps: Tensor) -> Tensor:
    return torch.stack(steps)
