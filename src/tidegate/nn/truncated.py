# SPDX-License-Identifier: Apache-2.0
"""`tbptt`: truncated backpropagation through time, a chunk of a long sequence at a time.

Source: Williams and Peng 1990, of whose h steps back from every h' steps this is h = h'. Letters: T steps, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate.nn.layers import RecurrentLayer
from tidegate.nn.recurrent import Recurrent
from tidegate.sequences import Lengths

Nest: TypeAlias = Any  # a tensor, or any nest of tuples, lists and dicts of tensors
Marks: TypeAlias = "Tensor | Callable[[Nest], Tensor] | None"


class tbptt:  # noqa: N801  (it is called like a function; an object because it has a state)
    """Go through a long sequence in chunks, each with the state that the one before left, its graph cut.

    ::

        for (x, target), output in tg.tbptt(layer, (x, target), steps=200):
            loss(output, target).backward()
            optimizer.step()
            optimizer.zero_grad()

    Each chunk is run when it is asked for, so that it sees the weights that the step before has made. Iterating anew
    starts at the first chunk, from `state` as it was given; but an iterator of pieces can be gone through once only.

    Args:
        module: a layer of tidegate's or torch.nn's, a `Recurrent`, or any `(input, state) -> (output, state)`; it is
            given `resets=` and `lengths=` if they are given here.
        data: one sequence, or what it comes in, piece by piece. A sequence is a tensor, or a tuple whose first part is
            the module's input and whose others, targets say, are cut alike; a part may be a nest of tensors. Any other
            iterable, a generator or a DataLoader say, gives pieces of that form, of any lengths: they are cut and
            joined to chunks, and never held for longer than a chunk needs. A piece that is a list, as a DataLoader
            makes it, is taken as a tuple.
        steps: of a chunk; the last one may be shorter.
        state: the state that enters the first step, as `module` takes it; None for its zeros.
        resets: bool, cut like `data` and handed on as `resets=`; or a function that gives a chunk's, of the chunk.
        lengths: (B,) of whole rows; each chunk is given how many of its steps are in each row, as `lengths=`.
        dim: the dimension of time in every tensor of `data` and in `resets`. None for 1 if `module` has a true
            `batch_first`, and its input more than two dimensions; else 0.

    Yields:
        chunk: as `data`'s form is.
        output: the module's of it, with a graph that ends where the chunk begins.

    Attributes:
        state: what the last chunk left, without a graph.

    Raises:
        ValueError, TypeError: names the argument, what was expected and what came.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        data: object,
        steps: int,
        *,
        state: Nest | None = None,
        resets: Marks = None,
        lengths: Lengths = None,
        dim: int | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"steps: expected a number of steps, 1 or more, got {steps!r}")
        if not isinstance(data, (Tensor, tuple, Iterable)):
            came = type(data).__name__
            raise TypeError(f"data: expected a tensor, a tuple of them, or an iterable of such pieces, got {came}")
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"dim: expected a dimension, 0 or more, or None, got {dim!r}")
        way = _other_way(module)
        if way:
            raise ValueError(f"module: expected one that runs forward alone, as a chunk knows no later one, got {way}")
        is_whole = isinstance(data, (Tensor, tuple))
        if resets is not None and not isinstance(resets, Tensor) and not callable(resets):
            raise TypeError(f"resets: expected a tensor, or a function of a chunk, got {type(resets).__name__}")
        if isinstance(resets, Tensor) and not is_whole:
            raise TypeError("resets: expected a function of a chunk with data that comes in pieces, got a Tensor")
        self.module, self.data, self.steps, self.state = module, data, steps, state
        self._first, self._resets, self._dim = state, resets, dim
        self._lengths = None if lengths is None else torch.as_tensor(lengths)
        if self._lengths is not None:
            self._check_lengths(_steps_of(data, self._time(data)) if is_whole else None)

    def __iter__(self) -> Iterator[tuple[Nest, Any]]:
        self.state, start = self._first, 0
        for chunk, *marks in self._chunks():
            given: dict[str, Any] = {}
            if self._resets is not None:
                given["resets"] = self._resets(chunk) if callable(self._resets) else marks[0]
            count = _steps_of(chunk, self._time(chunk))
            if self._lengths is not None:
                given["lengths"] = (self._lengths - start).clamp(0, count)
            start += count
            yield chunk, self._run(_input(chunk), given)
        if self._lengths is not None:
            self._check_lengths(start)

    def _check_lengths(self, steps: int | None) -> None:
        """Against T; None while it is not known."""
        given = [] if self._lengths is None else self._lengths.flatten().tolist()
        wrong = [length for length in given if length < 0 or (steps is not None and length > steps)]
        if wrong:
            expected = "0 or more" if steps is None else f"0..T = 0..{steps}"
            raise ValueError(f"lengths: expected {expected}, got {wrong[0]}")

    def _run(self, input: Nest, given: dict[str, Any]) -> Any:
        result = self.module(input, self.state, **given)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(f"module: expected it to return (output, state), got {type(result).__name__}")
        output, state = result
        self.state = pytree.tree_map_only(Tensor, Tensor.detach, state)
        return output

    def _chunks(self) -> Iterator[tuple[Nest, ...]]:
        """(chunk,) or, where the resets are cut with the data, (chunk, resets)."""
        waiting: list[Nest] = []  # pieces, of fewer than `steps` together
        count, dim = 0, 0
        for piece in self._pieces():
            dim = self._time(piece[0])
            length, start = _steps_of(piece, dim), 0
            while count + length - start >= self.steps:
                end = start + self.steps - count
                yield _joined([*waiting, _cut(piece, dim, start, end)], dim)
                waiting, count, start = [], 0, end
            if start < length:
                waiting.append(_cut(piece, dim, start, length))
                count += length - start
        if waiting:
            yield _joined(waiting, dim)

    def _pieces(self) -> Iterable[tuple[Nest, ...]]:
        if not isinstance(self.data, (Tensor, tuple)):
            return ((tuple(piece) if isinstance(piece, list) else piece,) for piece in self.data)
        return [(self.data, self._resets) if isinstance(self._resets, Tensor) else (self.data,)]

    def _time(self, data: Nest) -> int:
        """The dimension of time, by the module's input."""
        if self._dim is not None:
            return self._dim
        return 1 if getattr(self.module, "batch_first", False) and _tensors(_input(data))[0].dim() > 2 else 0


