# SPDX-License-Identifier: Apache-2.0
"""One stream: a step of tidegate's against torch.nn's layer called one step at a time, and against peers.

Letters: T frames, B rows (sessions), I input_size, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.cli.bench.agreement import BenchError, find_difference
from tidegate.cli.bench.candidates import build_input, build_module, build_oracle
from tidegate.cli.bench.latency import Latency, Step, clock_cost, time_steps
from tidegate.cli.bench.shapes import Case
from tidegate.cli.bench.worker import PeerProcess

FRAME_SECONDS = 0.01
_FRAMES = 64
_SLICE_STEPS = 1000
# A contender whose steps are long gets fewer, or torch.nn's LSTM alone would take most of the bench's time.
_LONG_SECONDS = 20.0
_ENOUGH_STEPS = 10_000  # ten of them are above p99.9

StepSlice = Callable[[int], list[int]]
"""Times so many steps; returns the nanoseconds of each."""


@dataclass(frozen=True)
class StreamResult:
    """What one stream measured.

    Attributes:
        latencies: of one step, by contender or peer.
        backend: the one that ran tidegate's steps.
        clock_seconds: what the clock and the loop took, already subtracted.
        notes: peers that could not take part, and why.
    """

    case: Case
    latencies: dict[str, Latency]
    backend: str
    threads: int
    clock_seconds: float
    notes: list[str] = field(default_factory=list[str])

    @property
    def ratio(self) -> float:
        """How many times as fast as torch.nn, by the median."""
        return self.times_as_fast("tidegate")

    def sessions_per_core(self, name: str) -> float:
        """Rows that a core can advance by one step in each 10 ms frame, at the median latency."""
        return self.case.shape.batch * FRAME_SECONDS / self.latencies[name].p50 / self.threads

    def times_as_fast(self, name: str, other: str = "torch.nn") -> float:
        """The other's median over this one's."""
        return self.latencies[other].p50 / self.latencies[name].p50


def measure_stream(
    case: Case, steps: int, threads: int, peers: list[PeerProcess], advance: Callable[[float], None]
) -> StreamResult:
    """Check every contender's steps against torch.nn over the whole sequence, then time them slice by slice in turn.

    Args:
        steps: how many to time of tidegate; of any other as many, or fewer if its steps are long: `_allowed`.
        advance: told the share of the work done since it was told last.

    Raises:
        BenchError: tidegate's or torch.nn's steps are not what torch.nn gives for the sequence.
    """
    whole = replace(case, shape=replace(case.shape, steps=_FRAMES))
    frames = build_input(whole)  # (T, B, I)
    module = build_module("torch.nn", case).eval()
    ours: Any = build_module("tidegate", case).eval()
    ours.load_state_dict(module.state_dict())
    stream = ours.stream(batch_size=case.shape.batch)
    contenders: dict[str, tuple[Step, list[Tensor]]] = {
        "torch.nn": (_handing_on(module), [frame.unsqueeze(0) for frame in frames]),
        "tidegate": (stream.step, list(frames)),
    }
    expected = build_oracle(module, whole)()
    slices: dict[str, StepSlice] = {}
    for name, (step, inputs) in contenders.items():
        with torch.inference_mode():
            found = torch.stack([step(frame).reshape(case.shape.batch, -1) for frame in inputs])
        fault = find_difference(expected, [found], getattr(torch, case.dtype))
        if fault:
            raise BenchError(f"{case}: {name}: {fault}")
        slices[name] = _local_slice(step, inputs)
    notes = _add_peers(case, threads, module, frames, expected, peers, slices)
    samples = _interleave(slices, steps, advance)
    clock = clock_cost(list(frames))
    latencies = {name: Latency.of(taken, clock) for name, taken in samples.items()}
    return StreamResult(case, latencies, stream.backend, threads, clock * 1e-9, notes)


def _handing_on(module: nn.Module) -> Step:
    """torch.nn's layer on one step at a time, as its users write it: (1, B, I) to (1, B, H)."""
    state: Any = None

    def step(frame: Tensor) -> Tensor:
        nonlocal state
        output, state = module(frame, state)
        return output

    return step


def _local_slice(step: Step, inputs: list[Tensor]) -> StepSlice:
    def run(count: int) -> list[int]:
        with torch.inference_mode():
            return time_steps(step, inputs, count)

    return run


def _add_peers(
    case: Case,
    threads: int,
    module: nn.Module,
    frames: Tensor,
    expected: list[Tensor],
    peers: list[PeerProcess],
    slices: dict[str, StepSlice],
) -> list[str]:
    """Add a slice for each peer that has steps and whose results agree; a note on each that fails or differs."""
    notes: list[str] = []
    able = [process for process in peers if process.can_run(case)]
    if not able:
        return notes
    weights = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    for process in able:
        try:
            array = process.build_step(case, weights, frames.unsqueeze(1).numpy(), threads)
        except Exception as error:  # another project's, of any type: named to the user, the peer left out
            notes.append(process.failure(case, error))
            continue
        fault = find_difference(expected, [torch.from_numpy(array)], torch.float32)
        if fault:
            notes.append(f"{case}: {process.peer.name}: not timed: {fault}")
        else:
            slices[process.peer.name] = process.step_slice
    return notes


def _interleave(slices: dict[str, StepSlice], steps: int, advance: Callable[[float], None]) -> dict[str, list[int]]:
    """The nanoseconds of every step of each contender. Each round starts with another contender; one round warms up."""
    names = list(slices)
    samples: dict[str, list[int]] = {name: [] for name in names}
    latest = {name: slices[name](min(steps, _SLICE_STEPS)) for name in names}
    for number, done in enumerate(range(0, steps, _SLICE_STEPS)):
        count = min(_SLICE_STEPS, steps - done)
        start = number % len(names)
        for name in names[start:] + names[:start]:
            latest[name] = slices[name](count if name == "tidegate" else _allowed(count, steps, latest[name]))
            samples[name] += latest[name]
        advance(count / steps)
    return samples


def _allowed(count: int, steps: int, latest: list[int]) -> int:
    """How many of a round's `count` steps another contender takes; `latest` are its last ones, in nanoseconds."""
    in_time = _LONG_SECONDS * 1e9 / fmean(latest)
    return min(count, ceil(count / steps * max(_ENOUGH_STEPS, in_time)))
