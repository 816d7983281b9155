# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps a past: recurrent layers, cells over time, and what is padded with zeros before its first step.

While one step of a model runs, each of these is answered here: from the state that enters, with the state that leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tidegate import reference
from tidegate.call import BOTH, FORWARD, REVERSE, Call, Layer
from tidegate.errors import ConversionError
from tidegate.fusion.reading import split_result
from tidegate.nn.over_time import CellRun
from tidegate.scope import scope

_TOO_MANY_STEPS = (
    "it is given several steps for one step of the input: does the example have its time first or second, as the "
    "model's `batch_first` says?"
)


_MARKS = (
    "it is given lengths or resets by the model: of a block the caller gives them, its steps and, with resets=True, "
    "its marks"
)


class Kept(NamedTuple):
    """A tensor that a model keeps from step to step.

    Attributes:
        name: the module that keeps it, and what it is: "gru.h_l0".
        sizes: of its features.
        initial: its numbers before the first step, in order.
        reverse: it runs from the last step to the first.
    """

    name: str
    sizes: tuple[int, ...]
    initial: tuple[float, ...]
    reverse: bool = False


class RefusedError(ConversionError):
    """A model that is no step `y_t, state' = f(x_t, state)`: names the module and says why."""


class Sites:
    """One run of a model's step.

    Args:
        entering: the state, (B, ...) each, in the order in which it is asked for; None to find out what there is,
            from each place's own initial state.
        current: gives the name of the module that is running.
        block: states may run from the end: the step is one of a whole block.

    Attributes:
        kept: what was found.
        leaving: the state after the step.
    """

    def __init__(self, entering: Sequence[Tensor] | None, current: Callable[[], str], block: bool) -> None:
        self.entering = None if entering is None else list(entering)
        self.current, self.block = current, block
        self.kept: list[Kept] = []
        self.leaving: list[Tensor] = []

    @contextmanager
    def open(self) -> Generator[None]:
        before, scope.observer = scope.observer, self._observe
        try:
            with _Pads(self):
                yield
        finally:
            scope.observer = before

    def refuse(self, reason: str) -> RefusedError:
        return RefusedError(f"{self.current()}: {reason}")

    def exchange(
        self, initial: Sequence[Tensor], names: Sequence[str], reverse: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """The entering state of a place, whose own first state is `initial`, (B, ...) each."""
        if self.entering is None:
            ways = reverse or [False] * len(names)
            for tensor, name, way in zip(initial, names, ways, strict=True):
                first = tensor[0]
                if not bool((tensor == first).all()):
                    raise self.refuse("its initial state depends on the input, so that a stream has none to begin with")
                numbers = tuple(first.double().flatten().tolist())
                self.kept.append(Kept(f"{self.current().split()[0]}.{name}", tuple(first.shape), numbers, way))
            return list(initial)
        place = len(self.leaving)
        found = self.entering[place : place + len(initial)]
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in initial]:
            raise self.refuse("it does not do the same at every step")
        return found

    def _observe(self, asked: Call | CellRun) -> Any:
        before, decomposes = scope.observer, scope.decomposes
        scope.observer, scope.decomposes = None, True
        try:
            return self._call(asked) if isinstance(asked, Call) else self._cell(asked)
        finally:
            scope.observer, scope.decomposes = before, decomposes

    def _call(self, call: Call) -> tuple[Tensor, ...]:
        """A layer or a cell of tidegate's, or one of torch.nn's that became one."""
        if call.direction is not FORWARD:
            self._from_the_end("both ways" if call.direction is BOTH else "from the end")
        if call.cell.storage:
            raise self.refuse(f"its weights are {call.cell.storage}: export the float32 model, with weights=")
        if call.steps != 1:
            raise self.refuse(_TOO_MANY_STEPS)
        if call.lengths is not None or call.resets is not None:
            raise self.refuse(_MARKS)
        whole, count = call.time_major(), call.layers * call.directions()
        backward = [call.direction is REVERSE or k % call.directions() == 1 for k in range(count)]
        ends = [f"_l{k // call.directions()}{'_reverse' * backward[k]}" for k in range(count)]
        letters = tuple(call.cell.states)
        names = [letter if call.is_step else letter + end for letter in letters for end in ends]
        columns = [state[k] for state in whole.states if state is not None for k in range(count)]
        entering = self.exchange(columns, names, backward * len(letters))
        output, options = whole.input, call.named_options()
        leaving: list[Sequence[Tensor]] = []
        for layer in range(call.layers):
            outputs: list[Tensor] = []
            for k in range(layer * call.directions(), (layer + 1) * call.directions()):
                states = tuple(entering[k::count])
                one = Layer(call.cell, output, states, call.weights_of(k), None, None, False, options)
                result, *left = reference.forward(one)
                outputs.append(result)
                leaving.append(left)
            output = outputs[0] if call.directions() == 1 else torch.cat(outputs, -1)
        by_letter = list(zip(*leaving, strict=True))
        self.leaving += [state for column in by_letter for state in column]
        # Rows first, as long as they are moved: the tracer follows them there.
        return call.restored(output, [torch.stack(column, 1).transpose(0, 1) for column in by_letter])

    def _from_the_end(self, way: str) -> None:
        if not self.block:
            raise self.refuse(
                f"it runs {way} over a sequence, whose end a stream has not seen; with block=True the model is "
                "exported over whole sequences"
            )

    def _cell(self, run: CellRun) -> tuple[Any, Any]:
        """Any cell over time."""
        if run.reverse:
            self._from_the_end("from the end")
        if run.lengths is not None or run.resets is not None:
            raise self.refuse(_MARKS)
        steps = pytree.tree_leaves(run.inputs)[0].shape[0]
        if steps != 1:
            raise self.refuse(_TOO_MANY_STEPS)
        leaves, structure = pytree.tree_flatten(run.state)
        names = ["state"] if len(leaves) == 1 else [f"state{k}" for k in range(len(leaves))]
        state = pytree.tree_unflatten(self.exchange(leaves, names, [run.reverse] * len(leaves)), structure)
        y, leaving = split_result(run.cell(pytree.tree_map(_first, run.inputs), state), state)
        self.leaving += pytree.tree_leaves(leaving)
        return pytree.tree_map(_as_sequence, y), leaving

    def past(self, x: Tensor, dim: int, steps: int, value: float) -> Tensor:
        """x, whose dimension `dim` is its one step, behind the last steps of it: these are kept."""
        batch = 0 if dim != 0 else 1
        step = x.movedim((batch, dim), (0, 1))  # (B, 1, ...)
        initial = x.new_full((step.shape[0], steps, *step.shape[2:]), value)
        (before,) = self.exchange([initial], [f"past{len(self.leaving)}"])
        joined = torch.cat((before, step), 1)
        self.leaving.append(joined[:, 1:])
        return joined.movedim((0, 1), (batch, dim))