def _other_way(module: object) -> str:
    """Of a layer or a `Recurrent` that runs backward, too, what says so."""
    if isinstance(module, torch.nn.RNNBase) and module.bidirectional:
        return "bidirectional=True"
    if isinstance(module, RecurrentLayer) and module._is_reverse():
        return "reverse=True"
    if isinstance(module, Recurrent):
        return "reverse=True" if module.reverse else "a pair of cells" if module.has_pairs else ""
    return ""


def _input(data: Nest) -> Nest:
    """What the module is given of a sequence."""
    return data[0] if isinstance(data, tuple) else data


def _tensors(data: Nest) -> list[Tensor]:
    leaves = pytree.tree_leaves(data)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        came = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)), "none")
        raise TypeError(f"data: expected tensors, or nests of them, in every piece, got {came}")
    return leaves


def _steps_of(data: Nest, dim: int) -> int:
    leaves = _tensors(data)
    for leaf in leaves:
        if leaf.dim() <= dim:
            raise ValueError(f"data: expected tensors with time in dimension {dim}, got {tuple(leaf.shape)}")
        if leaf.shape[dim] != leaves[0].shape[dim]:
            steps = leaves[0].shape[dim]
            raise ValueError(f"data: expected {steps} steps in dimension {dim} of all, got {tuple(leaf.shape)}")
    return leaves[0].shape[dim]


def _cut(data: Nest, dim: int, start: int, end: int) -> Nest:
    def cut(leaf: Tensor) -> Tensor:
        return leaf.narrow(dim, start, end - start)

    return pytree.tree_map(cut, data)


def _joined(pieces: list[Nest], dim: int) -> Nest:
    return pieces[0] if len(pieces) == 1 else pytree.tree_map(lambda *parts: torch.cat(parts, dim), *pieces)
