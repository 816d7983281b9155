# SPDX-License-Identifier: Apache-2.0
"""One case: build every contender, check that all agree with torch.nn, then time them in turn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tidegate
from tidegate.cli.bench.agreement import BenchError, find_difference
from tidegate.cli.bench.candidates import CONTENDERS, build_call, build_input, build_module, build_oracle
from tidegate.cli.bench.limits import Bound, Limits
from tidegate.cli.bench.memory import can_measure, peak_of_training_step
from tidegate.cli.bench.shapes import Case
from tidegate.cli.bench.streams import StreamResult, measure_stream
from tidegate.cli.bench.timing import Effort, TimeSlice, interleave, local_slice, use_threads
from tidegate.cli.bench.worker import PeerProcess, new_process


@dataclass(frozen=True)
class Result:
    """What one case measured.

    Attributes:
        seconds: of one call, by contender or peer.
        peak_bytes: of a training step, by contender; empty in other modes and where it cannot be measured.
        backend: the one that ran tidegate's call.
        bound: how close tidegate is to what the machine allows.
        fma_share: what part of the machine's multiply-adds tidegate's products are; None where that is not known.
        seconds_by_threads: of tidegate's call, for each number of threads that was asked for beside the bench's own.
        notes: peers that could not take part, and why.
    """

    case: Case
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    backend: str
    bound: Bound
    fma_share: float | None
    seconds_by_threads: dict[int, float]
    notes: list[str] = field(default_factory=list[str])

    @property
    def ratio(self) -> float:
        """How many times as fast as torch.nn."""
        return self.seconds["torch.nn"] / self.seconds["tidegate"]

    @property
    def best_peer(self) -> str | None:
        """The fastest of the other runtimes, or None where none took part."""
        peers = {name: seconds for name, seconds in self.seconds.items() if name not in CONTENDERS}
        return min(peers, key=peers.__getitem__) if peers else None


class Bench:
    """Measures case after case. Holds the other processes, which are closed at the end of its block."""

    def __init__(
        self,
        effort: Effort,
        threads: int,
        peers: list[PeerProcess],
        measure_memory: bool,
        scan_threads: tuple[int, ...] = (),
    ) -> None:
        self._effort = effort
        self._scan_threads = scan_threads
        self._threads = threads
        self._peers = peers
        self.limits = Limits()
        self._memory: dict[str, ProcessPoolExecutor] = {}
        if measure_memory and can_measure():
            self._memory = {contender: new_process() for contender in CONTENDERS}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        for peer in self._peers:
            peer.close()
        for process in self._memory.values():
            process.shutdown(cancel_futures=True)

    def measure(self, case: Case) -> Result:
        """Check, then time.

        Raises:
            BenchError: tidegate's results are not torch.nn's.
        """
        dtype: torch.dtype = getattr(torch, case.dtype)
        modules = {contender: build_module(contender, case) for contender in CONTENDERS}
        modules["tidegate"].load_state_dict(modules["torch.nn"].state_dict())
        calls = {contender: build_call(module, case) for contender, module in modules.items()}
        expected = build_oracle(modules["torch.nn"], case)()
        fault = find_difference(expected, calls["tidegate"](), dtype)
        if fault:
            raise BenchError(f"{case}: tidegate: {fault}")
        slices: dict[str, TimeSlice] = {contender: local_slice(call) for contender, call in calls.items()}
        notes = self._add_peers(case, modules["torch.nn"], expected, slices)
        seconds = interleave(slices, self._effort)
        with torch.set_grad_enabled(case.mode == "train"):
            backend = tidegate.explain(modules["tidegate"], build_input(case)).backend
        bound = self.limits.bound(case, seconds["tidegate"])
        fma_share = self.limits.fma_share(case, seconds["tidegate"])
        scan = self._scan(slices["tidegate"])
        return Result(case, seconds, self._peak_bytes(case), backend, bound, fma_share, scan, notes)

    def _scan(self, call: TimeSlice) -> dict[int, float]:
        """Median seconds of a call at each number of threads, interleaved."""
        if not self._scan_threads:
            return {}

        def at(threads: int) -> TimeSlice:
            def run(seconds: float) -> float:
                with use_threads(threads):
                    return call(seconds)

            return run

        medians = interleave({str(threads): at(threads) for threads in self._scan_threads}, self._effort)
        return {threads: medians[str(threads)] for threads in self._scan_threads}

    def measure_stream(self, case: Case, steps: int, advance: Callable[[float], None]) -> StreamResult:
        """A stream's steps: `streams.measure_stream` with this bench's peers and threads."""
        return measure_stream(case, steps, self._threads, self._peers, advance)

    def _add_peers(
        self, case: Case, module: torch.nn.Module, expected: list[Tensor], slices: dict[str, TimeSlice]
    ) -> list[str]:
        """Add a slice for each peer whose results agree; a note on each that fails or differs."""
        notes: list[str] = []
        able = [process for process in self._peers if process.can_run(case)]
        if not able:
            return notes
        suffix = "_l0" if case.mode == "cell" else ""
        weights = {f"{name}{suffix}": tensor.detach().numpy() for name, tensor in module.named_parameters()}
        input = build_input(case).view(case.shape.steps, case.shape.batch, case.shape.input_size).numpy()
        if case.mode == "train":  # output, input, weight_ih_l0, weight_hh_l0, ...: a peer returns no input gradient
            expected = [expected[0], *expected[2:4]]
        for process in able:
            try:
                arrays = process.build(case, weights, input, self._threads)
            except Exception as error:  # another project's, of any type: named to the user, the peer left out
                notes.append(process.failure(case, error))
                continue
            fault = find_difference(expected, [torch.from_numpy(array) for array in arrays], torch.float32)
            if fault:
                notes.append(f"{case}: {process.peer.name}: not timed: {fault}")
            else:
                slices[process.peer.name] = process.time_slice
        return notes

    def _peak_bytes(self, case: Case) -> dict[str, int]:
        if case.mode != "train":
            return {}
        return {
            contender: process.submit(peak_of_training_step, contender, case, self._threads).result()
            for contender, process in self._memory.items()
        }
