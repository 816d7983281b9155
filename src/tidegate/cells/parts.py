# SPDX-License-Identifier: Apache-2.0
"""What the ready cells share: their sizes, their recurrent product, their first weights.

Letters: B rows, I input_size, H hidden_size, G gates, J blocks.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

Device = torch.device | str | int | None
State = TypeVar("State")


class ReadyCell(torch.nn.Module):
    """A cell of this package: `cell(input, state=None, read=None)`.

    Attributes:
        input_size, hidden_size: I and H.
        state_size: the size of each state, an int or a tuple of them.
        reads: G, how many gates' recurrent products there are, each of which may read another h; 0 if there is none.

    `read` is what the recurrent products read in h's place, (B, H), or (B, G, H) where each gate reads its own; h where
    it is None. What the cell carries of h is never replaced. `RecurrentDropout` gives it.
    """

    reads: int = 0
    state_size: int | tuple[int, ...]

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
        self.input_size, self.hidden_size = input_size, hidden_size

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"

    def reset_parameters(self) -> None:
        """Draw all parameters anew: uniformly in +-1/sqrt(H), biases and norms as the class says."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)
        for part in self.children():
            if isinstance(part, torch.nn.LayerNorm):
                part.reset_parameters()


def zeros(input: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Zero states for `input`, (B, I)."""
    return tuple(input.new_zeros((*input.shape[:-1], size)) for size in sizes)


def empty(device: Device, dtype: torch.dtype | None, *shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def recurrent_shape(gates: int, hidden_size: int, blocks: int) -> tuple[int, ...]:
    """Of the recurrent weight: (G*H, H), or of J > 1 blocks (G, J, H/J, H/J).

    Block j of the units reads block j of h alone: [g, j, k, i] is the weight from its unit i to its unit k of gate g.

    Raises:
        ValueError: the blocks do not divide H.
    """
    if blocks < 1 or hidden_size % blocks:
        raise ValueError(f"blocks: expected a divisor of hidden_size = {hidden_size}, got {blocks}")
    if blocks == 1:
        return (gates * hidden_size, hidden_size)
    return (gates, blocks, hidden_size // blocks, hidden_size // blocks)


def product(read: Tensor, weight: Tensor, gates: int) -> Tensor:
    """The recurrent product, (B, G*H), of `read` (B, H) or (B, G, H) with a weight of `recurrent_shape`."""
    per_gate = read.dim() == 3
    if weight.dim() == 2:
        if not per_gate:
            return linear(read, weight)
        return torch.einsum("bgi,gki->bgk", read, weight.unflatten(0, (gates, -1))).flatten(1)
    blocks = read.unflatten(-1, (weight.shape[1], -1))
    return torch.einsum("bgji,gjki->bgjk" if per_gate else "bji,gjki->bgjk", blocks, weight).flatten(1)


def gate_reads(read: Tensor, gates: int) -> tuple[Tensor, ...]:
    """What each gate reads, (B, H) each."""
    return read.unbind(1) if read.dim() == 3 else (read,) * gates
