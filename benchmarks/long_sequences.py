# SPDX-License-Identifier: Apache-2.0
"""Memory and time of training on one very long sequence, with `checkpoint_every` and without.

    python benchmarks/long_sequences.py                     # a step of T = 10^6, B = 1, H = 64
    python benchmarks/long_sequences.py --soak 1000000      # truncated backpropagation: does memory stay flat?

Each figure is of a process of its own: time is processor time of one training step after a first one, on one thread;
memory is the process' peak beyond what it had with torch imported and the data and layer made. What a step holds at the
least: the output and its gradient, 4 bytes each a step and unit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import tidegate as tg

LAYERS = {"GRU": tg.GRU, "LSTM": tg.LSTM, "RNN": tg.RNN}
MB = 2**20


def main() -> None:
    arguments = read_arguments()
    if arguments.worker:
        print(json.dumps(measured(arguments.worker, arguments)))
    elif arguments.soak:
        soak(arguments)
    else:
        compare(arguments)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--input", type=int, default=1)
    parser.add_argument("--every", type=int, default=1024)
    parser.add_argument("--cells", nargs="+", choices=LAYERS, default=["GRU", "LSTM"])
    parser.add_argument("--repeat", type=int, default=2, help="steps timed, of which the quickest counts")
    parser.add_argument("--torch", action="store_true", help="torch.nn's, too: of a GRU minutes and 20 GB")
    parser.add_argument("--soak", type=int, default=0, metavar="STEPS")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> None:
    print(f"T={arguments.steps} B=1 I={arguments.input} H={arguments.hidden}, float32, one thread")
    print(f"{'':28}{'seconds':>8}{'us/step':>9}{'peak MB':>9}{'process MB':>12}{'time':>7}")
    for cell in arguments.cells:
        first = 0.0
        for way in (f"{cell}:0", f"{cell}:{arguments.every}", *[f"{cell}:torch"] * arguments.torch):
            found = in_process(way)
            first = first or found["seconds"]
            name = way.replace(":0", "").replace(":torch", ", torch.nn").replace(":", ", checkpoint_every=")
            us = found["seconds"] / arguments.steps * 1e6
            peak, process = found["peak"] / MB, found["process"] / MB
            ratio = found["seconds"] / first
            print(f"{name:28}{found['seconds']:8.2f}{us:9.2f}{peak:9.0f}{process:12.0f}{ratio:7.2f}", flush=True)


def in_process(way: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--worker", way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(way: str, arguments: argparse.Namespace) -> dict[str, float]:
    cell, how = way.split(":")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = (arguments.input, arguments.hidden)
    layer = getattr(torch.nn, cell)(*sizes) if how == "torch" else LAYERS[cell](*sizes)
    if how.isdecimal():
        layer.checkpoint_every = int(how)
    head = torch.nn.Linear(arguments.hidden, 1)
    x = torch.randn(arguments.steps, 1, arguments.input)
    train(layer, head, x[:5000])
    before = peak_memory()
    seconds = min(timed(layer, head, x) for _ in range(arguments.repeat))
    return {"seconds": seconds, "peak": peak_memory() - before, "process": peak_memory()}


def timed(layer: torch.nn.Module, head: torch.nn.Module, x: Tensor) -> float:
    start = time.process_time()
    train(layer, head, x)
    return time.process_time() - start


def train(layer: torch.nn.Module, head: torch.nn.Module, x: Tensor) -> None:
    output, _ = layer(x)
    head(output).square().mean().backward()


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def soak(arguments: argparse.Namespace) -> None:
    """A GRU learns to say what it saw three steps ago, from pieces that are made as they are asked for."""
    torch.manual_seed(0)
    layer, head = tg.GRU(1, arguments.hidden), torch.nn.Linear(arguments.hidden, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)
    seen, next_report, peaks = 0, 0, []
    for (x, target), output in tg.tbptt(layer, pieces(arguments.soak), steps=200):
        loss = (head(output) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(x)
        if seen >= next_report:
            next_report += arguments.soak // 10
            peaks.append(peak_memory() / MB)
            print(f"{seen:9} steps  loss {float(loss.detach()):.4f}  peak {peaks[-1]:.0f} MB", flush=True)
    print(f"memory grew by {peaks[-1] - peaks[1]:.1f} MB from the second report to the last")


def pieces(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, x three steps before) in pieces of 4096 steps and what is left, never the whole sequence."""
    last = torch.zeros(3, 1, 1)
    for start in range(0, steps, 4096):
        x = torch.rand(min(4096, steps - start), 1, 1)
        long = torch.cat((last, x))
        yield x, long[:-3]
        last = long[-3:]


if __name__ == "__main__":
    main()
