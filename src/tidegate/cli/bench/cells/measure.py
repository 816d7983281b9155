# SPDX-License-Identifier: Apache-2.0
"""One cell on one shape: build every contender, check that all agree with the loop, then time them in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch

import tidegate
from tidegate.cli.bench.agreement import BenchError, find_difference
from tidegate.cli.bench.cells.contenders import YARDSTICK, build_contenders, build_yardstick
from tidegate.cli.bench.cells.load import Subject, load_cell
from tidegate.cli.bench.jax_cells import STEPS
from tidegate.cli.bench.memory import can_measure, peak_of
from tidegate.cli.bench.model.load import ModelError, importing_from_here, one_line
from tidegate.cli.bench.shapes import Case
from tidegate.cli.bench.timing import Effort, TimeSlice, interleave, local_slice
from tidegate.cli.bench.worker import PeerProcess, new_process
from tidegate.errors import UnsupportedError


@dataclass(frozen=True)
class CellResult:
    """What one cell took on one shape.

    Attributes:
        case: its kind is the cell's name.
        seconds: of one call, by contender: "loop", "fused", "tg.LSTM", and where they took part "compiled loop", "jax".
        first_seconds: of the first fused call, which traces the cell and lowers it.
        peak_bytes: of a training step, "loop" and "fused"; empty in inference and where it cannot be measured.
        notes: contenders that could not take part, and why.
    """

    case: Case
    seconds: dict[str, float]
    first_seconds: float
    peak_bytes: dict[str, int]
    notes: list[str] = field(default_factory=list[str])

    def over(self, contender: str) -> float | None:
        """How many times as fast as the contender the fused cell is; None if it took no part."""
        return self.seconds[contender] / self.seconds["fused"] if contender in self.seconds else None

    @property
    def memory(self) -> float | None:
        """The fused training step's peak as a share of the loop's."""
        return self.peak_bytes["fused"] / max(1, self.peak_bytes["loop"]) if self.peak_bytes else None


class CellBench:
    """Measures case after case. Holds the other processes, which are closed at the end of its block.

    Args:
        compiled: torch.compile'd cells take part.
        jax: its process, or None.
    """

    def __init__(self, effort: Effort, threads: int, compiled: bool, jax: PeerProcess | None, memory: bool) -> None:
        self._effort, self._threads, self._compiled, self._jax = effort, threads, compiled, jax
        self._memory: dict[str, ProcessPoolExecutor] = {}
        if memory and can_measure():
            self._memory = {contender: new_process() for contender in ("loop", "fused")}

    def __enter__(self) -> CellBench:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._jax is not None:
            self._jax.close()
        for process in self._memory.values():
            process.shutdown(cancel_futures=True)

    def measure(self, case: Case, advance: Callable[[], None], say: Callable[[str], None]) -> CellResult:
        """Check, then time. `advance` is called after each round, `say` with what begins.

        Raises:
            BenchError: the cell cannot run fused, or its fused results are not the loop's.
            ModelError: it cannot be built, or a step fails.
        """
        subject = build_subject(case)
        dtype: torch.dtype = getattr(torch, case.dtype)
        calls = build_contenders(subject, case.mode, self._compiled)
        try:
            expected = calls["loop"]()
        except Exception as error:
            raise ModelError(f"--cell: a step of {case.kind} raised {one_line(error)}") from error
        start = time.perf_counter()
        try:
            found = calls["fused"]()
        except UnsupportedError:
            raise BenchError(f"{case}: {tidegate.explain(tidegate.dynamic_rnn, *_batch_first(subject))}") from None
        first_seconds = time.perf_counter() - start
        fault = find_difference(expected, found, dtype, "the loop")
        if fault:
            raise BenchError(f"{case}: fused: {fault}")
        notes: list[str] = []
        if "compiled loop" in calls:
            say(f"{case}: torch.compile is at work")
            try:
                fault = find_difference(expected, calls["compiled loop"](), dtype, "the loop")
            except Exception as error:  # the compiler's, of any type: named to the user, the contender left out
                fault = one_line(error)
            if fault:
                del calls["compiled loop"]
                notes.append(f"{case}: compiled loop: not timed: {fault}")
        calls[YARDSTICK] = build_yardstick(subject, case.shape.hidden_size, case.mode)
        slices: dict[str, TimeSlice] = {name: local_slice(call) for name, call in calls.items()}
        if self._jax is not None:
            say(f"{case}: jax is at work")
        notes += self._add_jax(case, subject, expected, slices)
        say(f"{case}: timing")
        seconds = interleave(slices, self._effort, advance)
        say(f"{case}: peak memory")
        return CellResult(case, seconds, first_seconds, self._peak_bytes(case), notes)

    def _add_jax(
        self, case: Case, subject: Subject, expected: list[torch.Tensor], slices: dict[str, TimeSlice]
    ) -> list[str]:
        if self._jax is None or case.kind not in STEPS or case.dtype != "float32":
            return []
        assert isinstance(subject.cell, torch.nn.Module)
        weights = {name: parameter.detach().numpy() for name, parameter in subject.cell.named_parameters()}
        try:
            arrays = self._jax.build(case, weights, subject.inputs.detach().numpy(), self._threads)
        except Exception as error:  # another project's, of any type: named to the user, the peer left out
            return [self._jax.failure(case, error)]
        wanted = [expected[0], *expected[2:]]  # all but the input's gradient
        fault = find_difference(wanted, [torch.from_numpy(array) for array in arrays], torch.float32, "the loop")
        if fault:
            return [f"{case}: jax: not timed: {fault}"]
        slices["jax"] = self._jax.time_slice
        return []

    def _peak_bytes(self, case: Case) -> dict[str, int]:
        if case.mode != "train":
            return {}
        waiting = {name: process.submit(_peak, name, case, self._threads) for name, process in self._memory.items()}
        return {name: future.result() for name, future in waiting.items()}


def build_subject(case: Case) -> Subject:
    shape = case.shape
    return load_cell(
        case.kind, shape.batch, shape.steps, shape.input_size, shape.hidden_size, getattr(torch, case.dtype)
    )


def _batch_first(subject: Subject) -> tuple[object, ...]:
    """Arguments of `dynamic_rnn`."""
    return (subject.cell, subject.inputs, None, subject.state, True)


def _peak(contender: str, case: Case, threads: int) -> int:
    """In a process that does nothing else."""
    torch.set_num_threads(threads)
    with importing_from_here():
        return peak_of(build_contenders(build_subject(case), case.mode, compiled=False)[contender])
