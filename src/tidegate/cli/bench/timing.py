# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every contender takes a slice in each round, so that a slow moment falls on all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from statistics import median

import torch

TimeSlice = Callable[[float], float]
"""Calls for about so many seconds; returns the seconds that one call took."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: the rounds, and the seconds of each contender's slice in a round."""

    rounds: int
    slice_seconds: float


THOROUGH = Effort(rounds=9, slice_seconds=0.04)
QUICK = Effort(rounds=5, slice_seconds=0.02)


def local_slice(call: Callable[[], object]) -> TimeSlice:
    """Time `call` in this process, several calls at a time where one is short."""

    def run(seconds: float) -> float:
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats = int(seconds / max(once, 1e-7))
        if repeats < 2:
            return once
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return run


def interleave(
    slices: dict[str, TimeSlice], effort: Effort, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of one call of each contender. Each round starts with another contender; one round warms up.

    `advance` is called after each round.
    """
    names = list(slices)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        slices[name](effort.slice_seconds)
    for number in range(effort.rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(slices[name](effort.slice_seconds))
        advance()
    return {name: median(values) for name, values in samples.items()}


@contextlib.contextmanager
def use_threads(wanted: int | None) -> Generator[int]:
    """Inside, torch computes with this many threads, None for its own choice; the number that it is."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