def _first(leaf: Tensor) -> Tensor:
    return leaf[0]


def _as_sequence(leaf: Tensor) -> Tensor:
    return leaf.unsqueeze(0)


class _Pads(TorchFunctionMode):
    """Steps put before a sequence are a past, and what convolves over time is a product; so is a look into a table."""

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        rules = {
            F.pad: self._pad,
            torch.conv1d: self._conv,
            F.embedding: self._embedding,
            F.batch_norm: self._batch_norm,
        }
        rule = rules.get(func)
        found = None if rule is None else rule(*args, **given)
        return func(*args, **given) if found is None else found

    def _pad(self, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor | None:
        if not any(pad):
            return x.clone()
        pairs = [(pad[k], pad[k + 1]) for k in range(0, len(pad), 2)]  # of the last dimension first
        places = [k for k, (before, _) in enumerate(pairs) if before > 0 and x.shape[-1 - k] == 1]
        if mode != "constant" or len(places) != 1:
            return None
        (place,) = places
        joined = self.sites.past(x, x.dim() - 1 - place, pairs[place][0], float(value or 0))
        rest = [0 if k == 2 * place else size for k, size in enumerate(pad)]
        return F.pad(joined, rest, mode, value) if any(rest) else joined

    def _conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor | None:  # fmt: skip
        """(B, C, L): over the last steps, of which L are there."""
        step, apart = _number(stride), _number(dilation)
        reach = (weight.shape[-1] - 1) * apart
        if padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = 0 if padding == "valid" else _number(padding)
        if step != 1:
            raise self.sites.refuse(f"its stride over time is {step}: it does not give a step for each step")
        length = x.shape[-1] + before + after - reach
        if length < 1:
            raise self.sites.refuse(
                f"its kernel reaches over {reach + 1} steps and its output is shorter than its input: "
                f"put {reach} steps of zeros before it"
            )
        if before:
            if x.shape[-1] != 1:
                return None
            x = self.sites.past(x, 2, before, 0.0)
        count = x.shape[-1] - reach
        made = [self._window(x, weight, bias, k, apart, groups) for k in range(max(count, 0))]
        if not made:
            raise self.sites.refuse("it looks ahead, which a stream cannot")
        y = torch.stack(made, -1)
        # What comes after needs steps that are not there yet: the model cuts it off, or is refused by its length.
        rest = length - len(made)
        return y if rest == 0 else torch.cat((y, y.new_zeros((*y.shape[:-1], rest))), -1)

    @staticmethod
    def _window(x: Tensor, weight: Tensor, bias: Tensor | None, first: int, apart: int, groups: int) -> Tensor:
        kernel, outputs = weight.shape[-1], weight.shape[0]
        taps = [x[..., first + j * apart] for j in range(kernel)]
        if groups == 1:
            # By steps first: the past lies in this order.
            return F.linear(torch.cat(taps, -1), weight.permute(0, 2, 1).flatten(1), bias)
        each, depth = outputs // groups, weight.shape[1]
        window = torch.stack(taps, -1).reshape(x.shape[0], groups, depth * kernel)
        blocks = weight.reshape(groups, each, depth * kernel)
        if depth * kernel <= 8 or each == 1:
            y = (window.unsqueeze(2) * blocks).sum(-1).flatten(1)
        else:
            y = torch.bmm(window.transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1).flatten(1)
        return y if bias is None else y + bias

    def _embedding(
        self, index: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        *args: Any, **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        if max_norm is not None:
            raise self.sites.refuse("its max_norm changes the weights while the model runs")
        places = torch.arange(weight.shape[0])
        return F.linear((index.unsqueeze(-1) == places).to(weight.dtype), weight.t())

    @staticmethod
    def _batch_norm(
        x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor | None:  # fmt: skip
        """Of the running statistics: a factor and a summand for each channel."""
        if training or mean is None or variance is None:
            return None
        scale = torch.rsqrt(variance + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return x * scale.view(shape) + shift.view(shape)


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int) else int(value[0])
