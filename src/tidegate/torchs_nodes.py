# SPDX-License-Identifier: Apache-2.0
"""The nodes that torch's recurrent operators leave on autograd's graph, where their gradient is the last.

cuDNN's gradient can be neither differentiated nor batched, and torch would raise. Two hooks on its node give the
reference's gradient in its place where it is not enough. In a short call's training step hooks take 1 to 10 % of the
time; one more node took 15 to 20 %.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tidegate import dispatch
from tidegate.call import BATCH_FIRST, BOTH, FORWARD, TIME_MAJOR, Call
from tidegate.cell import Cell
from tidegate.higher_order import Gradient, Gradients, aliases, as_they_were, recorded_again
from tidegate.sequences import from_packed

_LAST_OF_THEIR_KIND = ("CudnnRnnBackward", "MiopenRnnBackward")


def complete(
    final: Tensor, cell: Cell, options: tuple[Any, ...], weights: Sequence[Tensor | None], layers: int, is_both: bool
) -> None:
    """Have the node of torch's operator give gradients that can be differentiated, and batched ones.

    Args:
        final: the h_n that the operator returned.
        cell, options, weights, layers: as in `Call`.
        is_both: whether it ran in both directions.
    """
    node = final.grad_fn
    if node is not None and node.name().startswith(_LAST_OF_THEIR_KIND):
        hooks = _Hooks(cell, options, weights, layers, is_both)
        node.register_prehook(hooks.before)
        node.register_hook(hooks.after)


def _same(data: Tensor | None) -> Tensor | None:
    return data


class _Hooks:
    """Before and after the node of `output, h_n, c_n = operator(input, weights, h_0, c_0)`; c is empty without an LSTM.

    The node is asked for the tensors that it kept. Who held them here, too, would hold what activation checkpointing
    lets go.
    """

    def __init__(
        self, cell: Cell, options: tuple[Any, ...], weights: Sequence[Tensor | None], layers: int, is_both: bool
    ) -> None:
        self.cell, self.options, self.layers, self.is_both = cell, options, layers, is_both
        # Of a leaf autograd keeps the leaf itself, which may have other `.data` by then.
        self.then = aliases(weights)
        self.batched: dict[int, Gradients] = {}  # by thread: from one hook to the other

    def before(self, gradients: Gradients) -> Gradients | None:
        """Keep gradients that come batched from torch's operator; what it makes of zeros is not used."""
        if not dispatch.is_batched():
            return None
        self.batched[threading.get_ident()] = gradients
        return tuple([None if g is None else torch.zeros(g.shape, dtype=g.dtype, device=g.device) for g in gradients])

    def after(self, found: Gradients, gradients: Gradients) -> Gradients | None:
        """The gradients in place of those that torch found; None to keep them."""
        is_batched, is_recorded = dispatch.is_batched(), torch.is_grad_enabled()
        if not (is_batched or is_recorded):
            return None
        if is_batched:
            gradients = self.batched.pop(threading.get_ident())
        node: Any = dispatch.current_node()
        call, pad, unpad = self._ran(node)
        theirs = self._as_the_calls(found)
        theirs = (pad(theirs[0]), *theirs[1:])
        cotangents = (pad(gradients[0]), *gradients[1 : 1 + len(call.states)])
        needs = tuple(gradient is not None for gradient in theirs)
        first_order: Callable[[], Gradients] = partial(recorded_again, call, cotangents, needs)
        if not is_batched:
            first_order = partial(tuple, aliases(theirs))  # torch's own, without the node that would raise
        if is_recorded:
            mine = dispatch.apply_plain(Gradient, call, first_order, needs, *call.tensors, *cotangents)
        else:
            mine = first_order()
        return self._as_the_operators((unpad(mine[0]), *mine[1:]), len(found))

    def _ran(self, node: Any) -> tuple[Call, Callable[[Any], Any], Callable[[Any], Any]]:
        """The call on the tensors that the node kept; how packed data, if there are any, are padded and packed."""
        input, states = node._saved_input, [node._saved_hx, node._saved_cx]
        weights = as_they_were(node._saved_weight, [weight for weight in self.then if weight is not None])
        tensors = self._as_the_calls((input, *weights, *states))
        first = 1 + len(self.cell.states)
        # Whoever has the operator run in reverse turns its input round.
        direction = BOTH if self.is_both else FORWARD
        layout = BATCH_FIRST if node._saved_batch_first else TIME_MAJOR
        call = Call(
            self.cell, self.options, input, tuple(tensors[1:first]), tuple(tensors[first:]), None, None, self.layers,
            direction, layout,
        )  # fmt: skip
        if not node._saved_batch_sizes:
            return call, _same, _same
        sizes = torch.tensor([int(size) for size in node._saved_batch_sizes], device="cpu")
        padded = from_packed(PackedSequence(input, sizes))
        call = call._replace(input=padded.data, lengths=padded.lengths, layout=TIME_MAJOR)

        def pad(data: Tensor | None) -> Tensor | None:
            return None if data is None else from_packed(PackedSequence(data, sizes)).data

        def unpad(data: Tensor | None) -> Tensor | None:
            return None if data is None else padded.restore(data).data

        return call, pad, unpad

    def _as_the_calls(self, theirs: Sequence[Any]) -> list[Any]:
        """What lies as the operator's tensors, in the order of `Call.tensors`; None for weights that are absent."""
        weights = iter(theirs[1:])
        mine = [None if weight is None else next(weights) for weight in self.then]
        states = [next(weights) for _ in self.cell.states]
        return [theirs[0], *states, *mine]

    def _as_the_operators(self, mine: Sequence[Any], count: int) -> tuple[Any, ...]:
        """The other way round, with None for what the operator has besides."""
        first = 1 + len(self.cell.states)
        weights = [one for one, weight in zip(mine[first:], self.then, strict=True) if weight is not None]
        theirs = (mine[0], *weights, *mine[1:first])
        return theirs + (None,) * (count - len(theirs))
