# SPDX-License-Identifier: Apache-2.0
"""A converted layer called as Keras calls its own: masks with holes, the order of time, what is returned.

Letters: B rows, T steps, H hidden_size, n valid steps of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate.nn.layers import RecurrentLayer


def keras_call(
    layer: Any,
    inputs: Tensor,
    mask: Tensor | None = None,
    initial_state: Sequence[Tensor] | None = None,
    *,
    return_sequences: bool = False,
    return_state: bool = False,
    zero_output_for_mask: bool = False,
) -> Any:
    """Run a layer that `from_keras` made and return what Keras returns.

    Args:
        layer: batch-first tg.RNN, tg.GRU or tg.LSTM, of one layer, or of one direction.
        inputs: (B, T, I).
        mask: (B, T) bool; a False step is passed over: the state stays, the output is the step's before it.
        initial_state: h, for an LSTM h and c, each (B, H); of a bidirectional layer the forward's, then the backward's;
            of a stack those of the lowest layer first.
        return_sequences, return_state, zero_output_for_mask: as in Keras, with its defaults. A layer with `reverse`
            returns its output in the order of processing, last step first. Keras' Bidirectional sets
            zero_output_for_mask to return_sequences.

    Returns:
        The output (B, T, F), or without return_sequences (B, F) of the last step processed; with return_state a tuple
        of the output and the final states, in the order of `initial_state`.

    Raises:
        ValueError: layer, mask or initial_state is none of the above.
    """
    _check(layer, inputs, mask, initial_state)
    zero = return_sequences if layer.bidirectional else zero_output_for_mask
    kinds = len(layer.cell.states)
    state = None
    if initial_state is not None:
        # h (1, B, H), then c; of two directions the places are h, c, h, c.
        stacks = tuple(torch.stack(list(initial_state[k::kinds])) for k in range(kinds))
        state = stacks if kinds > 1 else stacks[0]
    if mask is None:
        output, final = layer(inputs, state)
    else:
        order = torch.argsort(~mask, dim=1, stable=True)  # valid steps first, in order
        packed = inputs.gather(1, order.unsqueeze(-1).expand(inputs.shape))
        output, final = layer(packed, state, lengths=mask.sum(1))
    reverse = [False, True] if layer.bidirectional else [layer.reverse]
    halves = [
        half if mask is None else _spread(half, mask, backwards, zero)
        for half, backwards in zip(output.chunk(len(reverse), -1), reverse, strict=True)
    ]
    if not return_sequences:
        halves = [half[:, 0 if backwards else -1] for half, backwards in zip(halves, reverse, strict=True)]
    elif reverse == [True]:
        halves = [halves[0].flip(1)]
    result = torch.cat(halves, -1)
    finals = final if kinds > 1 else (final,)
    return (result, *(final[k] for k in range(len(finals[0])) for final in finals)) if return_state else result


def _check(layer: object, inputs: Tensor, mask: Tensor | None, initial_state: Sequence[Tensor] | None) -> None:
    if not isinstance(layer, RecurrentLayer) or not layer.batch_first or (layer.bidirectional and layer.num_layers > 1):
        raise ValueError(f"layer: expected what from_keras returns, got {layer!r}")
    if inputs.dim() != 3:
        raise ValueError(f"inputs: expected (B, T, I), got {tuple(inputs.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != inputs.shape[:2]):
        expected = f"bool (B, T) = {tuple(inputs.shape[:2])}"
        raise ValueError(f"mask: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
    count = layer.num_layers * (2 if layer.bidirectional else 1) * len(layer.cell.states)
    if initial_state is not None and len(initial_state) != count:
        raise ValueError(f"initial_state: expected {count} tensors, got {len(initial_state)}")


def _spread(output: Tensor, mask: Tensor, backwards: bool, zero: bool) -> Tensor:
    """The valid steps' output (B, n.., H) back at their places; a masked step has that of the step processed before."""
    count = mask.cumsum(1)
    index = count - mask.long() if backwards else count - 1  # (B, T), of the valid step whose output stands here
    missing = (index < 0) | (index >= count[:, -1:])
    if zero:
        missing = missing | ~mask
    index = index.clamp(0, output.shape[1] - 1).unsqueeze(-1).expand(*index.shape, output.shape[-1])
    return output.gather(1, index).masked_fill(missing.unsqueeze(-1), 0)
