# SPDX-License-Identifier: Apache-2.0
"""`Recurrent` one step at a time, for one session or for many whose number changes.

Letters: B rows (sessions), T steps.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate.nn import over_time
from tidegate.nn.named import check as check_names
from tidegate.nn.named import give
from tidegate.nn.over_time import AnyCell, Nest, mapped
from tidegate.streaming import Sessions

if TYPE_CHECKING:
    from tidegate.nn.recurrent import Recurrent

_FORMAT = "tidegate recurrent stream 1"


class RecurrentStream(Sessions):
    """Cells, one step at a time; made by `Recurrent.stream`.

    It holds the state, and its own copy of the cells, in eval mode, made once, when the stream is made: what happens to
    the module's parameters later is seen after `refresh`. It records no gradient. Any number of streams may run in as
    many threads; one stream is for one thread at a time. Whatever raises leaves it as it was.
    """

    _row_dim = 0

    def __init__(self, module: Recurrent, batch_size: int | None, state: Nest, dtype: torch.dtype | None) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"batch_size: expected an integer of at least 0, or None for one row, got {batch_size!r}")
        self._module = module
        given = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        floats = [tensor for tensor in (*module.parameters(), *given) if tensor.is_floating_point()]
        self._dtype = dtype or (floats[0].dtype if floats else torch.get_default_dtype())
        self._device = floats[0].device if floats else torch.empty(0).device
        self._batched = batch_size is not None or (len(given) > 0 and given[0].dim() > 1)
        rows = batch_size if batch_size is not None else given[0].shape[0] if self._batched else 1
        self._adopt()
        states = module._read_states(state)
        # Which layers' states were made by what the cell tells of itself, and not yet tried.
        self._is_told = [one is None for one in states]
        full = [self._zero_state(cell, rows) if s is None else s for cell, s in zip(self._cells, states, strict=True)]
        whole = full if module._is_stack else full[0]
        over_time.check_tensors(whole, "state")
        self._pattern = mapped(lambda leaf: leaf.new_zeros((1, *leaf.shape[self._batched :])), whole)  # (1, ...) each
        self._set_states(self._read_state(whole, rows))

    def step(self, input: Nest, **named: Nest) -> Nest:
        """Advance every row by one step, through all layers.

        Args:
            input: what the first cell takes, (B, ...) each; without B if the stream has no batch dimension.
            named: further inputs, likewise, for the cells that take them by their names, as `Recurrent.forward` does.

        Returns:
            the last layer's y_t, likewise.

        Raises:
            ValueError: input's rows, dtype or device are not the stream's, or it asks for a gradient.
        """
        data, named = self._read_inputs(input, named, 0)
        with torch.no_grad():
            output, finals = self._through(data, named, _step, 0)
            output = mapped(torch.clone, output)  # y_t may be a state
        self._set_states(pytree.tree_leaves(finals))
        return self._to_user(output, 0)

    def steps(self, chunk: Nest, **named: Nest) -> Nest:
        """Advance every row by several steps at once: as calling `step` on each.

        Args:
            chunk: (T, B, ...), with batch_first (B, T, ...); without B if the stream has no batch dimension.
            named: further inputs, likewise.

        Returns:
            the outputs in that layout.

        Raises:
            ValueError: as for `step`.
        """
        data, named = self._read_inputs(chunk, named, 1)
        with torch.no_grad():
            output, finals = self._through(data, named, over_time.run, 1)
        self._set_states(pytree.tree_leaves(finals))
        return self._to_user(output, 1)

    @property
    def state(self) -> Nest:
        """The state, a copy, as `Recurrent.forward` takes and returns it; without B if the stream has no batch
        dimension. Set, it must have the stream's rows, dtype and device; else ValueError, and the stream stays as it
        was."""
        states = [(state if self._batched else state.squeeze(0)).clone() for state in self._states]
        return pytree.tree_unflatten(states, self._structure)

    @state.setter
    def state(self, value: Nest) -> None:
        self._set_states(self._read_state(value, self.rows))

    def refresh(self) -> None:
        """Copy the module's cells again; the state goes on.

        Raises:
            ValueError: the module has moved to another device: make a new stream.
        """
        for parameter in self._module.parameters():
            if parameter.device != self._device:
                raise ValueError(
                    f"refresh: expected parameters on {self._device} as when the stream was made, "
                    f"got {parameter.device}; make a new stream"
                )
        self._adopt()

    def save(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The state as a dictionary of tensors on the CPU and words, for `load`; written to `path` if there is one."""
        saved: dict[str, Any] = {
            "format": _FORMAT,
            "batched": self._batched,
            "structure": str(self._structure),
            "states": [state.detach().clone().cpu() for state in self._states],
        }
        if path is not None:
            torch.save(saved, path)
        return saved

    def load(self, source: dict[str, Any] | str | os.PathLike[str]) -> None:
        """Go on from what `save` gave or wrote: its rows replace the stream's. The file is read as data only.

        Raises:
            ValueError: it is of other cells, of other sizes or of another dtype.
        """
        saved = source if isinstance(source, dict) else torch.load(source, weights_only=True, map_location="cpu")
        expected = {"format": _FORMAT, "batched": self._batched, "structure": str(self._structure)}
        for name, value in expected.items():
            came = saved.get(name) if isinstance(saved, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance]
            if came != value:
                raise ValueError(f"source: expected {name} {value!r}, got {came!r}")
        states: Any = saved.get("states")
        if not isinstance(states, list) or len(states) != len(self._patterns):
            raise ValueError(f"source: expected a list of {len(self._patterns)} states")
        self._check_states(states, None, "source", torch.device("cpu"))
        self._set_states([state.clone().to(self._device) for state in states])

    def __repr__(self) -> str:
        rows = f"rows={self.rows}" if self._batched else "no batch dimension"
        cells = ", ".join(over_time.name_of(cell) for cell in self._cells)
        return f"RecurrentStream({cells}, {rows}, {self._dtype}, {self._device})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the cells' copy: it is the module's, copied anew where the stream is loaded."""
        return {name: value for name, value in vars(self).items() if name != "_cells"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._adopt()

    @property
    def _structure(self) -> pytree.TreeSpec:
        return pytree.tree_structure(self._pattern)

    @property
    def _patterns(self) -> list[Tensor]:
        return pytree.tree_leaves(self._pattern)

    def _adopt(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # Of a weight that was replaced by a plain tensor, whose history can't be copied, the value.
            memo: dict[int, Any] = {
                id(value): value.detach().clone()
                for part in self._module.modules()
                for value in vars(part).values()
                if isinstance(value, Tensor) and not value.is_leaf
            }
            cells = copy.deepcopy(self._module.cells, memo)
            self._cells = cells.eval().requires_grad_(False).to(self._dtype)

    def _zero_state(self, cell: object, rows: int) -> Nest:
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        return over_time.zero_state_of(cell, like, rows if self._batched else None, "state")

    def _through(
        self,
        data: Nest,
        named: dict[str, Nest],
        run: Callable[[AnyCell, Nest, Nest], tuple[Nest, Nest]],
        lead: int,
    ) -> tuple[Nest, Nest]:
        """All layers, from the stream's state: y_t and the states. `lead`: how many dimensions stand before B."""
        module = self._module
        state = pytree.tree_unflatten(self._states, self._structure)
        finals: list[Nest] = []
        for k, (cell, one) in enumerate(zip(self._cells, state if module._is_stack else [state], strict=True)):
            runs, inputs = give(cell, data, named)
            if self._is_told[k]:
                lone = mapped(lambda leaf: leaf.new_zeros((1, *leaf.shape[lead + 1 :])), inputs)
                over_time.check_hidden_size(runs, lone, self._dtype)
                self._is_told[k] = False
            output, final = run(runs, inputs, one)
            finals.append(final)
            data = add_where_alike(output, data) if module.residual else output
        return data, (finals if module._is_stack else finals[0])

    def _set_states(self, states: Iterable[Tensor]) -> None:
        """Streams outlive inference_mode blocks."""
        with torch.inference_mode(False), torch.no_grad():
            self._states = tuple(state.clone() if state.is_inference() else state for state in states)

    def _zeros(self, rows: int) -> list[Tensor]:
        return [pattern.new_zeros((rows, *pattern.shape[1:])) for pattern in self._patterns]

    def _read_state(self, state: Nest, rows: int | None, name: str = "state") -> list[Tensor]:
        leaves, structure = pytree.tree_flatten(state)
        if structure != self._structure:
            raise ValueError(f"{name}: expected the structure {self._structure}, got {structure}")
        over_time.check_tensors(state, name)
        states = leaves if self._batched else [leaf.unsqueeze(0) for leaf in leaves]
        self._check_states(states, rows, name, self._device)
        return [one.detach().clone() for one in states]

    def _check_states(self, states: list[Any], rows: int | None, name: str, device: torch.device) -> None:
        faults: list[str] = []
        for state, pattern in zip(states, self._patterns, strict=True):
            if not isinstance(state, Tensor) or state.dim() == 0:
                raise ValueError(f"{name}: expected a tensor (B, ...)")
            expected = (states[0].shape[0] if rows is None else rows, *pattern.shape[1:])
            if tuple(state.shape) != expected:
                faults.append(f"{name}: expected (B, ...) = {expected}, got {tuple(state.shape)}")
            dtype = self._dtype if pattern.is_floating_point() else pattern.dtype
            if state.dtype != dtype:
                faults.append(f"{name}: expected {dtype}, got {state.dtype}")
            if state.device != device:
                faults.append(f"{name}: expected {device}, got {state.device}")
        if faults:
            raise ValueError("\n".join(faults))

    def _read_inputs(self, input: Nest, named: dict[str, Nest], lead: int) -> tuple[Nest, dict[str, Nest]]:
        if not named:
            return self._read_input(input, lead), named
        check_names(self._cells, named)
        return self._read_input((input, named), lead)

    def _read_input(self, input: Nest, lead: int) -> Nest:
        """The user's input as (B, ...), or with `lead` 1 as (T, B, ...)."""
        leaves, structure = pytree.tree_flatten(input)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(f"input: expected a tensor or a nest of them, got {type(input).__name__}")
        batch_first = bool(lead) and self._batched and self._module.batch_first
        place = 0 if batch_first else lead
        letters = "(T, " * lead + "(" * (1 - lead) + "B, " * self._batched + "...)"
        letters = "(B, T, ...)" if batch_first else letters
        faults: list[str] = []
        for leaf in leaves:
            if leaf.dim() < lead + self._batched or (self._batched and leaf.shape[place] != self.rows):
                faults.append(f"input: expected {letters} with B = {self.rows}, got {tuple(leaf.shape)}")
            if leaf.is_floating_point() and leaf.dtype != self._dtype:
                faults.append(f"input: expected the stream's {self._dtype}, got {leaf.dtype}")
            if leaf.device != self._device:
                faults.append(f"input: expected the stream's device {self._device}, got {leaf.device}")
            if leaf.requires_grad and torch.is_grad_enabled():
                faults.append("input: a stream records no gradient; detach it, or run the module over the sequence")
        if faults:
            raise ValueError("\n".join(faults))
        if batch_first:
            leaves = [leaf.transpose(0, 1) for leaf in leaves]
        return structure.unflatten(leaves if self._batched else [leaf.unsqueeze(lead) for leaf in leaves])

    def _to_user(self, output: Nest, lead: int) -> Nest:
        if not self._batched:
            return mapped(lambda y: y.squeeze(lead), output)
        return mapped(lambda y: y.transpose(0, 1), output) if lead and self._module.batch_first else output


def add_where_alike(output: Nest, input: Nest) -> Nest:
    """A residual connection: their sum if the two have one shape, else the output."""
    is_alike = isinstance(output, Tensor) and isinstance(input, Tensor) and output.shape == input.shape
    return output + input if is_alike else output


def _step(cell: AnyCell, input: Nest, state: Nest) -> tuple[Nest, Nest]:
    return over_time.split_result(cell(input, state), state)
