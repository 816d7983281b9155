# SPDX-License-Identifier: Apache-2.0
"""A module's whole call: the unit of work that backends take.

Letters: T time, B batch, I input_size, P the size of h, L layers, D directions. Cell l*D + d is layer l in direction d.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tidegate.cell import Cell, Options, Sizes, States, Weights

if TYPE_CHECKING:
    from typing_extensions import Self


class _Number(enum.IntEnum):
    """Hashed as the number that it is: an enumeration's own hash is slow."""

    __hash__ = int.__hash__


class Layout(_Number):
    """How the input lies; the output lies as it does, and states are (L*D, B, size) without what the input lacks."""

    TIME_MAJOR = 0  # (T, B, I)
    BATCH_FIRST = 1  # (B, T, I)
    UNBATCHED = 2  # (T, I); states (L*D, size)
    STEP = 3  # (B, I), a cell's; states (B, size), and no output beside them
    UNBATCHED_STEP = 4  # (I,); states (size,)


class Direction(_Number):
    """Which way each layer runs."""

    FORWARD = 0
    REVERSE = 1  # from a row's last valid step to the first; output[t] still belongs to input[t]
    BOTH = 2


# The members by themselves: before Python 3.12, to look one up in its class takes as long as to check a small step.
TIME_MAJOR, BATCH_FIRST, UNBATCHED, STEP, UNBATCHED_STEP = Layout
FORWARD, REVERSE, BOTH = Direction


def count(direction: Direction) -> int:
    """D."""
    return 2 if direction is BOTH else 1


