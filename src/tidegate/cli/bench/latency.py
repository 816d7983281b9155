# SPDX-License-Identifier: Apache-2.0
"""The latency of single steps: every step is timed, none is averaged.

A clock reading follows each step, and a step's latency is the time from the reading before it to the one after it, so
that nothing falls between two steps. What the loop and the clock themselves take is measured without a step and
subtracted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

Step = Callable[[Any], Any]
"""Advances by one frame; returns the output."""

# Another contender's slice leaves its own weights in the caches; a running stream finds its own there.
_WARM_UP = 20
_NANOSECOND = 1e-9


@dataclass(frozen=True)
class Latency:
    """Seconds of one step: percentiles over all `steps` that were timed, each one that a step really took."""

    p50: float
    p99: float
    p999: float
    steps: int

    @staticmethod
    def of(nanoseconds: Sequence[int], clock_cost: int) -> Latency:
        """Of each step's reading; `clock_cost` is in every one of them."""
        ordered = sorted(nanoseconds)

        def percentile(per_mille: int) -> float:
            rank = -(-per_mille * len(ordered) // 1000)  # nearest rank: at least so many are no longer
            return max(1, ordered[rank - 1] - clock_cost) * _NANOSECOND

        return Latency(percentile(500), percentile(990), percentile(999), len(ordered))


def time_steps(step: Step, frames: Sequence[Any], count: int) -> list[int]:
    """Nanoseconds of each of `count` steps over the frames again and again, after a few that are not counted."""
    for frame in islice(cycle(frames), _WARM_UP):
        step(frame)
    now = time.perf_counter_ns
    taken: list[int] = []
    note = taken.append
    last = now()
    for frame in islice(cycle(frames), count):
        step(frame)
        stamp = now()
        note(stamp - last)
        last = stamp
    return taken


def clock_cost(frames: Sequence[Any], count: int = 20_000) -> int:
    """Median nanoseconds of the loop of `time_steps` without the step."""
    now = time.perf_counter_ns
    taken: list[int] = []
    note = taken.append
    last = now()
    for _ in islice(cycle(frames), count):
        stamp = now()
        note(stamp - last)
        last = stamp
    return sorted(taken)[count // 2]
