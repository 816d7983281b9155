# SPDX-License-Identifier: Apache-2.0
"""A recurrent module one step at a time, for one session or for many whose number changes.

Letters: L layers, B rows (sessions), T steps, I input_size, H hidden_size, P proj_size of an LSTM that has one, else H.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tidegate import backends, flops, ops
from tidegate.call import STEP, TIME_MAJOR, UNBATCHED_STEP, Call, Layout
from tidegate.cell import States
from tidegate.checks import check
from tidegate.scope import scope

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMAT = "tidegate stream 1"

# Of a layout, what advances an input and the states, which it replaces in their memory, all or none.
Run = Callable[[Layout], Callable[..., Tensor]]


@dataclass(frozen=True)
class Source:
    """The module that a stream runs.

    Attributes:
        module: with a `cell`, options and weights: a layer or a cell of ours.
        layers: how many it has.
        layered: states are (L, B, .), as a layer's, not (B, .), as a cell's.
        batch_first: chunks are (B, T, I).
    """

    module: Any
    layers: int
    layered: bool
    batch_first: bool

    @property
    def cell(self) -> Any:
        return self.module.cell


class _Laid(NamedTuple):
    """A module's weights as streams run them.

    Attributes:
        call: over one step (1, 1, I), on a copy of the weights.
        zeros: its states, (L, 1, size).
        chosen: the backend.
        run: its way to run any number of steps.
        layout: what else `run` holds for.
    """

    call: Call
    zeros: States
    chosen: backends.Backend
    run: Run
    layout: str


# Streams of one module share its weights' copy, as long as the module's are the same.
_LAID: weakref.WeakKeyDictionary[torch.nn.Module, _Laid] = weakref.WeakKeyDictionary()


def _lay_out(source: Source, dtype: torch.dtype | None) -> _Laid:
    """A module's weights as they are now, laid out by the backend that is to run them."""
    flops.offer()
    module: Any = source.module
    with torch.inference_mode(False), torch.no_grad():
        found = module._weights()
        first = next(weight for weight in found if weight is not None)
        if source.cell.storage:
            if dtype not in (None, torch.float32):
                raise ValueError(f"dtype: expected float32, in which {source.cell.storage} weights run, got {dtype}")
            dtype, weights = torch.float32, found
        else:
            dtype = dtype or first.dtype
            weights = tuple(None if w is None else w.detach().to(dtype) for w in found)
        call = Call(source.cell, module._option_values(), first.new_zeros(0), (), weights, layers=source.layers)
        sizes = call.sizes()
        zeros = tuple(first.new_zeros((source.layers, 1, sizes[n]), dtype=dtype) for n in source.cell.states.values())
        call = call._replace(input=first.new_zeros((1, 1, sizes["I"]), dtype=dtype), states=zeros)
        check(call)
        chosen = backends.select(call, scope.named)
        layout = chosen.layout()
        laid = _LAID.get(module)
        if laid is not None and (laid.chosen, laid.layout) == (chosen, layout) and _is_same(laid.call, call):
            return laid
        call = call._replace(weights=tuple(None if w is None else w.clone() for w in weights))
        run = chosen.prepare(call) if chosen.prepare is not None else _unprepared(call, chosen)
        _LAID[module] = laid = _Laid(call, zeros, chosen, run, layout)
        return laid


def _is_same(kept: Call, call: Call) -> bool:
    if (kept.options, kept.layers) != (call.options, call.layers):
        return False
    for a, b in zip(kept.tensors, call.tensors, strict=True):
        if (a is None) != (b is None):
            return False
        if a is None or b is None:
            continue
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or not torch.equal(a, b):
            return False
    return True


def _unprepared(call: Call, chosen: backends.Backend) -> Run:
    """The way of a backend that lays nothing out."""

    def run(layout: Layout, input: Tensor, *states: Tensor) -> Tensor:
        is_step = layout >= STEP
        data = input if not is_step else input.view(1, -1, input.shape[-1])
        with backends.backend(chosen.name), torch.no_grad():
            output, *finals = ops.run(call._replace(input=data, states=states))
        for state, final in zip(states, finals, strict=True):
            state.copy_(final)
        return output.view(*input.shape[:-1], -1) if is_step else output

    return lambda layout: partial(run, layout)


