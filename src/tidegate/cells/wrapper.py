# SPDX-License-Identifier: Apache-2.0
"""What wraps a cell and is a cell again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tidegate.nn import over_time
from tidegate.nn.over_time import AnyCell, Nest, mapped
from tidegate.nn.recurrent import as_module


class Wrapper(torch.nn.Module):
    """A cell around another one, which is anybody's: a module or function as `dynamic_rnn` takes it.

    What is random is drawn before the loop (`over_time.DrawsNoise`), from torch's default generator, so that a seed
    fixes it and activation checkpointing sees it again. A call outside of a loop draws for one step.
    """

    def __init__(self, cell: AnyCell) -> None:
        super().__init__()
        self.cell: Any = as_module(cell, "cell")

    @property
    def state_size(self) -> Nest | None:
        """The cell's, if it tells it."""
        is_told = isinstance(self.cell, torch.nn.RNNCellBase) or getattr(self.cell, "state_size", None) is not None
        return over_time.state_size(self.cell) if is_told else None

    @property
    def hidden_size(self) -> int | None:
        """The cell's, if it tells it."""
        return getattr(self.cell, "hidden_size", None)

    def draw_noise(self, inputs: Nest, state: Nest) -> dict[str, Nest] | None:
        """This wrapper's own noise and that of the cell inside, each if there is any."""
        own = self._draw(inputs, state) if self.training else None
        noise = {"own": own, "cell": over_time.draw_noise(self.cell, inputs, state)}
        return {name: part for name, part in noise.items() if part is not None} or None

    def forward(self, input: Nest, state: Nest | None = None, noise: dict[str, Nest] | None = None) -> Any:
        """One step.

        Args:
            input: what the cell takes.
            state: the cell's state; zeros if None.
            noise: of this step, as `draw_noise` gave it; drawn if None.

        Returns:
            (y_t, state), or state if the cell returns that.
        """
        if state is None:
            state = over_time.zero_state(self.cell, mapped(_one_step, input), "state")
        if noise is None:
            noise = self.draw_noise(mapped(_one_step, input), state)
            noise = None if noise is None else over_time.at(0, noise)
        noise = noise or {}
        return self._step(input, state, noise.get("own"), noise.get("cell"))

    def _draw(self, inputs: Nest, state: Nest) -> Nest | None:
        """Own noise, (T, B, ...) each; None if there is none."""
        return None

    def _step(self, input: Nest, state: Nest, own: Nest | None, inner: Nest | None) -> Any:
        raise NotImplementedError  # each wrapper has its own

    def _call(self, input: Nest, state: Nest, inner: Nest | None) -> Any:
        """The cell's step."""
        return self.cell(input, state) if inner is None else self.cell(input, state, inner)


def steps_of(inputs: Nest) -> int:
    """T."""
    return pytree.tree_leaves(inputs)[0].shape[0]


def read_probability(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability in 0..1, got {value!r}")
    return float(value)


def _one_step(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)
