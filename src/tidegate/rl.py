# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: the marks that other packages put on the steps of episodes, as `resets=`.

Each gives a bool tensor as a layer takes it: True where a step is the first of an episode. Letters: T steps, B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["resets_of_dones", "resets_of_episode_starts", "resets_of_is_init"]


def resets_of_is_init(is_init: Tensor) -> Tensor:
    """torchrl's `is_init`, (B, T, 1) or (B, T): for a layer with `batch_first`, (B, T).

    ::

        output, state = lstm(td["embed"], resets=resets_of_is_init(td["is_init"]))
    """
    marks = _read("is_init", is_init)
    if marks.dim() == 3 and marks.shape[-1] == 1:
        marks = marks.squeeze(-1)
    if marks.dim() != 2:
        raise ValueError(f"is_init: expected (B, T, 1) or (B, T), got {tuple(is_init.shape)}")
    return marks


def resets_of_episode_starts(episode_starts: Tensor, sequences: int) -> Tensor:
    """sb3-contrib's `episode_starts`, (B*T,) row by row, as its policies are given it: (T, B).

    ::

        features = features.view(B, -1, size).transpose(0, 1)
        output, state = lstm(features, state, resets=resets_of_episode_starts(episode_starts, B))

    Args:
        sequences: B, the states' second dimension.
    """
    marks = _read("episode_starts", episode_starts)
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"sequences: expected a number of rows, 1 or more, got {sequences!r}")
    if marks.dim() != 1 or marks.shape[0] % sequences:
        came = tuple(episode_starts.shape)
        raise ValueError(f"episode_starts: expected (B*T,), a multiple of sequences = {sequences}, got {came}")
    return marks.view(sequences, -1).transpose(0, 1)


def resets_of_dones(dones: Tensor, first: Tensor | bool = True, time: int = 0) -> Tensor:
    """Marks on an episode's last step, `terminated | truncated`, as marks on the next one's first, of the same shape.

    Args:
        dones: (T, B), or with `time=1` (B, T).
        first: whether the very first steps begin episodes: (B,), or one for all.
        time: the dimension of T.
    """
    marks = _read("dones", dones)
    begins = _read("first", torch.as_tensor(first, device=marks.device))
    if marks.dim() != 2 or time not in (0, 1):
        raise ValueError(f"dones: expected (T, B), or (B, T) with time=1, got {tuple(dones.shape)} with time={time!r}")
    rows = marks.shape[1 - time]
    if begins.shape not in ((), (rows,)):
        raise ValueError(f"first: expected one mark, or (B,) = ({rows},), got {tuple(begins.shape)}")
    shifted = marks.roll(1, time)
    shifted.narrow(time, 0, min(1, marks.shape[time])).copy_(begins.unsqueeze(-1 if time else 0))
    return shifted


def _read(name: str, marks: Tensor) -> Tensor:
    """bool, from bool or from numbers that are 0 and 1."""
    if not isinstance(marks, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name}: expected a Tensor, got {type(marks).__name__}")
    if marks.dtype != torch.bool and not bool(((marks == 0) | (marks == 1)).all()):
        raise ValueError(f"{name}: expected True and False, or 1 and 0, got other numbers")
    return marks.to(torch.bool)
