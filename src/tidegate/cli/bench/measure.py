# SPDX-License-Identifier: Apache-2.0
"""One case: build every contender, check that all agree with torch.nn, then time them in turn."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tidegate
from tidegate.cli.bench.candidates import CONTENDERS, build_call, build_input, build_module
from tidegate.cli.bench.memory import can_measure, peak_of_training_step
from tidegate.cli.bench.shapes import Case
from tidegate.cli.bench.timing import Effort, TimeSlice, interleave, local_slice
from tidegate.cli.bench.worker import PeerProcess, new_process

# float32 over hundreds of steps, summed in another order. Wrong gates or weights are off by far more.
TOLERANCE = 1e-3


class BenchError(RuntimeError):
    """A contender's results are not torch.nn's: its time would mean nothing."""


@dataclass(frozen=True)
class Result:
    """What one case measured.

    Attributes:
        seconds: of one call, by contender or peer.
        peak_bytes: of a training step, by contender; empty in other modes and where it cannot be measured.
        backend: the one that ran tidegate's call.
        notes: peers that could not take part, and why.
    """

    case: Case
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    backend: str
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

    def __init__(self, effort: Effort, threads: int, peers: list[PeerProcess], measure_memory: bool) -> None:
        self._effort = effort
        self._threads = threads
        self._peers = peers
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
        modules = {contender: build_module(contender, case) for contender in CONTENDERS}
        modules["tidegate"].load_state_dict(modules["torch.nn"].state_dict())
        calls = {contender: build_call(module, case) for contender, module in modules.items()}
        expected = calls["torch.nn"]()
        fault = _difference(expected, calls["tidegate"]())
        if fault:
            raise BenchError(f"{case}: tidegate: {fault}")
        slices: dict[str, TimeSlice] = {contender: local_slice(call) for contender, call in calls.items()}
        notes = self._add_peers(case, modules["torch.nn"], expected, slices)
        seconds = interleave(slices, self._effort)
        backend = tidegate.explain(modules["tidegate"], build_input(case)).backend
        return Result(case, seconds, self._peak_bytes(case), backend, notes)

    def _add_peers(
        self, case: Case, module: torch.nn.Module, expected: list[Tensor], slices: dict[str, TimeSlice]
    ) -> list[str]:
        """Add a slice for each peer whose results agree; a note on each that fails or differs."""
        notes: list[str] = []
        suffix = "_l0" if case.mode == "cell" else ""
        weights = {f"{name}{suffix}": tensor.detach().numpy() for name, tensor in module.named_parameters()}
        input = build_input(case).view(case.shape.steps, case.shape.batch, case.shape.input_size).numpy()
        if (
            case.mode == "train"
        ):  # output, then input, weight_ih_l0, weight_hh_l0, ...: a peer returns no input gradient
            expected = [expected[0], *expected[2:4]]
        for process in self._peers:
            if case.mode not in process.peer.modes:
                continue
            try:
                arrays = process.build(case, weights, input, self._threads)
            except Exception as error:  # another project's, of any type: named to the user, the peer left out
                notes.append(f"{case}: {process.peer.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
                continue
            fault = _difference(expected, [torch.from_numpy(array) for array in arrays])
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


def _difference(expected: list[Tensor], found: list[Any]) -> str | None:
    """What is wrong with `found`, or None. Compared to the largest value of each tensor, at least 1."""
    if len(expected) != len(found):
        return f"expected {len(expected)} results, got {len(found)}"
    for position, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        if wanted.numel() != got.numel():
            return f"result {position}: expected {tuple(wanted.shape)}, got {tuple(got.shape)}"
        apart = float((wanted - got.view(wanted.shape)).abs().max()) / max(1.0, float(wanted.abs().max()))
        if not apart <= TOLERANCE:  # NaN is no agreement either
            return f"result {position} is {apart:.1e} away from torch.nn's, more than {TOLERANCE:.0e}"
    return None