class Sessions:
    """Rows of state that come and go: what every stream has beside its steps."""

    _row_dim: int  # of a state
    _batched: bool
    _device: torch.device
    _states: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """How many sessions there are: B."""
        return self._states[0].shape[self._row_dim]

    def reset(self, rows: object = None) -> None:
        """Put rows back to the zero state.

        Args:
            rows: an integer, several, an integer tensor or a bool mask (B,); None for all.

        Raises:
            ValueError: a row that is not there.
        """
        if rows is None:
            return self._set_states(self._zeros(self.rows))
        keep = torch.ones(self.rows, dtype=torch.bool, device="cpu")
        keep[self._read_rows(rows)] = False
        keep = keep.to(self._device)
        # Not a product: 0 * NaN would keep what is to be forgotten.
        return self._set_states([torch.where(self._over_features(keep, s), s, 0) for s in self._states])

    def add_rows(self, rows: object = 1) -> range:
        """Add sessions behind those that are there.

        Args:
            rows: how many, from the zero state; or their state, in the form of `state`.

        Returns:
            the new rows' numbers.

        Raises:
            ValueError: the stream has no batch dimension, or the state does not fit.
        """
        self._need_rows("add_rows")
        if isinstance(rows, int):
            if rows < 0:
                raise ValueError(f"rows: expected how many to add, at least 0, or their state, got {rows}")
            added = self._zeros(rows)
        else:
            added = self._read_state(rows, None, "rows")
        before = self.rows
        self._set_states([torch.cat(pair, self._row_dim) for pair in zip(self._states, added, strict=True)])
        return range(before, self.rows)

    def remove_rows(self, rows: object) -> None:
        """End sessions. The others keep their order and close the gaps.

        Args:
            rows: as for `reset`.

        Raises:
            ValueError: the stream has no batch dimension, or a row is not there.
        """
        self._need_rows("remove_rows")
        keep = torch.ones(self.rows, dtype=torch.bool, device="cpu")
        keep[self._read_rows(rows)] = False
        kept = keep.nonzero().squeeze(-1).to(self._device)
        self._set_states([state.index_select(self._row_dim, kept) for state in self._states])

    def clone(self) -> Self:
        """A stream from the same state, which goes its own way. It shares the weights' copy."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._set_states([state.clone() for state in self._states])
        return other

    __copy__ = clone

    def _zeros(self, rows: int) -> Iterable[Tensor]:
        """The zero state of so many rows."""
        raise NotImplementedError  # each kind of stream has its own

    def _read_state(self, state: object, rows: int | None, name: str = "state") -> Iterable[Tensor]:
        """A copy of what the user gave, checked. `rows` None: any number."""
        raise NotImplementedError  # each kind of stream has its own

    def _set_states(self, states: Iterable[Tensor]) -> None:
        """The only place where the state is replaced, in one assignment."""
        raise NotImplementedError  # each kind of stream has its own

    def _over_features(self, mask: Tensor, state: Tensor) -> Tensor:
        return mask.view(-1, *(1,) * (state.dim() - 1 - self._row_dim))

    def _need_rows(self, method: str) -> None:
        if not self._batched:
            raise ValueError(f"{method}: this stream has one row and no batch dimension; make it with batch_size=1")

    def _read_rows(self, rows: object) -> Tensor:
        """(n,) int64 on the CPU, each in 0..B-1."""
        index = (
            rows.cpu()
            if isinstance(rows, Tensor)
            else torch.as_tensor([rows] if isinstance(rows, int) else rows, device="cpu")
        )
        if index.dtype == torch.bool and index.shape == (self.rows,):
            return index.nonzero().squeeze(-1)
        if index.numel() == 0 and index.dim() == 1:
            return index.to(torch.int64)
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex() or index.dim() != 1:
            raise ValueError(f"rows: expected integers, or a bool mask ({self.rows},), got {rows!r}")
        index = index.to(torch.int64)
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= self.rows:
            raise ValueError(f"rows: expected numbers in 0..{self.rows - 1}, got {low if low < 0 else high}")
        return index


class Stream(Sessions):
    """A recurrent module, one step at a time; made by `stream` of a layer or a cell.

    It holds the state, and its own copy of the weights, made once, when the stream is made: what happens to the
    module's parameters later is seen after `refresh`. It records no gradient and drops nothing out. Any number of
    streams may run in as many threads; one stream is for one thread at a time. Whatever raises leaves it as it was.
    """

    _row_dim = 1  # (L, B, size)

    def __init__(self, source: Source, batch_size: int | None, state: object, dtype: torch.dtype | None) -> None:
        self._source = source
        self._batched = batch_size is not None
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"batch_size: expected an integer of at least 0, or None for one row, got {batch_size!r}")
        self._adopt(_lay_out(source, dtype))
        rows = 1 if batch_size is None else batch_size
        if state is not None and batch_size is None:
            first: Any = state[0] if isinstance(state, (tuple, list)) and state else state
            self._batched = isinstance(first, Tensor) and first.dim() == 2 + source.layered
            rows = int(first.shape[-2]) if self._batched else 1
        self._set_states(self._zeros(rows) if state is None else self._read_state(state, rows))

    def step(self, input: Tensor) -> Tensor:
        """Advance every row by one step, through all layers.

        Args:
            input: (B, I); (I,) if the stream was made for one row without a batch dimension.

        Returns:
            the last layer's h like input, (B, P) or (P,); a tensor of its own.

        Raises:
            ValueError: input's shape, dtype or device is another than the stream's, or it asks for a gradient.
        """
        if (
            not isinstance(input, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
            or input.shape != self._input_shape
            or input.dtype != self._dtype
            or input.device != self._device
            or input.requires_grad
        ):
            self._check_input(
                input, self._input_shape, "(batch_size, input_size)" if self._batched else "(input_size,)"
            )
        return self._advance(input, *self._states)

    def steps(self, chunk: Tensor) -> Tensor:
        """Advance every row by several steps at once: as calling `step` on each, and faster.

        Args:
            chunk: (T, B, I), for a layer with batch_first (B, T, I); (T, I) without a batch dimension.

        Returns:
            the outputs in that layout.

        Raises:
            ValueError: as for `step`.
        """
        batch_first = self._batched and self._source.batch_first
        letters = "(T, batch_size, input_size)" if self._batched else "(T, input_size)"
        letters = "(batch_size, T, input_size)" if batch_first else letters
        dims = 1 + len(self._input_shape)
        if not isinstance(chunk, Tensor) or chunk.dim() != dims:  # pyright: ignore[reportUnnecessaryIsInstance]
            came = f"{chunk.dim()} dimensions" if isinstance(chunk, Tensor) else type(chunk).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"input: expected a tensor {letters}, got {came}")
        time = chunk.shape[1 if batch_first else 0]
        shape = (self.rows, time, self._input_size) if batch_first else (time, *self._input_shape)
        self._check_input(chunk, shape, letters)
        if batch_first:
            chunk = chunk.transpose(0, 1)
        if time == 1:
            output = self.step(chunk[0]).unsqueeze(0)
            return output.transpose(0, 1) if batch_first else output
        if time == 0 or self.rows == 0:
            output, states = chunk.new_empty((*chunk.shape[:-1], self._states[0].shape[-1])), self._states
        else:
            data = chunk if self._batched else chunk.unsqueeze(1)
            states = tuple(state.clone() for state in self._states)
            output = self._run(TIME_MAJOR)(data, *states)
            output = output if self._batched else output.squeeze(1)
        self._set_states(states)
        return output.transpose(0, 1) if batch_first else output

    @property
    def backend(self) -> str:
        """The backend that runs it; chosen when the stream is made, and at `refresh`."""
        return self._laid.chosen.name

    @property
    def state(self) -> Any:
        """The state, a copy: h, for an LSTM (h, c), as the module itself returns it.

        Of a layer (L, B, P) and (L, B, H), of a cell (B, H); without B if the stream has no batch dimension. Set, it
        must have the stream's rows, dtype and device; else ValueError, and the stream stays as it was.
        """
        states = tuple(self._to_user(state).clone() for state in self._states)
        return states[0] if len(states) == 1 else states

    @state.setter
    def state(self, value: object) -> None:
        self._set_states(self._read_state(value, self.rows))

    def refresh(self) -> None:
        """Read the module's parameters again; the state goes on.

        Raises:
            ValueError: the module has moved to another device or changed its sizes: make a new stream.
        """
        laid, before = _lay_out(self._source, self._dtype), self._laid.call
        names = ("input", *self._source.cell.states)
        for name, now, then in zip(names, laid.call.tensors, before.tensors, strict=False):
            if now is not None and then is not None and (now.shape, now.device) != (then.shape, then.device):
                raise ValueError(
                    f"refresh: expected {name} of {then.shape[-1]} on {then.device} as when the stream was made, "
                    f"got {now.shape[-1]} on {now.device}; make a new stream"
                )
        self._adopt(laid)
        self._set_states(self._states)

    def save(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The state as a dictionary of tensors on the CPU and words, for `load`; written to `path` if there is one."""
        named = {
            name: state.detach().clone().cpu()
            for name, state in zip(self._source.cell.states, self._states, strict=True)
        }
        saved: dict[str, Any] = {
            "format": _FORMAT,
            "cell": self._source.cell.name,
            "batched": self._batched,
            "states": named,
        }
        if path is not None:
            torch.save(saved, path)
        return saved

    def load(self, source: dict[str, Any] | str | os.PathLike[str]) -> None:
        """Go on from what `save` gave or wrote: its rows replace the stream's. The file is read as data only.

        Raises:
            ValueError: it is of another cell, of other sizes or of another dtype.
        """
        saved = source if isinstance(source, dict) else torch.load(source, weights_only=True, map_location="cpu")
        expected = {"format": _FORMAT, "cell": self._source.cell.name, "batched": self._batched}
        for name, value in expected.items():
            came = saved.get(name) if isinstance(saved, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance]
            if came != value:
                raise ValueError(f"source: expected {name} {value!r}, got {came!r}")
        named = saved.get("states")
        if not isinstance(named, dict):
            raise ValueError(f"source: expected states by name, got {type(named).__name__}")
        states: list[Any] = [named.get(name) for name in self._source.cell.states]
        self._check_states(states, None, "source", torch.device("cpu"))
        self._set_states([state.clone().to(self._device) for state in states])

    def __repr__(self) -> str:
        rows = f"rows={self.rows}" if self._batched else "no batch dimension"
        cell, layers = self._source.cell.name, self._source.layers
        return f"Stream({cell}, layers={layers}, {rows}, {self._dtype}, {self._device}, backend={self.backend})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights: they are the module's, laid out anew where it is loaded."""
        return {name: value for name, value in vars(self).items() if name not in ("_laid", "_run", "_advance")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._adopt(_lay_out(self._source, self._dtype))
        self._set_states(self._states)

    def _adopt(self, laid: _Laid) -> None:
        self._laid, self._run = laid, laid.run
        input = laid.call.input
        self._dtype, self._device, self._input_size = input.dtype, input.device, input.shape[-1]

    def _set_states(self, states: Iterable[Tensor]) -> None:
        """The only place where the state is replaced, in one assignment. Streams outlive inference_mode blocks."""
        with torch.inference_mode(False), torch.no_grad():
            plain = torch.contiguous_format
            self._states = tuple(s.clone(memory_format=plain) if s.is_inference() else s.contiguous() for s in states)
        self._input_shape = (self.rows, self._input_size) if self._batched else (self._input_size,)
        self._advance = self._run(STEP if self._batched else UNBATCHED_STEP)

    def _zeros(self, rows: int) -> States:
        return tuple([s.new_zeros(s.shape[0], rows, s.shape[-1]) for s in self._laid.zeros])

    def _to_user(self, state: Tensor) -> Tensor:
        state = state if self._source.layered else state.squeeze(0)
        return state if self._batched else state.squeeze(-2)

    def _read_state(self, state: object, rows: int | None, name: str = "state") -> list[Tensor]:
        """What the user gave as (L, B, .), copied. `rows` None: any number."""
        names = self._source.cell.states
        given: Any = (state,) if len(names) == 1 else state
        if not isinstance(given, (tuple, list)) or len(given) != len(names):
            raise ValueError(f"{name}: expected ({', '.join(names)}), got {type(state).__name__}")
        for one in given:
            expected = 1 + self._source.layered + self._batched
            if not isinstance(one, Tensor) or one.dim() != expected:
                came = f"{one.dim()} dimensions" if isinstance(one, Tensor) else type(one).__name__
                raise ValueError(f"{name}: expected a tensor of {expected} dimensions, got {came}")
        states = [one if self._batched else one.unsqueeze(-2) for one in given]
        states = states if self._source.layered else [one.unsqueeze(0) for one in states]
        self._check_states(states, rows, name, self._device)
        return [one.detach().clone() for one in states]

    def _check_states(self, states: list[Any], rows: int | None, name: str, device: torch.device) -> None:
        faults: list[str] = []
        for letter, state, pattern in zip(self._source.cell.states, states, self._laid.zeros, strict=True):
            if not isinstance(state, Tensor) or state.dim() != 3:
                raise ValueError(f"{name}: expected a tensor {letter} (layers, rows, size)")
            expected = (self._source.layers, states[0].shape[1] if rows is None else rows, pattern.shape[-1])
            if tuple(state.shape) != expected:
                faults.append(f"{name}: expected {letter} (layers, rows, size) = {expected}, got {tuple(state.shape)}")
            if state.dtype != self._dtype:
                faults.append(f"{name}: expected {letter} of {self._dtype}, got {state.dtype}")
            if state.device != device:
                faults.append(f"{name}: expected {letter} on {device}, got {state.device}")
        if faults:
            raise ValueError("\n".join(faults))

    def _check_input(self, input: object, shape: tuple[int, ...], letters: str) -> None:
        if not isinstance(input, Tensor):
            raise ValueError(f"input: expected a tensor {letters}, got {type(input).__name__}")
        faults: list[str] = []
        if tuple(input.shape) != shape:
            faults.append(f"input: expected {letters} = {shape}, got {tuple(input.shape)}")
        if input.dtype != self._dtype:
            faults.append(f"input: expected the stream's {self._dtype}, got {input.dtype}")
        if input.device != self._device:
            faults.append(f"input: expected the stream's device {self._device}, got {input.device}")
        if input.requires_grad and torch.is_grad_enabled():
            faults.append("input: a stream records no gradient; detach it, or run the module over the sequence")
        if faults:
            raise ValueError("\n".join(faults))
