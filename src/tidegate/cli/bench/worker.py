# SPDX-License-Identifier: Apache-2.0
"""A peer in a process of its own: its thread pool idles while the others have their slice."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

from tidegate.cli.bench.latency import time_steps
from tidegate.cli.bench.peers import PEERS, Arrays, Peer
from tidegate.cli.bench.shapes import Case
from tidegate.cli.bench.timing import TimeSlice, local_slice

# So long torch's own threads spin after their last task, at most.
_SETTLE_SECONDS = 0.005

# In a worker: time the call, and the step, that were built last.
_time_call: TimeSlice | None = None
_time_steps_of: Callable[[int], list[int]] | None = None


def new_process() -> ProcessPoolExecutor:
    """One process, started afresh: a forked one would share torch's thread pool in a state that it cannot use."""
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


class PeerProcess:
    """A peer that is asked, slice by slice, to time the case that it was given last."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._process = new_process()

    def build(self, case: Case, weights: Arrays, input: Any, threads: int) -> list[Any]:
        """Build the case's call and run it once; the arrays that it returned."""
        return self._process.submit(_build, self.peer.name, case, weights, input, threads).result()

    def time_slice(self, seconds: float) -> float:
        time.sleep(_SETTLE_SECONDS)
        taken = self._process.submit(_time_slice, seconds).result()
        time.sleep(self.peer.settles_in)
        return taken

    def can_run(self, case: Case) -> bool:
        """Peers are built from float32 weights."""
        return case.mode in self.peer.modes and case.dtype == "float32"

    def build_step(self, case: Case, weights: Arrays, frames: Any, threads: int) -> Any:
        """Build the case's step and run it over the frames (T, ...); the outputs, stacked."""
        return self._process.submit(_build_step, self.peer.name, case, weights, frames, threads).result()

    def step_slice(self, count: int) -> list[int]:
        """Time so many steps; the nanoseconds of each."""
        time.sleep(_SETTLE_SECONDS)
        taken = self._process.submit(_time_steps, count).result()
        time.sleep(self.peer.settles_in)
        return taken

    def failure(self, case: Case, error: Exception) -> str:
        """A note on it, in a line."""
        return f"{case}: {self.peer.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def close(self) -> None:
        self._process.shutdown(cancel_futures=True)


def installed_peers() -> list[Peer]:
    """Those whose packages are here; the two that read ONNX files need `onnx` to write one."""
    needs = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx"), "jax": ("jax",)}
    return [peer for peer in PEERS if all(find_spec(package) is not None for package in needs[peer.name])]


def _build(name: str, case: Case, weights: Arrays, input: Any, threads: int) -> list[Any]:
    global _time_call
    call = _peer(name).build(case, weights, input, threads)
    _time_call = local_slice(call)
    return [array.copy() for array in call()]


def _time_slice(seconds: float) -> float:
    assert _time_call is not None
    return _time_call(seconds)


def _build_step(name: str, case: Case, weights: Arrays, frames: Any, threads: int) -> Any:
    global _time_steps_of
    build = _peer(name).build_step
    assert build is not None
    step = build(case, weights, threads)
    _time_steps_of = partial(time_steps, step, list(frames))
    return import_module("numpy").stack([step(frame) for frame in frames])


def _time_steps(count: int) -> list[int]:
    assert _time_steps_of is not None
    return _time_steps_of(count)


def _peer(name: str) -> Peer:
    (found,) = (peer for peer in PEERS if peer.name == name)
    return found
