# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/performance.md that `tidegate bench` does not print, each by its name.

    PYTHONPATH=src python benchmarks/small_figures.py NAME

directions: a bidirectional layer, and its directions one after the other. recorded-cell: a cell's step that records
gradients. few-steps: short sequences of large layers by the kernels, whatever would be chosen. crowded: beside a
process that takes one of the cores.
Every pair is timed in turn, in one process; a figure is the median of the rounds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import tidegate as tg

ROUNDS = 15


def in_turn(first: Callable[[], object], second: Callable[[], object], seconds: float = 0.05) -> tuple[float, float]:
    """The medians of both, in seconds a call, each round long enough for the clock."""
    first(), second()
    began = time.perf_counter()
    first(), second()
    calls = max(1, int(seconds / (time.perf_counter() - began)))
    rounds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, times in zip((first, second), rounds, strict=True):
            began = time.perf_counter()
            for _ in range(calls):
                run()
            times.append((time.perf_counter() - began) / calls)
    return statistics.median(rounds[0]), statistics.median(rounds[1])


def training_step(*layers: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer(x)[0].sum().backward()

    return run


def directions() -> None:
    """A bidirectional GRU's training step, over the time of its directions one after the other."""
    ratios: list[float] = []
    for batch in (1, 4, 8):
        for size in (64, 128, 256):
            x = torch.randn(100, batch, size)
            both, forward, reverse = tg.GRU(size, size, bidirectional=True), tg.GRU(size, size), tg.GRU(size, size)
            together, apart = in_turn(training_step(both, x=x), training_step(forward, reverse, x=x))
            ratios.append(together / apart)
            print(f"B {batch} H {size}: {together / apart:.2f}")
    print(f"geometric mean {statistics.geometric_mean(ratios):.2f}")


def recorded_cell() -> None:
    """A cell's step with its gradients' graph, over torch.nn's."""
    for kind in ("GRUCell", "LSTMCell", "RNNCell"):
        for size in (16, 64, 128, 256):
            x, h = torch.randn(8, size), torch.zeros(8, size)
            state = (h, h) if kind == "LSTMCell" else h
            ours, theirs = getattr(tg, kind)(size, size), getattr(torch.nn, kind)(size, size)
            mine, other = in_turn(partial(ours, x, state), partial(theirs, x, state))
            print(f"{kind} {size}: {mine * 1e6:.1f} us, torch.nn {other * 1e6:.1f} us, {mine / other:.2f}")


def few_steps() -> None:
    """torch.nn's time over the kernels', without gradients: what decides where few steps are left to torch."""
    lengths = (2, 3, 4, 5, 7)
    print("T =", *lengths)
    with torch.no_grad(), tg.backend("cpu"):
        for kind in ("GRU", "LSTM", "RNN"):
            for size in (512, 1024, 2048):
                ours, theirs = getattr(tg, kind)(size, size), getattr(torch.nn, kind)(size, size)
                for batch in (1, 2, 4, 8, 16):
                    inputs = [torch.randn(steps, batch, size) for steps in lengths]
                    pairs = [in_turn(partial(ours, x), partial(theirs, x), 0.005) for x in inputs]
                    print(f"{kind} H {size} B {batch}:", *(f"{other / mine:.2f}" for mine, other in pairs), flush=True)


def _spin() -> None:
    while True:
        pass


def crowded() -> None:
    """A GRU over 100 steps, B = 1, without gradients, the mean of two seconds, while another process spins."""
    other = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    other.start()
    try:
        for size in (64, 256):
            x = torch.randn(100, 1, size)
            for name, layer in (("tidegate", tg.GRU(size, size)), ("torch.nn", torch.nn.GRU(size, size))):
                with torch.inference_mode():
                    began, calls = time.perf_counter(), 0
                    while time.perf_counter() - began < 2:
                        layer(x)
                        calls += 1
                print(f"H {size} {name}: {(time.perf_counter() - began) / calls * 1e3:.2f} ms")
    finally:
        other.terminate()


FIGURES = {"directions": directions, "recorded-cell": recorded_cell, "few-steps": few_steps, "crowded": crowded}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in FIGURES:
        sys.exit(f"usage: small_figures.py {'|'.join(FIGURES)}")
    FIGURES[sys.argv[1]]()
