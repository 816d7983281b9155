# SPDX-License-Identifier: Apache-2.0
"""`Recurrent`: any cells as a layer over sequences, with all that the built-in layers take and return.

Letters: T steps, B rows. A nest is a tensor, or any nest of tuples, lists and dicts of tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate import dispatch
from tidegate.checks import check_lengths
from tidegate.nn import over_time, segments
from tidegate.nn.batch import Batch, read_batch
from tidegate.nn.named import check as check_names
from tidegate.nn.named import give, outside_of_graph
from tidegate.nn.options import read_flag, refuse_scripting
from tidegate.nn.over_time import AnyCell, Nest, mapped
from tidegate.nn.recurrent_stream import RecurrentStream, add_where_alike
from tidegate.sequences import Lengths, Resets

_OPTIONS = ("batch_first", "reverse", "dropout", "residual", "checkpoint_every")

Layer: TypeAlias = AnyCell | tuple[AnyCell, AnyCell]


class Recurrent(torch.nn.Module):
    """Cells over sequences: one, or a stack of unequal ones, each in one direction or in both.

    A cell is a module or function `(x_t, state) -> (y_t, state)` or `-> state`: tidegate's, torch.nn's or anybody's, as
    `dynamic_rnn` takes it. The parameters are the cells' own, named `cells.{layer}.` and the cell's name for it, of a
    pair `cells.{layer}.0.` (forward) and `cells.{layer}.1.` (reverse): `Recurrent(tg.GRUCell(40, 128))` has
    `cells.0.weight_ih`.

    Args:
        cells: one cell; a list of them, a stack, in which each layer's output is the next one's input; in a layer's
            place a pair, a tuple (forward, reverse), whose outputs are concatenated over the last dimension.
        batch_first: padded batches and resets are (B, T, ...), not (T, B, ...).
        reverse: every layer runs from each row's last valid step to its first; output[t] still belongs to input[t].
        dropout: the probability that an entry of what goes from one layer into the next is zeroed in training.
        residual: a layer's input is added to its output wherever the two have the same shape. What is added is the
            input before dropout.
        checkpoint_every: in training, a layer's states are kept every so many steps and what is between is computed
            again in the backward: for long sequences. What a cell draws is drawn as without. None to keep everything.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """

    checkpoint_every: int = 0
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        cells: Layer | Sequence[Layer],
        *,
        batch_first: bool = False,
        reverse: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_first, self.reverse = read_flag("batch_first", batch_first), read_flag("reverse", reverse)
        self.dropout, self.residual = _read_dropout(dropout), read_flag("residual", residual)
        self.checkpoint_every = segments.read_every(checkpoint_every)
        layers, self._is_stack = _read_layers(cells)
        self.cells = torch.nn.ModuleList(layers)
        if self.reverse and any(map(_is_pair, layers)):
            raise ValueError("reverse: expected False with a pair of cells, which runs both ways already")
        if self.dropout > 0 and len(layers) == 1:
            warnings.warn(f"dropout: drops out between layers; {dropout} does nothing with one layer", stacklevel=2)

    @property
    def has_pairs(self) -> bool:
        """Whether there is a layer that runs both ways."""
        return any(map(_is_pair, self.cells))

    def extra_repr(self) -> str:
        given = {name: getattr(self, name) for name in _OPTIONS}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value)

    def forward(
        self, input: object, hx: Nest | None = None, *, lengths: Lengths = None, resets: Resets = None, **named: Nest
    ) -> tuple[Any, Nest]:
        """Run the cells over a batch of sequences.

        Args:
            input: (T, B, ...), with batch_first (B, T, ...), of at least 3 dimensions; unbatched (T, I); a
                PackedSequence; a jagged nested tensor (B, T_b, ...); a tuple or dict of such tensors, all of one form,
                of which each step is given one slice; or a list of sequences, (T_b, ...) or a tuple or dict of those.
                Of a tuple or dict the first tensor's dimensions say whether it is a batch. T and B may be 0.
            hx: the initial state, with `cells` for its pattern: of one cell its state, (B, ...) in each tensor, without
                B if unbatched; of a pair a pair of those; of a stack a list of what its layers have. None, in any
                place, for zeros, if the cell tells its sizes as `dynamic_rnn` says. Rows in the order of the input's.
            lengths: (B,) integers, any order, dtype and device, zeros allowed; for a padded batch. Past a row's length
                the output is 0, the returned state is the one after its last valid step (the initial one if the length
                is 0), and a reverse direction starts at the last valid step.
            resets: bool (T, B), with batch_first (B, T); unbatched (T,); for a list, a list of (T_b,). A mark at t
                makes t the first step of a new sequence: forward, the state entering t is zero; in reverse, the state
                entering t-1 is zero. Gradients do not cross it.
            named: further inputs in the input's form and of its B and T, for every cell that takes an argument of the
                name beside x_t and the state: `timespans=dt` for a `cell(x_t, state, timespans)`, which is given a
                slice at each step.

        Returns:
            output: the last layer's y_t at every step, in the input's form; if y_t is a nest, a nest of that form.
            h_n: like hx: each cell's state after the last valid step, in reverse after the first step.

        Raises:
            ValueError, TypeError: names the argument, what was expected and what came.
        """
        uncompiled = segments.uncompiled(self.forward, self.checkpoint_every) or outside_of_graph(self.forward, named)
        if uncompiled is not None:
            return uncompiled(input, hx, lengths=lengths, resets=resets, **named)
        batch = read_batch(self._joined(input, named), lengths, resets, self.batch_first)
        if dispatch.is_plain():
            check_lengths(batch.lengths, batch.steps())
        data, named = batch.data if named else (batch.data, {})
        finals: list[Nest] = []
        added = False
        if self.residual and batch.lengths is not None and isinstance(data, Tensor):
            data = over_time.zero_past(batch.lengths, data)  # it may be added to outputs that are 0 there
        for k, state in enumerate(self._read_states(hx)):
            entering = data
            if k and self.dropout > 0 and self.training:
                entering = mapped(partial(batch.dropout, p=self.dropout), data)
            output, final = self._run_layer(k, entering, named, state, batch)
            finals.append(final)
            summed = add_where_alike(output, data) if self.residual else output
            added |= summed is not output
            data = summed
        if self.residual and not added:
            raise ValueError("residual: expected a layer whose output has its input's shape, got none")
        return mapped(batch.restore, data), (finals if self._is_stack else finals[0])

    if TYPE_CHECKING:

        def __call__(
            self,
            input: object,
            hx: Nest | None = None,
            *,
            lengths: Lengths = None,
            resets: Resets = None,
            **named: Nest,
        ) -> tuple[Any, Nest]: ...

    def _joined(self, input: object, named: dict[str, Nest]) -> Any:
        """The input, or a pair of it and the further ones: of a list of sequences a list of pairs."""
        if not named:
            return input
        cells: list[Any] = [cell for layer in self.cells for cell in (layer if _is_pair(layer) else [layer])]  # pyright: ignore
        check_names(cells, named)
        if not isinstance(input, list):
            return input, named
        for name, rows in named.items():
            if not isinstance(rows, list) or len(rows) != len(input):
                came = f"{len(rows)} of them" if isinstance(rows, list) else type(rows).__name__
                raise ValueError(f"{name}: expected a list of {len(input)} sequences, as the input is, got {came}")
        return [(row, {name: rows[k] for name, rows in named.items()}) for k, row in enumerate(input)]

    def _run_layer(self, k: int, inputs: Nest, named: dict[str, Nest], state: Nest, batch: Batch) -> tuple[Nest, Nest]:
        layer: Any = self.cells[k]
        place = f"[{k}]" if self._is_stack else ""
        every = self.checkpoint_every
        if not _is_pair(layer):
            return _run(layer, inputs, named, state, batch, self.reverse, every, place)
        ahead, final_ahead = _run(layer[0], inputs, named, state[0], batch, False, every, place + "[0]")
        back, final_back = _run(layer[1], inputs, named, state[1], batch, True, every, place + "[1]")
        if pytree.tree_structure(ahead) != pytree.tree_structure(back):
            raise ValueError(f"cells{place}: expected outputs y_t of one structure from both of the pair")
        return pytree.tree_map(_concatenated, ahead, back), (final_ahead, final_back)

    def _read_states(self, hx: Nest | None) -> list[Any]:
        """Of each layer what the user gave: None, a state, or a pair of these."""
        count = len(self.cells)
        states: Any = [None] * count if hx is None else hx if self._is_stack else [hx]
        if not isinstance(states, (list, tuple)) or len(states) != count:
            came = f"{len(states)} of them" if isinstance(states, (list, tuple)) else type(states).__name__
            raise ValueError(f"hx: expected a list of {count} states, one for each of cells, got {came}")
        return [_read_pair(s, f"hx[{k}]" if self._is_stack else "hx") if _is_pair(layer) else s
                for k, (layer, s) in enumerate(zip(self.cells, states, strict=True))]  # fmt: skip

    def stream(
        self, batch_size: int | None = None, state: Nest | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentStream:
        """Run the cells step by step, without gradients, dropout or a cell's own noise.

        Args:
            batch_size: rows (sessions) to begin with; None for one row without a batch dimension, or for as many as
                `state` has.
            state: as `forward` takes and returns it; zeros if None, if every cell tells its sizes.
            dtype: of the stream's input, state and weights; the parameters' if None.

        Returns:
            a RecurrentStream, with a copy of the cells as they are now.

        Raises:
            ValueError: a layer runs in reverse, `state` does not fit, or it is needed and is None.
        """
        if self.reverse or self.has_pairs:
            option = "reverse=False" if self.reverse else "one cell a layer"
            raise ValueError(
                f"stream: expected {option}; the reverse direction begins at a sequence's last step, "
                "which a stream has not seen"
            )
        return RecurrentStream(self, batch_size, state, dtype)


class Function(torch.nn.Module):
    """A function as a cell, so that it has a place among modules."""

    def __init__(self, function: AnyCell) -> None:
        super().__init__()
        self.function = function
        size = over_time.state_size(function)
        if size is not None:
            self.state_size = size

    def forward(self, *given: object) -> Any:
        return self.function(*given)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def _run(
    cell: AnyCell,
    inputs: Nest,
    named: dict[str, Nest],
    state: Nest,
    batch: Batch,
    reverse: bool,
    every: int,
    place: str,
) -> tuple[Nest, Nest]:
    """One cell in one direction, from a state as the user gave it to a state as he is given it."""
    over_time.check_features(cell, inputs, f"input of cells{place}" if place else "input")
    cell, inputs = give(cell, inputs, named)
    name = f"hx{place}"
    state = over_time.zero_state(cell, inputs, name) if state is None else batch.read_state(state, name)
    over_time.check_state(cell, state, batch.rows(), name)
    output, final = over_time.run(cell, inputs, state, batch.lengths, batch.resets, reverse, every=every)
    return output, batch.restore_state(final)


def _read_layers(cells: object) -> tuple[list[torch.nn.Module], bool]:
    """The layers, and whether they are a stack."""
    if not isinstance(cells, (list, torch.nn.ModuleList)):
        return [_read_layer(cells, "cells")], False
    layers: list[Any] = list(cells)
    if not layers:
        raise ValueError("cells: expected at least one cell, got an empty list")
    return [_read_layer(layer, f"cells[{k}]") for k, layer in enumerate(layers)], True


def _read_layer(layer: object, name: str) -> torch.nn.Module:
    if not isinstance(layer, (tuple, torch.nn.ModuleList)):
        return as_module(layer, name)
    if len(layer) != 2:
        raise ValueError(f"{name}: expected a pair (forward, reverse), got {len(layer)} cells; a stack is a list")
    return torch.nn.ModuleList(as_module(cell, f"{name}[{k}]") for k, cell in enumerate(layer))


def as_module(cell: object, name: str) -> torch.nn.Module:
    """A cell that was given as the argument `name`, as a module.

    Raises:
        TypeError: it is none.
    """
    if isinstance(cell, torch.nn.RNNBase):
        raise TypeError(f"{name}: expected a cell, got the layer {type(cell).__name__}, which needs no Recurrent")
    if isinstance(cell, type) or not callable(cell):
        came = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
        raise TypeError(f"{name}: expected a cell, a module or function of (x_t, state), got {came}")
    return cell if isinstance(cell, torch.nn.Module) else Function(cell)


def _is_pair(layer: object) -> bool:
    return isinstance(layer, torch.nn.ModuleList)


def _read_pair(state: object, name: str) -> Any:
    if state is None:
        return (None, None)
    if not isinstance(state, (list, tuple)) or len(state) != 2:
        raise ValueError(f"{name}: expected a pair of states (forward, reverse), got {type(state).__name__}")
    return state


def _read_dropout(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"dropout: expected a probability in 0..1, got {value!r}")
    return float(value)


def _concatenated(ahead: Tensor, back: Tensor) -> Tensor:
    return torch.cat((ahead, back), -1)
