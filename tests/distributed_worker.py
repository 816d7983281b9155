# SPDX-License-Identifier: Apache-2.0
"""One of the processes that test_distributed.py starts with torchrun: every check here holds in each of them.

`distributed_worker.py WRAP FOLDER`. float64, so that a wrong gradient cannot hide behind rounding. What the last maker
saves in FOLDER the test loads in a process of its own.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import train_distributed as example
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import tidegate as tg
from tidegate.cli.demo.training import LEARNING_RATE, standardised
from tidegate.data import Dataset, LabelledSequences, japanese_vowels

CPU = torch.device("cpu")
MAKERS = {
    "ddp": ("tidegate", "accelerated before", "accelerated after"),
    "fsdp": ("tidegate", "layer by itself", "accelerated before", "accelerated after"),
}
STEPS = 3


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)  # sums in another order


def double_dataset() -> Dataset:
    data = standardised(japanese_vowels())
    parts = (LabelledSequences(part.padded.double(), part.lengths, part.labels) for part in (data.train, data.test))
    return Dataset(data.name, data.classes, *parts)


def pair(maker: str, how: str, dataset: Dataset, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A wrapped model, and its twin of one process: torch.nn's own where the model is accelerated."""
    torch.manual_seed(seed)
    layer = "accelerated" if maker.startswith("accelerated") else "tidegate"
    twin = example.new_model(layer, dataset, hidden_size=7).double()  # 21 rows: the two shards are unequal
    model = copy.deepcopy(twin)
    if maker == "accelerated before":
        tg.accelerate(model)
    if maker == "layer by itself" and how == "fsdp":
        fully_shard(model.layer)
    wrapped = example.wrap(model, how, CPU)
    if maker == "accelerated after":
        assert tg.accelerate(wrapped) is wrapped
    assert isinstance(model.layer, tg.GRU)
    assert all(isinstance(p, DTensor) == (how == "fsdp") for p in wrapped.parameters())
    return wrapped, twin


def one_process(twin: nn.Module, data: LabelledSequences) -> Tensor:
    loss = nn.functional.cross_entropy(twin(data.padded, data.lengths), data.labels)
    loss.backward()
    return loss.detach()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, mine: LabelledSequences, total: int) -> Tensor:
    optimizer.zero_grad()
    loss = example.backward(model, mine, total)
    optimizer.step()
    return loss


def check_training(maker: str, how: str, dataset: Dataset, mine: LabelledSequences) -> None:
    model, twin = pair(maker, how, dataset)
    optimizer, twins = optimizer_of(model), optimizer_of(twin)
    total = len(dataset.train)
    for _ in range(STEPS):
        optimizer.zero_grad()
        twins.zero_grad()
        close(example.backward(model, mine, total), one_process(twin, dataset.train))
        found = [whole(p.grad) for p in model.parameters()]
        assert all(gradient.ne(0).any() for gradient in found)
        close(found, [p.grad for p in twin.parameters()])
        optimizer.step()
        twins.step()
    close([whole(p.detach()) for p in model.parameters()], [p.detach() for p in twin.parameters()])


def check_checkpoints(maker: str, how: str, dataset: Dataset, mine: LabelledSequences, folder: Path) -> None:
    """A run that is saved and loaded goes on as one that is not; the file is also good for the other wrapper."""
    total, place = len(dataset.train), str(folder)
    model, _ = pair(maker, how, dataset)
    optimizer = optimizer_of(model)
    step(model, optimizer, mine, total)
    example.save(model, optimizer, place)
    expected = [step(model, optimizer, mine, total) for _ in range(2)]
    for other in ("ddp", "fsdp"):
        loaded, _ = pair(maker, other, dataset, seed=1)
        theirs = optimizer_of(loaded)
        assert not torch.allclose(example.backward(loaded, mine, total), expected[0])
        example.load(loaded, theirs, place)
        close([step(loaded, theirs, mine, total) for _ in range(2)], expected)


def leave() -> None:
    """End the process, its work done, without the interpreter's own end: gloo's threads may still hold a tensor then,
    ask for the interpreter's lock and abort the process (seen with torch 2.13 on a busy machine; pytorch#179291)."""
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    how, folder = sys.argv[1:]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "tidegate: the compiled operators are not installed", RuntimeWarning)
    # True of every batch_first layer, whose output is a transposed view; nothing here writes into it.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPGRU\) returned a view tensor", UserWarning)
    torch.set_num_threads(1)
    device = example.join()
    try:
        assert dist.get_world_size() == 2
        dataset = double_dataset()
        # Not halves: rank 0 has two thirds, so that a mean of the processes' means would be wrong.
        rank, cut = dist.get_rank(), 2 * len(dataset.train) // 3
        part = slice(cut) if rank == 0 else slice(cut, None)
        train = dataset.train
        mine = LabelledSequences(train.padded[part], train.lengths[part], train.labels[part])
        assert device == CPU
        for maker in MAKERS[how]:
            check_training(maker, how, dataset, mine)
            check_checkpoints(maker, how, dataset, mine, Path(folder, maker))
        if rank == 0:
            print("all checks passed", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "example":
        del sys.argv[1]
        example.main()
    else:
        main()
    leave()
