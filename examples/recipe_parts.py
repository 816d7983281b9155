# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: their command line, and a loop over batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


def read_options(text: str | None, arguments: list[str] | None, quick: str, epochs: int = 0) -> argparse.Namespace:
    """The command line's seed, which is set, quick, folder and, if `epochs` is their usual number, epochs."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if epochs:
        parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"{quick}, for the tests")
    parser.add_argument("--folder", type=Path, default=Path("out/recipes"))
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    return options


def fit(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    loss: Callable[[Batch], Tensor],
    epochs: int,
    steps: int,
    rate: float,
    warm_up: float = 0.3,
    clip: float = 1e9,
) -> Iterator[float]:
    """Train with Adam, whose rate rises to `rate` in the first `warm_up` of all steps and falls again.

    Args:
        batches: gives an epoch's, `steps` of them.
        clip: bound of the gradient's norm.

    Yields:
        after each epoch, its last loss.
    """
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=warm_up)
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
        yield value.item()