class Call(NamedTuple):
    """All that a backend needs to know. The compiler of torch 2.10 reads its fields and methods, no properties.

    Attributes:
        cell: what each layer is.
        options: the values of the cell's options, in its order.
        input: as `layout` says, any strides.
        states: the initial states in the cell's order, each as `layout` says; None for zeros.
        weights: of each layer and direction in turn, the cell's parameters in its order, None for absent ones.
        lengths: (B,) int64 on any device, each in 0..T, or None for T everywhere. Past a row's length the output is
            0 and the state stays; the reverse direction starts at the last valid step.
        resets: (T, B) bool, or None. `resets[t, b]` makes t the first step of a new sequence in row b: forward, the
            state entering t is zero; in reverse, the state entering t-1 is zero. A mark past a row's length means
            nothing.
        layers: L.
        between: what happens to (T, B, D*P) between two layers, dropout in training; or None.
    """

    cell: Cell
    options: tuple[Any, ...]
    input: Tensor
    states: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]
    lengths: Tensor | None = None
    resets: Tensor | None = None
    layers: int = 1
    direction: Direction = FORWARD
    layout: Layout = TIME_MAJOR
    between: Callable[[Tensor], Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be asked of, in order: input, states, weights."""
        return (self.input, *self.states, *self.weights)

    def with_tensors(self, tensors: Sequence[Any]) -> Self:
        """The same call on other tensors, given in the order of `tensors`."""
        split = 1 + len(self.states)
        return self._replace(input=tensors[0], states=tuple(tensors[1:split]), weights=tuple(tensors[split:]))

    def to(self, dtype: torch.dtype) -> Self:
        """The same call computed in `dtype`."""
        return self.with_tensors([None if tensor is None else tensor.to(dtype) for tensor in self.tensors])

    def directions(self) -> int:
        return count(self.direction)

    @property
    def is_step(self) -> bool:
        return self.layout >= STEP

    @property
    def steps(self) -> int:
        return 1 if self.is_step else self.input.shape[1 if self.layout is BATCH_FIRST else 0]

    def batch(self) -> int:
        if self.layout in (UNBATCHED, UNBATCHED_STEP):
            return 1
        return self.input.shape[1 if self.layout is TIME_MAJOR else 0]

    def has_known_sizes(self) -> bool:
        """Whether steps and rows are numbers, and not what a compiler or exporter traces with in their place."""
        return all(type(size) is int for size in self.input.shape)

    def weights_of(self, k: int) -> Weights:
        """The parameters of layer k // D in direction k % D, by name."""
        count = len(self.cell.parameters)
        return dict(zip(self.cell.parameters, self.weights[k * count : (k + 1) * count], strict=True))

    def named_options(self) -> Options:
        return dict(zip(self.cell.options, self.options, strict=True))

    def sizes(self) -> Sizes:
        """The letters of the cell's declared shapes, as the first layer's weights have them."""
        return self.cell.sizes(self.weights_of(0))

    @property
    def hidden_size(self) -> int:
        return self.cell.hidden_size(self.weights_of(0))

    def records(self) -> bool:
        """Whether autograd is to record it."""
        if not torch.is_grad_enabled():
            return False
        # In turn and not as one tuple: nearly always the first weight is the answer.
        for tensors in (self.weights, self.states, (self.input,)):
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return True
        return False

    def inference_reasons(self) -> list[str]:
        """Why a call with stored weights that autograd is to record cannot run; empty for any other."""
        if not self.cell.storage or not self.records():
            return []
        names = ("input", *(f"{state}_0" for state in self.cell.states))
        pairs = zip(names, self.tensors, strict=False)
        found = ", ".join(name for name, tensor in pairs if tensor is not None and tensor.requires_grad)
        return [
            f"{found}: expected tensors that need no gradient, because weights in {self.cell.storage} are for "
            "inference; detach them, or call under torch.no_grad()"
        ]

    def time_major(self) -> Call:
        """The same call over (T, B, I), from states (L*D, B, size) that are given."""
        input, states, layout = self.input, self.states, self.layout
        if layout is BATCH_FIRST:
            input = input.transpose(0, 1)
        elif layout is not TIME_MAJOR:
            # (T, I), (B, I) or (I,): the dimensions that are missing, of size 1.
            for place in {UNBATCHED: (1,), STEP: (0,), UNBATCHED_STEP: (0, 0)}[layout]:
                input = input.unsqueeze(place)
            for place in {UNBATCHED: (1,), STEP: (0,), UNBATCHED_STEP: (0, 0)}[layout]:
                states = tuple(None if state is None else state.unsqueeze(place) for state in states)
        return self._replace(input=input, states=states, layout=TIME_MAJOR).with_states()

    def with_states(self) -> Call:
        """The same call over (T, B, I) or (B, T, I), zeros in place of states that are not given."""
        if all(state is not None for state in self.states):
            return self
        batch = self.input.shape[1 if self.layout is TIME_MAJOR else 0]
        sizes, leading = self.sizes(), (self.layers * count(self.direction), batch)
        return self._replace(
            states=tuple(
                self.input.new_zeros((*leading, sizes[letter])) if state is None else state
                for letter, state in zip(self.cell.states.values(), self.states, strict=True)
            )
        )

    def restored(self, output: Tensor, finals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of `time_major()` as this call's layout has them."""
        layout = self.layout
        if layout is BATCH_FIRST:
            return (output.transpose(0, 1), *finals)
        if layout is UNBATCHED:
            return (output.squeeze(1), *(final.squeeze(1) for final in finals))
        if layout is STEP:
            return tuple(final.squeeze(0) for final in finals)
        if layout is UNBATCHED_STEP:
            return tuple(final[0, 0] for final in finals)
        return (output, *finals)


# As Call(...) with every field in order, at a third of its time.
new_call: Callable[[tuple[Any, ...]], Call] = partial(tuple.__new__, Call)


class Layer(NamedTuple):
    """One layer in one direction over a whole sequence: what a call falls into, and what the registered operators run.

    Attributes:
        input: (T, B, I), any strides.
        states: h_0 (B, P), for an LSTM also c_0 (B, H).
        weights, options: by name.
        lengths, resets: as in `Call`.
        reverse: from the last valid step to the first; output[t] still belongs to input[t].
    """

    cell: Cell
    input: Tensor
    states: States
    weights: Weights
    lengths: Tensor | None
    resets: Tensor | None
    reverse: bool
    options: Options

    @property
    def hidden_size(self) -> int:
        return self.cell.hidden_size(self.weights)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be asked of, in the operator's order: input, states, weights."""
        return (self.input, *self.states, *self.weights.values())

    def with_tensors(self, tensors: Sequence[Any]) -> Self:
        """The same layer on other tensors, given in the order of `tensors`."""
        split = 1 + len(self.states)
        weights = dict(zip(self.weights, tensors[split:], strict=True))
        return self._replace(input=tensors[0], states=tuple(tensors[1:split]), weights=weights)

    def to(self, dtype: torch.dtype) -> Self:
        """The same layer computed in `dtype`."""
        return self.with_tensors([None if tensor is None else tensor.to(dtype) for tensor in self.tensors])

    def without_steps(self) -> tuple[Tensor, ...]:
        """The results where no row has a step: zeros, and the initial states.

        They still depend on every tensor, so that its gradient is zero and not absent.
        """
        nothing = sum(tensor.flatten()[:0].sum() for tensor in self.tensors if tensor is not None)
        output = self.states[0].new_zeros((self.input.shape[0], *self.states[0].shape))
        return (output + nothing, *(state + nothing for state in self.states))

    def call(self) -> Call:
        """It as a module's call."""
        direction = REVERSE if self.reverse else FORWARD
        states = tuple(state.unsqueeze(0) for state in self.states)
        weights, options = tuple(self.weights.values()), tuple(self.options.values())
        return Call(self.cell, options, self.input, states, weights, self.lengths, self.resets, 1, direction)


Unit = Call | Layer


def layer_by_layer(call: Call, run: Callable[[Layer], tuple[Tensor, ...]], owned: bool = False) -> tuple[Tensor, ...]:
    """A whole call by `run`, layers by directions.

    Args:
        run: gives output (T, B, P) and the final states, (B, size) each.
        owned: autograd records nothing of what `run` gives, and it shares no memory.

    Returns:
        the output, but of a step, and the final states, as `call.layout` has them.
    """
    whole, directions, options = call.time_major(), count(call.direction), call.named_options()
    output = whole.input
    finals: list[Sequence[Tensor]] = []
    for layer in range(call.layers):
        outputs: list[Tensor] = []
        for k in range(layer * directions, (layer + 1) * directions):
            reverse = call.direction is REVERSE or k % directions == 1
            states = tuple([state[k] for state in whole.states if state is not None])
            one = Layer(call.cell, output, states, call.weights_of(k), call.lengths, call.resets, reverse, options)
            result, *last = run(one)
            outputs.append(result)
            finals.append(last)
        output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if call.between is not None and layer < call.layers - 1:
            output = call.between(output)
    if owned and len(finals) == 1:
        return call.restored(output, [state.unsqueeze(0) for state in finals[0]])
    # Else never a view, not even of one: FSDP2 warns of a module that returns one in training.
    return call.restored(output, [torch.stack(column) for column in zip(*finals, strict=True)])
